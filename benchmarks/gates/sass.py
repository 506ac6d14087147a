"""Reads NVIDIA machine code as `nvdisasm -c` prints it: instructions, loops, and what a loop costs.

A warp scheduler issues at most one instruction per clock, so the instructions of a loop body are its issue slots.
Predicated instructions take their slot too, and are counted. A loop is what lies between a label and a later
branch back to it; an innermost loop holds no other loop. Where a loop branches, one way through it is counted: the
one that evaluates most tanh, and of those the shortest. The others are for large inputs, ragged ends and absent
queries.

How many tanh a loop evaluates is read from the code as well: each has one denominator 1 + Eq Ek, a multiply-add
whose addend is the constant 1, and nothing else in a score loop adds 1.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.\w+)*)(.*)")
_LABEL = re.compile(r"^\s*(\.L[\w.$]*):")
_FUNCTION = re.compile(r"^\s*\.section\s+\.text\.([^\s,]+)")
_TARGET = re.compile(r"\.L[\w$]+")
_BRANCHES = {"BRA", "BRX"}  # BRX, a switch, names its targets in a remark

# Instructions of the FP32 lanes. The packed forms of sm_100 do two operations a lane in one slot.
_FP32 = {"FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2"}
_PACKED = {"FADD2", "FMUL2", "FFMA2"}
_FMA = {"FFMA", "FFMA2"}
# A multiply-add of two registers and 1. Neither 1 - 2r, which the loop for large magnitudes has, nor the negated
# step of Newton's method in a division is one.
_DENOMINATOR = re.compile(r"^\s*R[\w.]+, R[\w.]+, R[\w.]+, 1(?:, 1)?\s*;")
_GLOBAL = {"LDG", "STG", "LD", "ST"}
_LOADS = {"LDG", "LD"}
_LOCAL = {"LDL", "STL"}
_REGISTER = re.compile(r"\bR(\d+)\b")


@dataclass(frozen=True)
class Instruction:
    opcode: str  # with its modifiers: LDG.E.128
    operands: str
    predicated: bool = False

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def bytes(self) -> int:
        """Width of a load or store in a thread; 4 where the opcode names none."""
        for part in self.opcode.split(".")[1:]:
            if part in ("U8", "S8", "8"):
                return 1
            if part in ("U16", "S16", "16"):
                return 2
            if part in ("64", "128", "256"):
                return int(part) // 8
        return 4

    @cached_property
    def slots(self) -> int:
        return int(self.base != "NOP")

    @cached_property
    def tanh(self) -> int:
        if self.base not in _FMA or not _DENOMINATOR.match(self.operands):
            return 0
        return 1 + (self.base in _PACKED)

    @property
    def ends_here(self) -> bool:
        """Whether the next instruction never follows."""
        if self.predicated or self.opcode == "BRA.DIV":  # taken where lanes have parted
            return False
        if self.base == "BRA":  # whose condition may be an operand: BRA P0, `(.L_x_1)
            return self.operands.lstrip().startswith("`")
        return self.base in ("BRX", "EXIT", "RET")


@dataclass(frozen=True)
class Body:
    """A straight list of instructions: a function, or a loop of it."""

    instructions: tuple[Instruction, ...]

    @cached_property
    def counts(self) -> Counter:
        return Counter(i.base for i in self.instructions)

    @property
    def slots(self) -> int:
        return sum(i.slots for i in self.instructions)

    @property
    def mufu(self) -> int:
        return self.counts["MUFU"]

    @property
    def tanh(self) -> int:
        """Denominators 1 + Eq Ek that a thread evaluates."""
        return sum(i.tanh for i in self.instructions)

    @property
    def fp32(self) -> int:
        """Operations of the FP32 lanes per thread; a multiply-add is one."""
        return sum(self.counts[name] * (1 + (name in _PACKED)) for name in _FP32)

    @property
    def local(self) -> int:
        """Accesses to local memory: spills, and arrays that did not fit into registers."""
        return sum(self.counts[name] for name in _LOCAL)

    @property
    def global_widths(self) -> list[int]:
        """Bytes of each access to global memory, in program order."""
        return [i.bytes for i in self.instructions if i.base in _GLOBAL or i.opcode.startswith("LDGSTS")]

    @cached_property
    def in_flight(self) -> int:
        """Most bytes that a thread has asked of global memory at a time, where the instructions repeat: a load is
        on its way until one of its registers is named again. A predicated one, of what is optional, does not
        count."""
        most = 0
        loads: list[tuple[range, int]] = []  # registers and bytes
        for instruction in 2 * self.instructions:  # what the end of a loop loads is used at its head
            named = [int(number) for number in _REGISTER.findall(instruction.operands)]
            loads = [load for load in loads if not any(number in load[0] for number in named)]
            if instruction.base in _LOADS and not instruction.predicated:
                first, size = named[0], instruction.bytes
                loads.append((range(first, first + max(1, size // 4)), size))
            most = max(most, sum(size for _, size in loads))
        return most

    @property
    def store_widths(self) -> list[int]:
        return [i.bytes for i in self.instructions if i.base in ("STG", "ST")]


@dataclass(frozen=True)
class Function:
    name: str  # mangled
    body: Body
    branches: Mapping[int, tuple[int, ...]]  # from instruction to instructions

    @cached_property
    def loops(self) -> list[tuple[int, int]]:
        """First and last instruction of each, both included."""
        # A branch to itself, which nvdisasm puts after the end as padding, is no loop. Nor does a block close one
        # that lies behind the end and joins again.
        found = sorted((target, n) for n, targets in self.branches.items() for target in targets if target < n)
        return [loop for loop in found if self._busiest(loop).instructions]

    @property
    def innermost(self) -> list[tuple[int, int]]:
        """Those that hold no other; of several branches to one label, which continue the same loop, the last."""

        def holds(outer, inner):
            return outer[0] < inner[0] and inner[1] <= outer[1]

        return list({a[0]: a for a in self.loops if not any(holds(a, b) for b in self.loops)}.values())

    def _whole(self, loop: tuple[int, int]) -> Body:
        return Body(self.body.instructions[loop[0] : loop[1] + 1])

    def _busiest(self, loop: tuple[int, int]) -> Body:
        """The way through a loop that evaluates most tanh, and of those the shortest; empty if none leads back."""
        first, last = loop
        # By instruction: tanh, minus the slots, and next instruction of the best way from there back to the first.
        best: dict[int, tuple[int, int, int]] = {}
        for n in range(last, first - 1, -1):
            here, targets = self.body.instructions[n], self.branches.get(n, ())
            ways = [(0, 0, first)] if first in targets else []
            following = targets if here.ends_here else (*targets, n + 1)
            ways += [(*best[m][:2], m) for m in following if m > n and m in best]
            if ways:
                tanh, slots, following = max(ways)
                best[n] = tanh + here.tanh, slots - here.slots, following
        way = [first] if first in best else []
        while way and (n := best[way[-1]][2]) != first:
            way.append(n)
        return Body(tuple(self.body.instructions[n] for n in way))

    def score_loop(self) -> Body | None:
        """The innermost loop with most tanh: the compiler may leave a shorter remainder loop beside it. The loop
        for large magnitudes has no denominator of this form."""
        loops = map(self._busiest, self.innermost)
        return max((b for b in loops if b.tanh and b.mufu), key=lambda b: b.tanh, default=None)

    def memory_loop(self) -> Body | None:
        """The innermost loop with the widest accesses to global memory, and the most of them."""
        loop = self._memory_loop()
        return None if loop is None else self._whole(loop)

    def _memory_loop(self) -> tuple[int, int] | None:
        def widths(loop: tuple[int, int]) -> tuple[int, int]:
            found = self._whole(loop).global_widths
            return max(found, default=0), len(found)

        return max((loop for loop in self.innermost if widths(loop)[1]), key=widths, default=None)

    def in_flight(self) -> int:
        """Bytes of global memory that a thread waits for at a time, in the score loop or else the memory loop, by
        its shortest way: what is optional, as a residual, comes on top."""
        loop = self._memory_loop()
        body = self.score_loop() or (None if loop is None else self._busiest(loop))
        return 0 if body is None else body.in_flight


def parse(text: str) -> dict[str, Function]:
    """Every function of a disassembly, by mangled name."""
    functions, name = {}, None
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}

    def close() -> None:
        if name is None or not instructions:
            return
        branches = {}
        for n, instruction in enumerate(instructions):
            targets = _TARGET.findall(instruction.operands) if instruction.base in _BRANCHES else ()
            branches[n] = tuple(labels[target] for target in targets if target in labels)
        functions[name] = Function(name, Body(tuple(instructions)), branches)

    for line in text.splitlines():
        if found := _FUNCTION.match(line):
            close()
            name, instructions, labels = found[1], [], {}
        elif found := _LABEL.match(line):
            labels[found[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append(Instruction(found[2], found[3], found[1] is not None))
    close()
    return functions
