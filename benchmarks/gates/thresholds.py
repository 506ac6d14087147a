"""What every compiled kernel must keep to. A kernel that fails one fails `make gates`.

The score loops have half a MUFU per tanh, because two channels (forward) or two pairs (backward) share a
reciprocal. Their slots are bounded where the project's plan counts them, on sm_90; elsewhere the table shows them.

A kernel for few queries takes the exponential of a key where it uses it, one more MUFU per tanh: a single query
reads 4 bytes of key and value per tanh even in half precision, of which an H100's memory delivers 12.8 per clock
and multiprocessor. So memory allows 3.2 tanh per clock; 20 slots (6.4 tanh per clock) keep half in reserve.
"""

from .kernel import Kernel

MUFU = 0.55
MUFU_FEW, SLOTS_FEW = 1.55, 20.0
SLOTS_ARCH = "sm_90"
SLOTS = {
    ("CUDA C++", "forward"): 4.0,
    ("CUDA C++", "backward"): 8.0,
    ("Triton", "forward"): 4.5,
    ("Triton", "backward"): 8.0,
}
WIDTH = 16  # bytes of every global access in FiLM's main loops


def direction(kernel: Kernel) -> str:
    """Of the score loop. A backward kernel that recomputes the scores has the forward loop."""
    return "backward" if "bwd" in kernel.name and "scores" not in kernel.name else "forward"


def failures(kernel: Kernel) -> list[str]:
    """Each threshold that the kernel breaks, in words."""
    found = []
    if kernel.local:
        what = "spilled vector registers" if kernel.arch.startswith("gfx") else "local-memory instructions"
        found.append(f"{kernel.local} {what}, expected none")
    if kernel.stack:
        found.append(f"{kernel.stack} bytes of stack, expected none")
    if kernel.lane_moves:
        found.append(f"{kernel.lane_moves} moves of spilled scalar registers in the score loop, expected none")
    if kernel.occupancy == 0:
        found.append("a block does not fit on a multiprocessor")
    if kernel.mufu is not None:
        few = "few" in kernel.name
        mufu = MUFU_FEW if few else MUFU
        if kernel.mufu > mufu:
            found.append(f"{kernel.mufu:.2f} MUFU per tanh, expected at most {mufu}")
        limit = SLOTS_FEW if few else SLOTS[kernel.backend, direction(kernel)]
        if kernel.arch == SLOTS_ARCH and kernel.slots > limit:
            found.append(f"{kernel.slots:.2f} issue slots per tanh, expected at most {limit}")
    if kernel.widths and must_be_wide(kernel) and kernel.widths != (WIDTH,):
        widths = ", ".join(map(str, kernel.widths))
        found.append(f"global accesses of {widths} bytes in the main loop, expected {WIDTH} alone")
    return found


def must_be_wide(kernel: Kernel) -> bool:
    """The kernels that move x: not the sum over partial sums, nor the form for rows that no pack fits into."""
    return kernel.aligned and "_kernel_sum" not in kernel.name and not kernel.name.endswith(", 1>")
