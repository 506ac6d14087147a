"""The Triton kernels of attention in the interpreter: what test_additive_attention.py does not ask there already.

What runs on a GPU is the compiled kernel: ``make gates`` compiles each, ``tests/ptx`` runs the compiled code.
"""

import re

import numpy as np
import pytest
import torch
from device import INTERPRETED
from pairwise import EVERYTHING
from test_additive_attention import check, check_infinite, make_inputs, shape
from torch._inductor.utils import run_and_get_code

from fusedattn import UnsupportedError, additive_attention, additive_attention_ref
from fusedattn._options import AdditiveAttentionOptions as Options
from fusedattn.triton import additive_attention_problem

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.skipif(not INTERPRETED, reason="the interpreter needs TRITON_INTERPRET=1 and its own process"),
]


@pytest.mark.parametrize("dtype", [torch.float32, *[torch.float64] * EVERYTHING])
def test_magnitudes_differ_between_tiles(dtype):
    query, key, value, weight = make_inputs(shape(1, 40, 70, 3, 5), dtype)
    query[0, 3] *= 30
    key[0, 66] *= 100
    check([query, key, value, weight])


def test_a_range_of_keys_at_minus_infinity_leaves_the_others_theirs():
    """Scores that overflow: softmax is NaN only where no range has a finite one."""
    query, key, value, weight = make_inputs(shape(1, 3, 280, 4, 4))
    query[..., :2], key[..., :2], weight[:2] = 0, -30, 3e38
    key[:, 265:, :2] = 0
    actual = check_infinite([query, key, value, weight])
    assert (actual["weights"][:, :, :265] == 0).all() and (actual["weights"][:, :, 265:] > 0).all()


def test_layouts():
    def views(leaves):
        query, key, value, weight = leaves
        return query.expand(3, -1, -1), key[:, ::2].expand(3, -1, -1), value.transpose(1, 2), weight[::2]

    inputs = make_inputs(shape(1, 7, 70, 4, 6))
    query, key, _, _ = inputs
    value, weight = torch.randn(3, 6, 35), torch.randn(8)
    check([query, key, value, weight], views=views)


@pytest.mark.parametrize("Tq", [1, 5])
def test_channels_far_apart(Tq):
    """Of a transposed tensor: d times the stride of d does not fit 32 bits. Nothing of the gap is touched."""
    query, key, value, weight = make_inputs(shape(1, Tq, 6, 3, 4), torch.float16)
    query[0, 0] = 60  # beyond the range of exponentials: the inputs themselves are read

    def apart(t):
        gap = torch.from_numpy(np.zeros(2**31 + t.shape[1], np.float16)).as_strided(t.shape, (0, 1, 2**30))
        return gap.copy_(t)

    expected = additive_attention(query, key, value, weight)
    torch.testing.assert_close(additive_attention(apart(query), key, value, weight), expected, rtol=0, atol=0)
    torch.testing.assert_close(additive_attention(query, apart(key), value, weight), expected, rtol=0, atol=0)


def test_several_chunks_of_queries(monkeypatch):
    """Scratch is bounded: the scores of 32 queries at a time, none of them kept."""
    monkeypatch.setattr(additive_attention_problem, "CHUNK", 1)
    inputs = make_inputs(shape(1, 40, 20, 2, 3))
    for bias in (torch.randn(40, 20), torch.randn(20)):
        check([*inputs, bias], window_size=(30, 3), key_lengths=torch.tensor([17]), scale=0.7)
    inputs = [t.requires_grad_() for t in make_inputs(shape(2, 40, 20, 2, 3))]
    monkeypatch.setattr("fusedattn.ops.additive_attention.keeps_scores", lambda *_: False)
    for is_causal in (False, True):
        gradients = [
            torch.autograd.grad(function(*inputs, is_causal=is_causal).sin().sum(), inputs)
            for function in (additive_attention, additive_attention_ref)
        ]
        torch.testing.assert_close(*gradients)


def test_compiles_without_graph_breaks():
    linear = torch.nn.Linear(3, 4)
    query, key, value, weight = make_inputs(shape(2, 5, 7, 4, 6))
    inputs = [torch.randn(2, 5, 3), key.requires_grad_(), value, weight]

    def model(x, key, value, weight):
        return additive_attention(linear(x), key, value, weight, return_lse=True)[0].sin().sum()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for Tk in (7, 6):
        arguments = [inputs[0], key[:, :Tk], value[:, :Tk], weight]
        gradients = [torch.autograd.grad(f(*arguments), (key, linear.weight)) for f in (compiled, model)]
        torch.testing.assert_close(*gradients)


@pytest.mark.skipif(not EVERYTHING, reason="for make test-all: Inductor takes seconds, and is asked on the CPU")
def test_inductor_calls_each_operator_once():
    """Inductor's code for forward and backward is one call of ours each, around loops of its own, and runs."""
    linear = torch.nn.Linear(3, 4)
    query, key, value, weight = make_inputs(shape(2, 5, 7, 4, 6))
    inputs = [torch.randn(2, 5, 3), key.requires_grad_(), value, weight]

    def model(x, key, value, weight):
        return additive_attention(linear(x).tanh(), key, value.exp(), weight, return_lse=True)[0].sin().sum()

    compiled = torch.compile(model, fullgraph=True)
    expected = torch.autograd.grad(model(*inputs), (key, linear.weight))
    actual, code = run_and_get_code(lambda: torch.autograd.grad(compiled(*inputs), (key, linear.weight)))
    torch.testing.assert_close(actual, expected)
    calls = [re.findall(r"= (torch\.ops\.fusedattn\.\w+)\.default\(", text) for text in code]
    names = ("additive_attention_fwd_triton", "additive_attention_bwd_triton")
    assert calls == [[f"torch.ops.fusedattn.{name}"] for name in names]


def test_operators_are_well_formed():
    query, key, value, weight = (t.unsqueeze(1) for t in make_inputs(shape(2, 5, 7, 4, 6)))
    bias = torch.zeros(1, 1, 5, 7)
    options = (bias, None, torch.tensor([7, 3]), *[None] * 4, *Options(-1, 0, 0.5, 2.0, 0, 0.2))
    arguments = (query, key, value, weight.view(1, 4), *options)
    fwd, bwd = torch.ops.fusedattn.additive_attention_fwd_triton, torch.ops.fusedattn.additive_attention_bwd_triton
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(fwd, (*arguments, True, True), test_utils=tests)
    context, lse, weights, scores = fwd(*arguments, True, True)
    for output_mask in (0b11111, 0b00001, 0b00110, 0b11000):
        backward = (context, lse, weights, *arguments, context, lse, scores, output_mask)
        torch.library.opcheck(bwd, backward, test_utils=tests)


def test_unsupported_inputs():
    with pytest.raises(UnsupportedError, match="triton: .*float8"):
        additive_attention(*(t.to(torch.float8_e5m2) for t in make_inputs(shape(1, 2, 3, 4))))
