"""How long the kernels should take on paper: `python -m benchmarks.roofline`.

A kernel takes at least as long as its bytes at the memory's rate, and at least as long as its instructions at the
multiprocessors' rates: 4 schedulers issue one instruction of 32 threads each per clock, 16 lanes compute special
functions, 64 or 128 compute float32. Slots, MUFU and FP32 instructions per tanh come from the gates
(benchmarks/gates/counts.json), the rates from the vendor's data sheets; nothing here is measured. Latency,
staging, the softmax and the caches are left out: a prediction is a bound that real kernels approach from above.

    a step     max(bytes / bandwidth, tanh x max(slots / 128, MUFU / 16, FP32 / lanes) / multiprocessors / clock)
    products   with Dv = D the product of weights and values adds one multiply-add per tanh; backward has two more
    tiles      queries and keys count in whole tiles, and blocks in whole rounds of the multiprocessors; few
               queries have kernels of their own, counted with all the queries that they were compiled for
    Triton     moves packed exponentials and scores through memory too, and its backward pass runs twice
    kernels    of several that could take a case, the one with the least arithmetic does

Beside it stands what plain PyTorch cannot avoid: eager moves the (B, Tq, Tk, D) tensor several times; a compiled
forward pass moves inputs alone, but evaluates libdevice's tanh. Below an H100's table: what is aimed at there, and
which part of the bound that takes (against eager and compile, as if those reached their own bounds). Streaming
kernels have a table of their own (benchmarks/streams.py).
"""

import argparse
import json
import sys
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from rich.console import Console
from rich.table import Table

from . import streams
from .cases import ATTENTION, MODES, AttentionCase, FilmCase
from .devices import DEVICES, ISSUE_LANES, MUFU_LANES, Device
from .gates.kernel import Kernel
from .gates.thresholds import direction, few_queries
from .machine import ROOT

COUNTS = ROOT / "benchmarks" / "gates" / "counts.json"
FEW_QUERIES = 4  # Triton's kernel for few queries, one a program, takes up to as many


@dataclass(frozen=True)
class Cost:
    """Instructions per tanh."""

    slots: float
    mufu: float
    fp32: float

    @classmethod
    def of(cls, kernel: Kernel) -> "Cost":
        return cls(kernel.slots, kernel.mufu, kernel.fp32)

    def seconds(self, tanh: float, device: Device) -> float:
        clocks = max(self.slots / ISSUE_LANES, self.mufu / MUFU_LANES, self.fp32 / device.fp32_lanes)
        return tanh * clocks / (device.multiprocessors * device.clock)

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.slots + other.slots, self.mufu + other.mufu, self.fp32 + other.fp32)


PRODUCT = Cost(slots=1, mufu=0, fp32=1)
LIBDEVICE_TANH = Cost(slots=19.4, mufu=2, fp32=11)  # of a disassembled loop of w tanh(q + k)

LARGE = AttentionCase(64, 512, 512, 256)  # fills a GPU, as four batches do not
FILM = FilmCase("NCHW", "memory", 64, 256, 112)  # as benchmarks/gpu/ measures it: no cache holds it
CASES = (LARGE, *ATTENTION, FILM)


@dataclass(frozen=True)
class Loop:
    """A score loop, and how its kernel cuts a problem into blocks."""

    cost: Cost
    queries: int  # of a tile; of a kernel for few queries, the most that it takes
    keys: int
    channels: int | None = None  # of a block, where blocks share the channels
    splits_keys: bool = False  # blocks share the keys
    few: bool = False  # has tiles of as many queries as there are, and keys split over all multiprocessors

    def takes(self, case: AttentionCase) -> bool:
        return not self.few or case.Tq <= self.queries

    def tanh(self, case: AttentionCase) -> float:
        """Scored elements, tiles filled up."""
        if self.few:
            return case.work("forward")
        return case.B * _up(case.Tq, self.queries) * _up(case.Tk, self.keys) * case.D

    def rounds(self, case: AttentionCase, multiprocessors: int) -> float:
        """How much longer than an even share for every multiprocessor: the last round of blocks is not full."""
        if self.few:
            return 1.0
        blocks = case.B * ceil(case.Tq / self.queries)
        if self.channels:
            blocks *= ceil(case.D / self.channels)
        if self.splits_keys:
            blocks *= ceil(case.Tk / self.keys)
        return ceil(blocks / multiprocessors) * multiprocessors / blocks

    def seconds(self, case: AttentionCase, device: Device, products: int) -> float:
        cost = self.cost
        for _ in range(products):
            cost += PRODUCT
        return self.rounds(case, device.multiprocessors) * cost.seconds(self.tanh(case), device)


