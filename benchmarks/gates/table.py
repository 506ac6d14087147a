"""The kernels as Markdown: a row for each, a column for each property, architectures side by side in a cell."""

import re
from collections.abc import Callable, Iterable

from .kernel import ATTENTION, STREAMS, Kernel
from .thresholds import IN_FLIGHT, MUFU, SLOTS, SLOTS_ARCH, WIDTH, broken, failures, must_wait

HEAD = f"""# What the compiled kernels cost

Written by `make gates`, which also fails where a kernel breaks a threshold: no stack and no local memory (so no
spills), at most {MUFU} MUFU per tanh, on {SLOTS_ARCH} at most {SLOTS["CUDA C++", "forward"]} issue slots per tanh forward
({SLOTS["Triton", "forward"]} in Triton) and {SLOTS["CUDA C++", "backward"]} backward, and every global access of FiLM's main loops {WIDTH} bytes wide.
Kernels for few queries may take what memory leaves them: benchmarks/gates/thresholds.py derives it.
Nothing here was timed: it is read from the machine code.

A cell with several values has one per architecture, in the order of the heading; with one, all are equal.

- registers: of a thread
- shared: KiB of a block, of its largest launch
- occupancy: resident warps, of the most that a multiprocessor holds
- local: stack bytes / instructions that touch local memory
- slots, MUFU: instructions of the score loop, per tanh; on AMD vector instructions, reciprocals and exponentials;
  not counted in float64
- spilled: vector registers, to memory / scalar registers, to lanes of vector registers
- bytes: widths of the global accesses in FiLM's main loop; of the stores where a kernel has no loop
- waits: KiB that a multiprocessor has asked of memory at a time in that loop, of FiLM and of one query in CUDA C++:
  independent loads x resident threads, without what is optional; at least {IN_FLIGHT} on {SLOTS_ARCH}

A kernel marked ✗ breaks a threshold, listed below the tables.
"""  # noqa: E501


def _joined(values: Iterable[str]) -> str:
    values = list(values)
    return values[0] if len(set(values)) == 1 else " · ".join(values)


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _shared(kernel: Kernel) -> str:
    return "–" if kernel.shared is None else f"{kernel.shared / 1024:.3g}"


def _waits(kernel: Kernel) -> str:
    return f"{kernel.waiting / 1024:.3g}" if kernel.in_flight and must_wait(kernel) else "–"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


COMMON: dict[str, Callable[[Kernel], str]] = {
    "threads": lambda k: str(k.threads),
    "registers": lambda k: str(k.registers),
    "shared": _shared,
    "occupancy": lambda k: _percent(k.occupancy),
    "local": lambda k: f"{k.stack} / {k.local}",
}
COLUMNS: dict[str, dict[str, Callable[[Kernel], str]]] = {
    **dict.fromkeys(
        ATTENTION,
        {
            **COMMON,
            "slots": lambda k: _number(k.slots),
            "MUFU": lambda k: _number(k.mufu),
            "waits": _waits,
        },
    ),
    "attention_pool": COMMON,
    "hard_additive_attention": COMMON,
    "location_attention": COMMON,
    **{op: {**COMMON, "bytes": lambda k: ", ".join(map(str, k.widths)) or "–", "waits": _waits} for op in STREAMS},
    "norm_film": COMMON,
}
AMD = {
    "threads": lambda k: str(k.threads),
    "VGPR": lambda k: str(k.registers),
    "SGPR": lambda k: str(k.scalar_registers),
    "LDS": _shared,
    "occupancy": lambda k: _percent(k.occupancy),
    "spilled": lambda k: f"{k.local} / {k.scalar_spills}",
    "slots": lambda k: _number(k.slots),
    "rcp, exp": lambda k: _number(k.mufu),
}


def _rows(kernels: list[Kernel], columns: dict[str, Callable[[Kernel], str]]) -> list[str]:
    by_name: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel.name, []).append(kernel)
    lines = ["| kernel | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, group in sorted(by_name.items(), key=lambda item: natural(item[0])):
        mark = " ✗" if any(map(failures, group)) else ""
        cells = [f"{name}{mark}", *(_joined(map(cell, group)) for cell in columns.values())]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def natural(text: str) -> list:
    """Sorts 8 before 16."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text)]


def markdown(kernels: list[Kernel], tools: dict[str, str]) -> str:
    lines = [HEAD]
    for section in dict.fromkeys(k.section for k in kernels):
        lines += [f"## {section}", "", f"Compiled by {tools[section]}.", ""]
        mine = [k for k in kernels if k.section == section]
        for op in dict.fromkeys(k.op for k in mine):
            for amd in (False, True):
                group = [k for k in mine if k.op == op and k.arch.startswith("gfx") == amd]
                if group:
                    archs = " · ".join(dict.fromkeys(k.arch for k in group))
                    lines += [f"### {op}: {archs}", "", *_rows(group, AMD if amd else COLUMNS[op]), ""]
        if failed := broken(mine):
            lines += [*(f"- ✗ {line}" for line in failed), ""]
    return "\n".join(lines)
