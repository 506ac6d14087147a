"""A device that stands in for a GPU where there is none: tensors "on" it refuse to meet those of the CPU.

FUSEDATTN_TEST_DEVICE=standin pytest tests/test_film.py

It is PyTorch's PrivateUse1, so tensors have a device of their own, with autograd, torch.func and torch.compile as
on any other. Their memory is the CPU's: an operator without a kernel here runs the CPU's on aliases of its inputs,
after refusing what a GPU refuses: tensors of the CPU with dimensions, and its generators. The kernels of fusedattn
do so too, as the backend ``cuda``.

DLPack makes the aliases: a capsule says on which device the memory lies, and importing one whose device was
changed gives the same memory under the other name.
"""

import ctypes
import functools

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_map

from fusedattn import _dispatch

NAME = "standin"
CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
aten = torch.ops.aten

# Operators that take indices from the CPU, or move tensors between devices.
MIXING = ("aten::index", "aten::_index_put_impl_", "aten::_copy_from")
DL_CPU, DL_OTHER = 1, 12  # DLDeviceType; PyTorch reads the second as PrivateUse1


class _DLTensor(ctypes.Structure):
    """The first fields of a DLManagedTensor."""

    _fields_ = [("data", ctypes.c_void_p), ("device_type", ctypes.c_int), ("device_index", ctypes.c_int)]


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _alias(t, device_type):
    capsule = torch._C._to_dlpack(t)
    _DLTensor.from_address(_pointer(capsule, b"dltensor")).device_type = device_type
    return torch._C._from_dlpack(capsule)


def is_here(x):
    return isinstance(x, torch.Tensor) and x.device.type == NAME


def cuda_reasons(device, dtype):
    """As of a machine with a GPU, which this device is."""
    here = [] if device.type == NAME else [f"inputs are on {device}, not on a CUDA device"]
    return here + _dispatch._dtype_reasons(dtype)


def shorten_gradcheck():
    """Its derivatives are the CPU's: only whether they are computed on it is asked."""
    for name in ("gradcheck", "gradgradcheck"):
        setattr(torch.autograd, name, functools.partial(getattr(torch.autograd, name), fast_mode=True))


def names_or_makes(value):
    """What parameters that name or make tensors differ in; sizes and numbers ask nothing new of a device."""
    return value if isinstance(value, str) else id(value) if callable(value) else None


class _Module:
    """What PyTorch asks of ``torch.standin``."""

    def is_initialized(self):
        return True

    is_available = is_initialized

    def device_count(self):
        return 1

    def current_device(self):
        return 0

    def _is_in_bad_fork(self):
        return False

    def manual_seed_all(self, seed):
        """Its random numbers are the CPU's."""

    def get_rng_state(self):
        return torch.get_rng_state()

    def set_rng_state(self, state):
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]


def _as_on_the_cpu(op, *args, **kwargs):
    """The fallback: runs the CPU's kernel on aliases."""
    aliased = {}

    def down(x):
        if isinstance(x, torch.device) and x.type == NAME:
            return torch.device("cpu")
        if isinstance(x, torch.Generator):
            raise RuntimeError(f"{op}: expected a generator on {NAME}, got one on {x.device}")
        if not isinstance(x, torch.Tensor):
            return x
        if not is_here(x):
            if x.dim() == 0 or op._schema.name in MIXING:
                return x
            raise RuntimeError(f"{op}: expected all tensors on {NAME}, got {tuple(x.shape)} on {x.device}")
        # The storage of an alias cannot grow, as that of an output that starts empty does.
        alias = torch.empty_like(x, device="cpu") if x.numel() == 0 else _alias(x.detach(), DL_CPU)
        aliased[id(alias)] = alias, x
        return alias

    def up(t):
        if not isinstance(t, torch.Tensor):
            return t
        if id(t) not in aliased:
            return _alias(t, DL_OTHER)
        x = aliased[id(t)][1]
        return x if x.shape == t.shape else aten.set_.source_Tensor(x, _alias(t, DL_OTHER))

    args, kwargs = tree_map(down, (args, kwargs))
    # A number comes as such also where the overload has a tensor.
    numbers = any(
        isinstance(x, int | float) and isinstance(a.type, torch.TensorType)
        for a, x in zip(op._schema.arguments, args, strict=False)
    )
    return tree_map(up, (op.overloadpacket if numbers else op)(*args, **kwargs))


