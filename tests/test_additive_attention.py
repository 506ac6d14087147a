"""The kernels of additive attention against the reference: values and all gradients, within tests/tolerance.py.

Triton's kernels take the tests marked ``interpreted``, in its interpreter. A step there takes a millisecond,
whatever its tile: few channels, any number of rows.
"""

import math
import os
import subprocess
import sys

import pytest
import torch
from device import INTERPRETED, cpu_alone, examples, not_on_the_standin
from hypothesis import given, settings
from hypothesis import strategies as st
from pairwise import in_dtypes, pairwise
from tolerance import assert_close_to_reference

from fusedattn import additive_attention, additive_attention_ref

pytestmark = pytest.mark.levels

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INPUTS = ("query", "key", "value", "weight")
BIASED = (*INPUTS, "bias")
ACTIVATIONS = ("tanh", "relu", "leaky_relu", "sigmoid")


def shape(B, Tq, Tk, D, Dv=None, H=None):
    return {"B": B, "H": H, "Tq": Tq, "Tk": Tk, "D": D, "Dv": D if Dv is None else Dv}


def make_inputs(sizes, dtype=torch.float32, seed=0, spread=1.0):
    """query, key, value and weight (a weight per head where there are heads)."""
    torch.manual_seed(seed)
    B, H, Tq, Tk, D, Dv = sizes.values()
    lead = (B,) if H is None else (B, H)
    query, key = (torch.randn(*lead, T, D, dtype=torch.float64) * spread for T in (Tq, Tk))
    value = torch.randn(*lead, Tk, Dv, dtype=torch.float64)
    weight = torch.randn(*(() if H is None else (H,)), D, dtype=torch.float64)
    return [t.to(dtype) for t in (query, key, value, weight)]


def gradients_of_outputs(context_shape, keys, dtype, seed=1):
    """Random gradients of context, weights and lse, exact in dtype."""
    generator = torch.Generator().manual_seed(seed)
    rows = context_shape[:-1]
    shapes = (context_shape, (*rows, keys), rows)
    drawn = (torch.randn(s, generator=generator, dtype=torch.float64, device="cpu") for s in shapes)
    return [t.to(torch.get_default_device(), dtype).double() for t in drawn]


