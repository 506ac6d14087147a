"""Teaches Triton's interpreter what it lacks, so that kernels run on a machine without a GPU.

conftest.py imports it where ``TRITON_INTERPRET=1`` is set. Triton reads that on import, so such tests run in a
process of their own (``make test`` starts one).

What it adds (Triton 3.6 to 3.9 lack all of it):

- inline assembly, one instruction at a time (``INSTRUCTIONS``); an unknown one is an error;
- libdevice functions (``LIBDEVICE``), which otherwise return None; an unknown one is an error;
- ``tl.dot`` of bfloat16, which multiplies the bit patterns as integers;
- float32 to bfloat16 by rounding to nearest even; the interpreter cuts the low bits off.

It tests the logic of a kernel, not its machine code: approximate instructions are exact here.
"""

import math

import numpy as np
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime import interpreter

from fusedattn.triton import film_problem, norm_film_rows

INSTRUCTIONS = {
    "rcp.approx.ftz.f32": lambda x: np.float32(1) / x,
    "ex2.approx.ftz.f32": np.exp2,
    "lg2.approx.ftz.f32": np.log2,
    "tanh.approx.f32": np.tanh,
}
LIBDEVICE = {
    "erfc": np.vectorize(math.erfc, otypes=[np.float64]),
    "erf": np.vectorize(math.erf, otypes=[np.float64]),
    "fast_dividef": np.divide,
    "log1p": np.log1p,
    "tanh": np.tanh,
}

_Builder, _Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
_cast, _dot = _Builder.cast_impl, _Builder.create_dot


def _computed(function, arrays, like):
    with np.errstate(all="ignore"):
        return _Handle(function(*arrays).astype(like.data.dtype), like.dtype.scalar)


class _Result:
    """What ``create_inline_asm`` returns: an operation with one result."""

    def __init__(self, handle):
        self.handle = handle

    def get_result(self, n):
        return self.handle


def _create_inline_asm(self, asm, constraints, values, types, is_pure, pack):
    mnemonic = asm.split()[0]
    if mnemonic not in INSTRUCTIONS or asm.count(";") > 1:
        raise NotImplementedError(f"inline asm {asm!r}: add it to INSTRUCTIONS in {__file__}")
    return _Result(_computed(INSTRUCTIONS[mnemonic], [v.data for v in values], values[0]))


def _libdevice(name):
    def function(*arguments):
        if name not in LIBDEVICE:
            raise NotImplementedError(f"libdevice.{name}: add it to LIBDEVICE in {__file__}")
        tensors = [a for a in arguments if isinstance(a, tl.tensor)]
        like = max(tensors, key=lambda t: t.handle.data.ndim)
        arrays = [a.handle.data if isinstance(a, tl.tensor) else like.handle.data.dtype.type(a) for a in arguments]
        return tl.tensor(_computed(LIBDEVICE[name], arrays, like.handle), like.type)

    return function


def _widened(handle):
    """A bfloat16 array, which the interpreter stores as uint16, as float32."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return _Handle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _create_dot(self, a, b, d, *options):
    return _dot(self, _widened(a), _widened(b), d, *options)


def _cast_impl(self, source, target):
    if source.dtype.scalar == tl.bfloat16 and target.scalar == tl.float32:
        return _widened(source)
    if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
        return _cast(self, source, target)
    bits = np.ascontiguousarray(source.data, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40
    return _Handle(np.where(np.isnan(source.data), quiet, rounded).astype(np.uint16), tl.bfloat16)


_Builder.create_inline_asm = _create_inline_asm
_Builder.create_dot = _create_dot
_Builder.cast_impl = _cast_impl
for _name, _function in list(vars(libdevice).items()):
    if callable(_function):
        setattr(libdevice, _name, _libdevice(_name))

# A program takes milliseconds: pieces as on a GPU, but fewer of them.
film_problem.PROGRAMS = 6
norm_film_rows.LEAST_STEPS = 2
