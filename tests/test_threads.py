"""Several threads: those of Python at once, and however many compute one result."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fusedattn import additive_attention, film


@pytest.fixture
def num_threads():
    """Sets how many threads compute, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def numbers(*shapes):
    """The same in every thread."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def attention_step(B, Tq, Tk, lengths=None, is_causal=False):
    """Context and gradients."""
    lengths = None if lengths is None else torch.tensor(lengths)
    *inputs, grad = numbers((B, Tq, 40), (B, Tk, 40), (B, Tk, 24), (40,), (B, Tq, 24))
    context = additive_attention(*inputs, key_lengths=lengths, is_causal=is_causal)
    return context, *torch.autograd.grad(context, inputs, grad)


def film_step(*shape, channel_dim=1):
    """Result and gradients."""
    C = shape[channel_dim]
    *inputs, grad = numbers(shape, (shape[0], C), (C,), shape)
    y = film(*inputs, channel_dim=channel_dim, activation="silu")
    return y, *torch.autograd.grad(y, inputs, grad)


STEPS = {
    "uneven lengths": lambda: attention_step(4, 33, 150, lengths=[150, 1, 70, 3]),
    "causal": lambda: attention_step(1, 200, 200, is_causal=True),
    "one query, split keys": lambda: attention_step(1, 1, 5000),
    "split keys": lambda: attention_step(2, 20, 700),
    "rows": lambda: film_step(4096, 70),
    "runs": lambda: film_step(3, 17, 9000),
    "channels last": lambda: film_step(5, 2000, 33, channel_dim=2),
}


@pytest.mark.parametrize("step", STEPS)
def test_the_same_bits_for_any_number_of_threads(step, num_threads):
    num_threads(1)
    alone = STEPS[step]()
    for threads in (2, 3, 7):
        num_threads(threads)
        for a, b in zip(STEPS[step](), alone, strict=True):
            assert torch.equal(a, b)


def test_calls_from_several_threads_do_not_disturb_each_other():
    expected = attention_step(2, 40, 50)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: attention_step(2, 40, 50), range(16)):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
