"""PTX text of one kernel -> its parameters, variables and instructions (PTX ISA manual, sections 4 and 5).

Only what compilers emit is understood; anything else is a ``PtxError`` that quotes the statement.
"""

import re
import struct
from dataclasses import dataclass, field

from .values import TYPES


class PtxError(Exception):
    """The text cannot be parsed, or the program does what it must not do."""


@dataclass(frozen=True)
class Register:
    name: str
    bits: int  # 1 for a predicate


@dataclass(frozen=True)
class Special:
    """%tid.x and the like."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """Bits of a literal. ``float_bits`` is 32 or 64 where it was written as a float, 0 for an integer."""

    value: int
    float_bits: int = 0


@dataclass(frozen=True)
class Symbol:
    """The address of a variable or parameter."""

    name: str


@dataclass(frozen=True)
class Address:
    base: "Register | Symbol | Immediate"
    offset: int


@dataclass(frozen=True)
class Vector:
    elements: tuple


@dataclass(frozen=True)
class Not:
    """!%p"""

    register: Register


@dataclass(frozen=True)
class Pair:
    """%r1|%p1: a second destination."""

    first: Register
    second: Register


SINK = Symbol("_")


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: tuple
    guard: "Register | Not | None"
    text: str


@dataclass(frozen=True)
class Variable:
    space: str  # shared, local, global or const
    align: int
    size: int  # 0: extern, sized at the launch
    values: bytes


@dataclass
class Kernel:
    name: str
    parameters: dict[str, int] = field(default_factory=dict)  # name -> bytes
    variables: dict[str, Variable] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", re.S)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(?:\.ptr\s+[^,]*?)?([\w$]+)(?:\[(\d+)\])?\s*(?:,|$)"
)
_VARIABLE = re.compile(
    r"\.(shared|local|global|const)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(\[\d*\])?\s*(?:=\s*(.+))?$", re.S
)
_LABEL = re.compile(r"([\w$]+)\s*:(?!:)")
_LINE_DIRECTIVES = re.compile(r"\s*\.(?:loc|file|section)\b[^\n]*\n")
_SPECIALS = re.compile(r"%(?:(?:n?tid|n?ctaid)\.[xyz]|laneid|warpid|lanemask_\w+|clusterid\.\w|cluster_ctarank)$")


def parse(text: str, name: str | None = None) -> Kernel:
    """The kernel called ``name`` in ``text``, or its only one."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)
    entries = {m[1]: m for m in _ENTRY.finditer(text)}
    if name is None and len(entries) != 1:
        raise PtxError(f"expected one kernel, found {sorted(entries)}")
    entry = entries.get(name) if name is not None else next(iter(entries.values()))
    if entry is None:
        raise PtxError(f"no kernel {name!r}, only {sorted(entries)}")
    kernel = Kernel(entry[1])
    declared = " ".join(entry[2].split())
    for m in _PARAMETER.finditer(declared):
        kernel.parameters[m[2]] = TYPES[m[1]] // 8 * int(m[3] or 1)
    if len(kernel.parameters) != declared.count(".param"):
        raise PtxError(f"cannot parse the parameters of {kernel.name}: {declared}")
    # Variables of the module stand outside the bodies of functions.
    for statement in re.findall(
        r"^(?:\.visible |\.extern |\.weak )*(\.(?:shared|global|const)\b[^;]*);", text, re.M
    ):
        _declare(kernel, statement)
    _Body(kernel).parse(text, entry.end())
    return kernel


