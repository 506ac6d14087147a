"""Operands -> functions that read or write them on a running machine."""

from collections.abc import Callable

import numpy as np

from .parser import (
    SINK,
    Address,
    Immediate,
    Kernel,
    Not,
    Pair,
    PtxError,
    Register,
    Special,
    Symbol,
    Vector,
)
from .values import TYPES, decode, encode, is_float, unsigned, widen


class Operands:
    """Where the registers, variables and parameters of a kernel are."""

    def __init__(self, kernel: Kernel, addresses: dict[str, int]):
        self.kernel = kernel
        self.addresses = addresses  # of variables
        self.slots: dict[str, int] = {}

    def slot(self, register: Register) -> int:
        return self.slots.setdefault(register.name, len(self.slots))

    def reader(self, operand, type_: str) -> Callable:
        """``read(machine)``: the operand's numbers, one for every thread or one for all."""
        if isinstance(operand, Register):
            slot, name = self.slot(operand), operand.name

            def read(machine):
                bits = machine.registers[slot]
                if bits is None:
                    raise PtxError(f"{name} is read before it is written")
                return decode(bits, type_)

            return read
        if isinstance(operand, Not):
            read = self.reader(operand.register, "pred")
            return lambda machine: ~read(machine)
        if isinstance(operand, Special):
            name = operand.name
            return lambda machine: decode(machine.special(name), type_)
        if isinstance(operand, Vector):
            part = f"b{TYPES[type_] // len(operand.elements)}"
            reads = [self.reader(o, part) for o in operand.elements]
            return lambda machine: decode(_join([read(machine) for read in reads], TYPES[type_]), type_)
        constant = decode(self._constant(operand, type_), type_)
        return lambda machine: constant

    def _constant(self, operand, type_: str) -> np.ndarray:
        if isinstance(operand, Symbol):
            if operand.name not in self.addresses:
                raise PtxError(f"unknown symbol {operand.name}")
            return np.array([self.addresses[operand.name]], unsigned(type_))
        if not isinstance(operand, Immediate):
            raise PtxError(f"{operand} cannot be read as {type_}")
        if type_ == "pred":
            return np.array([operand.value != 0])
        bits = TYPES[type_]
        if operand.float_bits:
            if operand.float_bits != bits:
                raise PtxError(f"a literal of {operand.float_bits} bits is read as {type_}")
        elif is_float(type_) and bits != 16:
            raise PtxError(f"the integer {operand.value} is read as {type_}")
        return np.array([operand.value & ((1 << bits) - 1)], unsigned(type_))

    def writer(self, operand, type_: str) -> Callable:
        """``write(machine, numbers, active)``; active is None where every thread is."""
        if operand == SINK:
            return lambda machine, value, active: None
        if isinstance(operand, Vector):
            part = f"b{TYPES[type_] // len(operand.elements)}"
            writes = [self.writer(o, part) for o in operand.elements]

            def write_parts(machine, value, active):
                parts = _split(encode(value, type_), TYPES[type_], len(writes))
                for write, bits in zip(writes, parts, strict=True):
                    write(machine, bits, active)

            return write_parts
        if not isinstance(operand, Register):
            raise PtxError(f"{operand} is not a destination")
        slot, bits = self.slot(operand), operand.bits
        if (type_ == "pred") != (bits == 1):
            raise PtxError(f"{type_} is written to {operand.name} of {bits} bits")
        empty = ~unsigned("pred" if bits == 1 else f"b{bits}")(0)

        def write(machine, value, active):
            value = widen(encode(value, type_), type_, bits)
            if active is not None:
                old = machine.registers[slot]
                value = np.where(active, value, empty if old is None else old)
            elif value.shape != (machine.lanes,):
                value = np.full(machine.lanes, value)
            machine.registers[slot] = value

        return write

    def destinations(self, operand, types: tuple[str, ...]) -> list[Callable]:
        """Writers of ``d`` or ``d|e``."""
        if isinstance(operand, Pair):
            first, second = types
            return [self.writer(operand.first, first), self.writer(operand.second, second)]
        return [self.writer(operand, types[0])]

    def address(self, operand, bits: int) -> Callable:
        """``read(machine)``: the address of [base+offset] for every thread."""
        if not isinstance(operand, Address):
            raise PtxError(f"expected an address, got {operand}")
        read = self.reader(operand.base, f"u{bits}")
        offset = np.array([operand.offset & ((1 << bits) - 1)], unsigned(f"u{bits}"))

        def address(machine):
            at = read(machine) + offset
            return at if at.shape == (machine.lanes,) else np.full(machine.lanes, at)

        return address


def elements(operand) -> tuple:
    """Of a vector, or the operand itself."""
    return operand.elements if isinstance(operand, Vector) else (operand,)


def _join(parts: list[np.ndarray], bits: int) -> np.ndarray:
    word = unsigned(f"b{bits}")
    step = bits // len(parts)
    return sum((part.astype(word) << word(i * step) for i, part in enumerate(parts)), word(0))


def _split(value: np.ndarray, bits: int, count: int) -> list[np.ndarray]:
    step = bits // count
    return [(value >> value.dtype.type(i * step)).astype(unsigned(f"b{step}")) for i in range(count)]
