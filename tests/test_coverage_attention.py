"""CoverageAttention against the formulas of See et al. written out."""

import math

import pytest
import torch
from device import cpu_alone, not_on_the_standin

from fusedattn import CoverageAttention

T, STEPS = 6, 4


def make(**options):
    torch.manual_seed(0)
    module = CoverageAttention(5, 3, 4, dtype=torch.float64, **options)
    states, memory = torch.randn(STEPS, 2, 5), torch.randn(2, T, 3)
    return module, *(t.double().requires_grad_() for t in (states, memory))


def loop(module, states, memory, **options):
    """Contexts and weights (STEPS, B, ...), coverages after each step, losses of all but the first."""
    coverage, found, losses = None, [], []
    for state in states:
        context, weights, after = module(state, memory, coverage, **options)
        if coverage is not None:
            losses.append(module.coverage_loss(weights, coverage))
        coverage = after
        found.append((context, weights, coverage))
    return [*(torch.stack(of) for of in zip(*found, strict=True)), torch.stack(losses)]


def written_out(module, states, memory, visible):
    coverage, found, losses = torch.zeros(2, T, dtype=torch.float64), [], []
    w_c = module.coverage_proj.weight[:, 0]
    for state in states:
        z = module.key_proj(memory) + module.query_proj(state).unsqueeze(1) + coverage.unsqueeze(-1) * w_c
        a = (torch.tanh(z) @ module.weight[0]).masked_fill(~visible, -math.inf).softmax(-1)
        losses.append(torch.where(a < coverage, a, coverage).sum(-1))
        coverage = coverage + a
        found.append(((a.unsqueeze(-1) * memory).sum(1), a, coverage))
    return [*(torch.stack(of) for of in zip(*found, strict=True)), torch.stack(losses[1:])]


@pytest.mark.parametrize("projected", [False, True])
def test_the_formula_and_its_gradients(projected):
    module, states, memory = make()
    mask, lengths = torch.rand(2, T) > 0.3, torch.tensor([T, 3])
    mask[:, 0] = True
    leaves, options = [states, memory, *module.parameters()], {"mask": mask, "key_lengths": lengths}
    if projected:
        actual = loop(module, states, module.project_keys(memory, **options))
    else:
        actual = loop(module, states, memory, **options)
    expected = written_out(module, states, memory, mask & (torch.arange(T) < lengths[:, None]))
    torch.testing.assert_close(actual, expected)
    grads = [torch.randn_like(t) for t in expected]
    torch.testing.assert_close(*(torch.autograd.grad(of, leaves, grads) for of in (actual, expected)))


def test_padding_may_hold_anything():
    module, states, memory = make()
    filled, lengths = memory.detach().clone(), torch.tensor([3, 0])
    filled[0, 3:], filled[1] = math.nan, math.nan
    of_filled, of_memory = (loop(module, states, of, key_lengths=lengths) for of in (filled, memory))
    torch.testing.assert_close(of_filled, of_memory, rtol=0, atol=0)
    assert all((t[:, 1] == 0).all() for t in of_memory)


@not_on_the_standin("Dynamo does not trace a tensor that is a subclass of its kind")
def test_compiles_as_one_graph():
    torch.compiler.reset()
    module, states, memory = make()
    compiled = torch.compile(loop, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(module, states[:2], memory), loop(module, states[:2], memory))


def test_state_dict():
    module, states, memory = make(normalize=True)
    other = make(normalize=True)[0]
    other.reset_parameters()
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(loop(other, states, memory), loop(module, states, memory), rtol=0, atol=0)


@cpu_alone
def test_errors():
    module, states, memory = make()
    for call, message in (
        (lambda: module(states, memory), r"query: expected shape \(B, 5\), got \(4, 2, 5\)"),
        (lambda: module(states[0], memory, memory), r"coverage: expected shape \(B, 6\), got \(2, 6, 3\)"),
    ):
        with pytest.raises(ValueError, match=f"CoverageAttention: {message}"):
            call()