def run(function, inputs, dtype=None, views=None, **options):
    """Outputs by name, and the gradients of all inputs for random gradients of all outputs.

    Inputs are those of INPUTS, or of BIASED.
    """
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    query, key, value, weight, *bias = views(leaves) if views else leaves
    options |= {"bias": bias[0]} if bias else {}
    outputs = function(query, key, value, weight, return_weights=True, return_lse=True, **options)
    grads = gradients_of_outputs(outputs[0].shape, outputs[1].shape[-1], inputs[0].dtype)
    grads = [grad.to(output.dtype) for grad, output in zip(grads, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, leaves, grads)
    named = dict(zip(("context", "weights", "lse"), outputs, strict=True))
    return named | {f"grad_{name}": t for name, t in zip(BIASED, gradients, strict=False)}


def largest_activation(query, key, activation):
    """max |phi(q + k)|: that of what is not bounded, 1 of the others."""
    if activation not in ("relu", "leaky_relu") or not (query.numel() and key.numel()):
        return 1.0
    return max(1.0, (query.unsqueeze(-2) + key.unsqueeze(-3)).abs().max().item())


def term_magnitudes(inputs, exact, views=None, scale=1.0, softcap=None, activation="tanh", dropout_p=0.0, **_):
    """Magnitude of the terms of every sum, where the sums themselves may cancel.

    A score has the rounding of its D terms w_d phi and of sum_d w_d (tanh = 1 - 2r), that is ``noise`` units; it
    is a relative error of p = exp(score - lse), and so of all that is a sum over p.
    """
    leaves = [t.double() for t in inputs]
    query, key, value, weight, *bias = called = views(leaves) if views else leaves
    p = exact["weights"].detach()
    dc, dp, dlse = (t.abs() for t in gradients_of_outputs(exact["context"].shape, p.shape[-1], inputs[0].dtype))
    dc = dc / (1 - dropout_p)
    noise, largest = 1 + (softcap or 0), 1.0
    if weight.numel():
        largest = largest_activation(query, key, activation)
        noise += abs(scale) * (largest * weight.norm(dim=-1).max() + weight.sum(-1).abs().max()).item()
    for t in bias:
        noise += t[t.isfinite()].abs().max().item() if t.isfinite().any() else 0
    a = dc @ value.abs().transpose(-1, -2) + dp
    g = p * (a + (p * a).sum(-1, keepdim=True) + dlse.unsqueeze(-1)) * noise
    w = weight.abs().unsqueeze(-2)
    sums = {
        "context": p @ value.abs() * noise / (1 - dropout_p),
        "weights": p * noise,
        "lse": torch.tensor([noise]),
        "grad_query": 4 * g.sum(-1).unsqueeze(-1) * w,
        "grad_key": 4 * g.sum(-2).unsqueeze(-1) * w,
        "grad_value": p.transpose(-1, -2) @ dc * noise,
        "grad_weight": 3 * largest * (g.sum((0, -1, -2)) if weight.dim() > 1 else g.sum()).reshape(-1),
    }
    if bias:
        sums["grad_bias"] = g.sum_to_size(bias[0].shape)
    for name in ("grad_query", "grad_key", "grad_weight"):
        sums[name] *= abs(scale)
    magnitudes = {name: t.max().item() if t.numel() else 0.0 for name, t in sums.items()}
    for name, leaf, t in zip(BIASED, leaves, called, strict=False):
        magnitudes[f"grad_{name}"] *= max(t.numel(), 1) / max(
            leaf.numel(), 1
        )  # an expanded input sums its gradients
    return magnitudes


def check(inputs, kernel=additive_attention, eager=additive_attention_ref, views=None, factor_eps=0.0, **options):
    """The kernel's outputs and gradients are as near to float64 as those of ``eager`` in the same dtype.

    factor_eps: of tests/tolerance.py, where the product of weights and value may round its factors.
    """
    actual = run(kernel, inputs, views=views, **options)
    plain = run(eager, inputs, views=views, **options)
    exact = run(additive_attention_ref, inputs, torch.float64, views=views, **options)
    magnitudes = term_magnitudes(inputs, exact, views, **options)
    (*lead, Tq, D), Tk = inputs[0].shape, inputs[1].shape[-2]
    rows = math.prod(lead) * Tq
    # Every result has a score's D terms and the normaliser's Tk in it, the gradients below also longer sums.
    more = {"grad_key": Tq, "grad_value": Tq, "grad_weight": rows * Tk, "grad_bias": rows * Tk}
    for name, result in actual.items():
        n = D + Tk + more.get(name, 0)
        bounds = dict(terms=n, scale=magnitudes[name], factor_eps=factor_eps)
        assert_close_to_reference(result, plain[name], exact[name], name=name, **bounds)
    return actual


SHAPES = [
    shape(1, 1, 1, 1),
    shape(1, 1, 32, 64),
    shape(3, 1, 129, 129, 63),
    shape(2, 2, 63, 31, 1),
    shape(2, 3, 17, 16, 33),
    shape(1, 4, 129, 63, 65),
    shape(2, 5, 64, 65, 129),
    shape(1, 16, 129, 63, 16),
    shape(1, 63, 129, 64, 63),
    shape(2, 129, 63, 7, 31),  # scores are recomputed
    shape(2, 17, 33, 1, 1),
    shape(1, 1, 1000, 33, 5),  # keys split over cores
    shape(1, 6, 700, 130, 3),
    shape(2, 5, 17, 33, 8, H=3),
    shape(1, 33, 18, 8, 24, H=2),
]
INTERPRETED_SHAPES = [
    shape(2, 2, 17, 6, 33, H=2),  # few queries
    shape(1, 40, 33, 7, 130),  # scores are recomputed, several tiles of values
    shape(1, 1, 1, 1),
    shape(2, 3, 63, 31, 17),
    shape(1, 16, 129, 5, 16),
    shape(2, 63, 65, 4, 5),
    shape(1, 17, 5, 130, 3),
    shape(1, 1, 270, 2, 3),  # keys split over programs, which share no fewer than 256
    shape(1, 17, 270, 2, 3),
]


@pytest.mark.interpreted
@in_dtypes(*((INTERPRETED_SHAPES, INTERPRETED_SHAPES[:2]) if INTERPRETED else (SHAPES, SHAPES)), DTYPES)
def test_matches_the_reference(sizes, dtype):
    check(make_inputs(sizes, dtype))


@not_on_the_standin("large, and asks nothing new of it")
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        (shape(8, 1, 1027, 1024), torch.float32),
        (shape(9, 3, 1000, 1024, 1008), torch.float32),
        (shape(17, 1, 1003, 1024, 1008), torch.bfloat16),
    ],
)
def test_gradients_beyond_the_caches(sizes, dtype):
    """From 32 MiB up, whole aligned rows of gradients are written past the caches; those of one batch are not."""
    *inputs, weight = make_inputs(sizes, dtype)
    lengths = (sizes["Tk"] - 101 * torch.arange(sizes["B"])).clamp(min=0)

    def gradients(part, dtype=dtype):
        leaves = [t[part].to(dtype).requires_grad_() for t in inputs]
        context = additive_attention(*leaves, weight.to(dtype), key_lengths=lengths[part])
        return torch.autograd.grad(context.square().sum(), leaves)

    whole = gradients(slice(None))
    assert inputs[1].nbytes >= 32 << 20 > inputs[1][0].nbytes * 2
    for b in range(sizes["B"]):
        part = slice(b, b + 1)
        for all_of_them, one, exact in zip(whole, gradients(part), gradients(part, torch.float64), strict=True):
            assert_close_to_reference(all_of_them[part], one, exact, terms=sizes["D"] + sizes["Tk"])


