"""Reads NVIDIA machine code as `nvdisasm -c` prints it: instructions, loops, and what a loop costs.

A warp scheduler issues at most one instruction per clock, so the instructions of a loop body are its issue slots.
Predicated instructions take their slot too, and are counted. A loop is what lies between a label and a later
branch back to it; an innermost loop holds no other loop.

How many tanh a loop evaluates is read from the code as well: each has one denominator 1 + Eq Ek, a multiply-add
whose addend is the constant 1, and nothing else in a score loop adds 1.
"""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.\w+)*)(.*)")
_LABEL = re.compile(r"^\s*(\.L[\w.$]*):")
_FUNCTION = re.compile(r"^\s*\.section\s+\.text\.([^\s,]+)")
_TARGET = re.compile(r"`\((\.L[\w.$]*)\)")

# Instructions of the FP32 lanes. The packed forms of sm_100 do two operations a lane in one slot.
_FP32 = {"FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2"}
_PACKED = {"FADD2", "FMUL2", "FFMA2"}
_FMA = {"FFMA", "FFMA2"}
# A multiply-add of two registers and 1; 1 - 2r, which the loop for large magnitudes has, is none.
_DENOMINATOR = re.compile(r"^\s*R[\w.]+, -?R[\w.]+, R[\w.]+, 1(?:, 1)?\s*;")
_GLOBAL = {"LDG", "STG", "LD", "ST"}
_LOCAL = {"LDL", "STL"}


@dataclass(frozen=True)
class Instruction:
    opcode: str  # with its modifiers: LDG.E.128
    operands: str

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


@dataclass(frozen=True)
class Body:
    """A straight list of instructions: a function, or a loop of it."""

    instructions: tuple[Instruction, ...]

    @cached_property
    def counts(self) -> Counter:
        return Counter(i.base for i in self.instructions)

    @property
    def slots(self) -> int:
        return len(self.instructions) - self.counts["NOP"]

    @property
    def mufu(self) -> int:
        return self.counts["MUFU"]

    @property
    def tanh(self) -> int:
        """Denominators 1 + Eq Ek that a thread evaluates."""
        denominators = [i for i in self.instructions if i.base in _FMA and _DENOMINATOR.match(i.operands)]
        return sum(1 + (i.base in _PACKED) for i in denominators)

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

    @property
    def store_widths(self) -> list[int]:
        return [i.bytes for i in self.instructions if i.base in ("STG", "ST")]


@dataclass(frozen=True)
class Function:
    name: str  # mangled
    body: Body
    loops: tuple[tuple[int, int], ...]  # first and last instruction of each, both included

    def _loop(self, loop: tuple[int, int]) -> Body:
        return Body(self.body.instructions[loop[0] : loop[1] + 1])

    @property
    def innermost(self) -> list[Body]:
        def holds(outer, inner):
            return outer != inner and outer[0] <= inner[0] and inner[1] <= outer[1]

        return [self._loop(a) for a in self.loops if not any(holds(a, b) for b in self.loops)]

    def score_loop(self) -> Body | None:
        """The innermost loop with most tanh: the compiler may leave a shorter remainder loop beside it. The loop
        for large magnitudes has no denominator of this form."""
        return max((b for b in self.innermost if b.tanh and b.mufu), key=lambda b: b.tanh, default=None)

    def memory_loop(self) -> Body | None:
        """The innermost loop with the widest accesses to global memory, and the most of them."""
        loops = [b for b in self.innermost if b.global_widths]
        return max(loops, key=lambda b: (max(b.global_widths), len(b.global_widths)), default=None)


def parse(text: str) -> dict[str, Function]:
    """Every function of a disassembly, by mangled name."""
    functions, name = {}, None
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}

    def close() -> None:
        if name is None or not instructions:
            return
        loops = set()
        for n, instruction in enumerate(instructions):
            target = _TARGET.search(instruction.operands) if instruction.base == "BRA" else None
            if target and labels.get(target[1], n + 1) <= n:
                loops.add((labels[target[1]], n))
        # A branch of a function to itself, which nvdisasm puts after the end as padding, is no loop.
        loops = {loop for loop in loops if loop[0] != loop[1]}
        functions[name] = Function(name, Body(tuple(instructions)), tuple(sorted(loops)))

    for line in text.splitlines():
        if found := _FUNCTION.match(line):
            close()
            name, instructions, labels = found[1], [], {}
        elif found := _LABEL.match(line):
            labels[found[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append(Instruction(found[1], found[2]))
    close()
    return functions
