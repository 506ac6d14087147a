"""Instructions in which the threads of a warp work together (PTX ISA manual, sections 9.7.9.20 to 9.7.15).

All lanes that an instruction names must execute it together; where they do not, the result is undefined and that
is an error here. Every rule builds ``step(machine, active)`` from an instruction; ``active`` is a bool per thread.
"""

from collections.abc import Callable

import numpy as np

from .operands import Operands, elements
from .parser import Instruction, PtxError
from .values import TYPES

WARP = 32
_LANE = np.arange(WARP)


def _warps(x: np.ndarray, lanes: int) -> np.ndarray:
    return np.broadcast_to(x, (lanes,)).reshape(-1, WARP)


def whole_warps(active: np.ndarray) -> np.ndarray:
    """Which warps are active; an instruction that is .aligned needs all of a warp or none."""
    count = active.reshape(-1, WARP).sum(1)
    if not np.isin(count, (0, WARP)).all():
        raise PtxError(f"{count[(count > 0) & (count < WARP)][0]} of 32 threads of a warp execute it")
    return count > 0


def _check_members(active: np.ndarray, members: np.ndarray) -> None:
    """Every active lane's mask names active lanes only, itself among them."""
    together = active.reshape(-1, WARP)
    present = (together.astype(np.uint64) << _LANE.astype(np.uint64)).sum(1)[:, None]
    named = members.astype(np.uint64)
    itself = (named >> _LANE.astype(np.uint64)) & np.uint64(1)
    if (together & (((named & ~present) != 0) | (itself == 0))).any():
        raise PtxError("its mask names threads that do not execute it")


def _all_active(active: np.ndarray) -> np.ndarray | None:
    return None if active.all() else active


def _shuffle(instruction: Instruction, parts: list[str], operands: Operands) -> Callable:
    mode = parts[2]
    writes = operands.destinations(instruction.operands[0], ("b32", "pred"))
    reads = [operands.reader(o, "b32") for o in instruction.operands[1:]]

    def step(machine, active):
        value, b, c, members = (_warps(read(machine), machine.lanes) for read in reads)
        _check_members(active, members)
        b, c = b.astype(np.int64) & 31, c.astype(np.int64)
        clamp, segment = c & 31, (c >> 8) & 31
        last, first = (_LANE & segment) | (clamp & ~segment), _LANE & segment
        source = {"up": _LANE - b, "down": _LANE + b, "bfly": _LANE ^ b, "idx": first | (b & ~segment)}[mode]
        inside = source >= last if mode == "up" else source <= last
        source = np.where(inside, source, _LANE)
        executing = active.reshape(-1, WARP)
        if not np.take_along_axis(executing, source, 1)[executing].all():
            raise PtxError("a thread reads the value of one that does not execute it")
        result = np.take_along_axis(value, source, 1).reshape(-1)
        for write, x in zip(writes, (result, inside.reshape(-1)), strict=False):
            write(machine, x, _all_active(active))

    return step


def _vote(instruction: Instruction, parts: list[str], operands: Operands) -> Callable:
    mode = parts[2]
    write = operands.writer(instruction.operands[0], "b32" if mode == "ballot" else "pred")
    predicate = operands.reader(instruction.operands[1], "pred")
    members = operands.reader(instruction.operands[2], "b32")

    def step(machine, active):
        _check_members(active, named := _warps(members(machine), machine.lanes))
        named = (named[..., None] >> _LANE.astype(np.uint32)) & np.uint32(1) != 0
        given = _warps(predicate(machine), machine.lanes)[:, None, :]
        result = {
            "all": lambda: (given | ~named).all(2),
            "any": lambda: (given & named).any(2),
            "uni": lambda: (given | ~named).all(2) | ~(given & named).any(2),
            "ballot": lambda: ((given & named).astype(np.uint32) << _LANE.astype(np.uint32)).sum(2, np.uint32),
        }[mode]()
        write(machine, result.reshape(-1), _all_active(active))

    return step


