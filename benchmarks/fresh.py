"""Runs a measurement in a process of its own.

What ran before decides what memory costs: a process that has freed much of its heap serves even large tensors
from there, without the page faults that a fresh block brings. So every case starts from the same state: a fork
of a server that has imported PyTorch and done nothing else (preload.py).
"""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, TimeoutError
from math import inf
from threading import TIMEOUT_MAX
from typing import Any

import torch

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch._dynamo", "benchmarks.preload"])


class OutOfTimeError(RuntimeError):
    """A measurement was ended because it took longer than it may."""


def call(function: Callable, *arguments, environment: dict[str, str] | None = None, seconds: float = inf) -> Any:
    """``function(*arguments)`` in a new process with as many threads as here; all of them must pickle.

    Raises OutOfTimeError, and ends the process, where it takes longer than ``seconds``.
    """
    with ProcessPoolExecutor(1, _context) as pool:
        future = pool.submit(_run, environment or {}, torch.get_num_threads(), function, arguments)
        try:
            return future.result(min(seconds, TIMEOUT_MAX))
        except TimeoutError:
            for process in multiprocessing.active_children():  # measurements run one by one: it is the only child
                process.kill()
            raise OutOfTimeError(f"not done after {seconds:.0f} s") from None


def _run(environment: dict[str, str], threads: int, function: Callable, arguments: tuple) -> Any:
    os.environ.update(environment)
    torch.set_num_threads(threads)
    return function(*arguments)
