"""Instructions that read and write memory (PTX ISA manual, sections 9.7.9 and 9.7.13).

Caching and ordering qualifiers are accepted where they cannot change a result of threads in lockstep. Asynchronous
copies read at once but land in shared memory only when the thread waits for them: a missing wait reads NaN.
"""

from collections.abc import Callable

import numpy as np

from .arithmetic import elementwise
from .operands import Operands, elements
from .parser import Address, Immediate, Instruction, PtxError, Symbol
from .values import TYPES, decode, encode

_IGNORED = {
    "weak",
    "relaxed",
    "acquire",
    "release",
    "acq_rel",
    "volatile",
    "nc",
    "ca",
    "cg",
    "cs",
    "lu",
    "cv",
    "wb",
}
_IGNORED |= {"wt", "cta", "gpu", "sys", "noftz", "L1::evict_normal", "L1::evict_first", "L1::evict_last"}
_IGNORED |= {"L1::no_allocate", "L1::evict_unchanged", "L2::64B", "L2::128B", "L2::256B", "L2::evict_first"}
_IGNORED |= {"L2::evict_last", "L2::evict_normal"}
_SPACES = {"global": 64, "shared": 32, "shared::cta": 32, "local": 32, "param": 64, "const": 64}


def _qualifiers(parts: list[str], opcode: str) -> tuple[str, int, str, list[str]]:
    """Space, number of elements, type and what else an ld, st, atom or red names."""
    rest = [p for p in parts[1:] if p not in _IGNORED]
    spaces = [p for p in rest if p in _SPACES]
    types = [p for p in rest if p in TYPES]
    count = {"v2": 2, "v4": 4}.get(next((p for p in rest if p in ("v2", "v4")), ""), 1)
    rest = [p for p in rest if p not in spaces + types + ["v2", "v4"]]
    if len(spaces) != 1 or len(types) != 1:
        raise PtxError(f"{opcode} is not implemented")
    return spaces[0].removesuffix("::cta"), count, types[0], rest


class _Words:
    """Elements of ``type_`` at consecutive addresses of one space, for the active threads of a machine."""

    def __init__(self, space: str, count: int, type_: str):
        self.space, self.count, self.size = space, count, TYPES[type_] // 8

    def _places(self, at: np.ndarray):
        for i in range(self.count):
            yield at + at.dtype.type(i * self.size), self.size * (self.count if i == 0 else 1)

    def load(self, machine, at: np.ndarray, active: np.ndarray) -> list[np.ndarray]:
        memory, owner, actor = machine.space(self.space, active)
        return [memory.load(*owner, a, self.size, span, *actor) for a, span in self._places(at[active])]

    def store(self, machine, at: np.ndarray, active: np.ndarray, values: list[np.ndarray]) -> None:
        memory, owner, actor = machine.space(self.space, active)
        for (a, span), value in zip(self._places(at[active]), values, strict=True):
            memory.store(*owner, a, self.size, span, value[active], *actor)


def _load(instruction: Instruction, parts: list[str], operands: Operands) -> Callable:
    space, count, type_, rest = _qualifiers(parts, instruction.opcode)
    if rest:
        raise PtxError(f"{instruction.opcode} is not implemented")
    writes = [operands.writer(o, type_) for o in elements(instruction.operands[0])]
    if len(writes) != count:
        raise PtxError(f"expected {count} destinations")
    if space == "param" and isinstance(instruction.operands[1].base, Symbol):
        return _load_parameter(instruction.operands[1], type_, writes)
    address, words = operands.address(instruction.operands[1], _SPACES[space]), _Words(space, count, type_)

    def step(machine, active):
        everyone = active.all()
        for write, value in zip(writes, words.load(machine, address(machine), active), strict=True):
            if not everyone:
                spread = np.zeros(machine.lanes, value.dtype)
                spread[active] = value
                value = spread
            write(machine, decode(value, type_), None if everyone else active)

    return step


def _load_parameter(address: Address, type_: str, writes: list[Callable]) -> Callable:
    """At an address that is not computed: one number for all threads."""
    size = TYPES[type_] // 8

    def step(machine, active):
        data = machine.parameters[address.base.name]
        for i, write in enumerate(writes):
            start = address.offset + i * size
            if start + size > len(data):
                raise PtxError(f"{start + size} bytes of a parameter of {len(data)} are read")
            bits = np.frombuffer(data[start : start + size], f"u{size}")
            write(machine, decode(bits, type_), None if active.all() else active)

    return step


def _store(instruction: Instruction, parts: list[str], operands: Operands) -> Callable:
    space, count, type_, rest = _qualifiers(parts, instruction.opcode)
    reads = [operands.reader(o, type_) for o in elements(instruction.operands[1])]
    if rest or space in ("param", "const") or len(reads) != count:
        raise PtxError(f"{instruction.opcode} is not implemented")
    address, words = operands.address(instruction.operands[0], _SPACES[space]), _Words(space, count, type_)

    def step(machine, active):
        values = [np.broadcast_to(encode(read(machine), type_), (machine.lanes,)) for read in reads]
        words.store(machine, address(machine), active, values)

    return step


