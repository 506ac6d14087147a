"""What every compiled kernel must keep to. A kernel that fails one fails `make gates`.

The score loops have half a MUFU per tanh, because two channels (forward) or two pairs (backward) share a
reciprocal. Their slots are bounded where the project's plan counts them, on sm_90; elsewhere the table shows them.
"""

from .kernel import Kernel

MUFU = 0.55
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
        what = "spilled registers" if kernel.arch.startswith("gfx") else "local-memory instructions"
        found.append(f"{kernel.local} {what}, expected none")
    if kernel.stack:
        found.append(f"{kernel.stack} bytes of stack, expected none")
    if kernel.occupancy == 0:
        found.append("a block does not fit on a multiprocessor")
    if kernel.mufu is not None:
        if kernel.mufu > MUFU:
            found.append(f"{kernel.mufu:.2f} MUFU per tanh, expected at most {MUFU}")
        limit = SLOTS[kernel.backend, direction(kernel)]
        if kernel.arch == SLOTS_ARCH and kernel.slots > limit:
            found.append(f"{kernel.slots:.2f} issue slots per tanh, expected at most {limit}")
    if kernel.widths and must_be_wide(kernel) and kernel.widths != (WIDTH,):
        widths = ", ".join(map(str, kernel.widths))
        found.append(f"global accesses of {widths} bytes in the main loop, expected {WIDTH} alone")
    return found


def must_be_wide(kernel: Kernel) -> bool:
    """The kernels that move x: not the sum over partial sums, nor the form for rows that no pack fits into."""
    return "_sums" not in kernel.name and not kernel.name.endswith(", 1>")