@pytest.mark.parametrize(
    ("sizes", "is_causal"),
    [
        (shape(1, 1100, 1000, 3, 2), True),  # query rows in several chunks
        (shape(1, 33, 70000, 2, 1), False),  # chunks of few queries walk whole key rows
        (shape(8, 150, 150, 2, 1, H=8), True),  # several heads per chunk
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_matches_the_reference_in_several_chunks(sizes, is_causal, dtype):
    check(make_inputs(sizes, dtype), is_causal=is_causal)


# Masks by kind, for 3-D inputs (B, Tq, Tk) and for heads (B, H, Tq, Tk).
MASKS = {
    "none": lambda B, H, Tq, Tk: None,
    "keys": lambda B, H, Tq, Tk: torch.rand(Tk) > 0.4,
    "queries_keys": lambda B, H, Tq, Tk: torch.rand(Tq, Tk) > 0.4,
    "queries": lambda B, H, Tq, Tk: torch.rand(Tq, 1) > 0.4,
    "batch_keys": lambda B, H, Tq, Tk: torch.rand(*([B, 1] if H is None else [B, 1, 1]), Tk) > 0.4,
    "full": lambda B, H, Tq, Tk: torch.rand(*([B] if H is None else [B, H]), Tq, Tk) > 0.4,
    "heads": lambda B, H, Tq, Tk: torch.rand(*([1] if H is None else [H]), Tq, Tk) > 0.4,
    "empty_rows": lambda B, H, Tq, Tk: (torch.rand(Tq, 1) > 0.5) & (torch.rand(Tq, Tk) > 0.3),
    "all_masked": lambda B, H, Tq, Tk: torch.zeros(1, 1, dtype=torch.bool),
    "transposed": lambda B, H, Tq, Tk: (torch.rand(Tk, Tq) > 0.4).T,
}
MASKED_SHAPES = [
    shape(2, 1, 37, 9, 5),
    shape(3, 19, 37, 6, 7),
    shape(2, 7, 35, 20, 9, H=3),
]
if INTERPRETED:
    MASKED_SHAPES = [shape(2, 2, 37, 3, 5, H=2), shape(2, 19, 37, 3, 5)]


@pytest.mark.interpreted
@pairwise(
    sizes=MASKED_SHAPES, kind=MASKS, lengths=[False, True], is_causal=[False, True], activation=ACTIVATIONS[:2]
)
def test_masks_and_their_combinations(sizes, kind, lengths, is_causal, activation):
    inputs = make_inputs(sizes)
    B, H, Tq, Tk = (sizes[name] for name in ("B", "H", "Tq", "Tk"))
    mask = MASKS[kind](B, H, Tq, Tk)
    key_lengths = torch.tensor([20, 0, Tk][:B]) if lengths else None
    options = {"mask": mask, "key_lengths": key_lengths, "is_causal": is_causal, "activation": activation}
    actual = check(inputs, **options)
    # What the reference says of invisible keys, said again without it.
    visible = torch.ones(*actual["weights"].shape, dtype=torch.bool)
    if mask is not None:
        visible &= mask
    if is_causal:
        visible &= torch.ones(Tq, Tk, dtype=torch.bool).tril()
    if lengths:
        ranks = (-1,) + (1,) * (visible.dim() - 1)
        visible &= torch.arange(Tk) < key_lengths.view(ranks)
    assert (actual["weights"][~visible] == 0).all()
    empty = ~visible.any(-1)
    assert (actual["lse"] == -math.inf).equal(empty)
    assert (actual["context"][empty] == 0).all() and (actual["grad_query"][empty] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_masks_in_every_dtype(dtype):
    inputs = make_inputs(shape(2, 19, 37, 6, 7), dtype)
    check(inputs, mask=MASKS["empty_rows"](2, None, 19, 37), key_lengths=torch.tensor([33, 0]), is_causal=True)


@pytest.mark.parametrize("integers", [torch.int64, torch.int32, torch.uint8])
def test_key_lengths_of_any_integer_dtype(integers):
    inputs = make_inputs(shape(3, 2, 9, 4))
    lengths = torch.tensor([9, 0, 4])
    expected = additive_attention_ref(*inputs, key_lengths=lengths)
    torch.testing.assert_close(additive_attention(*inputs, key_lengths=lengths.to(integers)), expected)
    strided = torch.stack([lengths, lengths], 1)[:, 0].to(integers)
    torch.testing.assert_close(additive_attention(*inputs, key_lengths=strided), expected)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    "outputs", [("weights",), ("lse",), ("context", "weights"), ("context", "lse")], ids="-".join
)
def test_gradients_of_each_output_alone(outputs):
    sizes = shape(2, 5, 40, 3 if INTERPRETED else 33, 6)
    inputs = [t.requires_grad_() for t in make_inputs(sizes, torch.float64)]
    options = {"return_weights": True, "return_lse": True, "key_lengths": torch.tensor([40, 0])}

    def gradients(function):
        results = dict(zip(("context", "weights", "lse"), function(*inputs, **options), strict=True))
        loss = sum(results[name].masked_fill(results[name] == -math.inf, 0).sin().sum() for name in outputs)
        return torch.autograd.grad(loss, inputs, materialize_grads=True)

    torch.testing.assert_close(gradients(additive_attention), gradients(additive_attention_ref))


def test_outputs_come_in_order():
    inputs = make_inputs(shape(2, 3, 7, 4, 5))
    assert additive_attention(*inputs).shape == (2, 3, 5)
    context, weights = additive_attention(*inputs, return_weights=True)
    assert context.shape == (2, 3, 5) and weights.shape == (2, 3, 7)
    context, lse = additive_attention(*inputs, return_lse=True)
    assert context.shape == (2, 3, 5) and lse.shape == (2, 3)
    context, weights, lse = additive_attention(*inputs, return_weights=True, return_lse=True)
    assert weights.shape == (2, 3, 7) and lse.shape == (2, 3)
    torch.testing.assert_close(weights @ inputs[2], context)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_of_outputs(dtype):
    outputs = run(additive_attention, make_inputs(shape(1, 2, 3, 4), dtype))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {name: t.dtype for name, t in outputs.items()} == {name: dtype for name in outputs} | {"lse": wide}


@pytest.mark.interpreted
@pytest.mark.parametrize("empty", ["B", "Tq", "Tk", "D", "Dv", "H"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_sizes(empty, dtype):
    sizes = shape(2, 3, 5, 4, 6, H=2) | {empty: 0}
    actual = check(make_inputs(sizes, dtype))
    if empty == "Tk":
        assert (actual["context"] == 0).all() and (actual["lse"] == -math.inf).all()


# Ranges (DESIGN: |q| + |k| decides which loop runs)

MAGNITUDES = {
    "opposite": (60.0, -59.5),
    "overflow": (1e4, -1e4),
    "far": (1e4, 1e4),
    "huge": (1e30, -1e30),
    "huge_and_small": (3e38, 1e-30),
    "subnormal": (1e-40, -1e-40),
    "edge_of_four": (5.0, 5.0),
    "beyond_four": (5.1, -5.0),
    "edge_of_two": (10.5, -10.5),
    "beyond_two": (10.6, 10.5),
    "float64_four": (42.6, -42.5),
    "float64_two": (85.1, -85.0),
}


@pytest.mark.interpreted
@pairwise(
    Tq=[1, 5],
    magnitude=MAGNITUDES,
    D=[3] if INTERPRETED else [1, 16, 70],
    dtype=[torch.float32, torch.float64],
)
def test_magnitudes(Tq, magnitude, D, dtype):
    query, key, value, weight = make_inputs(shape(1, Tq, 21, D, 3), dtype)
    q, k = MAGNITUDES[magnitude]
    query = q + 0.25 * query if abs(q) < 1e6 else q * query.sign()
    key = k + 0.25 * key if abs(k) < 1e6 else k * key.sign()
    check([query, key, value, weight])


def check_overflowing_weights(Tq, kernel=additive_attention):
    """w - 2 w r is finite where the sums of either are not."""
    inputs = make_inputs(shape(2, Tq, 19, 40))
    inputs[3] = torch.full_like(inputs[3], 3e38)
    for t in inputs[:2]:
        t *= 1e-3
    actual, eager, exact = (
        function(*(t.to(dtype) for t in inputs), return_weights=True, return_lse=True)[2]
        for function, dtype in (
            (kernel, torch.float32),
            (additive_attention_ref, torch.float32),
            (additive_attention_ref, torch.float64),
        )
    )
    assert exact.abs().max() < torch.finfo(torch.float32).max
    noise = inputs[3].double().norm() + inputs[3].double().sum()  # as in term_magnitudes
    assert_close_to_reference(actual, eager, exact, terms=40, scale=noise.item())


@pytest.mark.interpreted
@pytest.mark.parametrize("Tq", [1, 3, 20])
def test_weights_whose_sum_overflows(Tq):
    check_overflowing_weights(Tq)


@pytest.mark.parametrize("Tq", [1, 3, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_magnitudes_mixed_within_tiles(dtype, Tq):
    query, key, value, weight = make_inputs(shape(2, Tq, 43, 37, 5), dtype)
    sizes = torch.tensor([0.1, 1.0, 3.0, 8.0, 30.0, 100.0, 1000.0])
    query *= sizes[torch.arange(Tq) % 7].to(dtype)[:, None]
    key *= sizes[torch.arange(43) % 5].to(dtype)[:, None]
    query[0, 0, 0], key[0, 1, 0] = 60, -59.5
    check([query, key, value, weight])


@pytest.mark.interpreted
@pytest.mark.parametrize("Tq", [2, 5])
@pytest.mark.parametrize("size", [1e-30, 1e6, 1e15, 1e30])
def test_magnitudes_of_the_weight(size, Tq):
    query, key, value, weight = make_inputs(shape(2, Tq, 21, 6 if INTERPRETED else 18, 3))
    check([query, key, value, weight * size])


@pytest.mark.parametrize("values", ["weight_zero", "one_channel", "value_large"])
def test_unusual_weights(values):
    query, key, value, weight = make_inputs(shape(2, 5, 21, 18, 3))
    if values == "weight_zero":
        weight = torch.zeros_like(weight)
    elif values == "one_channel":
        weight = weight * 1e-20
        weight[3] = 2.0
    else:
        value = value * 1e30
    check([query, key, value, weight])


def check_infinite(inputs, kernel=additive_attention, **options):
    """NaN and infinities stand where they do in the reference; gradients hide none of its.

    With a mask gradients are not compared: the reference multiplies the zeros of masked pairs with infinities.
    """
    actual = run(kernel, inputs, **options)
    eager = run(additive_attention_ref, inputs, **options)
    for name in ("context", "weights", "lse"):
        torch.testing.assert_close(actual[name], eager[name], equal_nan=True)
    for gradient in () if "mask" in options else ("grad_query", "grad_key", "grad_value", "grad_weight"):
        hidden = actual[gradient].isfinite() & ~eager[gradient].isfinite()
        assert not hidden.any(), f"{gradient}: finite where the reference is not"
    return actual


FEW, MANY = (shape(2, 3, 9, 5, 4), shape(1, 20, 9, 3, 4) if INTERPRETED else shape(2, 20, 35, 40, 18))


@pytest.mark.interpreted
@pairwise(sizes=[FEW, MANY], name=INPUTS, special=[math.nan, math.inf, -math.inf], activation=ACTIVATIONS)
def test_nan_and_infinity_behave_as_in_the_reference(sizes, name, special, activation):
    inputs = make_inputs(sizes)
    inputs[INPUTS.index(name)].view(-1)[1] = special
    check_infinite(inputs, activation=activation)


def check_minus_infinity(Tq, Tk, dtype, kernel=additive_attention):
    """Visible scores of -inf are not masked ones: where there are no others, softmax is NaN and lse -inf."""
    query, key, value, weight = make_inputs(shape(2, Tq, Tk, 4, 3), dtype)
    query[..., 1] = -9
    query[0, 0, 1] = 0  # one row with infinities of both signs
    weight[1] = math.inf
    mask = torch.ones(Tq, Tk, dtype=torch.bool)
    mask[:, :2], mask[1] = False, False
    options = {"mask": mask, "key_lengths": torch.tensor([Tk, Tk // 2 + 1])}
    for masked in ({}, options):
        actual = check_infinite([query, key, value, weight], kernel, **masked)
        assert actual["context"][:, 2:].isnan().all() and (actual["lse"][:, 2:] == -math.inf).all()


# Queries and keys: these in one part and in several.
PARTS = [(20, 35), (3, 270)] if INTERPRETED else [(20, 35), (3, 35), (20, 1000), (3, 1000)]


@pytest.mark.interpreted
@pytest.mark.parametrize(("Tq", "Tk"), PARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64][: 1 if INTERPRETED else 2])
def test_minus_infinity_is_not_a_mask(Tq, Tk, dtype):
    check_minus_infinity(Tq, Tk, dtype)


@pytest.mark.interpreted
@pytest.mark.parametrize(("Tq", "Tk"), PARTS)
@pytest.mark.parametrize("special", [math.inf, -math.inf][: 1 if INTERPRETED else 2])
def test_an_infinite_weight_gives_an_infinite_lse_and_nan_beside_it(Tq, Tk, special):
    inputs = make_inputs(shape(2, Tq, Tk, 4, 4))
    inputs[0][..., 1] *= 0.1  # so that every row has scores of both infinities
    inputs[3][1] = special
    actual = check_infinite(inputs)
    assert (actual["lse"] == math.inf).all()


@pytest.mark.interpreted
@pytest.mark.parametrize("special", [math.nan, math.inf], ids=["nan", "inf"])
def test_masked_keys_have_no_weight_beside_nan(special):
    inputs = make_inputs(shape(2, 20, 35, 4, 4))
    inputs[3][1] = special
    mask = MASKS["full"](2, None, 20, 35)
    weights = additive_attention(*inputs, mask=mask, return_weights=True)[1]
    assert (weights[~mask] == 0).all() and weights[mask].isnan().any()


def test_opposite_infinities_give_nan():
    query, key, value, weight = make_inputs(shape(1, 2, 5, 6, 3))
    query[0, 0, 2], key[0, 3, 2] = math.inf, -math.inf
    context = additive_attention(query, key, value, weight)
    assert context[0, 0].isnan().all() and context[0, 1].isfinite().all()


# Strides

STRIDES = {
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 2 else t,
    "heads_last": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2) if t.dim() > 3 else t,
    "every_second": lambda t: torch.stack([t, t + 1], -1).flatten(-2)[..., ::2],
    "narrowed": lambda t: torch.nn.functional.pad(t, (3, 2))[..., 3:-2],
    "rows_padded": lambda t: torch.nn.functional.pad(t, (0, 0, 1, 1))[..., 1:-1, :] if t.dim() > 2 else t,
}


@pairwise(
    sizes=[shape(2, 5, 33, 20, 7), shape(2, 18, 19, 24, 9, H=3)],
    strides=STRIDES,
    dtype=[torch.float32, torch.float16],
)
def test_non_contiguous_inputs(sizes, strides, dtype):
    def views(leaves):
        changed = [STRIDES[strides](t) for t in leaves]
        assert strides == "heads_last" or not any(t.is_contiguous() for t in changed[:3])
        return changed

    check(make_inputs(sizes, dtype), views=views)


@pytest.mark.parametrize("dim", ["batch", "heads", "queries", "keys", "channels", "all"])
def test_expanded_inputs(dim):
    full = (2, 3, 7, 19, 10, 6)

    def views(leaves):
        B, H, Tq, Tk, D, Dv = full
        query, key, value, weight = leaves
        return [
            query.expand(B, H, Tq, D),
            key.expand(B, H, Tk, D),
            value.expand(B, H, Tk, Dv),
            weight.expand(H, D),
        ]

    sizes = dict(zip(("B", "H", "Tq", "Tk", "D", "Dv"), full, strict=True))
    one = {"batch": "B", "heads": "H", "queries": "Tq", "keys": "Tk", "channels": "D"}
    sizes |= {name: 1 for key, name in one.items() if dim in (key, "all")}
    check(make_inputs(sizes), views=views)


def test_expanded_gradients():
    inputs = [t.requires_grad_() for t in make_inputs(shape(2, 5, 33, 20, 7))]
    actual = torch.autograd.grad(additive_attention(*inputs).sum(), inputs)
    expected = torch.autograd.grad(additive_attention_ref(*inputs).sum(), inputs)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_inputs_are_left_alone():
    inputs = make_inputs(shape(2, 5, 33, 20, 7))
    copies = [t.clone() for t in inputs]
    run(additive_attention, inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


@pytest.mark.interpreted
@pytest.mark.parametrize("Tq", [5, 18])
def test_one_weight_and_keys_for_all_heads(Tq):
    query, key, value, weight = make_inputs(shape(2, Tq, 20, 4, 5, H=3))

    def views(leaves):
        query, key, value, weight = leaves
        return query, key.expand(-1, 3, -1, -1), value.expand(-1, 3, -1, -1), weight

    check([query, key[:, :1], value[:, :1], weight[0]], views=views)


def test_an_infinite_softcap_caps_nothing():
    inputs = make_inputs(shape(2, 3, 5, 4))
    for function in (additive_attention, additive_attention_ref):
        torch.testing.assert_close(function(*inputs, softcap=math.inf), function(*inputs), rtol=0, atol=0)


# Properties


@st.composite
def problems(draw):
    sizes = {
        name: draw(st.integers(0 if name != "D" else 1, top)) for name, top in (("B", 3), ("Tq", 20), ("Tk", 70))
    }
    H = draw(st.one_of(st.none(), st.integers(1, 3)))
    sizes = shape(**sizes, D=draw(st.integers(1, 40)), Dv=draw(st.integers(1, 20)), H=H)
    options = {
        "is_causal": draw(st.booleans()),
        "scale": draw(st.sampled_from([1.0, 0.3, -2.0])),
        "softcap": draw(st.sampled_from([None, 0.7, 10.0])),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
    }
    torch.manual_seed(draw(st.integers(0, 1000)))
    options["mask"] = MASKS[draw(st.sampled_from(sorted(MASKS)))](sizes["B"], H, sizes["Tq"], sizes["Tk"])
    if draw(st.booleans()):
        options["key_lengths"] = torch.randint(0, sizes["Tk"] + 1, (sizes["B"],))
    strides = [draw(st.sampled_from([None, *sorted(STRIDES)])) for _ in INPUTS]
    spread = draw(st.sampled_from([0.01, 1.0, 4.0, 50.0]))
    return sizes, draw(st.sampled_from(DTYPES)), spread, strides, options


@settings(max_examples=examples(60))
@given(problems())
def test_any_problem_matches_the_reference(problem):
    sizes, dtype, spread, strides, options = problem

    def views(leaves):
        return [t if s is None else STRIDES[s](t) for t, s in zip(leaves, strides, strict=True)]

    check(make_inputs(sizes, dtype, spread=spread), views=views, **options)


@settings(max_examples=examples(25))
@given(st.integers(1, 40), st.integers(2, 90), st.integers(1, 40), st.integers(0, 1000))
def test_order_of_keys_does_not_matter(Tq, Tk, D, seed):
    query, key, value, weight = make_inputs(shape(1, Tq, Tk, D, 3), torch.float64, seed)
    order = torch.randperm(Tk)
    expected = additive_attention(query, key, value, weight)
    torch.testing.assert_close(additive_attention(query, key[:, order], value[:, order], weight), expected)


@settings(max_examples=examples(25))
@given(st.integers(1, 20), st.integers(1, 90), st.integers(0, 90), st.integers(0, 1000))
def test_lengths_are_the_same_as_shorter_keys(Tq, Tk, length, seed):
    length = min(length, Tk)
    query, key, value, weight = make_inputs(shape(1, Tq, Tk, 9, 3), torch.float64, seed)
    expected = additive_attention(query, key[:, :length], value[:, :length], weight)
    actual = additive_attention(query, key, value, weight, key_lengths=torch.tensor([length]))
    torch.testing.assert_close(actual, expected)


# Memory and reproducibility


@pytest.mark.parametrize("sizes", [shape(2, 40, 300, 70), shape(1, 200, 200, 8), shape(1, 3, 3000, 40)])
def test_the_same_bits_every_time(sizes):
    inputs = make_inputs(sizes)
    first = run(additive_attention, inputs)
    for _ in range(3):
        again = run(additive_attention, inputs)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("sizes", [shape(2, 30, 40, 64), shape(1, 300, 300, 8), shape(4, 1, 50, 33)])
def test_what_is_kept_for_backward_is_linear(sizes):
    inputs = [t.requires_grad_() for t in make_inputs(sizes)]
    kept = []

    def keep(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        context = additive_attention(*inputs)
    own = {t.untyped_storage().data_ptr() for t in (*inputs, context)}
    extra = sum(t.numel() for t in kept if t.untyped_storage().data_ptr() not in own)
    B, _, Tq, Tk, D, _ = sizes.values()
    assert extra <= B * (Tq + (Tq + Tk) * D)


LONG_SEQUENCE = """
import torch
from fusedattn import additive_attention

def peak():  # MiB; that of the memory map, which a child does not inherit
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024

def train(T):
    inputs = [torch.randn(1, T, 64, requires_grad=True) for _ in range(3)] + [torch.randn(64, requires_grad=True)]
    additive_attention(*inputs).sum().backward()
    assert all(t.grad.isfinite().all() for t in inputs)

train(64)
before = peak()
train(4096)
print(peak() - before)
"""


@cpu_alone  # tests/test_cuda.py asks the same of a GPU
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from /proc")
def test_training_on_a_long_sequence_takes_linear_memory():
    result = subprocess.run([sys.executable, "-c", LONG_SEQUENCE], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    # Seven tensors of 4096 x 64 are 7 MiB; the scores alone would be 64 MiB.
    assert float(result.stdout) < 32
