"""What type checkers see: mypy, of make lint, reads this file. Its assertions of types do nothing when it runs."""

import inspect
from typing import get_type_hints

import pytest
import torch
from torch import Tensor
from typing_extensions import assert_type

import fusedattn
from fusedattn import AdditiveAttention, BahdanauAttention, FiLM, ProjectedKeys, additive_attention, film
from fusedattn._typing import AttentionOptions, ModuleOptions

ROWS = ("query", "key", "value")
q, w = torch.ones(2, 3, 4), torch.ones(4)


@pytest.mark.parametrize("function", [additive_attention, fusedattn.additive_attention_ref])
def test_results_of_attention(function: fusedattn._typing.AttentionFunction) -> None:
    assert_type(function(q, q, q, w, scale=0.5, mask=None), Tensor)
    assert_type(function(q, q, q, w, return_weights=True), tuple[Tensor, Tensor])
    assert_type(function(q, q, value=q, weight=w, return_lse=True), tuple[Tensor, Tensor])
    assert_type(function(q, q, q, w, return_weights=True, return_lse=True), tuple[Tensor, Tensor, Tensor])
    context, weights = function(q, q, q, w, return_weights=True)
    assert context.shape == q.shape and weights.shape == (2, 3, 3)


def test_results_where_the_flags_are_not_known() -> None:
    for flag in (False, True):
        assert_type(additive_attention(q, q, q, w, return_weights=flag), Tensor | tuple[Tensor, Tensor])
        assert_type(AdditiveAttention(4, 4, 4)(q, q, return_weights=flag), Tensor | tuple[Tensor, Tensor])


def test_results_of_film_and_of_modules() -> None:
    assert_type(film(q, w, channel_dim=2), Tensor)
    assert_type(FiLM(4, 3)(q, q[:, 0]), Tensor)
    norm = fusedattn.AdaLayerNormZero(4, 4)
    y, gate, shift, scale, _ = norm(q, q[:, 0])
    assert_type(norm.add_norm(y, q, gate, shift, scale), tuple[Tensor, Tensor])
    assert_type(fusedattn.ConditionalBatchNorm(4, 3)(q, q[:, 0]), Tensor)
    assert_type(fusedattn.ConcatConditioning(torch.nn.Linear(8, 3), 4)(q, q), Tensor)
    assert_type(fusedattn.gated_film(q, channel_dim=2), Tensor)
    attention, step = AdditiveAttention(4, 4, 4), BahdanauAttention(4, 4, 4)
    assert_type(attention(q, q), Tensor)
    assert_type(attention(q, q, is_causal=True, return_weights=True), tuple[Tensor, Tensor])
    assert_type(step.project_keys(q), ProjectedKeys)
    assert_type(step(q[:, 0], step.project_keys(q)), tuple[Tensor, Tensor])
    assert_type(step(q[:, 0], q, return_weights=False), Tensor)


def test_results_of_the_forms_of_attention() -> None:
    smoothed = additive_attention(q, q, q, w, normalizer="sigmoid", return_weights=True)
    assert_type(smoothed, tuple[Tensor, Tensor])
    assert_type(additive_attention(q, q, q, w, normalizer=lambda scores: scores.softmax(-1)), Tensor)
    lse = torch.ones(2, 3)
    assert_type(fusedattn.merge_attention([q, q], [lse, lse]), tuple[Tensor, Tensor])
    concat, causal = fusedattn.ConcatAttention(4, 4, 4), fusedattn.CausalAdditiveAttention(4, 4, 4)
    assert_type(concat(q, q), tuple[Tensor, Tensor])
    assert_type(concat(q, q, return_weights=False), Tensor)
    assert_type(causal(q, q), Tensor)
    keys = causal.append(None, q[:, 0])
    assert_type(keys, ProjectedKeys)
    assert_type(causal.step(q[:, 0], keys), Tensor)
    assert_type(causal.step(q[:, 0], keys, 1, return_weights=True), tuple[Tensor, Tensor])
    assert_type(fusedattn.PointerAttention(4, 4, 4)(q, q), Tensor)
    assert_type(fusedattn.MultiHopAttention(4, 4, 4, 2)(q[:, 0], q), tuple[Tensor, Tensor])


@pytest.mark.parametrize(
    ("function", "options", "decisive"),
    [
        (additive_attention, AttentionOptions, {*ROWS, "weight", "return_weights", "return_lse"}),
        (AdditiveAttention.forward, ModuleOptions, {"self", *ROWS, "return_weights"}),
    ],
    ids=["function", "module"],
)
def test_overloads_have_the_arguments_of_the_signature(function, options, decisive) -> None:
    parameters = inspect.signature(function).parameters
    assert set(parameters) == decisive | set(options.__annotations__)
    assert {name: get_type_hints(function)[name] for name in options.__annotations__} == get_type_hints(options)
