"""Compiles side by side what tests would compile one after the other: CUDA kernels for the emulator, or as PTX.

python tests/build_kernels.py emulator|ptx
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor

from cuda_emulator import build, planted
from ptx import nvcc


def jobs(target: str) -> list[tuple]:
    """Functions and their arguments, the longest ones first."""
    if target == "ptx":
        return [] if nvcc.missing() else [(nvcc.build, "additive_attention"), (nvcc.build, "film")]
    if build.missing():
        return []
    with_bugs = planted.sources()
    found = [(build.build, name) for name in ("additive_attention", "film", "emulator")]
    return found + [(build.build, name, "plain", with_bugs) for name in ("additive_attention", "film")]


def main(target: str) -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in [pool.submit(*job) for job in jobs(target)]:
            done.result()


if __name__ == "__main__":
    main(*sys.argv[1:])
