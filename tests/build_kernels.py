"""Compiles side by side what tests would compile one after the other: CUDA kernels for the emulator and as PTX.

python tests/build_kernels.py
"""

import os
from concurrent.futures import ThreadPoolExecutor

from cuda_emulator import build, planted
from ptx import nvcc


def main() -> None:
    jobs = []  # the longest ones first
    if nvcc.missing() is None:
        jobs += [(nvcc.build, "additive_attention"), (nvcc.build, "film")]
    if build.missing() is None:
        with_bugs = planted.sources()
        jobs += [(build.build, "additive_attention"), (build.build, "film"), (build.build, "emulator")]
        jobs += [(build.build, name, "plain", with_bugs) for name in ("additive_attention", "film")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in [pool.submit(*job) for job in jobs]:
            done.result()


if __name__ == "__main__":
    main()
