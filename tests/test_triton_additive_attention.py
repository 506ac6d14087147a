"""The Triton kernels of additive attention in Triton's interpreter: values and all gradients, as for the C++ ones.

What runs on a GPU is the compiled kernel; ``make gates`` compiles each, ``tests/ptx`` runs the
compiled code. A step of the interpreter takes a millisecond whatever its tile: few channels, any number of rows.
"""

import triton_interpreter  # noqa: F401, I001, before anything that imports triton

import functools
import math
import re

import pytest
import torch
from test_additive_attention import (
    INPUTS,
    MAGNITUDES,
    MASKS,
    check,
    check_infinite,
    check_minus_infinity,
    check_overflowing_weights,
    make_inputs,
    run,
    shape,
    shape_id,
)
from torch._inductor.utils import run_and_get_code

from fusedattn import UnsupportedError, additive_attention, additive_attention_ref
from fusedattn.triton import additive_attention_problem

attention = functools.partial(additive_attention, backend="triton")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SHAPES = [
    shape(1, 1, 1, 1),
    shape(2, 3, 63, 31, 17),  # few queries
    shape(2, 2, 17, 6, 33, H=2),
    shape(1, 16, 129, 5, 16),
    shape(2, 63, 65, 4, 5),
    shape(1, 40, 33, 7, 130),  # scores are recomputed, several tiles of values
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SHAPES, ids=shape_id)
def test_matches_the_reference(sizes, dtype):
    check(make_inputs(sizes, dtype), attention)


def test_many_channels():
    check(make_inputs(shape(1, 17, 5, 130, 3)), attention)