def _atomic(instruction: Instruction, parts: list[str], operands: Operands) -> Callable:
    """atom (with the old value as its destination) and red (without)."""
    space, count, type_, (name, *rest) = _qualifiers(parts, instruction.opcode)
    if space != "global" or count != 1 or rest:
        raise PtxError(f"{instruction.opcode} is not implemented")
    given = instruction.operands
    write = operands.writer(given[0], type_) if parts[0] == "atom" else None
    given = given[1:] if write else given
    address = operands.address(given[0], 64)
    reads = [operands.reader(o, type_) for o in given[1:]]
    functions = {
        "exch": lambda old, new: new,
        "cas": lambda old, expected, new: np.where(encode(old, type_) == encode(expected, type_), new, old),
        "inc": lambda old, limit: np.where(old >= limit, 0, old + old.dtype.type(1)),
    }
    if name not in functions:
        known = name in ("add", "min", "max", "and", "or", "xor") and elementwise(f"{name}.{type_}")
        if not known:
            raise PtxError(f"{instruction.opcode} is not implemented")
        functions[name] = known.compute
    function = functions[name]

    def step(machine, active):
        at = address(machine)[active]
        values = [
            np.broadcast_to(read(machine), (machine.lanes, *read(machine).shape[1:]))[active] for read in reads
        ]

        def update(i, old):
            return encode(function(decode(old, type_), *(v[i : i + 1] for v in values)), type_)[0]

        old = machine.memory.atomic(at, TYPES[type_] // 8, update)
        if write is not None:
            spread = np.zeros(machine.lanes, old.dtype)
            spread[active] = old
            write(machine, decode(spread, type_), active)

    return step


def _copy(instruction: Instruction, parts: list[str], operands: Operands) -> Callable:
    """cp.async [shared], [global], bytes, bytes that are not zeros."""
    known = {"cp", "async", "ca", "cg", "shared", "shared::cta", "global"} | _IGNORED
    sizes = instruction.operands[2:]
    if set(parts) - known or not isinstance(sizes[0], Immediate) or len(sizes) > 2:
        raise PtxError(f"{instruction.opcode} is not implemented")
    size = sizes[0].value
    to, source = operands.address(instruction.operands[0], 32), operands.address(instruction.operands[1], 64)
    filled = operands.reader(sizes[-1], "u32")

    def step(machine, active):
        at, start = source(machine)[active], to(machine)[active]
        count = np.broadcast_to(filled(machine), (machine.lanes,))[active]
        if (at % np.uint64(size)).any() or (start % size).any():
            raise PtxError(f"an asynchronous copy of {size} bytes is misaligned")
        data = np.zeros((at.size, size), np.uint8)
        for i in range(size):
            here = i < count
            data[here, i] = machine.memory.load(at[here] + np.uint64(i), 1, 1)
        machine.copies.add(active, start, data)

    return step


class Copies:
    """Asynchronous copies on their way, in groups of each thread."""

    def __init__(self, lanes: int):
        self.committed = np.zeros(lanes, np.int64)
        self.pending: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []  # thread, group, to, data

    def add(self, active: np.ndarray, to: np.ndarray, data: np.ndarray) -> None:
        threads = np.flatnonzero(active)
        self.pending.append((threads, self.committed[threads], to, data))

    def commit(self, active: np.ndarray) -> None:
        self.committed[active] += 1

    def wait(self, machine, active: np.ndarray, allowed: int) -> None:
        """Until at most ``allowed`` of the committed groups of every active thread are on their way."""
        waiting = []
        for threads, group, to, data in self.pending:
            done = active[threads] & (group < self.committed[threads] - allowed)
            owner, actor = machine.block[threads[done]], machine.warp[threads[done]]
            for i in range(data.shape[1]):
                machine.shared.store(owner, to[done] + np.uint32(i), 1, 1, data[done, i], actor)
            if not done.all():
                waiting.append(tuple(x[~done] for x in (threads, group, to, data)))
        self.pending = waiting


def _commit(instruction: Instruction, parts: list[str], operands: Operands) -> Callable:
    return lambda machine, active: machine.copies.commit(active)


def _wait(instruction: Instruction, parts: list[str], operands: Operands) -> Callable:
    allowed = instruction.operands[0].value
    return lambda machine, active: machine.copies.wait(machine, active, allowed)


def _wait_all(instruction: Instruction, parts: list[str], operands: Operands) -> Callable:
    def step(machine, active):
        machine.copies.commit(active)
        machine.copies.wait(machine, active, 0)

    return step


def _to_global(instruction: Instruction, parts: list[str], operands: Operands) -> Callable:
    """cvta.to.global and back: generic addresses of global memory are the same numbers."""
    write, read = operands.writer(instruction.operands[0], "u64"), operands.reader(instruction.operands[1], "u64")
    return lambda machine, active: write(machine, read(machine), None if active.all() else active)


def _nothing(instruction: Instruction, parts: list[str], operands: Operands) -> Callable:
    return lambda machine, active: None


# First parts of the opcode -> rule. The longest match counts.
RULES: dict[str, Callable] = {
    "ld": _load,
    "ldu": _load,
    "st": _store,
    "atom": _atomic,
    "red": _atomic,
    "cp.async.ca": _copy,
    "cp.async.cg": _copy,
    "cp.async.commit_group": _commit,
    "cp.async.wait_group": _wait,
    "cp.async.wait_all": _wait_all,
    "cvta.to.global": _to_global,
    "cvta.global": _to_global,
    "membar": _nothing,
    "fence": _nothing,
    "prefetch.global": _nothing,
    "griddepcontrol": _nothing,
}
