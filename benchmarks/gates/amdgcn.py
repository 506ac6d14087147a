"""Reads AMD machine code, Triton's assembler text: its loops, and what the score loop costs."""

import re
from dataclasses import dataclass

_LABEL = re.compile(r"^(\.L\w+):")
_INSTRUCTION = re.compile(r"^\s+([vsdgb][a-z]*_\w+)(?:\s+([^;]*))?")
_BRANCH = re.compile(r"(\.L\w+)")
# As in sass.py: neither 1 - 2r nor a step of a division is one.
_DENOMINATOR = re.compile(r"^\S+, [vs][\d\[:\]]+, [vs][\d\[:\]]+, 1\.0(?: |$)")


@dataclass(frozen=True)
class Loop:
    instructions: tuple[tuple[str, str], ...]  # opcode, operands

    @property
    def slots(self) -> int:
        """Vector instructions: scalar ones issue beside them."""
        return sum(opcode.startswith(("v_", "ds_", "global_")) for opcode, _ in self.instructions)

    @property
    def tanh(self) -> int:
        """Denominators 1 + Eq Ek that a thread evaluates: multiply-adds of the constant 1, two in a packed one."""
        fma = (
            (opcode, operands)
            for opcode, operands in self.instructions
            if re.match(r"v_(pk_)?fma(c|ak|mk)?_f32", opcode) and _DENOMINATOR.match(operands)
        )
        return sum(2 if opcode.startswith("v_pk") else 1 for opcode, _ in fma)

    @property
    def transcendental(self) -> int:
        return sum(
            opcode.startswith(("v_rcp", "v_exp", "v_log", "v_sqrt", "v_rsq")) for opcode, _ in self.instructions
        )


def innermost_loops(text: str) -> list[Loop]:
    labels: dict[str, int] = {}
    instructions: list[tuple[str, str]] = []
    loops: list[tuple[int, int]] = []
    for line in text.splitlines():
        if found := _LABEL.match(line):
            labels[found[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append((found[1], found[2] or ""))
            target = _BRANCH.search(found[2] or "") if "branch" in found[1] else None
            if target and target[1] in labels:
                loops.append((labels[target[1]], len(instructions) - 1))

    def holds(outer, inner):
        return outer != inner and outer[0] <= inner[0] and inner[1] <= outer[1]

    return [Loop(tuple(instructions[a[0] : a[1] + 1])) for a in loops if not any(holds(a, b) for b in loops)]


def score_loop(text: str) -> Loop | None:
    """The innermost loop with most tanh, as on NVIDIA."""
    return max((x for x in innermost_loops(text) if x.tanh), key=lambda x: x.tanh, default=None)
