"""A result, the dict that __main__ stores as JSON, as tables, CSV, README section and comparison."""

import csv
import math
import re
import shutil
from pathlib import Path

from rich.console import Console
from rich.table import Table

from . import contenders
from .machine import MIB, ROOT, describe
from .summary import BOTH_COMPILED, summaries
from .targets import targets

PICTURES = {  # of the README, in docs/
    "ratios.png": "How many times as fast fusedattn is as eager PyTorch and torch.compile, case by case",
    "ceilings.png": "Which part of the measured ceiling each case reaches",
}
ATTENTION = "B, Tq, Tk, D"
HEADS = {  # of the first column, by group
    "attention": ATTENTION,
    "sweep": ATTENTION,
    "small": ATTENTION,
    "film": "x",
    "huge pages": "x",
    "loop": "B, Tk, D",
    "wide loop": "B, Tk, D",
    "wide attention": ATTENTION,
    "wide location": "B, Tk, D",
    "wide pool": "value",
    "wide film": "x",
    "wide norm": "norm, x",
    "wide gated": "x",
    "wide module": "module",
    "wide block": "block",
    "wide dropin": "module",
}
WIDE = {
    "wide loop": "Decoder loops",
    "wide attention": "Attention",
    "wide location": "Location-sensitive attention",
    "wide pool": "Attention pooling",
    "wide film": "FiLM",
    "wide norm": "Norms with FiLM",
    "wide gated": "Gated FiLM",
    "wide module": "Modules",
    "wide block": "Whole blocks",
    "wide dropin": "Replaced modules",
}
NOTHING = "–"
README_SECTION = re.compile(r"(<!-- benchmarks:begin -->\n).*?(<!-- benchmarks:end -->)", re.DOTALL)


def number(value: float | None, unit: str = "") -> str:
    """Three significant digits, never an exponent."""
    if value is None:
        return NOTHING
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(0, min(digits, 4))}f}{unit}"


def _milliseconds(row: dict | None) -> str:
    return number(row and row["milliseconds"])


def _peak(row: dict | None) -> str:
    peak = row and row.get("peak_bytes")
    return NOTHING if peak is None else f"{peak / MIB:.0f}"


def _difference(row: dict) -> str:
    return f"{row['difference']:.1e}" if "difference" in row else NOTHING


def _ceiling(s: dict) -> str:
    return f"{s['ceiling']:.0%} {s['fused']['limit']}" if "ceiling" in s else NOTHING


