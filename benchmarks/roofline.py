"""How long the kernels should take on paper: `python -m benchmarks.roofline`.

A kernel takes at least as long as its bytes at the memory's rate, and at least as long as its instructions at the
multiprocessors' rates: 4 schedulers issue one instruction of 32 threads each per clock, 16 lanes compute special
functions, 64 or 128 compute float32. Slots, MUFU and FP32 instructions per tanh come from the gates
(benchmarks/gates/counts.json), the rates from the vendor's data sheets; nothing here is measured. Latency,
staging, the softmax and the caches are left out: a prediction is a bound that real kernels approach from above.

    a step     max(bytes / bandwidth, tanh x max(slots / 128, MUFU / 16, FP32 / lanes) / multiprocessors / clock)
    products   with Dv = D the product of weights and values adds one multiply-add per tanh; backward has two more
    tiles      queries and keys count in whole tiles, and blocks in whole rounds of the multiprocessors

Beside it stands what plain PyTorch cannot avoid: eager moves the (B, Tq, Tk, D) tensor several times; a compiled
forward pass moves inputs alone, but evaluates libdevice's tanh.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .cases import ATTENTION, MODES, AttentionCase, FilmCase
from .devices import DEVICES, ISSUE_LANES, MUFU_LANES, Device
from .gates.kernel import Kernel
from .gates.thresholds import direction
from .machine import ROOT

COUNTS = ROOT / "benchmarks" / "gates" / "counts.json"
FEW_QUERIES = 16  # a kernel that splits the keys takes up to as many


@dataclass(frozen=True)
class Cost:
    """Instructions per tanh."""

    slots: float
    mufu: float
    fp32: float

    def seconds(self, tanh: float, device: Device) -> float:
        clocks = max(self.slots / ISSUE_LANES, self.mufu / MUFU_LANES, self.fp32 / device.fp32_lanes)
        return tanh * clocks / (device.multiprocessors * device.clock)

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.slots + other.slots, self.mufu + other.mufu, self.fp32 + other.fp32)


PRODUCT = Cost(slots=1, mufu=0, fp32=1)
LIBDEVICE_TANH = Cost(slots=19.4, mufu=2, fp32=11)  # of a disassembled loop of w tanh(q + k)

LARGE = AttentionCase(64, 512, 512, 256)  # fills a GPU, as four batches do not
FILM = FilmCase("NCHW", "memory", 64, 256, 64)  # a tensor of 256 MiB: no cache holds it


@dataclass(frozen=True)
class Tiles:
    """How a backend cuts a problem into blocks. Where keys are split, few queries have tiles of their size."""

    queries: int
    keys: int
    channels: int  # of a block of the backward pass
    splits_keys: bool

    def tanh(self, case: AttentionCase) -> float:
        """Scored elements, tiles filled up."""
        if self.splits_keys and case.Tq <= FEW_QUERIES:
            return case.work("forward")
        return case.B * self._up(case.Tq, self.queries) * self._up(case.Tk, self.keys) * case.D

    def rounds(self, case: AttentionCase, direction: str, multiprocessors: int) -> float:
        """How much longer than an even share for every multiprocessor: the last round of blocks is not full."""
        if self.splits_keys and case.Tq <= FEW_QUERIES:
            return 1.0
        blocks = case.B * ceil(case.Tq / self.queries)
        if direction == "backward":
            blocks *= ceil(case.D / self.channels)
        elif self.splits_keys:
            blocks *= ceil(case.Tk / self.keys)
        return ceil(blocks / multiprocessors) * multiprocessors / blocks

    @staticmethod
    def _up(n: int, tile: int) -> int:
        return ceil(n / tile) * tile


class CountsError(LookupError):
    """The gates have not counted the kernel that a prediction needs."""


@dataclass(frozen=True)
class Counts:
    """Kernels of one backend, as `make gates` stored them."""

    backend: str
    kernels: tuple[Kernel, ...]

    @property
    def tiles(self) -> Tiles:
        """CUDA C++: csrc/additive_attention/cuda_problem.cuh, cuda_bwd.cuh; Triton: its usual configuration."""
        split = any(word in k.name for k in self.kernels for word in ("few", "split", "merge"))
        return Tiles(64, 64, 32, split) if self.backend == "CUDA C++" else Tiles(32, 64, 32, True)

    @classmethod
    def load(cls, backend: str, path: Path = COUNTS) -> "Counts":
        kernels = (Kernel.from_json(k) for k in json.loads(path.read_text())["kernels"])
        return cls(backend, tuple(k for k in kernels if k.section == backend))

    def cost(self, arch: str, which: str) -> Cost:
        """Of the float32 score loop, forward or backward; the cheapest where several kernels have one."""
        found = [
            k
            for k in self.kernels
            if k.op == "additive_attention" and k.arch == arch and k.slots is not None and direction(k) == which
            if "float" in k.name or "fp32" in k.name
        ]
        if not found:
            raise CountsError(f"no {which} score loop of {self.backend} for {arch}; run make gates")
        best = min(found, key=lambda k: k.slots)
        return Cost(best.slots, best.mufu, best.fp32)


@dataclass(frozen=True)
class Prediction:
    seconds: float
    limit: str  # "memory" or "arithmetic"
    eager: float
    compiled: float


def _slower(memory: float, arithmetic: float) -> tuple[float, str]:
    return (memory, "memory") if memory >= arithmetic else (arithmetic, "arithmetic")


def attention(case: AttentionCase, mode: str, device: Device, counts: Counts) -> Prediction:
    def seconds_of(which: str, cost: Cost) -> float:
        idle = counts.tiles.rounds(case, which, device.multiprocessors)
        return idle * cost.seconds(counts.tiles.tanh(case), device)

    forward = counts.cost(device.arch, "forward")
    arithmetic = seconds_of("forward", forward + PRODUCT)
    if mode == "training":
        backward = counts.cost(device.arch, "backward") + PRODUCT + PRODUCT
        arithmetic += seconds_of("backward", backward + forward if case.recomputes_scores else backward)
    memory = case.bytes_moved(mode) / device.bandwidth
    seconds, limit = _slower(memory, arithmetic)
    tensor = 4 * case.work(mode) / device.bandwidth
    # Eager forward: the sum is written and read, tanh written and read. Backward: the gradient of tanh written and
    # read, tanh read for it and for dw, the gradient of the sum written, read for dq and read for dk.
    eager = tensor * (4 if mode == "forward" else 11)
    # Compiled: nothing of that size forward; backward the gradient of the sum is written once and read twice.
    passes = 1 if mode == "forward" else 2
    evaluated = passes * LIBDEVICE_TANH.seconds(case.work(mode), device)
    compiled = max(memory + (3 * tensor if mode == "training" else 0), evaluated)
    return Prediction(seconds, limit, max(eager, memory), compiled)


def film(case: FilmCase, mode: str, device: Device) -> Prediction:
    tensor = case.x_bytes() / device.bandwidth
    # Eager: gamma x, then + beta, each read and written. Backward: dx 2, dy x 3, its sum 1, the sum of dy 1.
    eager = tensor * (4 if mode == "forward" else 11)
    fused = case.bytes_moved(mode) / device.bandwidth
    return Prediction(fused, "memory", eager, fused)


def predict(case: AttentionCase | FilmCase, mode: str, device: Device, counts: Counts) -> Prediction:
    return film(case, mode, device) if isinstance(case, FilmCase) else attention(case, mode, device, counts)


def rate(case: AttentionCase | FilmCase, mode: str, seconds: float) -> float:
    """G tanh/s or GB/s, as the benchmarks report it."""
    return case.work(mode) / seconds / 1e9


def measured(result: dict, contender: str) -> dict[tuple[str, str], float]:
    """Seconds by case and mode of the float32 rows of a benchmark result whose contender is named so."""
    return {
        (row["case"], row["mode"]): row["milliseconds"] / 1e3
        for row in result["rows"]
        if row["contender"] == contender and row.get("dtype", "float32") == "float32"
    }


def device_of(result: dict) -> Device | None:
    """The device that a result was measured on, by the name that its stamp gives."""
    gpu = str(result["machine"].get("gpu", ""))
    return next((device for device in DEVICES if device.name in gpu), None)


CONTENDERS = {"CUDA C++": "cuda", "Triton": "triton"}


def print_device(console: Console, device: Device, counts: Counts, seen: dict[tuple[str, str], float]) -> None:
    title = (
        f"{device.name}: {device.multiprocessors} multiprocessors at {device.clock / 1e9:.3g} GHz, "
        f"{device.bandwidth / 1e12:.3g} TB/s; {counts.backend}"
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
    for case in (LARGE, *ATTENTION, FILM):
        for mode in MODES:
            p = predict(case, mode, device, counts)
            per_clock = "–"
            if isinstance(case, AttentionCase):
                per_clock = f"{case.work(mode) / p.seconds / device.clock / device.multiprocessors:.1f}"
            cells = [
                case.name.removeprefix("attention "),
                mode,
                p.limit,
                f"{1e3 * p.seconds:.3g}",
                f"{rate(case, mode, p.seconds):.0f}",
            ]
            cells += [per_clock, f"{1e3 * p.eager:.3g}", f"{1e3 * p.compiled:.3g}"]
            cells += [f"{p.eager / p.seconds:.1f}×", f"{p.compiled / p.seconds:.1f}×"]
            if seen:
                time = seen.get((case.name, mode))
                cells += [f"{1e3 * time:.3g}", f"{p.seconds / time:.0%}"] if time else ["–", "–"]
            table.add_row(*cells)
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--backend", choices=CONTENDERS, default="CUDA C++")
    parser.add_argument("--result", type=Path, help="a GPU benchmark's result.json, shown beside the prediction")
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
        devices, seen = (device,), measured(result, CONTENDERS[options.backend])
    try:
        for device in devices:
            print_device(console, device, counts, seen)
    except CountsError as error:
        print(error, file=sys.stderr)
        return 1
    console.print(
        "Predictions from instruction counts and data sheets, not measurements. float32, Dv = D; G/s: tanh, bytes."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
