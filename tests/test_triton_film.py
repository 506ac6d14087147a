"""FiLM's Triton kernels in the interpreter: what test_film.py, run there too, does not ask of every backend."""

import random

import pytest
import torch
from device import INTERPRETED
from torch._dynamo.testing import CompileCounterWithBackend

from fusedattn import film
from fusedattn._dispatch import BACKENDS

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.skipif(not INTERPRETED, reason="the interpreter needs TRITON_INTERPRET=1 and its own process"),
]


def test_random_lengths_are_traced_once():
    """With gradients, between other operators: one graph without breaks, then the same for every length."""
    counter = CompileCounterWithBackend("aot_eager")
    linear = torch.nn.Linear(3, 3)

    def model(x, gamma):
        return film(linear(x), gamma, channel_dim=2, activation="silu").sin()

    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    traced = []
    for length in random.Random(0).sample(range(2, 40), 10):
        x, gamma = torch.randn(2, length, 3), torch.randn(2, 3)
        actual = compiled(x, gamma)
        torch.testing.assert_close(actual, model(x, gamma))
        actual.sum().backward()
        traced.append(counter.frame_count)
    assert len(set(traced)) == 1, traced


def test_auto_does_not_take_the_interpreter():
    x = torch.randn(2, 3, 5)
    able = [name for name, reasons in BACKENDS.items() if not reasons(x.device, x.dtype)]
    assert able == ["cpu", "triton"]
