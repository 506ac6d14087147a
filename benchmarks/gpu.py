"""``python -m benchmarks.gpu``: eager PyTorch, torch.compile, CUDA and Triton kernels on this NVIDIA GPU.

Results are compared with float64 first; status 1 where they disagree. Times are the median of CUDA events around
single steps, contenders in alternation, so that a drifting clock meets all of them. Prints a table and writes
result.json, stamped, to --output; ``python -m benchmarks.roofline --result`` sets it beside predictions.

Rates stand beside two ceilings: the bandwidth of x.clone(), measured in the same run, and the instruction bound of
the score loop, 32 tanh per clock and multiprocessor at the highest clock that the driver names.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
from functools import partial
from math import sqrt
from pathlib import Path

import torch

from fusedattn import _dispatch, info

from . import contenders, machine
from .cases import MODES, AttentionCase, Case, FilmCase

TANH_PER_CLOCK = 32  # and multiprocessor: half a reciprocal per tanh on 16 lanes
CASES: tuple[Case, ...] = (
    AttentionCase(64, 512, 512, 256),
    AttentionCase(128, 10, 128, 1024),
    AttentionCase(64, 1, 1024, 512),
    AttentionCase(1, 1, 100_000, 256),
    FilmCase("NCHW", "memory", 64, 256, 112),
    FilmCase("channels_last", "memory", 64, 256, 112),
    FilmCase("BTC", "memory", 64, 1024, 4096),
)
DTYPES = (torch.float32, torch.bfloat16)
BACKENDS = {"cuda": _dispatch.cuda_reasons, "triton": _dispatch.triton_reasons}  # contenders of these names
ROUNDS, LEAST_MILLISECONDS = 15, 2.0


def stamp() -> dict:
    query = "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    answer = subprocess.run(["nvidia-smi", query, "--format=csv,noheader,nounits"], capture_output=True, text=True)
    fields = answer.stdout.splitlines()[0].split(", ") if answer.returncode == 0 and answer.stdout else [None] * 4
    properties = torch.cuda.get_device_properties(0)
    return machine.stamp() | {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "gpu_memory": properties.total_memory,
        "cuda": torch.version.cuda,
        **dict(zip(("driver", "max_sm_mhz", "max_memory_mhz", "power_limit_watt"), fields, strict=True)),
    }


def to_gpu(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return t.to("cuda", dtype)  # keeps the strides of a dense tensor


def contenders_of(case: Case, compile: bool = True) -> dict[str, contenders.Function]:
    """Every contender by name, with each backend that can run instead of the one that a call would take."""
    found = contenders.of(case, compile)
    fused = found.pop(contenders.FUSED)
    usable = [name for name, reasons in BACKENDS.items() if not reasons(torch.device("cuda"), torch.float32)]
    return found | {name: partial(fused, backend=name) for name in usable}


def check_agreement(case: Case, dtype: torch.dtype, functions: dict) -> None:
    """Raises SystemExit unless the kernels' results are as near to float64 as eager's in the same dtype."""
    few = dataclasses.replace(case, B=min(case.B, 2))
    inputs, grad = [to_gpu(t, dtype) for t in few.inputs()], to_gpu(few.grad_output(), dtype)
    expected = contenders.reference(few, inputs, grad)
    results = {
        name: contenders.step(few, "training", name, functions[name], inputs, grad)()
        for name in functions
        if name in BACKENDS or name.startswith("eager")
    }
    errors = {
        name: [(got.double() - wanted).abs().max().item() for got, wanted in zip(outputs, expected, strict=True)]
        for name, outputs in results.items()
    }
    for n, (what, terms) in enumerate(few.summed_terms().items()):
        eager = max(found[n] for name, found in errors.items() if name not in BACKENDS)
        size = expected[n].abs().max().item()
        floor = (torch.finfo(dtype).eps / 2 + torch.finfo(torch.float32).eps * sqrt(terms)) * size
        for name in BACKENDS.keys() & errors.keys():
            if not errors[name][n] <= 2 * eager + floor:
                raise SystemExit(
                    f"{case.name}, {dtype}: {what} of {name} is {errors[name][n]:.3g} from float64, "
                    f"eager {eager:.3g}"
                )


def milliseconds(step, repeats: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeats


def measure(case: Case, dtype: torch.dtype, mode: str) -> list[dict]:
    inputs, grad = [to_gpu(t, dtype) for t in case.inputs()], to_gpu(case.grad_output(), dtype)
    steps, peaks, rows = {}, {}, []
    for name, function in contenders_of(case).items():
        step = contenders.step(case, mode, name, function, inputs, grad)
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        try:
            step()
            milliseconds(step, 2)
        except torch.OutOfMemoryError:
            rows.append({"contender": name, "milliseconds": None, "why": "out of memory"})
            continue
        finally:
            torch.cuda.empty_cache()
        steps[name], peaks[name] = step, torch.cuda.max_memory_allocated() - held
    repeats = {name: max(1, round(LEAST_MILLISECONDS / milliseconds(step, 3))) for name, step in steps.items()}
    times = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            times[name].append(milliseconds(step, repeats[name]))
    for name, found in times.items():
        rows.append(
            {
                "contender": name,
                "milliseconds": statistics.median(found),
                "spread": (max(found) - min(found)) / statistics.median(found),
                "rate": rate(case, dtype, mode, name, statistics.median(found)),
                "peak_bytes": peaks[name],
            }
        )
    shared = {"case": case.name, "dtype": str(dtype).removeprefix("torch."), "mode": mode, "unit": case.unit}
    return [shared | row for row in rows]


def rate(case: Case, dtype: torch.dtype, mode: str, name: str, ms: float) -> float:
    """G tanh/s, or GB/s of what must be moved at least."""
    if isinstance(case, AttentionCase):
        return case.work(mode) / ms / 1e6
    moved = case.bytes_moved("forward" if name == contenders.CLONE else mode)
    return moved * dtype.itemsize / 4 / ms / 1e6


def fastest(rows: list[dict], prefix: str) -> float | None:
    return min(
        (r["milliseconds"] for r in rows if r["contender"].startswith(prefix) and r["milliseconds"]), default=None
    )


def line(fused: dict, rows: list[dict], bound: float | None) -> str:
    """One line of the table: a backend, how many times faster than eager and compile, and of which ceiling."""
    if fused["milliseconds"] is None:
        return f"{fused['case']:36} {fused['dtype']:9} {fused['mode']:9} {fused['contender']:7} {fused['why']}"
    ratios = ""
    for prefix in ("eager", "compile"):
        other = fastest(rows, prefix)
        ratios += f"{'-' if other is None else format(other / fused['milliseconds'], '.1f'):>9}"
    clone = next((r["rate"] for r in rows if r["contender"] == contenders.CLONE), None)
    ceiling = clone or bound
    part = f"{fused['rate'] / ceiling:6.0%} of {'clone' if clone else 'bound'}" if ceiling else ""
    return (
        f"{fused['case']:36} {fused['dtype']:9} {fused['mode']:9} {fused['contender']:7} "
        f"{fused['milliseconds']:10.4f} {fused['rate']:9.1f} {fused['unit']:9}{ratios} {part}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device\n" + info.report())
    result = {"machine": stamp(), "rows": []}
    clock = result["machine"]["max_sm_mhz"]
    bound = None
    if clock:
        bound = TANH_PER_CLOCK * result["machine"]["multiprocessors"] * float(clock) / 1e3  # G tanh/s
    print(
        f"{result['machine']['gpu']}, driver {result['machine']['driver']}; {machine.describe(result['machine'])}"
    )
    print(
        f"{'case':36} {'dtype':9} {'mode':9} {'backend':7} {'ms':>10} {'rate':>9} {'':9}"
        f"{'x eager':>9}{'x comp.':>9}"
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        for dtype in DTYPES:
            check_agreement(case, dtype, contenders_of(case, compile=False))
            for mode in MODES:
                rows = measure(case, dtype, mode)
                result["rows"] += rows
                for row in rows:
                    if row["contender"] in BACKENDS:
                        print(line(row, rows, bound), flush=True)
                (arguments.output / "result.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
