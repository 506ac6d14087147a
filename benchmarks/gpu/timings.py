"""Main shapes: eager PyTorch, torch.compile, the compiled identity, CUDA C++ and Triton, on this GPU.

    python -m benchmarks.gpu.timings [--only NAME]

First the kernels and eager of every case, then, while time lasts, what Inductor has to compile. A kernel's results
are compared with float64 before it is timed; one that disagrees is timed all the same, and its row says so. Times
are those of the device: replays of a CUDA graph or, where a step cannot be captured, a queue filled before; the
median of rounds, contenders in alternation, so that a drifting clock meets all of them. What a call costs the CPU
is a column of its own. Rows go to result.json as they come: ``python -m benchmarks.roofline --result`` sets them
beside predictions.

Rates stand beside two ceilings: the bandwidth of x.clone(), measured in the same run, and the instruction bound of
the score loop, 32 tanh per clock and multiprocessor at the highest clock that the driver names.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Iterator
from functools import partial
from math import sqrt
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from .. import contenders, machine
from ..cases import MODES, AttentionCase, Case, FilmCase
from . import device as gpu
from .stages import OUTPUT_VARIABLE, record, rehearsing

TANH_PER_CLOCK = 32  # and multiprocessor: half a reciprocal per tanh on 16 lanes
CASES: tuple[Case, ...] = (
    AttentionCase(64, 512, 512, 256),
    AttentionCase(128, 10, 128, 1024),
    AttentionCase(64, 1, 1024, 512),
    FilmCase("NCHW", "memory", 64, 256, 112),
    AttentionCase(1, 1, 100_000, 256),
    FilmCase("BTC", "memory", 64, 1024, 4096),
    FilmCase("channels_last", "memory", 64, 256, 112),
)
REHEARSED: tuple[Case, ...] = (AttentionCase(2, 5, 64, 64), FilmCase("NCHW", "memory", 2, 8, 14))
DTYPES = (torch.float32, torch.bfloat16)
ROUNDS, LEAST_MILLISECONDS = 11, 2.0
LEFT_OUT = ("compile sum", "eager sum")  # one form of each: wherever both were measured it was the faster, or near


def inputs_of(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Inputs as of ``case`` and a gradient, made on the device: only their layout comes from the case."""
    with FakeTensorMode():
        layouts, grad = case.inputs(), case.grad_output()
    made = gpu.normal_like(layouts, dtype, seed=0)
    if isinstance(case, AttentionCase):
        made[3] /= sqrt(case.D)
    return made, gpu.normal_like([grad], dtype, seed=1)[0]


def functions_of(case: Case, compiling: bool) -> dict[str, contenders.Function]:
    """Contenders by name: those that Inductor compiles, or the others, with every usable backend."""
    every = contenders.of(case, compile=compiling)
    fused = every.pop(contenders.FUSED)
    kept = {name: f for name, f in every.items() if name not in LEFT_OUT}
    if compiling:
        return {name: f for name, f in kept.items() if name.startswith(("compile", contenders.IDENTITY))}
    return {name: partial(fused, backend=name) for name in gpu.usable()} | kept


def disagreements(case: Case, dtype: torch.dtype, functions: dict) -> dict[str, str]:
    """How backends are further from float64 than twice eager in the same dtype, and rounding."""
    few = dataclasses.replace(case, B=min(case.B, 2))
    inputs, grad = inputs_of(few, dtype)
    expected = contenders.reference(few, inputs, grad)

    def errors(name: str) -> list[float]:
        outputs = contenders.step(few, "training", name, functions[name], inputs, grad)()
        return [(got.double() - wanted).abs().max().item() for got, wanted in zip(outputs, expected, strict=True)]

    eager = [errors(name) for name in functions if name.startswith("eager")]
    found = {}
    for name in functions:
        if name in gpu.backends():
            try:
                ours = errors(name)
            except Exception as error:  # whatever a kernel does: its row says so, and the others are measured
                found[name] = gpu.brief(error)
                continue
            for n, (what, terms) in enumerate(few.summed_terms().items()):
                plain, size = max(e[n] for e in eager), expected[n].abs().max().item()
                floor = (torch.finfo(dtype).eps / 2 + torch.finfo(torch.float32).eps * sqrt(terms)) * size
                if not ours[n] <= 2 * plain + floor:
                    found[name] = f"{what}: {ours[n]:.3g} from float64, eager {plain:.3g}"
    return found


