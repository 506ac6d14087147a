"""Pictures of a result, as PNG files: ratios, parts of the ceiling, and growth with the sequence length."""

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, no display
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402
from matplotlib.ticker import NullLocator, PercentFormatter, ScalarFormatter  # noqa: E402

from . import contenders  # noqa: E402
from .cases import MODES  # noqa: E402
from .machine import MIB, describe  # noqa: E402
from .report import WIDE, number  # noqa: E402
from .summary import summaries  # noqa: E402

# Okabe and Ito's colours: whatever one's colour vision, they can be told apart
COLORS = {"eager": "#999999", "compile": "#E69F00", "identity": "#CC79A7", "fused": "#0072B2"}
NAMES = {
    "eager": "eager PyTorch",
    "compile": "torch.compile",
    "identity": "identity, compiled",
    "fused": "fusedattn",
}
LIMITS = {"bytes": ("#56B4E9", "bound by bytes"), "compute": ("#009E73", "bound by arithmetic")}
HEADS = {  # of cases, by group and size
    ("attention", None): "Attention (B, Tq, Tk, D)",
    ("loop", None): "Decoder loops, B, Tk, D",
    ("film", "cache"): "FiLM in the cache, x",
    ("film", "memory"): "FiLM beyond the cache, x",
    ("small", None): "A small call (B, Tq, Tk, D)",
    **{(group, None): title for group, title in WIDE.items()},
}
TITLES = {"forward": "Forward", "training": "Training step: forward and backward"}
RATIOS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
Panels = list[tuple[Axes, list[tuple[float, dict]]]]


def _panels(result: dict, groups: tuple[str, ...], bars: Callable[[dict], int]) -> tuple[Figure, Panels]:
    """A panel per mode with so many bars for each case, below the head of its kind; with each panel the cases'
    summaries and the middle of their places on the axis, of which a bar takes 1."""
    ticks: list[tuple[float, str, str]] = []
    places: dict[tuple[str, str], float] = {}
    y = 0.0
    for (group, size), head in HEADS.items():
        found = {s["case"]: s for s in summaries(result, group) if group in groups and s["size"] == size}
        if found:
            ticks.append((y, head, "bold"))
            y += 1
            for case, s in found.items():
                height = bars(s) + 0.5
                places[group, case] = y + height / 2
                ticks.append((places[group, case], case.partition(" ")[2], "normal"))
                y += height
            y += 1
    figure, row = plt.subplots(
        1, len(MODES), figsize=(12, 1.3 + 0.175 * y), sharex=True, sharey=True, layout="constrained"
    )
    panels = []
    for axes, mode in zip(row, MODES, strict=True):
        axes.set_title(TITLES[mode], loc="left", fontsize=10)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(left=False, labelsize=9)
        axes.grid(axis="x", color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.axvline(1, color="black", linewidth=0.9)
        found = [(group, s) for group in groups for s in summaries(result, group) if s["mode"] == mode]
        panels.append((axes, [(places[group, s["case"]], s) for group, s in found]))
    row[0].set_yticks([y for y, *_ in ticks], [text for _, text, _ in ticks])
    for label, (*_, weight) in zip(row[0].get_yticklabels(), ticks, strict=True):
        label.set_fontweight(weight)
    row[0].set_ylim(y - 0.7, -0.8)
    return figure, panels


def _bar(axes: Axes, start: float, end: float, y: float, color: str, text: str) -> None:
    """A horizontal bar with its figure at the end."""
    axes.barh(y, end - start, 0.9, left=start, color=color)
    side = 1 if end >= start else -1
    axes.annotate(
        text,
        (end, y),
        (4 * side, 0),
        textcoords="offset points",
        ha="left" if side > 0 else "right",
        va="center",
        fontsize=8,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
    )


def _save(figure: Figure, result: dict, title: str, keys: list, path: Path) -> Path:
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    if keys:
        figure.legend(handles=keys, loc="outside upper right", ncols=len(keys), frameon=False, fontsize=10)
    figure.supxlabel(describe(result["machine"]), x=0.01, ha="left", fontsize=8, color="#555555")
    figure.savefig(path, dpi=110, facecolor="white")
    plt.close(figure)
    return path


def ratios(result: dict, path: Path) -> Path:
    """How many times faster fusedattn is than each rival, case by case."""

    def present(s: dict) -> dict[str, float]:
        return {rival: s[f"vs {rival}"] for rival in contenders.RIVALS if f"vs {rival}" in s}

    figure, panels = _panels(result, ("attention", "loop", "film", "small"), lambda s: len(present(s)))
    found = [1.0]
    for axes, cases in panels:
        for y, s in cases:
            for n, (rival, ratio) in enumerate(present(s).items()):
                place = y + n - (len(present(s)) - 1) / 2
                _bar(axes, 1, ratio, place, COLORS[rival], number(ratio, "×"))
                found.append(ratio)
    _scale_ratios(panels, found)
    keys = [Patch(color=COLORS[rival], label=f"against {NAMES[rival]}") for rival in contenders.RIVALS]
    return _save(figure, result, "How many times as fast fusedattn is", keys, path)


def _scale_ratios(panels: Panels, ratios: list[float]) -> None:
    """A logarithmic scale that all panels share, with room for the figures at the bars' ends."""
    low, high = min(0.7, min(ratios) / 1.5), max(1.5, max(ratios) * 1.7)
    for axes, _ in panels:
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.set_xticks([tick for tick in RATIOS if low <= tick <= high])
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}×")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("times as fast as the rival, logarithmic", fontsize=9)