def _fallback(op, *args, **kwargs):
    returned = [r.alias_info for r in op._schema.returns]
    if any(alias is not None and not alias.is_write for alias in returned):
        return op.redispatch(CPU, *args, **kwargs)  # a view: the same storage in another shape
    return _as_on_the_cpu(op, *args, **kwargs)


def _empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    format = torch.contiguous_format if memory_format is None else memory_format
    return _alias(torch.empty(size, dtype=dtype, device="cpu", memory_format=format), DL_OTHER)


def _empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    return _alias(torch.empty_strided(size, stride, dtype=dtype, device="cpu"), DL_OTHER)


def _resize(t, size, *, memory_format=None):
    if t.shape == torch.Size(size):
        return t
    if t.numel():
        raise NotImplementedError(f"resizing {tuple(t.shape)} to {tuple(size)} on {NAME}")
    return aten.set_.source_Tensor(t, _empty(size, dtype=t.dtype))


def _copy_from(source, target, non_blocking=False):
    source, to = (_alias(t.detach(), DL_CPU) if is_here(t) else t for t in (source, target))
    to.copy_(source)
    return target


def _zeros(size, *, dtype=None, layout=None, device=None, pin_memory=None):
    return torch.zeros(size, dtype=dtype, device=NAME)


def _convolution(*args):
    return _as_on_the_cpu(aten.convolution.default, *args)


def _convolution_backward(grad, x, weight, stride, padding, dilation, transposed, *rest):
    bias_sizes = [weight.shape[1] * rest[1] if transposed else weight.shape[0]]
    args = grad, x, weight, bias_sizes, stride, padding, dilation, transposed, *rest
    return _as_on_the_cpu(aten.convolution_backward.default, *args)


def _in_autocast_dtype(op):
    def cast(x):
        return x.to(torch.get_autocast_dtype(NAME)) if is_here(x) and x.is_floating_point() else x

    def kernel(*args):
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
            return op(*tree_map(cast, args))

    return kernel


def _bytes_of(storage):
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _clone(storage):
    return _bytes_of(storage).clone().untyped_storage()


def _to(storage, *, device, non_blocking=False):
    return _bytes_of(storage).to(device).untyped_storage()


backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())
_EVERY = torch.library.Library("_", "IMPL", "PrivateUse1")
_EVERY.fallback(_fallback)
_OWN = torch.library.Library("aten", "IMPL", "PrivateUse1")
for _name, _kernel in {
    "empty.memory_format": _empty,
    "empty_strided": _empty_strided,
    "_efficientzerotensor": _zeros,
    "resize_": _resize,
    "_copy_from": _copy_from,
    "convolution_overrideable": _convolution,
    "convolution_backward_overrideable": _convolution_backward,
}.items():
    _OWN.impl(_name, _kernel)
for _overload in aten.set_.overloads():
    _OWN.impl(
        f"set_.{_overload}".removesuffix(".default"),
        functools.partial(getattr(aten.set_, _overload).redispatch, CPU),
    )
# Of the operators that autocast runs in half precision, those that the modules use.
_REST = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
_REST.fallback(torch.library.fallthrough_kernel)
_HALF = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
for _op in (aten.linear, aten.matmul):
    _HALF.impl(_op.default.name().removeprefix("aten::"), _in_autocast_dtype(_op))
torch.UntypedStorage.clone, torch.UntypedStorage.to = _clone, _to
