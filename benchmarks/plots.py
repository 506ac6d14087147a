"""Plots of a result, as PNG files."""

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, no display
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from .machine import describe  # noqa: E402
from .summary import MIB, summaries  # noqa: E402

COLORS = {"eager": "#8c8c8c", "compile": "#e08a2e", "fused": "#2868c8"}


def _save(figure, result: dict, path: Path) -> Path:
    figure.text(0.01, 0.005, describe(result["machine"]), fontsize=6, color="#555555")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _bars(axes: Axes, found: list[dict], title: str) -> None:
    labels = [s["case"].partition(" ")[2] for s in found]
    for offset, rival in ((0.2, "eager"), (-0.2, "compile")):
        places = [n + offset for n in range(len(found))]
        bars = axes.barh(places, [s.get(f"vs {rival}", 0) for s in found], 0.38, color=COLORS[rival])
        bars.set_label(f"vs {rival}")
        axes.bar_label(bars, fmt="%.3g×", padding=2, fontsize=7)
    axes.set_yticks(range(len(found)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.margins(x=0.15)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("speed-up of fusedattn")
    axes.legend(fontsize=8)


def speedups(result: dict, group: str, path: Path) -> Path | None:
    found = summaries(result, group)
    if not found:
        return None
    rows = len(found) / 2
    figure, panels = plt.subplots(1, 2, figsize=(13, 1.5 + 0.6 * rows))
    for axes, mode in zip(panels, ("forward", "training"), strict=True):
        _bars(axes, [s for s in found if s["mode"] == mode], f"{group}, {mode}")
    return _save(figure, result, path)


def lengths(result: dict, path: Path) -> Path | None:
    """Time and peak memory against sequence length; a line ends where the next step would need too much."""
    found = summaries(result, "sweep")
    if not found:
        return None
    modes = list(dict.fromkeys(s["mode"] for s in found))
    figure, panels = plt.subplots(len(modes), 2, figsize=(11, 4 * len(modes)), squeeze=False)
    values: list[tuple[str, Callable]] = [
        ("time, ms", lambda row: row["milliseconds"]),
        (
            "peak memory beyond results, MiB",
            lambda row: row.get("peak_bytes") and max(row["peak_bytes"] / MIB, 0.1),
        ),
    ]
    for row_of_axes, mode in zip(panels, modes, strict=True):
        for axes, (label, value) in zip(row_of_axes, values, strict=True):
            for kind, color in COLORS.items():
                points = [(s["fused"]["length"], value(s[kind])) for s in found if s["mode"] == mode and s[kind]]
                points = [point for point in points if point[1]]
                if points:
                    axes.plot(*zip(*points, strict=True), marker="o", color=color, label=kind)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xlabel("Tq = Tk (B = 1, D = 256)")
            axes.set_ylabel(label)
            axes.set_title(mode, fontsize=10)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
    return _save(figure, result, path)


def write(result: dict, folder: Path) -> list[Path]:
    paths = [
        speedups(result, "attention", folder / "attention_speedup.png"),
        speedups(result, "film", folder / "film_speedup.png"),
        lengths(result, folder / "sequence_length.png"),
    ]
    return [path for path in paths if path is not None]
