"""What the Triton kernels share: the fast reciprocal, numbers as arguments, registration, and a list for tools.

Works on Triton 3.6 to 3.9.
"""

import functools
import inspect
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Kernels take this as a constexpr, so that they can be compiled for either vendor on any machine.
NVIDIA = torch.version.hip is None


@triton.jit
def fast_reciprocal(x, NVIDIA: tl.constexpr):
    """1 / x by the hardware's approximation (1 ulp); x and 1 / x must be normal float32 numbers, or x NaN.

    ``/`` never becomes a bare MUFU.RCP. Inline asm does, but on AMD it is silently dropped; there fast_dividef is
    v_rcp_f32 and a multiplication. In float64 two steps of Newton make 23 bits all of them; ``/`` takes longer,
    and calls a function for what is out of range: registers spill around it.
    """
    y = x.to(tl.float32)
    if NVIDIA:
        r = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [y], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        r = libdevice.fast_dividef(1.0, y)
    if x.dtype == tl.float64:
        r = r.to(tl.float64)
        r = tl.fma(tl.fma(-x, r, 1.0), r, r)
        r = tl.fma(tl.fma(-x, r, 1.0), r, r)
    return r


@triton.jit
def load_wide(pointers, mask):
    """Loads into the dtype of the arithmetic: float64 stays, everything else becomes float32; 0 where masked."""
    t = tl.load(pointers, mask=mask, other=0.0)
    if t.dtype != tl.float64:
        t = t.to(tl.float32)
    return t


def argument(x: float, dtype: torch.dtype) -> float | int:
    """A number as kernels of this dtype take it: Triton passes floats in single precision, so double goes as bits.

    Kernels list it under ``do_not_specialize`` and read it with ``number``.
    """
    return struct.unpack("q", struct.pack("d", x))[0] if dtype == torch.float64 else x


@triton.jit
def number(x, dtype: tl.constexpr):
    """An ``argument`` in the dtype of the arithmetic."""
    if dtype == tl.float64:
        x = x.to(tl.int64).to(tl.float64, bitcast=True)
    return x


def asked_for(output_mask: int, n: int) -> list[bool]:
    """Which of its n results a backward operator is asked for."""
    return [bool(output_mask >> k & 1) for k in range(n)]


def on_device_of(t: torch.Tensor):
    """Context in which kernels launch on t's GPU; does nothing for the CPU (the interpreter)."""
    return torch.cuda.device_of(t)


def require(op: str, argument: str, t: torch.Tensor, shape: tuple, dtype: torch.dtype, device: torch.device):
    """Raises where a tensor that a raw operator got is not what its kernels read."""
    if t.shape != shape or t.dtype != dtype or t.device != device:
        raise RuntimeError(
            f"{op}: {argument}: expected shape {shape}, {dtype}, on {device}, "
            f"got {tuple(t.shape)}, {t.dtype}, on {t.device}"
        )


# Registration

# Kept for the life of the process: what a Library registers goes with it.
LIBRARY = torch.library.Library("fusedattn", "FRAGMENT")


def register(schema: str, function: Callable) -> None:
    """Defines ``fusedattn::<schema>`` with ``function`` as its kernel on GPUs (ROCm's dispatch key is CUDA too).

    A plain Library, not ``torch.library.custom_op`` or ``triton_op``. To torch.compile it is opaque, as the C++
    ops are: no graph break, one graph for all lengths (``tests/test_triton_film.py`` counts), and the launcher,
    which is not traced, may look at shapes to choose tiles; within ``triton_op`` each look would guard the graph.
    In eager mode a call costs 5 us before the launcher, against 18 to 31 of both others
    (``python -m benchmarks.registration``, torch 2.13); decoding makes thousands of small calls. What is given up:
    Inductor cannot fuse into the kernels or plan their scratch memory.
    """
    LIBRARY.define(schema)
    name = schema.split("(")[0]
    LIBRARY.impl(name, function, "CUDA")
    if INTERPRETED:
        LIBRARY.impl(name, function, "CPU")


# Launching, and a description of launches for tools: tests that compile every kernel, gates on machine code, the
# executor of compiled code