_REDUCE = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def _reduce(instruction: Instruction, parts: list[str], operands: Operands) -> Callable:
    _, _, name, type_ = parts
    if type_ not in ("u32", "s32", "b32"):
        raise PtxError(f"{instruction.opcode} is not implemented")
    write = operands.writer(instruction.operands[0], type_)
    read = operands.reader(instruction.operands[1], type_)
    members = operands.reader(instruction.operands[2], "b32")

    def step(machine, active):
        _check_members(active, named := _warps(members(machine), machine.lanes))
        if not (named == np.uint32(0xFFFFFFFF)).all():
            raise PtxError("a reduction over part of a warp is not implemented")
        total = _REDUCE[name].reduce(_warps(read(machine), machine.lanes), axis=1)
        write(machine, np.repeat(total.astype(read(machine).dtype), WARP), _all_active(active))

    return step


def _synchronise(instruction: Instruction, parts: list[str], operands: Operands) -> Callable:
    members = operands.reader(instruction.operands[0], "b32")
    return lambda machine, active: _check_members(active, _warps(members(machine), machine.lanes))


def _elect(instruction: Instruction, parts: list[str], operands: Operands) -> Callable:
    lane, chosen = operands.destinations(instruction.operands[0], ("b32", "pred"))
    members = operands.reader(instruction.operands[1], "b32")

    def step(machine, active):
        _check_members(active, named := _warps(members(machine), machine.lanes))
        first = np.log2((named & (~named + np.uint32(1))).astype(np.float64)).astype(np.uint32)
        lane(machine, first.reshape(-1), _all_active(active))
        chosen(machine, (first == _LANE).reshape(-1), _all_active(active))

    return step


# Matrices. In a fragment a lane is g = lane / 4, t = lane % 4.


def _matrix_rows(instruction: Instruction, parts: list[str], operands: Operands, writing: bool):
    """ldmatrix, stmatrix: n matrices of 8 rows of 16 bytes; lane 8 m + r has the address of row r of matrix m."""
    vector, address = instruction.operands[::-1] if writing else instruction.operands
    flags = set(parts[1:]) - {"sync", "aligned", "m8n8", "trans", "shared", "shared::cta", "b16"}
    registers = elements(vector)
    if flags != {f"x{len(registers)}"}:
        raise PtxError(f"{instruction.opcode} is not implemented")
    address = operands.address(address, 32)
    count, transposed = len(registers), "trans" in parts
    g, t = _LANE // 4, _LANE % 4
    # Which two elements (row, column) of its matrix a lane's register holds.
    row, column = (2 * t[:, None] + np.arange(2), np.broadcast_to(g[:, None], (WARP, 2)))
    if not transposed:
        row, column = column, row

    def places(machine, active, matrix):
        """Owner, address, actor of the 32 x 2 elements of one matrix of every active warp."""
        warps = whole_warps(active)
        starts = address(machine).reshape(-1, WARP)[warps][:, 8 * matrix : 8 * matrix + 8]
        if (starts % 16).any():
            raise PtxError("the address of a row is not a multiple of 16")
        at = (starts[:, row] + (2 * column).astype(np.uint32)).reshape(-1)
        owner, actor = (x.reshape(-1, WARP)[warps][:, 0] for x in (machine.block, machine.warp))
        return warps, np.repeat(owner, 2 * WARP), at, np.repeat(actor, 2 * WARP)

    return registers, count, places


def _load_matrix(instruction: Instruction, parts: list[str], operands: Operands) -> Callable:
    registers, count, places = _matrix_rows(instruction, parts, operands, writing=False)
    writes = [operands.writer(r, "b32") for r in registers]

    def step(machine, active):
        loaded = []
        for matrix in range(count):
            warps, owner, at, actor = places(machine, active, matrix)
            words = np.zeros((warps.size, WARP), np.uint32)
            words[warps] = machine.shared.load(owner, at, 2, 2, actor).view(np.uint32).reshape(-1, WARP)
            loaded.append(words.reshape(-1))
        for write, words in zip(writes, loaded, strict=True):
            write(machine, words, _all_active(active))

    return step


