"""Runs a measurement in a process of its own.

What ran before decides what memory costs: a process that has freed much of its heap serves even large tensors
from there, without the page faults that a fresh block brings. So every case starts from the same state.
"""

import multiprocessing
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch


def call(function: Callable, *arguments, environment: dict[str, str] | None = None) -> Any:
    """``function(*arguments)`` in a new process with as many threads as here; all of them must pickle."""
    pool = multiprocessing.get_context("spawn").Pool
    threads = torch.get_num_threads()
    with mock.patch.dict(os.environ, environment or {}), pool(1, torch.set_num_threads, (threads,)) as process:
        return process.apply(function, arguments)