def _up(n: int, tile: int) -> int:
    return ceil(n / tile) * tile


class CountsError(LookupError):
    """The gates have not counted the kernel that a prediction needs."""


@dataclass(frozen=True)
class Counts:
    """Kernels of one backend, as `make gates` stored them."""

    backend: str
    kernels: tuple[Kernel, ...]

    @classmethod
    def load(cls, backend: str, path: Path = COUNTS) -> "Counts":
        kernels = (Kernel.from_json(k) for k in json.loads(path.read_text())["kernels"])
        return cls(backend, tuple(k for k in kernels if k.section == backend))

    def loops(self, arch: str, which: str, dtype: str) -> list[Loop]:
        """Score loops of the forward or backward pass. Tiles: csrc/additive_attention/cuda_problem.cuh and
        cuda_bwd.cuh; Triton's kernels have them in their names."""
        found = [
            k
            for k in self.kernels
            if k.op == "additive_attention" and k.arch == arch and k.slots is not None and k.dtype == dtype
            if direction(k) == which and ("bwd" in k.name) == (which == "backward")
        ]
        if not found:
            raise CountsError(f"no {which} score loop of {self.backend} for {arch}; run make gates")
        if self.backend == "Triton" and which == "backward":
            # Its cheapest form makes dk, its dearest dq and dw; 32 is what the other side is padded to.
            dearest, cheapest = (pick(found, key=lambda k: k.slots) for pick in (max, min))
            rows, channels = dearest.tile
            return [Loop(Cost.of(dearest) + Cost.of(cheapest), rows, 32, channels, splits_keys=True)]
        return [self._loop(k, which) for k in found]

    def _loop(self, kernel: Kernel, which: str) -> Loop:
        cost, queries = Cost.of(kernel), few_queries(kernel)
        if queries is not None:
            return Loop(cost, queries if self.backend == "CUDA C++" else FEW_QUERIES, 64, few=True)
        if self.backend == "Triton":
            return Loop(cost, *kernel.tile[:2], splits_keys=True)
        return Loop(cost, 64, 64, channels=32 if which == "backward" else None)

    def seconds(self, case: AttentionCase, device: Device, which: str, dtype: str, products: int) -> float:
        """Arithmetic of the fastest kernel; for few queries, that of the form for as many or the next more."""
        loops = [loop for loop in self.loops(device.arch, which, dtype) if loop.takes(case)]
        few = sorted((loop for loop in loops if loop.few), key=lambda loop: loop.queries)[:1]
        tiled = [loop for loop in loops if not loop.few]
        return min(loop.seconds(case, device, products) for loop in few + tiled)

    def scratch(self, case: AttentionCase, mode: str) -> float:
        """Bytes that the kernels move beyond inputs and outputs."""
        if self.backend != "Triton" or (case.Tq <= FEW_QUERIES and mode == "forward"):
            return 0
        rows, pairs = case.B * (case.Tq + case.Tk) * case.D, case.B * case.Tq * case.Tk
        # Written and read once each: packed rows, scores; backward packs again and has g and its transpose.
        return 2 * 4 * ((rows + pairs) if mode == "forward" else 2 * rows + 4 * pairs)


@dataclass(frozen=True)
class Prediction:
    seconds: float
    limit: str  # "memory" or "arithmetic"
    eager: float
    compiled: float


def _slower(memory: float, arithmetic: float) -> tuple[float, str]:
    return (memory, "memory") if memory >= arithmetic else (arithmetic, "arithmetic")


