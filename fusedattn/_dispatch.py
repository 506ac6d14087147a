"""Chooses a backend and says why the others cannot run: one predicate per backend does both. And the errors."""

import functools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._mode_utils import no_dispatch

from fusedattn import _library
from fusedattn._dtypes import accumulation_dtype

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
P = ParamSpec("P")
R = TypeVar("R")
LEAST_TRITON_CAPABILITY = (8, 0)  # that it supports; it compiles for 7.5, too, but promises nothing


class UnsupportedError(ValueError):
    """No backend, or not the one asked for, can run these inputs. The message lists every reason."""


def fail(op: str, argument: str, expected: str, received: Any) -> NoReturn:
    """Every error of an argument names the op, the argument, what was expected and what was received."""
    raise ValueError(f"{op}: {argument}: expected {expected}, got {received}")


def check_layout(op: str, argument: str, t: Tensor) -> None:
    if t.layout is not torch.strided or t.is_nested:
        fail(op, argument, "a dense Tensor", f"a nested one of layout {t.layout}" if t.is_nested else t.layout)


NO_REASONS: dict[str, str] = {}


def choose(
    op: str,
    requested: str,
    device: torch.device,
    dtype: torch.dtype,
    describe: Callable[[], str],
    unable: dict[str, str] = NO_REASONS,
) -> str:
    """The name of the backend to run.

    Args:
        op: name of the public function, for messages.
        requested: ``"auto"``, ``"reference"`` or a key of ``BACKENDS``.
        device, dtype: of the inputs.
        describe: the shapes of the inputs in words, called only for an error message.
        unable: backends that this op's inputs are not for, whatever device and dtype, and why.

    ``"auto"`` takes the first backend that can run. Where none can because of the device or the installation it
    takes the reference, after one warning for each op and kind of device; so it does for ONNX. Raises
    :class:`UnsupportedError` where the dtype is none of ``DTYPES``, or the backend asked for cannot run, and
    ``ValueError`` for an unknown name.
    """
    if requested == "auto":
        # ONNX has no kernels of ours; what it is made of is the reference's ATen operators.
        if torch.compiler.is_compiling() and torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
            return "reference"
        for name, reasons in BACKENDS.items():
            if not reasons(device, dtype) and name not in unable:
                return name
        if not _dtype_reasons(dtype):
            if not torch.compiler.is_compiling():
                _warn_of_reference(op, device, unable)
            return "reference"
    elif requested in BACKENDS:
        if not BACKENDS[requested](device, dtype) and requested not in unable:
            return requested
    elif requested == "reference":
        return requested
    else:
        check_backend(op, requested)
    found = "no backend can run" if requested == "auto" else f"backend {requested!r} cannot run"
    raise UnsupportedError(
        f"{op}: {found} {describe()}, {dtype}, {device}\n{_all_reasons(device, dtype, unable)}\n"
        "  reference: can run (plain PyTorch, backend='reference')"
    )


def check_backend(caller: str, requested: str) -> None:
    """Raises ``ValueError`` for a name that does not exist; whether that backend can run depends on the inputs."""
    if requested not in ("auto", *BACKENDS, "reference"):
        names = ", ".join(repr(name) for name in ("auto", *BACKENDS, "reference"))
        raise ValueError(f"{caller}: backend: expected one of {names}, got {requested!r}")


def _all_reasons(device: torch.device, dtype: torch.dtype, unable: dict[str, str]) -> str:
    def of(name: str) -> list[str]:
        return [*BACKENDS[name](device, dtype), *([unable[name]] if name in unable else [])]

    return "\n".join(f"  {name}: {'; '.join(of(name)) or 'can run'}" for name in BACKENDS)


_warned: set[tuple[str, str, bool]] = set()