def measure(case: Case, dtype: torch.dtype, mode: str, functions: dict, wrong: dict[str, str]) -> list[dict]:
    """A row for each contender."""
    inputs, grad = inputs_of(case, dtype)
    shared = {"case": case.name, "dtype": str(dtype).removeprefix("torch."), "mode": mode, "unit": case.unit}
    runs, rows = {}, {}
    for name, function in functions.items():
        step = contenders.step(case, mode, name, function, inputs, grad)
        row = rows[name] = shared | {
            "contender": name,
            "milliseconds": None,
            "rate": None,
            "disagrees": wrong.get(name),
        }
        try:
            step()
            row["peak_bytes"] = gpu.peak_bytes(step)
            row["call_microseconds"] = gpu.call_microseconds(step)
            runs[name], row["timed_by"] = gpu.replayed(step, row["call_microseconds"])
            gpu.milliseconds(runs[name], 2)
        except Exception as error:  # want of memory, too: it is what is known of this contender
            runs.pop(name, None)
            row["why"] = gpu.brief(error)
            gpu.release()
    queued = {name: rows[name]["timed_by"].startswith("queue") for name in runs}
    repeats = {
        name: max(1, min(100, round(LEAST_MILLISECONDS / gpu.milliseconds(run, 3)))) for name, run in runs.items()
    }
    times = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            times[name].append(gpu.milliseconds(run, repeats[name], queued[name]))
    for name, found in times.items():
        median = statistics.median(found)
        spread = (max(found) - min(found)) / median
        rows[name] |= {"milliseconds": median, "spread": spread, "rate": rate(case, dtype, mode, name, median)}
    return list(rows.values())


def rate(case: Case, dtype: torch.dtype, mode: str, name: str, ms: float) -> float:
    """G tanh/s, or GB/s of what must be moved at least."""
    if isinstance(case, AttentionCase):
        return case.work(mode) / ms / 1e6
    moved = case.bytes_moved("forward" if name == contenders.CLONE else mode)
    return moved * dtype.itemsize / 4 / ms / 1e6


def bound(stamp: dict) -> float | None:
    """G tanh/s at the highest clock, if the driver tells it."""
    if stamp["max_sm_mhz"] is None or stamp["multiprocessors"] is None:
        return None
    return TANH_PER_CLOCK * stamp["multiprocessors"] * float(stamp["max_sm_mhz"]) / 1e3


HEADER = (
    f"{'case':30} {'dtype':9} {'mode':9} {'contender':10} {'ms':>10} {'call us':>9} {'rate':>9} {'':8} "
    "of the ceiling"
)


def line(row: dict, ceiling: float | None) -> str:
    """One line of the table."""
    start = f"{row['case']:30} {row['dtype']:9} {row['mode']:9} {row['contender']:10}"
    if row["milliseconds"] is None:
        return f"{start} {row['why']}"
    part = f"{row['rate'] / ceiling:7.0%}" if ceiling else f"{'-':>7}"
    wrong = f"  DISAGREES: {row['disagrees']}" if row["disagrees"] else ""
    return (
        f"{start} {row['milliseconds']:10.4f} {row['call_microseconds']:9.1f} {row['rate']:9.1f} {row['unit']:8} "
        f"{part}{wrong}"
    )


def plan(cases: tuple[Case, ...]) -> Iterator[tuple[Case, torch.dtype, bool]]:
    """Kernels of all cases before anything that Inductor compiles."""
    for compiling in (False, True):
        for dtype in DTYPES:
            for case in cases:
                yield case, dtype, compiling


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.timings", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", metavar="NAME", help="of the contenders")
    options = parser.parse_args()
    folder = Path(os.environ.get(OUTPUT_VARIABLE, machine.ROOT / "benchmarks" / "results" / "gpu"))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / (f"result_{options.only}.json" if options.only else "result.json")
    result = {"machine": gpu.stamp(), "rows": []}
    print(f"{result['machine']['gpu']}; {machine.describe(result['machine'])}\n{HEADER}", flush=True)
    clones: dict[tuple[Case, torch.dtype], float | None] = {}
    disagreed = 0
    for case, dtype, compiling in plan(REHEARSED if rehearsing() else CASES):
        functions = functions_of(case, compiling)
        wrong = {} if compiling else disagreements(case, dtype, functions)
        disagreed += len(wrong)
        if options.only:
            functions = {name: f for name, f in functions.items() if name == options.only}
        for mode in MODES:
            rows = measure(case, dtype, mode, functions, wrong)
            clones.update(((case, dtype), row["rate"]) for row in rows if row["contender"] == contenders.CLONE)
            ceiling = clones.get((case, dtype)) if isinstance(case, FilmCase) else bound(result["machine"])
            for row in rows:
                print(line(row, ceiling), flush=True)
                record(kind="timing", **row)
                result["rows"].append(row)
            file.write_text(json.dumps(result, indent=1))
    if os.environ.get("FUSEDATTN_AUTOTUNE") == "1" and "triton" in gpu.usable():
        record_tiles()
    return int(disagreed > 0)


def record_tiles() -> None:
    """What tuning chose, for the table of fusedattn/triton/_tiles.py."""
    from fusedattn.triton import _tiles

    for key, tile in _tiles._fastest.items():
        print(f"{key}: {tile}")
        record(kind="tile", key=str(key), tile=str(tile))


if __name__ == "__main__":
    sys.exit(main())
