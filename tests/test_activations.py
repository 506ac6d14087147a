"""Activations of scores: beside scale and soft cap; and of those that are linear on either side of zero, kinks,
slopes and magnitudes. Other options meet them in tests/test_additive_attention.py."""

import pytest
import torch
from device import INTERPRETED
from pairwise import pairwise
from test_additive_attention import ACTIVATIONS, DTYPES, check, make_inputs, run, shape

from fusedattn import additive_attention

pytestmark = pytest.mark.levels


@pytest.mark.interpreted
@pairwise(
    scale=[1.0, 0.25, -1.5, 0.0], softcap=[None, 0.3, 5.0], activation=ACTIVATIONS, Tq=[1, 9, 19], dtype=DTYPES
)
def test_what_a_score_is_made_of(scale, softcap, activation, Tq, dtype):
    inputs = make_inputs(shape(1, Tq, 35, 3, 9) if INTERPRETED else shape(2, Tq, 35, 24, 9), dtype)
    lengths = torch.tensor([29] if INTERPRETED else [35, 6])
    check(inputs, scale=scale, softcap=softcap, activation=activation, key_lengths=lengths)


@pytest.mark.interpreted
@pytest.mark.parametrize("Tq, negative_slope", [(2, -0.5), (18, 0.0), (18, 3.0)])
def test_negative_slopes(Tq, negative_slope):
    inputs = make_inputs(shape(1, Tq, 19, 5, 3))
    check(inputs, activation="leaky_relu", negative_slope=negative_slope)


@pytest.mark.interpreted
@pytest.mark.parametrize("Tq, activation", [(1, "leaky_relu"), (7, "relu"), (18, "relu"), (18, "leaky_relu")])
def test_kinks_have_the_gradients_of_pytorch(Tq, activation):
    """Where q + k is 0, as it often is of small integers."""
    query, key, value, weight = make_inputs(shape(2, Tq, 20, 5, 3), torch.float64)
    query, key = query.round(), key.round()
    assert ((query.unsqueeze(-2) + key.unsqueeze(-3)) == 0).double().mean() > 0.1
    check([query, key, value, weight], activation=activation)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("opposite", [False, True])
@pytest.mark.parametrize("Tq", [1, 5, 20])
def test_magnitudes_without_exponentials(Tq, opposite, activation):
    check_magnitudes(Tq, opposite, activation)


def check_magnitudes(Tq, opposite, activation, kernel=additive_attention):
    """What cancels in q + k alone cancels; a weight that is small beside it is not divided by its largest."""
    query, key, value, weight = make_inputs(shape(1, Tq, 21, 18, 3))
    query, key = 1e4 + query, (-1e4 if opposite else 1e4) + key
    check([query, key, value, weight * 1e-3], kernel, activation=activation)
    outputs = run(kernel, [query * 1e30, key * 1e30, value, weight * 1e-35], activation=activation)
    assert all(t.isfinite().all() for t in outputs.values())
