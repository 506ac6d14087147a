"""Biases of additive attention, against the reference: values and all gradients; beside windows, in
tests/test_additive_attention_window.py."""

import math

import pytest
import torch
from device import INTERPRETED, examples
from hypothesis import given, settings
from hypothesis import strategies as st
from pairwise import pairwise
from test_additive_attention import MASKED_SHAPES, MASKS, STRIDES, check, make_inputs, problems, shape

from fusedattn import additive_attention

pytestmark = pytest.mark.levels

# Biases by kind: shapes for (B, H, Tq, Tk), of which 3-D inputs have no H, and what is done to random numbers.
BIASES = {
    "full": lambda B, H, Tq, Tk: torch.randn(*([B] if H is None else [B, H]), Tq, Tk),
    "queries_keys": lambda B, H, Tq, Tk: torch.randn(Tq, Tk),
    "keys": lambda B, H, Tq, Tk: torch.randn(Tk),
    "queries": lambda B, H, Tq, Tk: 30 * torch.randn(Tq, 1),
    "batch": lambda B, H, Tq, Tk: torch.randn(*([B, 1] if H is None else [B, 1, 1]), Tk),
    "heads": lambda B, H, Tq, Tk: torch.randn(*([1] if H is None else [H]), Tq, Tk),
    "heads_keys": lambda B, H, Tq, Tk: torch.randn(*([1] if H is None else [H]), 1, Tk),
    "heads_alone": lambda B, H, Tq, Tk: torch.randn(*([B, 1, 1] if H is None else [B, H, 1, 1])),
    "one": lambda B, H, Tq, Tk: torch.randn(()),
    "large": lambda B, H, Tq, Tk: 1e4 * torch.randn(Tq, Tk),
    "hides": lambda B, H, Tq, Tk: torch.randn(Tq, Tk).masked_fill(torch.rand(Tq, Tk) > 0.6, -math.inf),
    "hides_rows": lambda B, H, Tq, Tk: torch.zeros(Tq, Tk).masked_fill(torch.rand(Tq, 1) > 0.5, -math.inf),
    "lowest": lambda B, H, Tq, Tk: torch.zeros(Tq, Tk).masked_fill(
        (torch.rand(Tq, 1) > 0.5) | (torch.rand(Tq, Tk) > 0.7), torch.finfo(torch.float32).min
    ),
}
BIAS_VIEWS = {
    "as_it_is": lambda t, full: t,
    "expanded": lambda t, full: t.expand(full),
    "transposed": lambda t, full: t.mT.contiguous().mT if t.dim() > 1 else t,
    "every_second": lambda t, full: torch.stack([t, t + 1], -1)[..., 0],
}


@pytest.mark.interpreted
@pairwise(
    sizes=MASKED_SHAPES,
    kind=["full", "keys", "heads", "queries", "hides_rows", "lowest"] if INTERPRETED else BIASES,
    strides=["as_it_is", "transposed"] if INTERPRETED else BIAS_VIEWS,
    softcap=[None, 0.7],
    scale=[1.0, -0.3],
    mask=["none", "empty_rows"],
    dtype=[torch.float32, torch.bfloat16] if INTERPRETED else [torch.float32, torch.float64, torch.bfloat16],
    is_wide=[False, True],
)
def test_matches_the_reference(sizes, kind, strides, softcap, scale, mask, dtype, is_wide):
    inputs = make_inputs(sizes, dtype)
    called = [sizes[name] for name in ("B", "H", "Tq", "Tk")]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    bias = BIASES[kind](*called).to(wide if is_wide or kind == "lowest" else dtype)
    full = (*inputs[0].shape[:-1], called[-1])

    def views(leaves):
        return [*leaves[:4], BIAS_VIEWS[strides](leaves[4], full)]

    options = {"softcap": softcap, "scale": scale, "mask": MASKS[mask](*called)}
    actual = check([*inputs, bias], views=views, **options)
    hidden = (bias == -math.inf).expand(actual["weights"].shape)
    assert (actual["weights"][hidden] == 0).all() and (actual["grad_bias"][bias == -math.inf] == 0).all()
    empty = hidden.all(-1)
    assert (actual["lse"][empty] == -math.inf).all() and (actual["context"][empty] == 0).all()
    assert (actual["grad_query"][empty] == 0).all()


@pytest.mark.parametrize(
    ("sizes", "kind"),
    [
        (shape(1, 1100, 1000, 3, 2), "full"),  # query rows in several chunks
        (shape(1, 1100, 1000, 3, 2), "keys"),
        (shape(1, 33, 70000, 2, 1), "queries"),  # chunks of few queries
        (shape(8, 150, 150, 2, 1, H=8), "heads"),  # several heads per chunk, and batches in several of them
        (shape(8, 150, 150, 2, 1, H=8), "batch"),
    ],
)
def test_several_chunks(sizes, kind):
    called = [sizes[name] for name in ("B", "H", "Tq", "Tk")]
    check([*make_inputs(sizes), BIASES[kind](*called)], scale=0.7)


@pytest.mark.parametrize("Tq", [1, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_lowest_number_leaves_its_rows_a_softmax(dtype, Tq):
    check_lowest_bias(dtype, Tq, additive_attention)


def check_lowest_bias(dtype, Tq, kernel):
    """Of equal numbers; and beside others its keys have no weight. So float masks are written, too."""
    inputs = make_inputs(shape(2, Tq, 37, 4, 5), dtype)
    bias = torch.zeros(2, 1, 37, dtype=dtype)
    bias[0], bias[1, 0, 5:] = torch.finfo(dtype).min, torch.finfo(dtype).min
    weights = kernel(*inputs, bias=bias, softcap=3.0, return_weights=True)[1]
    torch.testing.assert_close(weights[0], torch.full_like(weights[0], 1 / 37))
    masked = kernel(*inputs, mask=bias == 0, softcap=3.0, return_weights=True)[1]
    torch.testing.assert_close(weights[1], masked[1])


@settings(max_examples=examples(25))
@given(problems(), st.sampled_from(sorted(BIASES)))
def test_any_problem_matches_the_reference(problem, kind):
    sizes, dtype, spread, strides, options = problem
    bias = BIASES[kind](*(sizes[name] for name in ("B", "H", "Tq", "Tk")))

    def views(leaves):
        rows = [t if s is None else STRIDES[s](t) for t, s in zip(leaves[:4], strides, strict=True)]
        return [*rows, leaves[4]]

    wide = torch.promote_types(dtype, torch.float32)
    check([*make_inputs(sizes, dtype, spread=spread), bias.to(wide)], views=views, **options)