def _warn_of_reference(op: str, device: torch.device, unable: dict[str, str]) -> None:
    """Once, and not where it says nothing new: meta tensors are not computed, the import told of the extension."""
    known = device.type == "meta" or (device.type == "cpu" and _library.EXTENSION_ERROR is not None)
    asked = op, device.type, bool(unable)
    if known or asked in _warned:
        return
    _warned.add(asked)
    warnings.warn(
        f"fusedattn: no kernel of {op} can run on {device}; it runs as plain PyTorch: same results, slower, with "
        f"the memory that kernels save.\n{_all_reasons(device, torch.float32, unable)}",
        stacklevel=4,
    )


def cpu_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why the C++ CPU kernels cannot run inputs of this device and dtype; empty if they can."""
    reasons = _extension_reasons()
    if device.type != "cpu":
        reasons.append(f"inputs are on {device}, not on the CPU")
    if dtype not in DTYPES:
        reasons += _dtype_reasons(dtype)
    return reasons


def cuda_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why the C++ CUDA kernels cannot run inputs of this device and dtype; empty if they can."""
    reasons = _extension_reasons()
    if _library.CUDA_ERROR is not None:
        reasons.append(f"there are no CUDA kernels here: {_library.CUDA_ERROR}")
    if device.type != "cuda":
        reasons.append(f"inputs are on {device}, not on a CUDA device")
    elif not torch.cuda.is_available():
        reasons.append("torch finds no CUDA device")
    elif not reasons and (error := cuda_error(device)):
        reasons.append(f"the CUDA kernels do not run on {describe_gpu(device)}: {error}")
    return reasons + _dtype_reasons(dtype)


def triton_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why the Triton kernels cannot run inputs of this device and dtype; empty if they can."""
    reasons = []
    if _library.TRITON_ERROR is not None:
        reasons.append(f"there are no Triton kernels here: {_library.TRITON_ERROR}")
    if device.type == "cpu":
        if not _library.TRITON_INTERPRETED:
            reasons.append("inputs are on the CPU, where only Triton's interpreter would run them")
    elif device.type != "cuda":  # which is what torch calls AMD GPUs, too
        reasons.append(f"inputs are on {device}, not on a GPU")
    elif not torch.cuda.is_available():
        reasons.append("torch finds no GPU")
    else:
        if torch.version.hip is None:
            gpu = torch.cuda.get_device_properties(device)
            if (gpu.major, gpu.minor) < LEAST_TRITON_CAPABILITY:
                least = ".".join(map(str, LEAST_TRITON_CAPABILITY))
                reasons.append(f"Triton needs compute capability {least}, this is {describe_gpu(device)}")
        if not reasons and (error := _library.triton_driver_error()) is not None:
            reasons.append(f"Triton does not start: {error}")
    return reasons + _dtype_reasons(dtype)


def _extension_reasons() -> list[str]:
    if _library.EXTENSION_ERROR is None:
        return []
    return [f"the compiled extension did not load: {_library.EXTENSION_ERROR}"]


def describe_gpu(device: torch.device) -> str:
    """``Tesla T4 (compute capability 7.5)``"""
    gpu = torch.cuda.get_device_properties(device)
    return f"{gpu.name} (compute capability {gpu.major}.{gpu.minor})"


@_library.assume_constant
def cuda_error(device: torch.device) -> str:
    """What CUDA says where its driver, or this build, has no code of our kernels for a device; else empty."""
    return _cuda_error(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _cuda_error(index: int) -> str:
    with no_dispatch():  # else who traces this call would find the question in his graph
        return torch.ops.fusedattn.cuda_error(index)


def _dtype_reasons(dtype: torch.dtype) -> list[str]:
    return [] if dtype in DTYPES else [f"dtype {dtype} is not one of {', '.join(map(str, DTYPES))}"]


# In order of preference.
BACKENDS = {"cpu": cpu_reasons, "cuda": cuda_reasons, "triton": triton_reasons}


@_library.assume_constant  # torch.compile guards on the settings by itself
def tf32_allowed() -> bool:
    """Whether PyTorch's settings allow TF32 in float32 matrix products, whichever of its interfaces made them."""
    # torch.backends.cuda.matmul.fp32_precision, which takes five times as long.
    return torch._C._get_fp32_precision_getter("cuda", "matmul") == "tf32"