def wide(result: dict, path: Path) -> Path:
    """How many times faster fusedattn is than the faster of eager PyTorch and torch.compile, at many sizes."""
    figure, panels = _panels(result, tuple(WIDE), lambda s: 1)
    colors = {True: ("#0072B2", "fusedattn is faster"), False: ("#D55E00", "fusedattn is slower")}
    for axes, cases in panels:
        for y, s in cases:
            ratio = s["vs faster"]
            _bar(axes, 1, ratio, y, colors[ratio >= 1][0], number(ratio, "×"))
    _scale_ratios(panels, [s["vs faster"] for _, cases in panels for _, s in cases])
    keys = [Patch(color=color, label=label) for color, label in colors.values()]
    title = "How many times as fast as the faster of eager PyTorch and torch.compile"
    return _save(figure, result, title, keys, path)


def ceilings(result: dict, path: Path) -> Path:
    """Which part of what the machine can do at best each case reaches, and torch.compile beside it."""
    figure, panels = _panels(result, ("attention", "film"), lambda s: 1)
    furthest = 1.0
    for axes, cases in panels:
        for y, s in cases:
            part = s.get("ceiling")
            if part:
                _bar(axes, 0, part, y, LIMITS[s["fused"]["limit"]][0], f"{part:.0%}")
                axes.plot([part / s["vs compile"]] * 2, [y - 0.45, y + 0.45], color="black", linewidth=2)
                furthest = max(furthest, part)
        axes.set_xlabel("of the ceiling that was measured in the same run", fontsize=9)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
    panels[0][0].set_xlim(0, furthest + 0.1)
    keys = [Patch(color=color, label=label) for color, label in LIMITS.values()]
    tick = {"marker": "|", "markersize": 11, "markeredgewidth": 2, "linestyle": "none", "color": "black"}
    keys.append(Line2D([], [], label="where torch.compile is", **tick))
    return _save(figure, result, "How near fusedattn comes to what the machine can do", keys, path)


def lengths(result: dict, path: Path) -> Path:
    """Time and peak memory against sequence length; a line ends where the next step would need too much."""
    found = summaries(result, "sweep")
    modes = list(dict.fromkeys(s["mode"] for s in found))
    figure, rows = plt.subplots(len(modes), 2, figsize=(12, 4 * len(modes)), squeeze=False, layout="constrained")
    for (left, right), mode in zip(rows, modes, strict=True):
        for kind, color in COLORS.items():
            steps = [s[kind] | {"length": s["length"]} for s in found if s["mode"] == mode and s[kind]]
            _line(left, kind, color, [(s["length"], s["milliseconds"]) for s in steps])
            peaks = [(s["length"], s["peak_bytes"] / MIB) for s in steps if s.get("peak_bytes") is not None]
            _line(right, kind, color, [(length, max(peak, 1)) for length, peak in peaks])
        for axes, what in ((left, "time, ms"), (right, "peak memory beyond results, MiB")):
            axes.set_title(f"{mode.capitalize()}: {what}", loc="left", fontsize=10)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.xaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
            axes.set_xlabel("Tq = Tk, with B = 1 and D = 256", fontsize=9)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="#dddddd", linewidth=0.7)
            axes.margins(x=0.25)
    return _save(figure, result, "Attention against sequence length", [], path)


def _line(axes: Axes, kind: str, color: str, points: list[tuple[float, float]]) -> None:
    """A line with its name at the end."""
    if points:
        axes.plot(*zip(*points, strict=True), marker="o", color=color)
        axes.annotate(
            NAMES[kind], points[-1], (6, 0), textcoords="offset points", va="center", color=color, fontsize=9
        )


def write(result: dict, folder: Path) -> list[Path]:
    """Every picture that the result has something for, as PNG files in the folder."""
    paths = []
    if summaries(result, "attention") or summaries(result, "film"):
        paths += [ratios(result, folder / "ratios.png"), ceilings(result, folder / "ceilings.png")]
    if any(summaries(result, group) for group in WIDE):
        paths.append(wide(result, folder / "wide.png"))
    if len({s["case"] for s in summaries(result, "sweep")}) > 2:
        paths.append(lengths(result, folder / "lengths.png"))
    return paths
