"""What a call of an operator costs before any kernel, by how it is registered.

Shows why ``fusedattn/triton/_common.py`` takes a plain Library. Needs no GPU. Run as
``python -m benchmarks.registration``.
"""

import timeit

import torch

CALLS, REPEATS = 2000, 15


def allocate(x: torch.Tensor, n: int) -> torch.Tensor:
    """A launcher that launches nothing."""
    return torch.empty_like(x)


def main() -> None:
    library = torch.library.Library("fusedattn_registration", "FRAGMENT")
    library.define("library(Tensor x, int n) -> Tensor")
    library.impl("library", allocate, "CPU")
    contenders = {
        "the function itself": allocate,
        "torch.library.Library": torch.ops.fusedattn_registration.library,
        "torch.library.custom_op": torch.library.custom_op(
            "fusedattn_registration::custom", allocate, mutates_args=()
        ),
        "torch.library.triton_op": torch.library.triton_op(
            "fusedattn_registration::triton", allocate, mutates_args=()
        ),
    }
    x = torch.empty(8)
    for name, call in contenders.items():
        seconds = min(timeit.repeat(lambda: call(x, 1), number=CALLS, repeat=REPEATS)) / CALLS  # noqa: B023
        print(f"{name:24}{seconds * 1e6:6.1f} us a call")


if __name__ == "__main__":
    main()
