"""Calls that are too small for a fused one, which the original answers.

A fused call saves passes over memory, and costs more in Python than the operators that it stands for: on the
CPU that decides below some ten thousand elements, with gradients below twice as many. ``python -m
benchmarks.crossover`` measures where; an adapter says it in ``least``. Compiled code has no such costs, and on
GPUs it was not measured.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from fusedattn.dropin._adapter import Adapter

_IS_OFF = ContextVar("fusedattn_always_fused", default=False)


@contextmanager
def always_fused() -> Iterator[None]:
    """Within it replaced modules are fused at any size, for probes and tests."""
    token = _IS_OFF.set(True)
    try:
        yield
    finally:
        _IS_OFF.reset(token)


def is_small(adapter: Adapter, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the original is as fast at these arguments of the method."""
    if torch.compiler.is_compiling() or _IS_OFF.get():
        return False
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    if not tensors or tensors[0].device.type != "cpu":
        return False
    return adapter.work(*tensors) < adapter.least * (1 + torch.is_grad_enabled())
