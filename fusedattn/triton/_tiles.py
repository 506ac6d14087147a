"""Which tile a kernel takes: a table by shape and GPU; on request, the fastest of its rows on this machine.

The table was made by counting registers and instructions of machine code on every architecture (``make gates``),
not by timing. With ``FUSEDATTN_AUTOTUNE=1`` the rows of a kernel are timed, once for each dtype, kind of GPU and
power of two that its sizes reach, and the fastest is taken. That costs a few compilations and some tens of
launches at the first call of each such bucket, so a warning comes first; it is off by default. Another tile sums
in another order: tuned results may differ in their last bits between processes.
"""

import functools
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton

from fusedattn.triton import _common

VARIABLE = "FUSEDATTN_AUTOTUNE"

# sm_80 stands for 8.x, sm_90 for 9.x to 11.x, sm_120 for everything later.
SM_80, SM_90, SM_120, AMD = "sm_80", "sm_90", "sm_120", "amd"
NVIDIA = (SM_80, SM_90, SM_120)
EVERY = (*NVIDIA, AMD)


@dataclass(frozen=True)
class Tile:
    """A row of the table.

    Args:
        kernel: whose tile this is.
        extents: of the tile, named in the comments of the table.
        warps: that share it; of 32 threads on NVIDIA, 64 on AMD.
        most: the largest size that takes it untuned; 0 for rows that only tuning tries.
        gpus: kinds of GPU it is for.
        doubles: what the last extent is divided by in float64, whose numbers take two registers each.
    """

    kernel: str
    extents: tuple[int, ...]
    warps: int
    most: float = math.inf
    gpus: tuple[str, ...] = EVERY
    doubles: int = 2

    def extents_in(self, dtype: torch.dtype) -> tuple[int, ...]:
        return *self.extents[:-1], self.extents[-1] // (self.doubles if dtype == torch.float64 else 1)


# Three kernels have one tile, which other things decide. ``pack`` writes the tiles of its readers, as many
# channels at a time as fill 128 bytes. ``gradient`` pads its rows to its own extents. ``value`` sums over as few
# queries as tl.dot takes, because products in three TF32 terms hold their operands three times.
TABLE = (
    # Queries x keys; size: queries. Slots a tanh on sm_90: 4.2 and 4.0, at 128 registers or fewer. 64 x 64 took
    # 4.7, for its loads, and 16 x 128 by two warps exchanges q through shared memory. More rows reuse more of each
    # key; a tall tile would be mostly empty for few. In float64 half of it spilled where there is a soft cap, and
    # where D is small a quarter by Triton 3.6, half by 3.9.
    Tile("scores", (16, 128), 4, 16, NVIDIA, doubles=8),
    Tile("scores", (32, 64), 2, gpus=NVIDIA, doubles=4),
    Tile("scores", (32, 128), 4, 0, NVIDIA, doubles=4),
    # A wave of 64 threads holds whole rows, whose addresses and masks are scalar registers: more than four rows a
    # thread spill where there is a mask.
    Tile("scores", (16, 64), 4, 16, (AMD,)),
    Tile("scores", (32, 64), 8, gpus=(AMD,)),
    # Keys x channels; size: channels. A row of 128 channels, two loads, is read by a warp; the sums of all keys
    # stay in registers.
    Tile("few", (64, 32), 4, 64),
    Tile("few", (32, 64), 4),
    Tile("few", (16, 64), 4, 0),
    # Queries x keys. Operands of three TF32 products are held three times: eight warps take 128 registers at most.
    # Four took 255, spilled at some widths, and on AMD scalar ones.
    Tile("context", (16, 32), 8),
    # Held rows x channels; size: channels. One warp has all rows of four channels a thread: nothing is exchanged.
    # In float64 half of them would take every register.
    Tile("inputs", (16, 64), 1, 64, (SM_80, SM_90, AMD), doubles=4),
    Tile("inputs", (16, 64), 2, 64, (SM_120,), doubles=4),  # one warp spills there
    Tile("inputs", (8, 128), 1, doubles=4),
    Tile("inputs", (16, 128), 2, 0, (SM_90, SM_120, AMD), doubles=4),  # on sm_80 it spills at some widths
    # Elements: 8 a thread on NVIDIA, one or two loads of 16 bytes. Four warps, with 16 elements a thread, took 250
    # registers in the backward of short runs.
    Tile("film", (2048,), 8),
    Tile("film", (1024,), 4, 0),
    Tile("film", (4096,), 16, 0),
    # Elements of whole rows, 8 a thread; size: channels. Longer rows go in blocks of the last.
    Tile("norm", (1024,), 4, 1024),
    Tile("norm", (2048,), 8, 2048),
    Tile("norm", (4096,), 16),
)


def gpu_of(device: torch.device) -> str:
    """The kind of GPU in the table's terms; what is no GPU (the interpreter, tools) counts as sm_90."""
    major = capability_of(device)
    return AMD if major is None else SM_80 if major < 9 else SM_90 if major < 12 else SM_120


def capability_of(device: torch.device) -> int | None:
    """The first number of an NVIDIA GPU's compute capability, None on AMD."""
    if (recorded := _common.recording_for()) is not None:
        backend, arch = recorded
        return None if backend == "hip" else int(arch) // 10
    return _capability_of(device)


@functools.cache
def _capability_of(device: torch.device) -> int | None:
    if torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def rows(kernel: str, gpu: str) -> list[Tile]:
    return [tile for tile in TABLE if tile.kernel == kernel and gpu in tile.gpus]


def enabled() -> bool:
    return os.environ.get(VARIABLE) == "1"


def choose(
    kernel: str,
    size: int,
    tensor: torch.Tensor,
    sizes: tuple[int, ...],
    run: Callable[[Tile], object],
    name: str | None = None,
) -> Tile:
    """The tile for a launch.

    Args:
        kernel: as in the table.
        size: what the table decides by.
        tensor: whose device and dtype these are.
        sizes: all that may decide which tile is fastest; a bucket is made of their powers of two.
        run: does the work with a tile, as often as asked; called only to time it, or for tools to see every tile.
        name: of what is tuned, where several share the rows of a kernel.
    """
    gpu = gpu_of(tensor.device)
    found = rows(kernel, gpu)
    usual = next(tile for tile in found if size <= tile.most)
    if _common.recording_for() is not None:
        if _common.records_every_tile():
            for tile in found:
                if tile is not usual:
                    run(tile)
    elif enabled():
        bucket = tuple(triton.next_power_of_2(n) for n in sizes)
        key = (name or kernel, gpu, tensor.dtype, bucket)
        if key not in _fastest and can_time(tensor.device):
            _warn_once(gpu)
            _fastest[key] = min(found, key=lambda tile: milliseconds(functools.partial(run, tile)))
        return _fastest.get(key, usual)
    return usual


_fastest: dict[tuple, Tile] = {}


@functools.cache
def _warn_once(gpu: str) -> None:
    warnings.warn(
        f"fusedattn: {VARIABLE}=1: Triton kernels are about to be timed on this GPU ({gpu}). The first call of "
        "every new kernel, dtype and power of two of the sizes takes some seconds. This is said once.",
        stacklevel=2,
    )


def can_time(device: torch.device) -> bool:
    """Whether launches can be timed: on a GPU, while no graph is captured."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call; infinite where the tile needs more than the GPU has."""
    try:
        return triton.testing.do_bench(call, warmup=5, rep=20, return_mode="median")
    except triton.runtime.errors.OutOfResources:
        return math.inf
