"""Runs a parsed kernel: all threads of a few blocks at once, one numpy operation per instruction.

Threads that stand at the same instruction run together. A branch that not all of them take splits the group; the
group that others cannot come to any more runs last (order.py), so that groups meet again where their paths do. A
group stops at a barrier until every thread of its block has come.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from . import access, warp
from .arithmetic import elementwise
from .memory import GlobalMemory, PrivateMemory
from .operands import Operands
from .order import ranks
from .parser import Immediate, Instruction, Kernel, PtxError

_BARRIERS = ("bar.sync", "barrier.sync", "barrier.sync.aligned", "bar.red.or.pred", "bar.red.and.pred")
_EXITS = ("ret", "exit", "ret.uni")


@dataclass(frozen=True)
class _Step:
    guard: Callable | None
    run: Callable
    text: str


@dataclass
class _Block:
    """Instructions up to the next label, branch, exit or barrier."""

    steps: list[_Step]
    end: str = "next"  # or branch, exit, barrier
    guard: Callable | None = None
    target: int = 0  # number of the block that a branch goes to, number of the barrier
    finish: Callable | None = None  # what a barrier with a reduction writes when all have come


class Program:
    """A kernel with every instruction turned into a function; ``launch`` runs it."""

    def __init__(self, kernel: Kernel, memory: GlobalMemory, parameters: dict[str, bytes], shared_bytes: int = 0):
        self.kernel = kernel
        addresses, self.sizes = {}, {"shared": 0, "local": 0}
        for name, variable in kernel.variables.items():
            if variable.space in self.sizes:
                start = -(-self.sizes[variable.space] // variable.align) * variable.align
                addresses[name], self.sizes[variable.space] = start, start + variable.size
            else:
                data = variable.values.ljust(variable.size, b"\0")
                addresses[name] = memory.add(np.frombuffer(data, np.uint8).copy(), name)
        # A space of their own, for addresses that are computed.
        self.parameters = GlobalMemory()
        for name, data in parameters.items():
            addresses[name] = self.parameters.add(np.frombuffer(data, np.uint8), name)
        # Dynamic shared memory begins behind the static.
        for name, variable in kernel.variables.items():
            if variable.space == "shared" and variable.size == 0:
                addresses[name] = -(-self.sizes["shared"] // 16) * 16
                self.sizes["shared"] = addresses[name] + shared_bytes
        self.operands = Operands(kernel, addresses)
        self.blocks = self._blocks()
        self.rank = ranks([self._successors(number) for number in range(len(self.blocks))])

    def _successors(self, number: int) -> list[int]:
        block, following = self.blocks[number], [number + 1] if number + 1 < len(self.blocks) else []
        if block.end == "branch":
            return [block.target] if block.guard is None else [block.target, *following]
        return [] if block.end == "exit" and block.guard is None else following

    def _blocks(self) -> list[_Block]:
        instructions = self.kernel.instructions
        starts = {0, *self.kernel.labels.values()}
        for i, instruction in enumerate(instructions):
            if _kind(instruction) is not None:
                starts.add(i + 1)
        order = sorted(starts)
        number = {start: n for n, start in enumerate(order)}
        blocks = []
        for start, stop in zip(order, [*order[1:], len(instructions)], strict=True):
            block = _Block([])
            for instruction in instructions[start:stop]:
                try:
                    kind = _kind(instruction)
                    guard = None if instruction.guard is None else self.operands.reader(instruction.guard, "pred")
                    if kind is None:
                        block.steps.append(_Step(guard, self._step(instruction), instruction.text))
                        continue
                    block.end, block.guard = kind, guard
                    if kind == "branch":
                        block.target = number[self.kernel.labels[instruction.operands[0].name]]
                    elif kind == "barrier":
                        block.target = _barrier_number(instruction)
                        block.finish = self._reduction(instruction)
                except PtxError as error:
                    raise PtxError(f"{error}\n    in: {instruction.text}") from error
            blocks.append(block)
        return blocks

    def _reduction(self, instruction: Instruction) -> Callable | None:
        """bar.red: whether the predicate holds for any thread, or for all threads, of the block."""
        if "red" not in instruction.opcode.split("."):
            return None
        write = self.operands.writer(instruction.operands[0], "pred")
        read = self.operands.reader(instruction.operands[2], "pred")
        reduce = np.logical_or if "or" in instruction.opcode.split(".") else np.logical_and

        def finish(machine, threads):
            given = np.broadcast_to(read(machine), (machine.lanes,)).reshape(machine.blocks, -1)
            result = np.repeat(reduce.reduce(given, axis=1), given.shape[1])
            write(machine, result, threads)

        return finish

    def _step(self, instruction: Instruction) -> Callable:
        rule = elementwise(instruction.opcode)
        if rule is None:
            parts = instruction.opcode.split(".")
            for n in range(len(parts), 0, -1):
                for rules in (access.RULES, warp.RULES):
                    if (build := rules.get(".".join(parts[:n]))) is not None:
                        return build(instruction, parts, self.operands)
            raise PtxError(f"unknown instruction {instruction.opcode}")
        destination, *sources = instruction.operands
        if len(sources) != len(rule.sources):
            raise PtxError(f"expected {len(rule.sources)} sources")
        reads = [self.operands.reader(o, t) for o, t in zip(sources, rule.sources, strict=True)]
        writes = self.operands.destinations(destination, rule.destinations)
        compute, several = rule.compute, len(rule.destinations) > 1

        def step(machine, active):
            result = compute(*[read(machine) for read in reads])
            chosen = None if machine.everyone else active
            for write, value in zip(writes, result if several else (result,), strict=False):
                write(machine, value, chosen)

        return step


def _kind(instruction: Instruction) -> str | None:
    """How control leaves this instruction, None if it goes to the next one."""
    if instruction.opcode in ("bra", "bra.uni"):
        return "branch"
    if instruction.opcode in _EXITS:
        return "exit"
    return "barrier" if instruction.opcode in _BARRIERS else None


def _barrier_number(instruction: Instruction) -> int:
    numbers = [o for o in instruction.operands if isinstance(o, Immediate)]
    if len(numbers) != 1 or len(instruction.operands) != (3 if "red" in instruction.opcode else 1):
        raise PtxError("a barrier of part of a block is not implemented")
    return numbers[0].value


class Machine:
    """The state of some blocks of a grid."""

    def __init__(self, program: Program, memory: GlobalMemory, parameters: dict[str, bytes], grid, block, numbers):
        self.memory, self.parameters, self.parameter_memory = memory, parameters, program.parameters
        threads = int(np.prod(block))
        self.blocks, self.lanes = len(numbers), threads * len(numbers)
        self.registers: list[np.ndarray | None] = [None] * len(program.operands.slots)
        self.block = np.repeat(np.arange(len(numbers)), threads)  # which of the blocks here
        thread = np.tile(np.arange(threads), len(numbers))
        self.warp = thread // warp.WARP
        in_grid = np.repeat(numbers, threads)
        values = {"laneid": thread % warp.WARP, "warpid": self.warp}
        for i, axis in enumerate("xyz"):
            values[f"tid.{axis}"] = thread // int(np.prod(block[:i])) % block[i]
            values[f"ctaid.{axis}"] = in_grid // int(np.prod(grid[:i])) % grid[i]
            values[f"ntid.{axis}"], values[f"nctaid.{axis}"] = np.array([block[i]]), np.array([grid[i]])
        self.specials = {f"%{name}": value.astype(np.uint32) for name, value in values.items()}
        self.shared = PrivateMemory("shared", len(numbers), program.sizes["shared"], actors=True)
        self.local = PrivateMemory("local", self.lanes, program.sizes["local"])
        self.copies = access.Copies(self.lanes)
        self.everyone = True

    def special(self, name: str) -> np.ndarray:
        if name not in self.specials:
            raise PtxError(f"unknown special register {name}")
        return self.specials[name]

    def space(self, name: str, active: np.ndarray):
        """Memory, its owner for every active thread, and the warp that acts; empty where there is none."""
        if name in ("global", "const"):
            return self.memory, (), ()
        if name == "param":
            return self.parameter_memory, (), ()
        if name == "shared":
            return self.shared, (self.block[active],), (self.warp[active],)
        return self.local, (np.flatnonzero(active),), ()

    def run(self, program: Program, budget: int) -> int:
        """Until every thread has left; returns how many instructions were executed."""
        groups = {0: np.ones(self.lanes, bool)}
        waiting: dict[tuple[int, int], np.ndarray] = {}  # (barrier, block to go on with) -> threads
        alive = np.ones(self.lanes, bool)
        executed = 0
        while groups or waiting:
            if not groups:
                groups = self._release(program, waiting, alive)
                waiting = {}
            number = min(groups, key=program.rank.__getitem__)
            active, block = groups.pop(number), program.blocks[number]
            executed += len(block.steps) + 1
            if executed > budget:
                raise PtxError(f"more than {budget} instructions: does the kernel end?")
            self.everyone = bool(active.all())
            for step in block.steps:
                self._execute(step, active)
            taken = active if block.guard is None else active & block.guard(self)
            rest = active & ~taken
            if block.end == "next":
                taken, rest = np.zeros_like(active), active
            elif block.end == "exit":
                alive &= ~taken
            elif block.end == "barrier":
                place = block.target, number + 1
                if taken.any():
                    waiting[place] = waiting.get(place, False) | taken
            elif taken.any():
                groups[block.target] = groups.get(block.target, False) | taken
            if rest.any():
                groups[number + 1] = groups.get(number + 1, False) | rest
        return executed

    def _execute(self, step: _Step, active: np.ndarray) -> None:
        try:
            if step.guard is None:
                step.run(self, active)
                return
            chosen = active & step.guard(self)
            if chosen.any():
                everyone, self.everyone = self.everyone, bool(chosen.all())
                step.run(self, chosen)
                self.everyone = everyone
        except PtxError as error:
            raise type(error)(f"{error}\n    in: {step.text}") from error

    def _release(self, program: Program, waiting, alive: np.ndarray) -> dict[int, np.ndarray]:
        """Threads at barriers that go on; no other thread can run, so who is missing now will never come."""
        groups: dict[int, np.ndarray] = {}
        barriers = {barrier for barrier, _ in waiting}
        arrived = {b: np.any([t for (barrier, _), t in waiting.items() if barrier == b], axis=0) for b in barriers}
        for (barrier, target), threads in waiting.items():
            here = self.block[threads]
            missing = np.isin(self.block, here) & ~arrived[barrier]
            if missing.any():
                raise PtxError(
                    f"barrier {barrier}: {int(missing.sum())} threads of the block never come "
                    f"({int((missing & ~alive).sum())} have left the kernel)"
                )
            self.shared.barrier(np.unique(here))
            if (finish := program.blocks[target - 1].finish) is not None:
                finish(self, threads)
            groups[target] = groups.get(target, False) | threads
        return groups


def _parameters(kernel: Kernel, memory: GlobalMemory, arguments: Sequence) -> dict[str, bytes]:
    """An array becomes the address of its bytes, a number what its parameter is wide enough for."""
    if len(arguments) != len(kernel.parameters):
        raise PtxError(f"{kernel.name} has {len(kernel.parameters)} parameters, got {len(arguments)} arguments")
    result = {}
    for (name, size), value in zip(kernel.parameters.items(), arguments, strict=True):
        if isinstance(value, np.ndarray):
            value = memory.add(value, name)
        if isinstance(value, bytes):
            data = value
        elif isinstance(value, float):
            data = np.array(value, f"f{size}").tobytes()
        else:
            data = (int(value) % (1 << 8 * size)).to_bytes(size, "little")
        if len(data) != size:
            raise PtxError(f"{name}: expected {size} bytes, got {len(data)}")
        result[name] = data
    return result


def launch(
    kernel: Kernel,
    grid: Sequence[int],
    threads: Sequence[int] | int,
    arguments: Sequence,
    shared_bytes: int = 0,
    *,
    memory: GlobalMemory | None = None,
    budget: int = 3_000_000,
    together: int = 2048,
) -> int:
    """Runs ``kernel`` on a grid and returns the number of instructions executed; arrays change in place.

    Args:
        arguments: arrays (passed by address), numbers, or bytes of a struct.
        shared_bytes: dynamic shared memory of a block.
        memory: where addresses inside structs point to.
        budget: instructions after which the kernel counts as endless.
        together: about how many threads run in lockstep.
    """
    grid = (*grid, 1, 1)[:3]
    block = (*([threads] if isinstance(threads, int) else threads), 1, 1)[:3]
    size = int(np.prod(block))
    if size % warp.WARP:
        raise PtxError(f"blocks of {size} threads, which is not a multiple of {warp.WARP}, are not implemented")
    memory = GlobalMemory() if memory is None else memory
    parameters = _parameters(kernel, memory, arguments)
    program = Program(kernel, memory, parameters, shared_bytes)
    blocks, executed = int(np.prod(grid)), 0
    step = max(1, together // size)
    with np.errstate(all="ignore"):
        for first in range(0, blocks, step):
            numbers = np.arange(first, min(first + step, blocks))
            executed += Machine(program, memory, parameters, grid, block, numbers).run(program, budget)
    memory.write_back()
    return executed
