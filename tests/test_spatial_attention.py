"""SpatialAttention against the formulas of Show, Attend and Tell written out."""

import math

import pytest
import torch
from device import cpu_alone, not_on_the_standin

from fusedattn import SpatialAttention

GATES = [None, "scalar", "channel"]
PLACES = [(3, 4), (5,), (2, 1, 3)]


def make(gate="scalar", places=(3, 4), dtype=torch.float64, **options):
    torch.manual_seed(0)
    module = SpatialAttention(5, 6, 4, gate=gate, dtype=dtype, **options)
    state = torch.randn(2, 5, dtype=dtype).requires_grad_()
    return module, state, torch.randn(2, 6, *places, dtype=dtype).requires_grad_()


def written_out(module, state, features, mask=None):
    """(z, weights, the weighted map)"""
    a = features.flatten(2).mT
    phi = torch.relu if module.activation == "relu" else torch.tanh
    e = phi(module.query_proj(state).unsqueeze(1) + module.key_proj(a)) @ module.weight[0]
    alpha = torch.zeros_like(e)
    for b in range(len(e)):
        seen = torch.ones(e.shape[1], dtype=torch.bool) if mask is None else mask[b].flatten()
        alpha[b, seen] = e[b, seen].softmax(0)
    beta = 1.0 if module.gate_proj is None else torch.sigmoid(module.gate_proj(state))
    under = alpha.unsqueeze(1) * a.mT * (1.0 if module.gate_proj is None else beta.unsqueeze(-1))
    return under.sum(2), alpha.view(len(e), *features.shape[2:]), under.view_as(features)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("gate", GATES)
def test_the_formula_and_its_gradients(gate, places, activation):
    module, state, features = make(gate, places, activation=activation)
    mask = torch.rand(2, *places) > 0.4
    leaves = [state, features, *module.parameters()]
    results = module(state, features, mask=mask, return_map=True)
    expected = written_out(module, state, features, mask)
    torch.testing.assert_close(results, expected)
    grads = [torch.randn_like(t) for t in results]
    actual = torch.autograd.grad(results, leaves, grads, allow_unused=True)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, leaves, grads, allow_unused=True))
    torch.testing.assert_close(module(state, features), written_out(module, state, features)[:2])


@pytest.mark.parametrize("masked", [False, True])
def test_steps_over_a_projected_map(masked):
    module, state, features = make()
    mask = torch.rand(2, 3, 4) > 0.4 if masked else None
    expected = module(state, features, mask=mask, return_map=True)
    keys = module.project_keys(features, mask=mask)
    torch.testing.assert_close(module(state, keys, places=(3, 4), return_map=True), expected)
    context, weights = module(state, keys)
    torch.testing.assert_close((context, weights), (expected[0], expected[1].flatten(1)))
    losses = [module(state, keys)[0].sin().sum(), expected[0].sin().sum()]
    grads = [torch.autograd.grad(loss, [features, *module.parameters()], retain_graph=True) for loss in losses]
    torch.testing.assert_close(*grads)


def test_a_map_that_is_hidden():
    module, state, features = make(dtype=torch.float32)
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[1] = False
    mask[0, 2] = False
    keys = module.project_keys(features.masked_fill(~mask.unsqueeze(1), math.nan), mask=mask)
    expected = module.project_keys(features.masked_fill(~mask.unsqueeze(1), 0.0), mask=mask)
    torch.testing.assert_close(module(state, keys), module(state, expected), rtol=0, atol=0)
    context, weights = module(state, keys)
    assert (context[1] == 0).all() and (weights[1] == 0).all()


def test_the_doubly_stochastic_penalty():
    weights = torch.rand(2, 5, 3, 4).requires_grad_()
    penalty = SpatialAttention.doubly_stochastic_penalty(weights)
    expected = sum((1 - weights[b, :, y, x].sum()) ** 2 for b in range(2) for y in range(3) for x in range(4)) / 2
    torch.testing.assert_close(penalty, expected)
    torch.testing.assert_close(
        SpatialAttention.doubly_stochastic_penalty(torch.full((2, 5, 3, 4), 0.2)), torch.tensor(0.0)
    )


@not_on_the_standin("Dynamo does not trace a tensor that is a subclass of its kind")
@pytest.mark.parametrize("gate", GATES)
def test_compiles_as_one_graph(gate):
    torch.compiler.reset()
    module, state, features = make(gate)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(state, features, return_map=True), module(state, features, return_map=True)
    )


def test_state_dict():
    module, state, features = make("channel")
    other = make("channel")[0]
    other.reset_parameters()
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(other(state, features), module(state, features), rtol=0, atol=0)


@cpu_alone
def test_errors():
    with pytest.raises(ValueError, match="SpatialAttention: gate: expected 'scalar', 'channel' or None, got 'on'"):
        SpatialAttention(5, 6, 4, gate="on")
    module, state, features = make()
    for call, message in (
        (lambda: module(state[:, :4], features), r"query: expected shape \(B, 5\), got \(2, 4\)"),
        (
            lambda: module(state, features[:, :5]),
            r"features: expected shape \(B, 6, \*places\), got \(2, 5, 3, 4\)",
        ),
        (lambda: module.project_keys(features[:, :, 0, 0]), r"features: expected shape \(B, 6, \*places\)"),
        (
            lambda: module(state, features, mask=torch.ones(2, 12) > 0),
            r"mask: expected shape \(B, 3, 4\), got \(2,",
        ),
    ):
        with pytest.raises(ValueError, match=f"SpatialAttention: {message}"):
            call()
