"""The scores of additive attention, values and gradients within tests/tolerance.py, and what composes of them."""

import math

import pytest
import torch
from device import BACKEND, DEVICE, INTERPRETED, not_on_the_standin, raw_op
from pairwise import in_dtypes, pairwise
from test_additive_attention import ACTIVATIONS, largest_activation
from tolerance import assert_close_to_reference

from fusedattn import additive_attention, additive_scores, additive_scores_ref

pytestmark = pytest.mark.levels

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INPUTS = ("query", "key", "weight")


def make_inputs(B, Tq, Tk, D, H=None, dtype=torch.float32, spread=1.0):
    torch.manual_seed(0)
    lead = (B,) if H is None else (B, H)
    query, key = (torch.randn(*lead, T, D, dtype=torch.float64) * spread for T in (Tq, Tk))
    weight = torch.randn(*(() if H is None else (H,)), D, dtype=torch.float64)
    return [t.to(dtype) for t in (query, key, weight)]


def run(function, inputs, dtype=None, **options):
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    scores = function(*leaves, **options)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(scores.shape, generator=generator, dtype=torch.float64, device="cpu")
    grad = grad.to(torch.get_default_device(), inputs[0].dtype).to(scores.dtype)
    gradients = torch.autograd.grad(scores, leaves, grad)
    return {"scores": scores} | {f"grad_{name}": t for name, t in zip(INPUTS, gradients, strict=True)}


def check(inputs, scale=1.0, **options):
    options["scale"] = scale
    actual, plain = run(additive_scores, inputs, **options), run(additive_scores_ref, inputs, **options)
    exact = run(additive_scores_ref, inputs, torch.float64, **options)
    query, key, weight = (t.double() for t in inputs)
    (*lead, Tq, D), Tk = query.shape, key.shape[-2]
    # A score is sum_d w_d - 2 sum_d w_d r, whose terms may cancel; so may those of the sums below.
    w = weight.abs().max().item() if weight.numel() else 0.0
    largest = largest_activation(query, key, options.get("activation"))
    noise = (
        1 + abs(scale) * (largest * weight.norm(dim=-1).max() + weight.sum(-1).abs().max()).item() if D else 1.0
    )
    slope = 3 * abs(scale) * (noise if options.get("softcap") else 1.0)
    pairs = math.prod(lead) * Tq * Tk
    bounds = {
        "scores": (D, noise),
        "grad_query": (Tk, 4 * w * slope),
        "grad_key": (Tq, 4 * w * slope),
        "grad_weight": (pairs, 3 * largest * slope),
    }
    for name, (terms, magnitude) in bounds.items():
        sums = magnitude * (1 if name == "scores" else math.sqrt(max(terms, 1)))
        assert_close_to_reference(actual[name], plain[name], exact[name], terms=terms, name=name, scale=sums)
    return actual


SIZES = [
    (1, 1, 1, 1),
    (3, 1, 129, 63),
    (2, 2, 63, 31),
    (2, 5, 17, 33, 3),
    (1, 63, 130, 64),
    (2, 129, 33, 7),
    (1, 1, 1000, 33),
]
NARROW = [(1, 1, 1, 1), (2, 3, 33, 5), (1, 40, 65, 4), (2, 5, 17, 3, 2)]


@pytest.mark.interpreted
@in_dtypes(NARROW if INTERPRETED else SIZES, [(2, 3, 33, 5), (2, 5, 17, 33, 3), (1, 63, 130, 64)], DTYPES)
def test_matches_the_reference(sizes, dtype):
    check(make_inputs(*sizes, dtype=dtype))


@pytest.mark.interpreted
@pairwise(
    scale=[1.0, -0.3],
    softcap=[None, 2.0, math.inf],
    activation=ACTIVATIONS,
    dtype=[torch.float32, torch.bfloat16],
    Tq=[1, 18 if INTERPRETED else 40],
)
def test_options(scale, softcap, activation, dtype, Tq):
    inputs = make_inputs(2, Tq, 33, 3 if INTERPRETED else 6, dtype=dtype)
    check(inputs, scale=scale, softcap=softcap, activation=activation)


@pytest.mark.interpreted
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("Tq", [2, 18])
def test_gradients_at_nan_are_those_of_pytorch(Tq, activation):
    inputs = make_inputs(1, Tq, 9, 4)
    inputs[0][0, 1, 2] = math.nan
    actual, plain = (run(f, inputs, activation=activation) for f in (additive_scores, additive_scores_ref))
    torch.testing.assert_close(actual, plain, equal_nan=True)
    assert actual["grad_query"].isfinite().all()


@pytest.mark.interpreted
@pytest.mark.parametrize("spread", [1e-20, 30.0, 1e4, 1e30])
@pytest.mark.parametrize("Tq", [1, 18 if INTERPRETED else 40])
def test_magnitudes(Tq, spread):
    found = check(make_inputs(1 if INTERPRETED else 2, Tq, 37, 5, spread=spread))
    assert all(torch.isfinite(t).all() for t in found.values())


