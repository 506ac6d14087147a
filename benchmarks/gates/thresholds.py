"""What every compiled kernel must keep to. A kernel that fails one fails `make gates`.

The score loops have half a MUFU per tanh, because two channels (forward) or two pairs (backward) share a
reciprocal. Their slots are bounded where the project's plan counts them, on sm_90; elsewhere the table shows them.

Kernels for few queries differ: `limits` derives theirs.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from ..devices import DEVICES, ISSUE_LANES, MUFU_LANES
from .kernel import ATTENTION, Kernel

MUFU = 0.55
SLOTS_ARCH = "sm_90"
SLOTS = {
    ("CUDA C++", "forward"): 4.0,
    ("CUDA C++", "backward"): 8.0,
    ("Triton", "forward"): 4.5,
    ("Triton", "backward"): 8.0,
}
WIDTH = 16  # bytes of every global access in FiLM's main loops
# KiB that a multiprocessor waits for at a time, in the main loops of what memory binds, on SLOTS_ARCH: an H100's
# share of the bandwidth, 25 GB/s, times the 700 ns or so until memory answers is 17.
IN_FLIGHT = 20

CARD = next(device for device in DEVICES if device.name == "H100")  # whose rates the plan's targets name
EXPONENTIAL = 8  # slots of exp(2k) to full accuracy: seven instructions, one of them MUFU, and k's conversion
# Rows as long as a key that a kernel for few queries moves: key and value; Triton scores and sums in two kernels;
# backward the key and its gradient.
ROWS = {
    ("CUDA C++", "forward"): 2,
    ("CUDA C++", "backward"): 2,
    ("Triton", "forward"): 1,
    ("Triton", "backward"): 2,
}


class Limits(NamedTuple):
    slots: float
    mufu: float


def direction(kernel: Kernel) -> str:
    """Of the score loop. A backward kernel that recomputes the scores has the forward loop."""
    return "backward" if "bwd" in kernel.name and "scores" not in kernel.name else "forward"


def few_queries(kernel: Kernel) -> int | None:
    """Queries that share a key in a kernel for few of them, by its name: `kernel_split<half, 16>`; 1 in Triton."""
    if not re.search(r"_(few|split)(?![a-z])", kernel.name):
        return None
    queries = re.search(r", (\d+)>$", kernel.name)
    return int(queries[1]) if queries else 1


def limits(kernel: Kernel) -> Limits:
    """Most issue slots and MUFU per tanh.

    With few queries, exponentials of keys are taken where they are used: one per tanh and query. And what memory
    cannot feed need not be fast: while one tanh's share of the rows arrives, the card issues

        bytes per tanh x (issue slots per second) / (bytes per second)

    instructions, one in 8 of them for the special functions. An H100 issues 10 per byte: with one query in float32
    that is 80 slots for the 8 bytes of key and value, with 16 queries 5. The larger of the two limits holds.
    """
    which = kernel.backend, direction(kernel)
    queries = few_queries(kernel)
    if queries is None:
        return Limits(SLOTS[which], MUFU)
    itemsize = 4 if kernel.dtype == "float32" else 2
    fed = itemsize * ROWS[which] / queries * CARD.slots_per_byte
    return Limits(
        max(SLOTS[which] + EXPONENTIAL / queries, fed),
        max(MUFU + 1 / queries, fed * MUFU_LANES / ISSUE_LANES),
    )


def broken(kernels: Iterable[Kernel]) -> list[str]:
    """Every kernel and threshold that it breaks, a line each: architectures that share it stand together."""
    found: dict[str, list[str]] = {}
    for kernel in kernels:
        for reason in failures(kernel):
            found.setdefault(f"{kernel.name}: {reason}", []).append(kernel.arch)
    return [f"{what} ({', '.join(archs)})" for what, archs in found.items()]


def failures(kernel: Kernel) -> list[str]:
    """Each threshold that the kernel breaks, in words."""
    found = []
    if kernel.local:
        what = "spilled vector registers" if kernel.arch.startswith("gfx") else "local-memory instructions"
        found.append(f"{kernel.local} {what}, expected none")
    if kernel.scalar_spills:
        found.append(f"{kernel.scalar_spills} spilled scalar registers, expected none")
    if kernel.stack:
        found.append(f"{kernel.stack} bytes of stack, expected none")
    if kernel.shared is None:
        found.append("no launch of it in benchmarks/gates/launches.cpp")
    if kernel.occupancy == 0:
        found.append("a block does not fit on a multiprocessor")
    if kernel.mufu is None and must_score(kernel):
        found.append("no score loop was found in its machine code")
    if kernel.mufu is not None:
        most = limits(kernel)
        if kernel.mufu > most.mufu:
            found.append(f"{kernel.mufu:.2f} MUFU per tanh, expected at most {round(most.mufu, 2)}")
        if kernel.arch == SLOTS_ARCH and kernel.slots > most.slots:
            found.append(f"{kernel.slots:.2f} issue slots per tanh, expected at most {round(most.slots, 2)}")
    if kernel.widths and must_be_wide(kernel) and kernel.widths != (WIDTH,):
        widths = ", ".join(map(str, kernel.widths))
        found.append(f"global accesses of {widths} bytes in the main loop, expected {WIDTH} alone")
    if kernel.arch == SLOTS_ARCH and must_wait(kernel) and kernel.waiting < IN_FLIGHT * 1024:
        found.append(f"{kernel.waiting / 1024:.1f} KiB in flight, expected at least {IN_FLIGHT}")
    return found


def must_score(kernel: Kernel) -> bool:
    """The kernels with a score loop; in float64 its multiply-adds are not those that `score_loop` looks for, and
    relu and leaky_relu have no reciprocals to look for."""
    if "relu" in kernel.name or ", Linear" in kernel.name:
        return False
    scores = re.search(r"_fwd_kernel(<|_split|_few)|_(scores|inputs)\b", kernel.name)
    return kernel.op in ATTENTION and scores is not None and kernel.dtype != "float64"


def must_wait(kernel: Kernel) -> bool:
    """The kernels whose time is that of their bytes: streams, and one query. Triton's are not held to it yet."""
    streams = bool(kernel.widths) and must_be_wide(kernel)
    one_query = few_queries(kernel) == 1 and kernel.slots is not None
    return kernel.backend == "CUDA C++" and (streams or one_query)


def must_be_wide(kernel: Kernel) -> bool:
    """The kernels that move x: not the sum over partial sums, nor the form for rows that no pack fits into."""
    return kernel.aligned and "_kernel_sum" not in kernel.name and not kernel.name.endswith(", 1>")
