"""Chooses a backend and says why the others cannot run: one predicate per backend does both."""

import inspect
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fusedattn import _library

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LEAST_CUDA_CAPABILITY = 8  # bfloat16 and TF32 on tensor cores
Reasons = Callable[[], list[str]]


class UnsupportedError(ValueError):
    """No backend, or not the one asked for, can run these inputs. The message lists every reason."""


def choose(op: str, requested: str, backends: Mapping[str, Reasons], describe: Callable[[], str]) -> str:
    """The name of the backend to run.

    Args:
        op: name of the public function, for messages.
        requested: ``"auto"``, ``"reference"`` or a key of ``backends``.
        backends: in order of preference, each with a function that lists why it cannot run (empty: it can).
        describe: the inputs in words, called only for an error message.

    ``"auto"`` takes the first backend that can run; the reference only for the CPU of an installation without the
    compiled extension, which said so when it was imported. Raises :class:`UnsupportedError` where none can run, or
    the one asked for cannot, and ``ValueError`` for a name that does not exist.
    """
    if requested == "auto":
        for name, reasons in backends.items():
            if not reasons():
                return name
        if _library.EXTENSION_ERROR is not None and "cpu" in backends and len(backends["cpu"]()) == 1:
            return "reference"  # the extension is all that is missing
    elif requested in backends:
        if not backends[requested]():
            return requested
    elif requested == "reference":
        return requested
    else:
        names = ", ".join(repr(name) for name in ("auto", *backends, "reference"))
        raise ValueError(f"{op}: backend: expected one of {names}, got {requested!r}")
    found = "no backend can run" if requested == "auto" else f"backend {requested!r} cannot run"
    lines = [f"{op}: {found} {describe()}"]
    lines += [f"  {name}: {'; '.join(reasons()) or 'can run'}" for name, reasons in backends.items()]
    lines.append("  reference: can run (plain PyTorch, backend='reference')")
    raise UnsupportedError("\n".join(lines))


def cpu_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why the C++ CPU kernels cannot run inputs of this device and dtype; empty if they can."""
    reasons = _extension_reasons()
    if device.type != "cpu":
        reasons.append(f"inputs are on {device}, not on the CPU")
    return reasons + _dtype_reasons(dtype)


def cuda_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why the C++ CUDA kernels cannot run inputs of this device and dtype; empty if they can."""
    reasons = _extension_reasons()
    if _library.CUDA_ERROR is not None:
        reasons.append(f"there are no CUDA kernels here: {_library.CUDA_ERROR}")
    if device.type != "cuda":
        reasons.append(f"inputs are on {device}, not on a CUDA device")
    elif not torch.cuda.is_available():
        reasons.append("torch finds no CUDA device")
    else:
        reasons += _capability_reasons(device)
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
    elif torch.version.hip is None:
        reasons += _capability_reasons(device)
    return reasons + _dtype_reasons(dtype)


def _extension_reasons() -> list[str]:
    if _library.EXTENSION_ERROR is None:
        return []
    return [f"the compiled extension did not load: {_library.EXTENSION_ERROR}"]


def _capability_reasons(device: torch.device) -> list[str]:
    gpu = torch.cuda.get_device_properties(device)
    if gpu.major >= LEAST_CUDA_CAPABILITY:
        return []
    return [f"{gpu.name} has compute capability {gpu.major}.{gpu.minor}, below {LEAST_CUDA_CAPABILITY}.0"]


def _dtype_reasons(dtype: torch.dtype) -> list[str]:
    return [] if dtype in DTYPES else [f"dtype {dtype} is not one of {', '.join(map(str, DTYPES))}"]


def needs_function(tensors) -> bool:
    """Whether derivatives or a functorch transform may be asked of this call."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def tf32_allowed() -> bool:
    """Whether PyTorch's settings allow TF32 in float32 matrix products, whichever of its interfaces made them."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# What torch.compiler.assume_constant_result does, which would import dynamo here. torch.compile guards on the
# settings by itself.
tf32_allowed._dynamo_marked_constant = True


def autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is on for this kind of device (some, like meta, have none)."""
    known = device.type in ("cpu", "cuda") or torch.amp.is_autocast_available(device.type)
    return known and torch.is_autocast_enabled(device.type)


def autocast(t: Tensor) -> Tensor:
    """t in autocast's dtype; float64 and integers stay what they are."""
    if not t.is_floating_point() or t.dtype == torch.float64:
        return t
    return t.to(torch.get_autocast_dtype(t.device.type))


def signature_kept(function: type) -> type:
    """Class decorator: the signature that ``autograd.Function.apply`` else works out anew in every call."""
    function.forward.__signature__ = inspect.signature(function.forward)
    return function


def traced(tensors) -> tuple:
    """Views of tensors while torch.compile traces, else the tensors (or None) themselves.

    Under ``torch.func.grad`` dynamo does not know of its inputs that they require gradients, takes a Function for
    inference, and the gradients come out zero. It knows of what is made from them.
    """
    if not torch.compiler.is_compiling():
        return tuple(tensors)
    return tuple(t if t is None else t.view_as(t) for t in tensors)