@pytest.mark.interpreted
@pytest.mark.parametrize("sizes", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
def test_empty_sizes(sizes):
    found = run(additive_scores, make_inputs(*sizes))
    assert all(torch.equal(t, torch.zeros_like(t)) for t in found.values())


@pytest.mark.interpreted
def test_a_float32_weight_beside_half_precision_is_not_rounded():
    query, key, weight = make_inputs(2, 3, 17, 6, dtype=torch.bfloat16)
    weight = weight.float() * (1 + 2.0**-12)
    found = check([query, key, weight])
    assert found["scores"].dtype == torch.bfloat16 and found["grad_weight"].dtype == torch.float32


@pytest.mark.interpreted
def test_layouts_and_broadcasting():
    query, key, weight = make_inputs(3, 4, 9, 6)
    expected = additive_scores(query, key, weight)
    strided = torch.randn(3, 6, 18).transpose(1, 2)[:, ::2].copy_(key)
    torch.testing.assert_close(additive_scores(query, strided, weight.repeat_interleave(2)[::2]), expected)
    leaf = query[:1].clone().requires_grad_()
    scores = additive_scores(leaf, key, weight)
    torch.testing.assert_close(scores, additive_scores(leaf.expand(3, -1, -1), key, weight))
    scores.sum().backward()
    assert leaf.grad.shape == (1, 4, 6)


def test_attention_composes_of_them():
    query, key, weight = make_inputs(2, 5, 9, 6)
    value = torch.randn(2, 9, 4)
    composed = additive_scores(query, key, weight).softmax(-1) @ value
    torch.testing.assert_close(composed, additive_attention(query, key, value, weight))


def test_scores_may_be_written_in_place():
    query, key, weight = (t.requires_grad_() for t in make_inputs(2, 5, 9, 6))
    mask = torch.rand(2, 5, 9) > 0.5
    scores = additive_scores(query, key, weight, softcap=3.0).masked_fill_(mask, 0.0)
    grads = torch.autograd.grad(scores.sum(), (query, key, weight))
    plain = additive_scores_ref(query, key, weight, softcap=3.0).masked_fill(mask, 0.0)
    torch.testing.assert_close(grads, torch.autograd.grad(plain.sum(), (query, key, weight)))


BAD = {
    "query": lambda q, k, w: (q[0], k, w),
    "key": lambda q, k, w: (q, k[..., :-1], w),
    "weight": lambda q, k, w: (q, k, w[:-1]),
    "key dtype": lambda q, k, w: (q, k.double(), w),
    "query dtype": lambda q, k, w: (q.long(), k.long(), w.long()),
}


@pytest.mark.parametrize("wrong", BAD)
def test_errors_name_the_argument(wrong):
    with pytest.raises(ValueError, match=f"additive_scores: {wrong.split()[0]}: expected"):
        additive_scores(*BAD[wrong](*make_inputs(2, 5, 9, 6)))


def test_other_errors():
    inputs = make_inputs(2, 5, 9, 6)
    with pytest.raises(TypeError, match="additive_scores: weight: expected a Tensor, got list"):
        additive_scores(*inputs[:2], [1.0])
    for options in (
        {"scale": math.nan},
        {"softcap": -1.0},
        {"scale": torch.ones(())},
        {"negative_slope": math.nan},
        {"negative_slope": torch.ones(())},
    ):
        with pytest.raises(ValueError, match=f"additive_scores: {next(iter(options))}: expected"):
            additive_scores(*inputs, **options)
    with pytest.raises(ValueError, match="activation: expected one of 'tanh', .*'leaky_relu', got 'gelu'"):
        additive_scores(*inputs, activation="gelu")


@pytest.mark.machinery
@pytest.mark.skipif(DEVICE != "cpu" and BACKEND != "triton", reason="it has no kernels in CUDA C++")
@pytest.mark.parametrize("softcap, activation", [(0.0, (0, 0.2)), (2.0, (3, 0.1))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, softcap, activation):
    inputs = make_inputs(2, 3, 4, 5, H=2, dtype=dtype)
    torch.library.opcheck(raw_op("additive_scores_fwd").default, (*inputs, 0.5, softcap, *activation))
    grad = torch.randn(2, 2, 3, 4).to(dtype)
    for output_mask in (0b111, 0b001, 0b110):
        arguments = (grad, *inputs, 0.5, softcap, *activation, output_mask)
        torch.library.opcheck(raw_op("additive_scores_bwd").default, arguments)


@not_on_the_standin("Inductor makes no code for it")
def test_compile_and_export():
    inputs = [t.requires_grad_() for t in make_inputs(2, 5, 9, 6)]

    def model(query, key, weight):
        return (additive_scores(query * 2, key, weight, softcap=2.0, activation="sigmoid").sigmoid() ** 2).sum()

    expected = torch.autograd.grad(model(*inputs), inputs)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), inputs), expected)

    class Model(torch.nn.Module):
        forward = staticmethod(model)

    exported = torch.export.export(Model(), tuple(inputs)).module()
    torch.testing.assert_close(torch.autograd.grad(exported(*inputs), inputs), expected)


def test_vmap():
    query, key, weight = make_inputs(4, 3, 5, 6)
    weights = torch.stack([weight, 2 * weight])
    actual = torch.func.vmap(lambda w: additive_scores(query, key, w))(weights)
    torch.testing.assert_close(actual, torch.stack([additive_scores(query, key, w) for w in weights]))
    per_sample = torch.func.vmap(
        torch.func.grad(lambda w, q, k: additive_scores(q[None], k[None], w).square().sum()), (None, 0, 0)
    )
    expected = torch.stack(
        [
            torch.func.grad(
                lambda w, n=n: additive_scores_ref(query[n : n + 1], key[n : n + 1], w).square().sum()
            )(weight)
            for n in range(4)
        ]
    )
    torch.testing.assert_close(per_sample(weight, query, key), expected)