# By names of their own: a small call notices each dot.
_is_compiling = torch.compiler.is_compiling
_is_transformed = torch._C._are_functorch_transforms_active
_is_tracing = torch._C._is_tracing


def is_eager() -> bool:
    """Whether calls are run as they come: nothing compiles, transforms or traces them."""
    return not (_is_compiling() or _is_transformed() or _is_tracing() or forward_ad._current_level >= 0)


_signature = attrgetter("__class__", "shape", "dtype", "device", "layout")
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))
MOST_SIGNATURES = 1024  # of a function; sizes may change from call to call


def are_plain(tensors: tuple) -> bool:
    """Whether these are tensors or None, and no subclass has a say in what is done with them."""
    return _PLAIN.issuperset(map(type, tensors))


def once_per_signature(check: Callable[..., R]) -> Callable[..., R]:
    """Decorator of ``check(tensors, *settings)``: calls that are alike are checked once.

    Result and errors depend on the settings and on shapes, dtypes and devices of the tensors alone, any of which
    may be None, and the result holds none of them. What compilers trace, and subclasses, are checked at each call.
    """
    known: dict[tuple, R] = {}

    @functools.wraps(check)
    def call(tensors: tuple, *settings: Any) -> R:
        if torch.compiler.is_compiling() or torch._C._is_tracing():
            return check(tensors, *settings)
        try:
            of_tensors = [t if t is None else _signature(t) for t in tensors]
            key = (*of_tensors, *settings, *map(type, settings))  # 1 == 1.0 == True
            found = known.get(key)
        except (AttributeError, RuntimeError, TypeError):  # no tensor, a nested one, sizes that are symbols
            key, found = (), None
        if found is None:
            found = check(tensors, *settings)
            if key and are_plain(tensors):
                if len(known) >= MOST_SIGNATURES:
                    known.clear()
                known[key] = found
        return found

    return call


def overridable(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: tensors that define ``__torch_function__`` are asked, as by PyTorch's own functions.

    So ``torch.fx`` records a call, and subclasses of Tensor and function modes see it.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if has_torch_function(args) or (kwargs and has_torch_function(tuple(kwargs.values()))):
            return handle_torch_function(call, (*args, *kwargs.values()), *args, **kwargs)
        return function(*args, **kwargs)

    return call


def not_scriptable(module: torch.nn.Module) -> NoReturn:
    """``__prepare_scriptable__`` of every module: TorchScript would complain of some line of ours."""
    raise NotImplementedError(
        f"{type(module).__name__}: torch.jit.script cannot compile it; use torch.export, torch.compile or "
        "torch.jit.trace"
    )


@_library.assume_constant  # Dynamo of torch 2.11 does not trace the question
def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


def autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is on for this kind of device (some, like meta, have none)."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():  # the quickest to ask
        return False
    return _has_autocast(device.type) and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """For what is to compute in the dtype of its inputs. Some kinds of device have no autocast, like meta."""
    return torch.autocast(device.type, enabled=False) if autocast_enabled(device) else nullcontext()


def beside(x: Tensor, t: Tensor) -> Tensor:
    """A parameter t in the dtype of x, but float32 beside half precision stays what it is: kernels take it so."""
    return t if t.dtype in (x.dtype, accumulation_dtype(x.dtype)) else t.to(x.dtype)


def autocast(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """t in autocast's dtype, or in ``dtype``; float64 and integers stay what they are."""
    if not t.is_floating_point() or t.dtype == torch.float64:
        return t
    return t.to(torch.get_autocast_dtype(t.device.type) if dtype is None else dtype)