@dataclass(frozen=True)
class Kernel:
    """One kernel in one specialisation, described without tensors or a driver.

    Args:
        function: the ``triton.jit`` function.
        signature: type of each argument, ``"*fp32"``, ``"i64"``, ``"fp32"`` ..., or ``"constexpr"``.
        constexprs: the values of those. ``NVIDIA``, if among them, is set by ``compile``.
        grid: an example of a launch grid.
        divisible: names of arguments that are multiples of 16 (for a pointer: of 16 bytes).
        near: names of pointers into less than 2 GiB, which AMD addresses by 32-bit offsets.
        num_warps, num_stages: options of the compilation.
        name: readable, for test ids and tables.
    """

    function: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    grid: tuple[int, ...]
    divisible: tuple[str, ...] = ()
    near: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 2
    name: str = ""

    def compile(self, backend: str, arch: int | str):
        """Triton's compiled kernel for ``("cuda", 90)``, ``("hip", "gfx942")`` ...; needs no GPU."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        constexprs = dict(self.constexprs)
        if "NVIDIA" in constexprs:
            constexprs["NVIDIA"] = backend == "cuda"
        names = self.function.arg_names
        attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in self.divisible}
        for name in self.near if backend == "hip" else ():
            attributes.setdefault((names.index(name),), []).append(["tt.pointer_range", 32])
        source = ASTSource(
            self.function,
            signature={name: self.signature[name] for name in names},
            constexprs={(names.index(name),): value for name, value in constexprs.items()},
            attrs=attributes,
        )
        target = GPUTarget(backend, arch, 32 if backend == "cuda" else 64)
        return triton.compile(
            source, target=target, options={"num_warps": self.num_warps, "num_stages": self.num_stages}
        )

    @property
    def specialisation(self) -> tuple:
        """What Triton's cache would tell this kernel from others by."""
        constexprs = tuple(sorted((name, str(value)) for name, value in self.constexprs.items()))
        options = self.num_warps, self.num_stages
        return (
            self.function.__name__,
            tuple(self.signature.items()),
            constexprs,
            self.divisible,
            self.near,
            options,
        )


_record: list[Kernel] | None = None
_target: tuple[str, int | str] = ("cuda", 90)
_every_tile = False


def launch(
    function,
    grid: tuple[int, ...],
    *arguments,
    options: Mapping[str, Any] = MappingProxyType({}),
    num_warps: int = 4,
    num_stages: int = 2,
    **keywords,
):
    """Launches a kernel, or only notes it within ``recorded``.

    ``options`` are what kernels of the op take of its options; this one gets those that its signature names.
    """
    names = _parameters(function.fn)
    for name, value in options.items():
        if name in names:
            keywords[name] = value
    if _record is None:
        function[grid](*arguments, **keywords, num_warps=num_warps, num_stages=num_stages)
    else:
        _record.append(_described(function, grid, arguments, keywords, num_warps, num_stages))


@functools.cache
def _parameters(function: Callable) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def recorded(
    call: Callable[[], Any], target: tuple[str, int | str] = ("cuda", 90), every_tile: bool = False
) -> list[Kernel]:
    """The kernels that ``call()`` launches, in order, with their tiles on ``target``, say ``("hip", "gfx942")``.

    With ``every_tile`` also those with the other tiles that tuning may choose. None of them runs, so tensors may
    be on the meta device.
    """
    global _record, _target, _every_tile
    _record, _target, _every_tile = [], target, every_tile
    try:
        call()
        return _record
    finally:
        _record = None


def distinct(kernels: Iterable[Kernel]) -> list[Kernel]:
    """One of each specialisation, the first."""
    found: dict[tuple, Kernel] = {}
    for kernel in kernels:
        found.setdefault(kernel.specialisation, kernel)
    return list(found.values())


def recording_for() -> tuple[str, int | str] | None:
    """The target of ``recorded``, or None outside."""
    return None if _record is None else _target


def records_every_tile() -> bool:
    """Whether ``recorded`` is asked for the tiles that only tuning chooses, too."""
    return _every_tile


_TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.bool: "*i1",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def _described(function, grid, arguments, keywords, num_warps, num_stages) -> Kernel:
    """What Triton would compile for this launch: its rules of specialisation, written down."""
    signature, values, divisible, near = {}, {}, [], []
    given = dict(zip(function.arg_names, arguments, strict=False)) | keywords
    for parameter in function.params:
        name, specialised = parameter.name, not parameter.do_not_specialize
        x = given[name]
        if parameter.is_constexpr or x is None or (specialised and isinstance(x, int) and x == 1):
            values[name] = x
        elif isinstance(x, torch.Tensor):
            signature[name] = _TYPES[x.dtype]
            if x.storage_offset() * x.itemsize % 16 == 0:
                divisible.append(name)
            if x.untyped_storage().nbytes() < 1 << 31:
                near.append(name)
        elif isinstance(x, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(1 << 31) <= x < 1 << 31 else "i64"
            if specialised and x % 16 == 0:
                divisible.append(name)
    signature |= dict.fromkeys(values, "constexpr")
    tile = "x".join(str(values[name]) for name in function.arg_names if name.startswith("BLOCK_"))
    types = "-".join(dict.fromkeys(t[1:] for t in signature.values() if t.startswith("*")))
    name = f"{function.__name__}-{tile}-{types}"
    return Kernel(
        function, signature, values, tuple(grid), tuple(divisible), tuple(near), num_warps, num_stages, name
    )