def attention(case: AttentionCase, mode: str, device: Device, counts: Counts, dtype="float32") -> Prediction:
    arithmetic = counts.seconds(case, device, "forward", dtype, products=1)
    if mode == "training":
        arithmetic += counts.seconds(case, device, "backward", dtype, products=2)
        if case.recomputes_scores:
            arithmetic += counts.seconds(case, device, "forward", dtype, products=0)
    inputs = _bytes(case.bytes_moved(mode), dtype) / device.bandwidth
    seconds, limit = _slower(inputs + counts.scratch(case, mode) / device.bandwidth, arithmetic)
    tensor = _bytes(4 * case.work(mode), dtype) / device.bandwidth
    # Eager forward: the sum is written and read, tanh written and read. Backward: the gradient of tanh written and
    # read, tanh read for it and for dw, the gradient of the sum written, read for dq and read for dk.
    eager = tensor * (4 if mode == "forward" else 11)
    # Compiled: nothing of that size forward; backward the gradient of the sum is written once and read twice.
    passes = 1 if mode == "forward" else 2
    evaluated = passes * LIBDEVICE_TANH.seconds(case.work(mode), device)
    compiled = max(inputs + (3 * tensor if mode == "training" else 0), evaluated)
    return Prediction(seconds, limit, max(eager, inputs), compiled)


def film(case: FilmCase, mode: str, device: Device, dtype="float32") -> Prediction:
    tensor = _bytes(case.x_bytes(), dtype) / device.bandwidth
    # Eager: gamma x, then + beta, each read and written. Backward: dx 2, dy x 3, its sum 1, the sum of dy 1.
    eager = tensor * (4 if mode == "forward" else 11)
    fused = _bytes(case.bytes_moved(mode), dtype) / device.bandwidth
    return Prediction(fused, "memory", eager, fused)


def _bytes(of_float32: float, dtype: str) -> float:
    return of_float32 if dtype == "float32" else of_float32 / 2


def predict(case: AttentionCase | FilmCase, mode: str, device: Device, counts: Counts, dtype: str) -> Prediction:
    if isinstance(case, FilmCase):
        return film(case, mode, device, dtype)
    return attention(case, mode, device, counts, dtype)


def rate(case: AttentionCase | FilmCase, mode: str, seconds: float, dtype: str) -> float:
    """G tanh/s or GB/s, as the benchmarks report it."""
    work = case.work(mode) if isinstance(case, AttentionCase) else _bytes(case.work(mode), dtype)
    return work / seconds / 1e9


def measured(result: dict, contender: str, dtype: str) -> dict[tuple[str, str], float]:
    """Seconds by case and mode of a GPU benchmark's rows of this contender and dtype."""
    return {
        (row["case"], row["mode"]): row["milliseconds"] / 1e3
        for row in result["rows"]
        if row["contender"] == contender and row["dtype"] == dtype and row["milliseconds"]
    }


def device_of(result: dict) -> Device | None:
    """The device that a result was measured on, by the name that its stamp gives."""
    gpu = str(result["machine"].get("gpu", ""))
    return next((device for device in DEVICES if device.name in gpu), None)


CONTENDERS = {"CUDA C++": "cuda", "Triton": "triton"}  # as benchmarks/gpu/ names them


@dataclass(frozen=True)
class Aim:
    """What a kernel is to reach on an H100, and how near the bound it has to come for that."""

    what: str
    case: AttentionCase
    mode: str
    of_bound: float = 0  # least part of the bound itself
    tanh_per_clock: float = 0  # and multiprocessor
    vs_eager: float = 0
    vs_compiled: float = 0

    def needed(self, p: Prediction, device: Device) -> float:
        """The part of the bound, above 1 where the bound itself falls short."""
        per_clock = self.case.work(self.mode) / p.seconds / device.clock / device.multiprocessors
        return max(
            self.of_bound,
            self.tanh_per_clock / per_clock,
            self.vs_eager * p.seconds / p.eager,
            self.vs_compiled * p.seconds / p.compiled,
        )


