"""fusedattn's time at each CPU level. The level is read once per process, so each has its own."""

import statistics

from fusedattn._library import cpu_capability

from . import contenders, fresh, measure
from .cases import ATTENTION, Case

LEVELS = ("default", "avx2", "avx512")


def rows(rounds: int, cases: tuple[Case, ...] = ATTENTION) -> list[dict]:
    """Rows of group "levels", the contender being the level. Processes alternate, as contenders do."""
    levels = LEVELS[: LEVELS.index(cpu_capability()) + 1]
    found: dict[tuple, list[dict]] = {}
    for n in range(rounds):
        for level in levels if n % 2 == 0 else reversed(levels):
            for row in fresh.call(_rows, cases, environment={"FUSEDATTN_CPU_CAPABILITY": level}):
                found.setdefault((row["case"], row["mode"], level), []).append(row)
    merged = []
    for (_, _, level), several in found.items():
        row = {**several[0], "contender": level, "rounds": sum(r["rounds"] for r in several)}
        row["milliseconds"] = statistics.median(r["milliseconds"] for r in several)
        row["fastest"] = min(r["fastest"] for r in several)
        row["rate"] = statistics.median(r["rate"] for r in several)
        merged.append(row)
    return merged


def _rows(cases: tuple[Case, ...]) -> list[dict]:
    jobs = [
        measure.Job("levels", case, names=(contenders.FUSED,), check=False, min_seconds=0.02) for case in cases
    ]
    return [row for job in jobs for row in measure.time_case(job)]