@pytest.mark.parametrize("Tq", [2, 19])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", [False, True], ids=["no_lengths", "lengths"])
@pytest.mark.parametrize("kind", ["none", "keys", "queries", "full", "heads", "empty_rows"])
def test_masks_and_their_combinations(Tq, kind, lengths, is_causal):
    sizes = shape(2, Tq, 37, 4, 5, H=2)
    mask = MASKS[kind](2, 2, Tq, 37)
    key_lengths = torch.tensor([20, 0]) if lengths else None
    actual = check(make_inputs(sizes), attention, mask=mask, key_lengths=key_lengths, is_causal=is_causal)
    if lengths:
        assert (actual["context"][1] == 0).all() and (actual["lse"][1] == -math.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("softcap", [None, 0.3])
@pytest.mark.parametrize("scale", [0.3, -1.5, 0.0])
def test_scale_and_softcap(scale, softcap, dtype):
    inputs = make_inputs(shape(2, 9, 35, 6, 9), dtype)
    check(inputs, attention, scale=scale, softcap=softcap, key_lengths=torch.tensor([35, 6]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("Tq", [1, 5])
@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_magnitudes(magnitude, Tq, dtype):
    query, key, value, weight = make_inputs(shape(1, Tq, 21, 3, 3), dtype)
    q, k = MAGNITUDES[magnitude]
    query = q + 0.25 * query if abs(q) < 1e6 else q * query.sign()
    key = k + 0.25 * key if abs(k) < 1e6 else k * key.sign()
    check([query, key, value, weight], attention)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_magnitudes_differ_between_tiles(dtype):
    query, key, value, weight = make_inputs(shape(1, 40, 150, 4, 5), dtype)
    query[0, 3] *= 30
    key[0, 140] *= 100
    check([query, key, value, weight], attention)


@pytest.mark.parametrize("size", [1e-30, 1e15, 1e30])
@pytest.mark.parametrize("Tq", [2, 5])
def test_magnitudes_of_the_weight(size, Tq):
    query, key, value, weight = make_inputs(shape(2, Tq, 21, 6, 3))
    check([query, key, value, weight * size], attention)


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("Tq", [3, 20])
def test_nan_and_infinity_behave_as_in_the_reference(Tq, name, special):
    inputs = make_inputs(shape(2, Tq, 9, 4, 4))
    inputs[INPUTS.index(name)].view(-1)[1] = special
    check_infinite(inputs, attention)


@pytest.mark.parametrize("special", [math.inf, -math.inf], ids=["inf", "-inf"])
@pytest.mark.parametrize("Tk", [70, 300], ids=["one_range", "split_keys"])
@pytest.mark.parametrize("Tq", [3, 20])
def test_an_infinite_weight_gives_an_infinite_lse_and_nan_beside_it(Tq, Tk, special):
    inputs = make_inputs(shape(2, Tq, Tk, 4, 4))
    inputs[0][..., 1] *= 0.1  # so that every row has scores of both infinities
    inputs[3][1] = special
    actual = check_infinite(inputs, attention)
    assert (actual["lse"] == math.inf).all()


@pytest.mark.parametrize(("Tk", "dtype"), [(70, torch.float32), (300, torch.float32), (70, torch.float64)])
@pytest.mark.parametrize("Tq", [3, 20])
def test_minus_infinity_is_not_a_mask(Tq, Tk, dtype):
    check_minus_infinity(Tq, Tk, dtype, attention)


@pytest.mark.parametrize("Tq", [1, 20])
def test_weights_whose_sum_overflows(Tq):
    check_overflowing_weights(Tq, attention)


@pytest.mark.parametrize("special", [math.nan, math.inf], ids=["nan", "inf"])
def test_masked_keys_have_no_weight_beside_nan(special):
    inputs = make_inputs(shape(2, 20, 35, 4, 4))
    inputs[3][1] = special
    mask = MASKS["full"](2, None, 20, 35)
    weights = attention(*inputs, mask=mask, return_weights=True)[1]
    assert (weights[~mask] == 0).all() and weights[mask].isnan().any()


def test_a_range_of_keys_at_minus_infinity_leaves_the_others_theirs():
    """Scores that overflow: softmax is NaN only where no range has a finite one."""
    query, key, value, weight = make_inputs(shape(1, 3, 400, 4, 4))
    query[..., :2], key[..., :2], weight[:2] = 0, -30, 3e38
    key[:, 300:, :2] = 0
    actual = check_infinite([query, key, value, weight], attention)
    assert (actual["weights"][:, :, :300] == 0).all() and (actual["weights"][:, :, 300:] > 0).all()


def test_layouts():
    def views(leaves):
        query, key, value, weight = leaves
        return query.expand(3, -1, -1), key[:, ::2].expand(3, -1, -1), value.transpose(1, 2), weight[::2]

    inputs = make_inputs(shape(1, 7, 70, 4, 6))
    query, key, _, _ = inputs
    value, weight = torch.randn(3, 6, 35), torch.randn(8)
    check([query, key, value, weight], attention, views=views)


def test_one_weight_and_keys_for_all_heads():
    query, key, value, weight = make_inputs(shape(2, 18, 20, 4, 5, H=3))
    inputs = [query, key[:, :1], value[:, :1], weight[0]]

    def views(leaves):
        query, key, value, weight = leaves
        return query, key.expand(-1, 3, -1, -1), value.expand(-1, 3, -1, -1), weight

    check(inputs, attention, views=views)


@pytest.mark.parametrize("empty", ["B", "Tq", "Tk", "D", "Dv", "H"])
def test_zero_sizes(empty):
    check(make_inputs(shape(2, 5, 6, 4, 6, H=2) | {empty: 0}), attention)


def test_several_chunks_of_queries(monkeypatch):
    """Scratch is bounded: the scores of 32 queries at a time, none of them kept."""
    monkeypatch.setattr(additive_attention_problem, "CHUNK", 1)
    check(make_inputs(shape(1, 70, 40, 2, 3)), attention, is_causal=True, key_lengths=torch.tensor([37]))
    inputs = [t.requires_grad_() for t in make_inputs(shape(2, 70, 40, 2, 3))]
    monkeypatch.setattr("fusedattn.ops.additive_attention._keeps_scores", lambda *_: False)
    for is_causal in (False, True):
        gradients = [
            torch.autograd.grad(function(*inputs, is_causal=is_causal).sin().sum(), inputs)
            for function in (attention, additive_attention_ref)
        ]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("Tq", "dtype"), [(1, torch.float32), (17, torch.float32), (1, torch.float64)])
def test_keys_split_over_programs(Tq, dtype):
    check(make_inputs(shape(1, Tq, 1000, 2, 3), dtype), attention, key_lengths=torch.tensor([700]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("outputs", [("weights",), ("lse",)], ids="-".join)
def test_gradients_of_each_output_alone(outputs, dtype):
    inputs = [t.requires_grad_() for t in make_inputs(shape(2, 5, 40, 3, 6), dtype)]

    def gradients(function):
        results = dict(
            zip(("weights", "lse"), function(*inputs, return_weights=True, return_lse=True)[1:], strict=True)
        )
        return torch.autograd.grad(
            sum(results[name].sin().sum() for name in outputs), inputs, materialize_grads=True
        )

    torch.testing.assert_close(gradients(attention), gradients(additive_attention_ref))


def test_the_same_bits_every_time():
    inputs = make_inputs(shape(2, 18, 300, 4, 5))
    first, second = (run(attention, inputs) for _ in range(2))
    assert all(first[name].equal(second[name]) for name in first)


def test_compiles_without_graph_breaks():
    linear = torch.nn.Linear(3, 4)
    query, key, value, weight = make_inputs(shape(2, 5, 7, 4, 6))
    inputs = [torch.randn(2, 5, 3), key.requires_grad_(), value, weight]

    def model(x, key, value, weight):
        return attention(linear(x), key, value, weight, return_lse=True)[0].sin().sum()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for Tk in (7, 6):
        arguments = [inputs[0], key[:, :Tk], value[:, :Tk], weight]
        gradients = [torch.autograd.grad(f(*arguments), (key, linear.weight)) for f in (compiled, model)]
        torch.testing.assert_close(*gradients)


def test_inductor_calls_each_operator_once():
    """Inductor's code for forward and backward is one call of ours each, around loops of its own, and runs."""
    linear = torch.nn.Linear(3, 4)
    query, key, value, weight = make_inputs(shape(2, 5, 7, 4, 6))
    inputs = [torch.randn(2, 5, 3), key.requires_grad_(), value, weight]

    def model(x, key, value, weight):
        return attention(linear(x).tanh(), key, value.exp(), weight, return_lse=True)[0].sin().sum()

    compiled = torch.compile(model, fullgraph=True)
    expected = torch.autograd.grad(model(*inputs), (key, linear.weight))
    actual, code = run_and_get_code(lambda: torch.autograd.grad(compiled(*inputs), (key, linear.weight)))
    torch.testing.assert_close(actual, expected)
    calls = [re.findall(r"= (torch\.ops\.fusedattn\.\w+)\.default\(", text) for text in code]
    names = ("additive_attention_fwd_triton", "additive_attention_bwd_triton")
    assert calls == [[f"torch.ops.fusedattn.{name}"] for name in names]


def test_operators_are_well_formed():
    query, key, value, weight = (t.unsqueeze(1) for t in make_inputs(shape(2, 5, 7, 4, 6)))
    options = (None, torch.tensor([7, 3]), None, None, True, 0.5, 2.0)
    arguments = (query, key, value, weight.view(1, 4), *options)
    fwd, bwd = torch.ops.fusedattn.additive_attention_fwd_triton, torch.ops.fusedattn.additive_attention_bwd_triton
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(fwd, (*arguments, True, True), test_utils=tests)
    context, lse, weights, scores = fwd(*arguments, True, True)
    torch.library.opcheck(bwd, (context, lse, weights, *arguments, context, lse, scores), test_utils=tests)


def test_unsupported_inputs():
    with pytest.raises(UnsupportedError, match="triton: .*float8"):
        attention(*(t.to(torch.float8_e5m2) for t in make_inputs(shape(1, 2, 3, 4))))