def _declare(kernel: Kernel, statement: str) -> str:
    m = _VARIABLE.match(" ".join(statement.split()))
    if m is None:
        raise PtxError(f"cannot parse: {statement}")
    space, align, type_, name, count, values = m.groups()
    bits = TYPES[type_]
    size = bits // 8 * (int(count[1:-1] or 0) if count else 1)
    literals = [int(v, 0) for v in values.strip("{} ").split(",")] if values else []
    data = b"".join((v % (1 << bits)).to_bytes(bits // 8, "little") for v in literals)
    kernel.variables[name] = Variable(space, int(align or bits // 8), size, data)
    return name


class _Body:
    """Statements between the braces of a kernel. Braces nest: a register belongs to the block that declares it."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.scopes: list[dict[str, Register]] = [{}]
        self.ranges: dict[str, int] = {}  # prefix of `.reg .b32 %r<100>` -> bits
        self.scoped = 0

    def parse(self, text: str, at: int) -> None:
        while self.scopes:
            while (m := _LINE_DIRECTIVES.match(text, at)) is not None:
                at = m.end()
            while text[at].isspace():
                at += 1
            if text[at] == "{":
                self.scopes.append({})
                at += 1
            elif text[at] == "}":
                self.scopes.pop()
                at += 1
            elif text[at] == ";":
                at += 1
            elif (m := _LABEL.match(text, at)) is not None:
                self.kernel.labels[m[1]] = len(self.kernel.instructions)
                at = m.end()
            elif not _LINE_DIRECTIVES.match(text, at):
                end = text.index(";", at)
                self.statement(text[at:end].strip())
                at = end + 1

    def statement(self, text: str) -> None:
        if text.startswith(".reg"):
            self.registers(text)
        elif text.startswith((".shared", ".local")):
            _declare(self.kernel, text)
        elif not text.startswith(".pragma"):
            self.instruction(text)

    def registers(self, text: str) -> None:
        _, type_, names = text.split(None, 2)
        bits = TYPES.get(type_[1:])
        if bits is None:
            raise PtxError(f"cannot parse: {text}")
        for name in names.split(","):
            name = name.strip()
            if (m := re.match(r"(.+)<\d+>$", name)) is not None:
                self.ranges[m[1]] = bits
            else:
                self.scoped += 1
                self.scopes[-1][name] = Register(f"{name}@{self.scoped}", bits)

    def register(self, name: str) -> Register | None:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        m = re.match(r"(.*?)\d+$", name)
        if m is not None and m[1] in self.ranges:
            return Register(name, self.ranges[m[1]])
        return None

    def instruction(self, text: str) -> None:
        text = " ".join(text.split())
        m = re.match(r"(?:@(!?)([\w%$]+) )?([a-z][\w.:]*)\s*(.*)$", text)
        if m is None:
            raise PtxError(f"cannot parse: {text}")
        negated, guard, opcode, rest = m.groups()
        if guard is not None:
            guard = self.operand(guard)
            guard = Not(guard) if negated else guard
        operands = tuple(self.operand(o) for o in _split(rest))
        self.kernel.instructions.append(Instruction(opcode, operands, guard, text))

    def operand(self, text: str):
        text = text.strip()
        if text.startswith("{"):
            return Vector(tuple(self.operand(o) for o in _split(text[1:-1])))
        if text.startswith("["):
            m = re.match(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\w+)\s*)?\]$", text)
            if m is None:
                raise PtxError(f"cannot parse the address {text}")
            return Address(self.operand(m[1]), int(m[2] or "0", 0))
        if text.startswith("!"):
            return Not(self.operand(text[1:]))
        if "|" in text:
            return Pair(*(self.operand(part) for part in text.split("|")))
        if (register := self.register(text)) is not None:
            return register
        if _SPECIALS.match(text):
            return Special(text)
        if (m := re.match(r"0([fFdD])([0-9a-fA-F]+)$", text)) is not None and len(m[2]) in (8, 16):
            return Immediate(int(m[2], 16), 32 if m[1] in "fF" else 64)
        if (m := re.match(r"(-?(?:0x[0-9a-fA-F]+|\d+))U?$", text)) is not None:
            return Immediate(int(m[1], 0))
        if (m := re.match(r"-?\d+\.\d*$", text)) is not None:
            return Immediate(struct.unpack("<Q", struct.pack("<d", float(text)))[0], 64)
        if re.match(r"[A-Za-z_$][\w$]*$", text):
            return Symbol(text)
        raise PtxError(f"cannot parse the operand {text!r}")


def _split(text: str) -> list[str]:
    """At commas outside braces and brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    return [p for p in parts if p.strip()]