def _store_matrix(instruction: Instruction, parts: list[str], operands: Operands) -> Callable:
    registers, count, places = _matrix_rows(instruction, parts, operands, writing=True)
    reads = [operands.reader(r, "b32") for r in registers]

    def step(machine, active):
        for matrix, read in zip(range(count), reads, strict=True):
            warps, owner, at, actor = places(machine, active, matrix)
            words = np.ascontiguousarray(_warps(read(machine), machine.lanes)[warps]).view(np.uint16)
            machine.shared.store(owner, at, 2, 2, words.reshape(-1), actor)

    return step


def _fragment_a(packed: int, registers: int):
    """Row and column of every element of A, [lane, register, element of it]."""
    lane, register, e = np.ix_(_LANE, np.arange(registers), np.arange(packed))
    return lane // 4 + 8 * (register % 2) + 0 * e, packed * (lane % 4) + e + 4 * packed * (register // 2)


def _fragment_b(packed: int, registers: int):
    lane, register, e = np.ix_(_LANE, np.arange(registers), np.arange(packed))
    return packed * (lane % 4) + e + 4 * packed * register, lane // 4 + 0 * register + 0 * e


def _fragment_c(registers: int):
    lane, register = np.ix_(_LANE, np.arange(registers))
    return lane // 4 + 8 * (register // 2), 2 * (lane % 4) + register % 2


_SHAPES = {"m16n8k16": (16, 16), "m16n8k8": (16, 8), "m16n8k4": (16, 4), "m8n8k4": (8, 4)}


def _multiply(instruction: Instruction, parts: list[str], operands: Operands) -> Callable:
    """mma.sync: D = A B + C. Products and sums in float64, rounded once to the type of D."""
    shape = next((p for p in parts if p in _SHAPES), None)
    types = [p for p in parts if p in TYPES]
    known = {"sync", "aligned", "row", "col"}
    if shape is None or set(parts[1:]) - known - {shape} - set(types) or len(types) != 4:
        raise PtxError(f"{instruction.opcode} is not implemented")
    m, k = _SHAPES[shape]
    d_type, a_type, b_type, c_type = types
    if a_type != b_type or (a_type, d_type, c_type) not in [
        *((x, "f32", "f32") for x in ("f16", "bf16", "tf32")),
        ("f64", "f64", "f64"),
    ]:
        raise PtxError(f"{instruction.opcode} is not implemented")
    packed = 2 if a_type in ("f16", "bf16") else 1
    register_type = f"{a_type}x2" if packed == 2 else a_type
    d, a, b, c = (elements(o) for o in instruction.operands)
    if len(a) * packed * WARP != m * k or len(b) * packed * WARP != 8 * k or len(c) * WARP != 8 * m:
        raise PtxError(f"{instruction.opcode}: expected other numbers of registers")
    reads_a, reads_b = ([operands.reader(r, register_type) for r in x] for x in (a, b))
    reads_c = [operands.reader(r, c_type) for r in c]
    writes = [operands.writer(r, d_type) for r in d]
    at_a, at_b, at_c = _fragment_a(packed, len(a)), _fragment_b(packed, len(b)), _fragment_c(len(c))

    def gather(machine, reads, at, shape):
        matrix = np.zeros((machine.lanes // WARP, *shape))
        values = [np.broadcast_to(read(machine).reshape(-1, packed), (machine.lanes, packed)) for read in reads]
        matrix[:, at[0], at[1]] = np.stack(values, 1).reshape(-1, WARP, len(reads), packed)
        return matrix

    def step(machine, active):
        whole_warps(active)
        product = gather(machine, reads_a, at_a, (m, k)) @ gather(machine, reads_b, at_b, (k, 8))
        added = np.stack([np.broadcast_to(read(machine), (machine.lanes,)) for read in reads_c], 1)
        result = product[:, at_c[0], at_c[1]] + added.reshape(-1, WARP, len(c))
        for i, write in enumerate(writes):
            write(machine, result[:, :, i].reshape(-1), _all_active(active))

    return step


# First parts of the opcode -> rule. The longest match counts.
RULES: dict[str, Callable] = {
    "shfl.sync": _shuffle,
    "vote.sync": _vote,
    "redux.sync": _reduce,
    "elect.sync": _elect,
    "bar.warp.sync": _synchronise,
    "ldmatrix.sync.aligned": _load_matrix,
    "stmatrix.sync.aligned": _store_matrix,
    "mma.sync.aligned": _multiply,
}
