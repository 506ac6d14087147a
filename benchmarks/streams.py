"""How near to the bandwidth of a copy the streaming kernels come on paper, for ``benchmarks.roofline``.

film, norm_film and gated_film do little but read and write tensors as large as x. What the counts of the gates
(benchmarks/gates/counts.json) say of that is how many bytes are asked for at once: all programs that a
multiprocessor holds, each with a tile of every tensor that it reads. By Little's law memory delivers

    part of the bandwidth = bytes in flight / (latency x bandwidth of a multiprocessor), at most 1

and a pass takes its bytes at that rate. Sums over groups, parameters, what the caches keep for a second pass and
the ends of launches are left out, so it is a bound, as all that roofline prints. A norm whose groups reach over
positions reads x twice, so that it takes longer than a copy of the same tensors at the same bandwidth.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from rich.table import Table

from .devices import LATENCY, Device
from .gates.kernel import Kernel
from .gates.occupancy import MAX_WARPS

WANTED = 0.85  # of the bandwidth of a copy
PACK = 16  # bytes of an access


@dataclass(frozen=True)
class Pass:
    """A kernel by the beginning of its name, and how many tensors like x it reads and writes."""

    kernel: str
    reads: float
    writes: float


@dataclass(frozen=True)
class Stream:
    """A call, by the passes of its forward and backward kernels. ``extents``: of x along the tile of a program,
    rows or runs and what is neighbouring in them. ``necessary``: tensors that any code must read and write."""

    op: str
    name: str
    x: tuple[int, ...]
    extents: tuple[int, int]
    forward: tuple[Pass, ...]
    backward: tuple[Pass, ...]
    necessary: dict[str, float]
    tile: tuple[int, ...] | None = None  # of Triton's kernels, where several have the name

    def passes(self, mode: str) -> tuple[Pass, ...]:
        return self.forward + (self.backward if mode == "training" else ())


_MAPS = (16, 256, 64, 64)
STREAMS = (
    Stream(
        *("film", "NCHW", (64, 256, 112, 112), (64 * 256, 112 * 112)),
        (Pass("film_fwd_kernel_runs", 1, 1),),
        (Pass("film_bwd_kernel_runs", 2, 1),),
        {"forward": 2, "training": 5},
        (2, 1024),
    ),
    Stream(
        *("norm_film", "layer, gated", (64, 1024, 1152), (64 * 1024, 1152)),
        (Pass("norm_film_fwd_kernel_rows", 2, 2),),
        (Pass("norm_film_bwd_kernel_rows", 4, 2),),
        {"forward": 4, "training": 10},
        (1, 2048),
    ),
    Stream(
        *("norm_film", "group", (64, *_MAPS[1:]), (64 * 256, 64 * 64)),
        (Pass("norm_film_fwd_kernel_moments", 1, 0), Pass("norm_film_fwd_kernel_maps", 1, 1)),
        (Pass("norm_film_bwd_kernel_sums", 2, 0), Pass("norm_film_bwd_kernel_maps", 2, 1)),
        {"forward": 2, "training": 5},
        (2, 1024),
    ),
    Stream(
        *("norm_film", "batch, channels last", (256, 128, 28, 28), (128, 256 * 28 * 28)),
        (Pass("norm_film_fwd_kernel_moments", 1, 0), Pass("norm_film_fwd_kernel_maps", 1, 1)),
        (Pass("norm_film_bwd_kernel_sums", 2, 0), Pass("norm_film_bwd_kernel_maps", 2, 1)),
        {"forward": 2, "training": 5},
        (128, 16),
    ),
    Stream(
        *("gated_film", "PixelCNN", (256, 256, 32, 32), (256 * 128, 32 * 32)),
        (Pass("gated_film_fwd_kernel", 1, 0.5),),
        (Pass("gated_film_bwd_kernel", 1.5, 1),),
        {"forward": 1.5, "training": 4},
        (4, 512),
    ),
)


def _in_flight(kernel: Kernel, reads: float, extents: tuple[int, int], itemsize: int) -> float:
    """Bytes that the programs on a multiprocessor ask for before they wait."""
    if kernel.waiting:  # read from the machine code
        return kernel.waiting
    held = (kernel.occupancy or 0) * 32 * MAX_WARPS[int(kernel.arch.removeprefix("sm_"))]  # threads
    if kernel.backend == "CUDA C++":  # a pack of each tensor a thread, at least
        return held * PACK * reads
    rows, columns = kernel.tile
    filled = min(rows, extents[0]) * min(columns, extents[1])
    return held / kernel.threads * filled * itemsize * reads


def part_of_bandwidth(kernel: Kernel, of: Pass, stream: Stream, device: Device, itemsize: int) -> float:
    needed = LATENCY * device.bandwidth / device.multiprocessors
    return min(1.0, _in_flight(kernel, of.reads, stream.extents, itemsize) / needed)


@dataclass(frozen=True)
class Found:
    """Of a call: seconds, part of the copy's bandwidth that its passes reach, and time of a copy over its own."""

    stream: Stream
    mode: str
    seconds: float
    of_copy: float
    of_necessary: float


def _kernel(kernels: tuple[Kernel, ...], of: Pass, stream: Stream, device: Device, dtype: str) -> Kernel | None:
    """Of those that gates compiled for aligned tensors the one with the least occupancy."""
    found = [
        k
        for k in kernels
        if k.op == stream.op and k.arch == device.arch and k.dtype == dtype and k.aligned and not k.local
        if k.name.startswith((f"{of.kernel}-", f"{of.kernel}<"))
        if k.backend == "CUDA C++" or stream.tile is None or k.tile == stream.tile
    ]
    return min(found, key=lambda k: k.occupancy or 0, default=None)


def predict(kernels: tuple[Kernel, ...], device: Device, dtype: str) -> Iterator[Found]:
    """Of each call whose kernels were all counted."""
    itemsize = 4 if dtype == "float32" else 2
    for stream in STREAMS:
        tensor = itemsize * prod(stream.x) / device.bandwidth
        for mode in ("forward", "training"):
            passes = [(of, _kernel(kernels, of, stream, device, dtype)) for of in stream.passes(mode)]
            if any(kernel is None for _, kernel in passes):
                continue
            seconds = moved = 0.0
            for of, kernel in passes:
                at_best = tensor * (of.reads + of.writes)
                moved += at_best
                seconds += at_best / part_of_bandwidth(kernel, of, stream, device, itemsize)
            yield Found(stream, mode, seconds, moved / seconds, tensor * stream.necessary[mode] / seconds)


def table(kernels: tuple[Kernel, ...], device: Device, dtype: str) -> Table | None:
    found = list(predict(kernels, device, dtype))
    if not found:
        return None
    table = Table(title=f"{device.name}: streaming kernels, {dtype}", title_justify="left", title_style="bold")
    for n, column in enumerate(("op", "x", "mode", "predicted ms", "of copy bandwidth", "of necessary bytes")):
        table.add_column(column, justify="left" if n < 3 else "right", no_wrap=n < 3)
    for f in found:
        below = "" if f.of_copy >= WANTED else f", below {WANTED:.0%}"
        numbers = f"{1e3 * f.seconds:.3g}", f"{f.of_copy:.0%}{below}", f"{f.of_necessary:.0%}"
        table.add_row(f"{f.stream.op}, {f.stream.name}", str(f.stream.x), f.mode, *numbers)
    return table
