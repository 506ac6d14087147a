"""ForwardAttention against the recursion of Zhang et al. written out."""

import math

import pytest
import torch
from device import cpu_alone, not_on_the_standin

from fusedattn import ForwardAttention

T, STEPS = 6, 4


def make(**options):
    torch.manual_seed(0)
    module = ForwardAttention(5, 3, 4, dtype=torch.float64, **options)
    states, memory = torch.randn(STEPS, 2, 5), torch.randn(2, T, 3)
    return module, *(t.double().requires_grad_() for t in (states, memory))


def loop(module, states, memory, transitions=None, **options):
    """Contexts and alignments (STEPS, B, ...)."""
    alignment, found = module.start(memory), []
    for t, state in enumerate(states):
        u = None if transitions is None else transitions[t]
        context, alignment = module(state, memory, alignment, u, **options)
        found.append((context, alignment))
    return [torch.stack(of) for of in zip(*found, strict=True)]


def written_out(module, states, memory, visible, transitions=None):
    contexts, alignments = [], []
    for b in range(2):
        alpha, of_steps = [1.0] + [0.0] * (T - 1), []
        for t in range(STEPS):
            e = torch.tanh(module.query_proj(states[t, b]) + module.key_proj(memory[b])) @ module.weight[0]
            y = e.masked_fill(~visible[b], -math.inf).softmax(0)
            u = 0.5 if transitions is None else transitions[t, b]
            alpha = [((1 - u) * alpha[n] + (u * alpha[n - 1] if n else 0.0)) * y[n] for n in range(T)]
            alpha = [a / sum(alpha) for a in alpha]
            of_steps.append(torch.stack(alpha))
        alignments.append(torch.stack(of_steps))
        contexts.append(alignments[-1] @ memory[b])
    return torch.stack(contexts, 1), torch.stack(alignments, 1)


@pytest.mark.parametrize("agent", [False, True])
def test_the_recursion_and_its_gradients(agent):
    module, states, memory = make()
    transitions = torch.rand(STEPS, 2, dtype=torch.float64).requires_grad_() if agent else None
    lengths = torch.tensor([T, 3])
    leaves = [t for t in (states, memory, transitions, *module.parameters()) if t is not None]
    actual = loop(module, states, memory, transitions, key_lengths=lengths)
    visible = torch.arange(T) < lengths[:, None]
    expected = written_out(module, states, memory, visible, transitions)
    torch.testing.assert_close(actual, list(expected))
    grads = [torch.randn_like(t) for t in expected]
    torch.testing.assert_close(*(torch.autograd.grad(of, leaves, grads) for of in (actual, expected)))
    keys = module.project_keys(memory, mask=visible)
    torch.testing.assert_close(loop(module, states, keys, transitions), actual)


def test_the_alignment_moves_by_one_place_at_most():
    module, states, memory = make()
    _, alignments = loop(module, states, memory)
    for t in range(STEPS):
        assert (alignments[t, :, t + 2 :] == 0).all() and (alignments[t, :, : t + 2] > 0).all()
    torch.testing.assert_close(alignments.sum(-1), torch.ones(STEPS, 2, dtype=torch.float64))


def test_padding_and_nothing_in_reach():
    module, states, memory = make()
    filled = memory.detach().clone()
    filled[0, 3:] = math.nan
    lengths = torch.tensor([3, T])
    expected = loop(module, states, memory, key_lengths=lengths)
    torch.testing.assert_close(loop(module, states, filled, key_lengths=lengths), expected, rtol=0, atol=0)
    keys = module.project_keys(filled, key_lengths=lengths)
    torch.testing.assert_close(loop(module, states, keys), expected, rtol=0, atol=0)
    mask = torch.arange(T) > 2
    context, alignment = module(states[0], memory, module.start(memory), mask=mask.expand(2, -1))
    assert (context == 0).all() and (alignment == 0).all()
    grads = torch.autograd.grad(context.sum() + alignment.sum(), [states, memory, module.weight])
    assert all(g.isfinite().all() for g in grads)


@not_on_the_standin("Dynamo does not trace a tensor that is a subclass of its kind")
def test_compiles_as_one_graph():
    torch.compiler.reset()
    module, states, memory = make()
    compiled = torch.compile(loop, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(module, states[:2], memory), loop(module, states[:2], memory))


def test_state_dict():
    module, states, memory = make()
    other = make()[0]
    other.reset_parameters()
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(loop(other, states, memory), loop(module, states, memory), rtol=0, atol=0)


@cpu_alone
def test_errors():
    module, states, memory = make()
    start = module.start(memory)
    for call, message in (
        (lambda: module(states, memory, start), r"query: expected shape \(B, 5\), got \(4, 2, 5\)"),
        (lambda: module(states[0], memory, start[:, 1:]), r"alignment: expected shape \(B, 6\), got \(2, 5\)"),
        (lambda: module(states[0], memory, start, start), r"transition: expected shape \(B,\), got \(2, 6\)"),
    ):
        with pytest.raises(ValueError, match=f"ForwardAttention: {message}"):
            call()
