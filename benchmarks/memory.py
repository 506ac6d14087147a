"""Peak memory of a step beyond its inputs, outputs and gradients.

Measured as the process's peak resident memory, because a profiler sees only what PyTorch's allocator hands
out and not what kernels take elsewhere. Linux resets that peak on demand (/proc/self/clear_refs), so one
process can measure many steps. It must not keep freed memory, which would hide the next step's: blocks from
64 KiB up are mapped and unmapped one by one, and gradients' memory is not kept for the next. Both cost time, hence
a process apart from the timing.
Every step runs once before, so that code and thread stacks are not counted. Resolution: about 1 MiB.
"""

import ctypes
import gc
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from threading import TIMEOUT_MAX, Timer

import torch

from . import contenders
from .cases import Case
from .fresh import OutOfTimeError
from .machine import ROOT

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_ARENA_MAX": "1",
    "FUSEDATTN_REUSE_MEMORY": "0",
}


def measure(jobs: list[tuple[Case, str, list[str]]], seconds: float) -> Iterator[tuple[str, str, str, int | None]]:
    """(case name, mode, contender, bytes) for each job (case, mode, contenders), in order.

    bytes is None where the system cannot tell. Raises OutOfTimeError where it takes longer than ``seconds``.
    """
    command = [sys.executable, "-m", "benchmarks.memory"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, **ALLOCATOR}, **pipes) as process:
        pickle.dump((torch.get_num_threads(), jobs), process.stdin)
        process.stdin.close()
        alarm = Timer(min(seconds, TIMEOUT_MAX), process.kill)
        alarm.start()
        for line in process.stdout:
            yield tuple(json.loads(line))
        out_of_time = not alarm.is_alive()
        alarm.cancel()
    if out_of_time:
        raise OutOfTimeError(f"not done after {seconds:.0f} s")
    if process.returncode:
        raise RuntimeError(f"the memory measurement ended with status {process.returncode}")


def add_peaks(rows: list[dict], jobs: list[tuple[Case, str, list[str]]], seconds: float) -> None:
    """Puts what :func:`measure` finds into the rows of these cases, modes and contenders."""
    by_name = {(row["case"], row["mode"], row["contender"]): row for row in rows}
    for name, mode, contender, peak in measure(jobs, seconds):
        by_name[name, mode, contender]["peak_bytes"] = peak


def _resident(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(field))


def release() -> None:
    """Gives memory that was freed back to the system."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _peak_beyond_results(run) -> int | None:
    results = run()
    size = sum(x.untyped_storage().nbytes() for x in results)
    del results
    release()
    try:
        before = _resident("VmRSS")
        with open("/proc/self/clear_refs", "w") as control:
            control.write("5")  # the peak starts again from here
    except OSError:
        return None
    run()
    return max(0, _resident("VmHWM") - before - size)


def main() -> None:
    threads, jobs = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(threads)
    for case, mode, names in jobs:
        functions = contenders.of(case)
        inputs, grad = case.inputs(), case.grad_output()
        for name in names:
            peak = _peak_beyond_results(contenders.step(case, mode, name, functions[name], inputs, grad))
            print(json.dumps([case.name, mode, name, peak]), flush=True)


if __name__ == "__main__":
    main()