def table(result: dict, group: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows for the cases of a group; columns that would be empty are left out."""
    found = summaries(result, group)
    kinds = (*contenders.RIVALS, contenders.FUSED, contenders.COMPILED_FUSED)
    unit = found[0]["fused"]["unit"] if found else ""
    columns = {
        HEADS[group]: [s["case"].partition(" ")[2] for s in found],
        "model": [s["model"] or NOTHING for s in found],
        "mode": [s["mode"] for s in found],
        **{f"{kind} ms": [_milliseconds(s[kind]) for s in found] for kind in kinds},
        unit: [number(s["fused"]["rate"]) if unit else NOTHING for s in found],
        **{
            f"vs {rival}": [number(s.get(f"vs {rival}"), "×") for s in found]
            for rival in (*kinds, contenders.CLONE)
        },
        BOTH_COMPILED: [number(s.get(BOTH_COMPILED), "×") for s in found],
        **{f"{kind} MiB": [_peak(s[kind]) for s in found] for kind in kinds},
        "parts": [number(s["fused"].get("parts"), "×") for s in found],
        "allowed": [number(s["fused"].get("allows"), "×") for s in found],
        "difference": [_difference(s["fused"]) for s in found],
        "of ceiling": [_ceiling(s) for s in found],
    }
    columns = {name: cells for name, cells in columns.items() if set(cells) != {NOTHING}}
    return list(columns), [list(cells) for cells in zip(*columns.values(), strict=True)]


LEGEND = (
    "float32, median ms. eager and compile are the faster of tanh(q + k) @ w and (tanh(q + k) * w).sum(-1); "
    "without --full the first form alone is compiled. identity: the best that an expert can write in PyTorch, "
    "1 - 2 / (1 + exp(2q) exp(2k)) for tanh, compiled, with a backward of its own (benchmarks/identity.py). "
    "MiB: peak memory beyond inputs, outputs and gradients. Ceiling: the longer of the bytes that must be read "
    "and written (the output in fresh memory) and the kernel's arithmetic, at rates measured in the same run; "
    "vs clone: GB/s against x.clone(). Loops: a decoder's attention part, step after step over the same keys. "
    "FiLM's rows without a ceiling are those with huge pages for PyTorch's own memory (THP_MEM_ALLOC_ENABLE=1)."
)


WIDE_LEGEND = (
    "Median ms. eager: plain PyTorch by hand; compile: those lines compiled for these shapes, one step of a loop. "
    "Loops leave out projections on both sides, modules have them (benchmarks/wide.py). MiB: peak memory of a "
    "training step beyond inputs, outputs and gradients. Ceiling: the bytes that must be read and written, at "
    "rates measured in the same run. Whole blocks are compared eager with eager and compiled with compiled. "
    "Replaced modules: eager is a module as its authors wrote it, fused the same one after "
    "fusedattn.dropin.replace (benchmarks/dropin.py); difference: the largest of their outputs and gradients in "
    "training, over the largest value of each; parts: how many times as fast what runs fused is, by the "
    "operators' own times; allowed: how many times as fast the network would be if that took no time."
)


def _print(console: Console, title: str, columns: list[str], rows: list[list[str]]) -> None:
    if not rows:
        return
    table = Table(title=title, title_justify="left", title_style="bold")
    for n, column in enumerate(columns):
        table.add_column(column, justify="left" if n < 2 else "right")
    for cells in rows:
        table.add_row(*cells)
    console.print(table)


def print_result(console: Console, result: dict) -> None:
    _print(console, "Additive attention", *table(result, "attention"))
    _print(console, "FiLM", *table(result, "film"))
    _print(console, "FiLM, huge pages for PyTorch's own memory, too", *table(result, "huge pages"))
    _print(console, "Decoder loops", *table(result, "loop"))
    _print(console, "Attention against sequence length", *table(result, "sweep"))
    _print(console, "A small call of attention", *table(result, "small"))
    levels: dict[tuple[str, str], dict[str, str]] = {}
    for row in result["rows"]:
        if row["group"] == "levels":
            key = (row["case"].removeprefix("attention "), row["mode"])
            levels.setdefault(key, {})[row["contender"]] = number(row["rate"])
    names = list(dict.fromkeys(name for cells in levels.values() for name in cells))
    rows = [[*key, *(cells.get(name, "–") for name in names)] for key, cells in levels.items()]
    _print(console, "CPU levels, G tanh/s", ["B, Tq, Tk, D", "mode", *names], rows)
    for group, title in WIDE.items():
        _print(console, title, *table(result, group))
    _print_below_one(console, result)
    ceilings = [[name, f"{value:.1f}"] for name, value in result["ceilings"].items()]
    _print(console, "Measured ceilings, GB/s and G multiply-adds/s", ["ceiling", "rate"], ceilings)
    console.print(WIDE_LEGEND if any(summaries(result, group) for group in WIDE) else LEGEND)
    for line in result.get("sizes", ()):
        console.print(f"sizes: {line}", highlight=False, markup=False)
    for line in result.get("left_out", ()):
        console.print(f"left out: {line}", highlight=False, markup=False, style="yellow")
    console.print(describe(result["machine"]))


def _print_below_one(console: Console, result: dict) -> None:
    """The wide rows that eager PyTorch or torch.compile wins, the worst first."""
    found = [s for group in WIDE for s in summaries(result, group)]
    below = sorted((s for s in found if s["vs faster"] < 1), key=lambda s: s["vs faster"])
    cells = [[s["case"], s["mode"], s["model"], number(s["vs faster"], "×")] for s in below]
    _print(console, "Below 1", ["case", "mode", "model", "vs the faster of eager and compile"], cells)
    if found:
        console.print(f"{len(below)} of {len(found)} rows are below 1", highlight=False)


def print_targets(console: Console, result: dict) -> None:
    rows = [
        [t.what, f"{t.sign} {number(t.bound)}{t.unit}", number(t.measured, t.unit), t.verdict]
        for t in targets(result)
    ]
    _print(console, "Targets", ["target", "wanted", "measured", "verdict"], rows)


def print_comparison(console: Console, old: dict, new: dict) -> None:
    """Old and new side by side; above 1 the new one is faster. Eager and compile show the machine's part."""

    def times(result: dict) -> dict[tuple, dict]:
        return {(row["group"], row["case"], row["mode"], row["contender"]): row for row in result["rows"]}

    before, after = times(old), times(new)
    rows = []
    for key in (key for key in after if key in before):
        a, b = before[key], after[key]
        speed = a["milliseconds"] / b["milliseconds"]
        rows.append(
            [
                key[1],
                key[2],
                key[3],
                _milliseconds(a),
                _milliseconds(b),
                number(speed, "×"),
                _peak(a),
                _peak(b),
            ]
        )
    columns = ["case", "mode", "contender", "old ms", "new ms", "speed", "old MiB", "new MiB"]
    _print(console, "Compared with an earlier result", columns, rows)
    console.print(f"old: {describe(old['machine'])}\nnew: {describe(new['machine'])}")


def write_csv(result: dict, path: Path) -> None:
    columns = list(dict.fromkeys(key for row in result["rows"] for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(result["rows"])


def _markdown(columns: list[str], rows: list[list[str]]) -> list[str]:
    def line(cells):
        return "| " + " | ".join(cells) + " |"

    return [line(columns), line(["---", "---", *["---:"] * (len(columns) - 2)]), *map(line, rows), ""]


def update_readme(result: dict, pictures: Path) -> list[Path]:
    """Rewrites what stands between the two benchmark markers of the README and copies its pictures from a folder;
    returns the files to commit.

    Raises ValueError if the README does not hold the markers.
    """
    lines = [f"Measured by `{result['command']}` on {describe(result['machine'])}.", ""]
    (ROOT / "docs").mkdir(exist_ok=True)
    for name, text in PICTURES.items():
        shutil.copy(pictures / name, ROOT / "docs" / name)
        lines += [f"![{text}](docs/{name})", ""]
    for group in ("attention", "loop", "film", "huge pages"):
        columns, rows = table(result, group)
        lines += _markdown(columns, rows) if rows else []
    lines += [" ".join([LEGEND, *(f"{line}." for line in result["sizes"])]), ""]
    readme = ROOT / "README.md"
    text, count = README_SECTION.subn(lambda m: m[1] + "\n".join(lines) + m[2], readme.read_text())
    if count != 1:
        raise ValueError(
            f"{readme}: expected one section between the benchmarks:begin and :end markers, found {count}"
        )
    readme.write_text(text)
    return [readme, *(ROOT / "docs" / name for name in PICTURES)]
