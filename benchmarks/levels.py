"""fusedattn's time at each CPU level. The level is read once per process, so each has its own."""

import json
import os
import statistics
import subprocess
import sys

import torch

from fusedattn._library import cpu_capability

from . import contenders, measure
from .cases import ATTENTION, MODES, Case, from_json, to_json
from .machine import ROOT

LEVELS = ("default", "avx2", "avx512")


def rows(rounds: int, cases: tuple[Case, ...] = ATTENTION) -> list[dict]:
    """Rows of group "levels", the contender being the level. Processes alternate, as contenders do."""
    levels = LEVELS[: LEVELS.index(cpu_capability()) + 1]
    request = json.dumps({"threads": torch.get_num_threads(), "cases": [to_json(case) for case in cases]})
    found: dict[tuple, list[dict]] = {}
    for n in range(rounds):
        for level in levels if n % 2 == 0 else reversed(levels):
            environment = {**os.environ, "FUSEDATTN_CPU_CAPABILITY": level}
            command = [sys.executable, "-m", "benchmarks.levels"]
            done = subprocess.run(
                command,
                input=request,
                cwd=ROOT,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                check=True,
            )
            for row in json.loads(done.stdout):
                found.setdefault((row["case"], row["mode"], level), []).append(row)
    merged = []
    for (_, _, level), several in found.items():
        row = {**several[0], "contender": level, "rounds": sum(r["rounds"] for r in several)}
        row["milliseconds"] = statistics.median(r["milliseconds"] for r in several)
        row["fastest"] = min(r["fastest"] for r in several)
        row["rate"] = statistics.median(r["rate"] for r in several)
        merged.append(row)
    return merged


def main() -> None:
    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    found = []
    for fields in request["cases"]:
        case = from_json(fields)
        fused = {contenders.FUSED: contenders.of(case, compile=False)[contenders.FUSED]}
        found += measure.time_case("levels", case, fused, MODES, rounds=5, min_seconds=0.02)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