MANY, DECODE = AttentionCase(128, 10, 128, 1024), AttentionCase(64, 1, 1024, 512)
AIMS = (
    Aim("70% of 32 tanh per clock", LARGE, "forward", tanh_per_clock=0.7 * 32),
    Aim("70% of 32 tanh per clock", MANY, "forward", tanh_per_clock=0.7 * 32),
    Aim("60% of its bound", LARGE, "training", of_bound=0.6),
    Aim("85% of copy bandwidth", DECODE, "forward", of_bound=0.85),
    Aim("30 x eager", LARGE, "forward", vs_eager=30),
    Aim("4 x compile", LARGE, "forward", vs_compiled=4),
    Aim("4 x compile", LARGE, "training", vs_compiled=4),
)


def print_aims(console: Console, device: Device, counts: Counts, dtype: str) -> None:
    for aim in AIMS:
        needed = aim.needed(attention(aim.case, aim.mode, device, counts, dtype), device)
        verdict = f"needs {needed:.0%} of the bound" if needed <= 1 else f"out of reach: {needed:.2f} of the bound"
        shape = aim.case.name.removeprefix("attention ")
        console.print(f"  aim {aim.what}, {shape} {aim.mode}: {verdict}", highlight=False)


def print_device(console: Console, device: Device, counts: Counts, dtype: str, seen: dict) -> None:
    title = (
        f"{device.name}: {device.multiprocessors} multiprocessors at {device.clock / 1e9:.3g} GHz, "
        f"{device.bandwidth / 1e12:.3g} TB/s; {counts.backend}, {dtype}"
    )
    table = Table(title=title, title_justify="left", title_style="bold")
    columns = [
        "case",
        "mode",
        "bound by",
        "predicted ms",
        "G/s",
        "tanh/clk/SM",
        "eager ms",
        "compile ms",
    ]
    columns += ["vs eager", "vs compile"] + (["measured ms", "of predicted"] if seen else [])
    for n, column in enumerate(columns):
        table.add_column(column, justify="left" if n < 3 else "right", no_wrap=n < 3)
    for case in CASES:
        for mode in MODES:
            p = predict(case, mode, device, counts, dtype)
            per_clock = "–"
            if isinstance(case, AttentionCase):
                per_clock = f"{case.work(mode) / p.seconds / device.clock / device.multiprocessors:.1f}"
            cells = [
                case.name.removeprefix("attention "),
                mode,
                p.limit,
                f"{1e3 * p.seconds:.3g}",
                f"{rate(case, mode, p.seconds, dtype):.0f}",
            ]
            cells += [per_clock, f"{1e3 * p.eager:.3g}", f"{1e3 * p.compiled:.3g}"]
            cells += [f"{p.eager / p.seconds:.1f}×", f"{p.compiled / p.seconds:.1f}×"]
            if seen:
                time = seen.get((case.name, mode))
                cells += [f"{1e3 * time:.3g}", f"{p.seconds / time:.0%}"] if time else ["–", "–"]
            table.add_row(*cells)
    console.print(table)
    if (below := streams.table(counts.kernels, device, dtype)) is not None:
        console.print(below)
    if device.name == "H100":
        print_aims(console, device, counts, dtype)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--backend", choices=CONTENDERS, default="CUDA C++")
    parser.add_argument("--result", type=Path, help="a GPU benchmark's result.json, shown beside the prediction")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    console = Console() if sys.stdout.isatty() else Console(width=170)
    counts = Counts.load(options.backend)
    devices, seen = DEVICES, {}
    if options.result:
        result = json.loads(options.result.read_text())
        device = device_of(result)
        if device is None:
            names = ", ".join(d.name for d in DEVICES)
            parser.error(
                f"{options.result}: measured on {result['machine'].get('gpu')!r}, expected one of {names}"
            )
        devices, seen = (device,), measured(result, CONTENDERS[options.backend], options.dtype)
    try:
        for device in devices:
            print_device(console, device, counts, options.dtype, seen)
    except CountsError as error:
        print(error, file=sys.stderr)
        return 1
    console.print(
        "Predictions from instruction counts and data sheets, not measurements. Dv = D; G/s: tanh, bytes."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
