"""Memory that the CPU kernels keep from one step of training for the next: csrc/common/memory.cpp."""

import copy
import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fusedattn import additive_attention, film

MIB = 1 << 20


def attention_gradients(Tk, Tq=1, B=1, D=256, seed=0, **options):
    """Gradients of query, key, value and weight; those of key and value take Tk * D * B * 4 bytes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, Tq, D), (B, Tk, D), (B, Tk, D), (D,)]
    inputs = [torch.randn(s, generator=generator).requires_grad_() for s in shapes]
    return torch.autograd.grad(additive_attention(*inputs, **options).square().sum(), inputs)


def film_gradients(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(s, generator=generator).requires_grad_() for s in ((2, 64, size), (2, 64), (2, 64))]
    return torch.autograd.grad(film(*inputs, channel_dim=1, activation="silu").sum(), inputs)


def test_the_next_gradients_take_the_memory_of_the_last():
    last = {t.data_ptr() for t in attention_gradients(8192)[1:3]}
    assert {t.data_ptr() for t in attention_gradients(8192)[1:3]} == last
    last = film_gradients(40_000)[0].data_ptr()
    assert film_gradients(40_000)[0].data_ptr() == last


def test_memory_in_use_is_not_lent_again():
    held = attention_gradients(8192, seed=1)
    before = [t.clone() for t in held]
    view = held[1][:, 5:9]
    others = attention_gradients(8192, seed=2)
    assert not {t.data_ptr() for t in held} & {t.data_ptr() for t in others}
    del held
    attention_gradients(8192, seed=3)
    assert torch.equal(view, before[1][:, 5:9])  # a view keeps the whole


@pytest.mark.parametrize(
    "gradients",
    [
        lambda: attention_gradients(2000, B=2, key_lengths=torch.tensor([1500, 0])),
        lambda: attention_gradients(3000, Tq=7, D=255),
        lambda: attention_gradients(2000, Tq=40, B=2, is_causal=True, softcap=3.0),
        lambda: attention_gradients(1200, Tq=1200, D=16),  # scores kept for backward are lent, too
        lambda: film_gradients(40_000),
    ],
    ids=["one_query", "few_queries", "many_queries", "kept_scores", "film"],
)
def test_what_lent_memory_held_does_not_show(gradients):
    first = gradients()
    expected = [t.clone() for t in first]
    for t in first:
        t.fill_(float("nan"))
    del first, t
    for actual, wanted in zip(gradients(), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_a_lent_gradient_is_a_tensor_like_any_other():
    gradient = attention_gradients(4096)[1]
    values = gradient.clone()
    assert torch.equal(copy.deepcopy(gradient), values)
    file = io.BytesIO()
    torch.save(gradient, file)
    file.seek(0)
    assert torch.equal(torch.load(file), values)
    array = gradient.numpy()
    gradient = gradient.add_(1).share_memory_()
    assert gradient.is_shared() and torch.equal(gradient, values + 1)
    assert array[0, 0, 0] == values[0, 0, 0] + 1


def test_threads_share_what_is_kept():
    sizes = [1500 + 100 * n for n in range(8)]
    expected = {size: attention_gradients(size, seed=size) for size in sizes}

    def steps(offset):
        wrong = 0
        for n in range(24):
            size = sizes[(n + offset) % len(sizes)]
            actual = attention_gradients(size, seed=size)
            wrong += not all(torch.equal(a, e) for a, e in zip(actual, expected[size], strict=True))
        return wrong

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(steps, range(4))) == [0] * 4


RESIDENT = """
import random, sys, torch
sys.path.insert(0, sys.argv[1])
from test_memory import MIB, attention_gradients

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024

attention_gradients(8)
start = resident()
sizes = [int(n * 1024) for n in eval(sys.argv[2])]  # keys: a MiB of each gradient is 1024 of them
for size in sizes:
    attention_gradients(size)
print(resident() - start)
"""


def run_resident(sizes, **variables):
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", **variables}
    command = [sys.executable, "-c", RESIDENT, os.path.dirname(__file__), repr(sizes)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def resident_after(sizes, **variables):
    """MiB that stay resident after steps whose key and value gradients take ``sizes`` MiB each."""
    result = run_resident(sizes, **variables)
    assert result.returncode == 0, result.stderr
    return float(result.stdout)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="resident memory is read from /proc")
def test_no_more_is_kept_than_was_in_use_at_once():
    # Had every block been kept, blocks too small for the next step would add up to some 500 MiB.
    growing = [4 * 1.6**n for n in range(7)]
    assert resident_after([growing[-1]]) > growing[-1]
    assert resident_after(growing) < 1.25 * resident_after([growing[-1]])


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="resident memory is read from /proc")
def test_nothing_is_kept_where_that_is_not_wanted():
    assert resident_after([64], FUSEDATTN_REUSE_MEMORY="0") < 32
    assert resident_after([64], FUSEDATTN_REUSE_MEMORY="1") > 100


def test_another_value_of_the_variable_is_a_clear_error():
    result = run_resident([4], FUSEDATTN_REUSE_MEMORY="no")
    assert result.returncode != 0
    assert "FUSEDATTN_REUSE_MEMORY: expected 0 or 1, got 'no'" in result.stderr
