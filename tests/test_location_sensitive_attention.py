"""LocationSensitiveAttention against the formulas of Chorowski et al. and Tacotron 2 written out, in loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from pairwise import pairwise

from fusedattn import LocationSensitiveAttention, LocationState

T, STEPS = 9, 5


def make(steps=STEPS, **options):
    torch.manual_seed(0)
    options = {"num_filters": 3, "kernel_size": 5, "dtype": torch.float64} | options
    module = LocationSensitiveAttention(5, 3, 4, **options)
    states, memory = torch.randn(steps, 2, 5), torch.randn(2, T, 3)
    return module, *(t.double().requires_grad_() for t in (states, memory))


def loop(module, states, memory, **options):
    """Contexts and weights (STEPS, B, ...), and the sum of the weights."""
    state, found = None, []
    for query in states:
        context, weights, state = module(query, memory, state, **options)
        found.append((context, weights))
    return [*(torch.stack(of) for of in zip(*found, strict=True)), state.cumulative]


def written_out(module, states, memory, visible):
    weights = total = torch.zeros(visible.shape, dtype=memory.dtype)
    conv, projection, found = module.location_conv.weight, module.location_proj.weight, []
    for state in states:
        seen = torch.stack([weights, total] if module.cumulative else [weights], 1)
        features = F.conv1d(seen, conv, padding=conv.shape[2] // 2).mT @ projection.T
        z = module.key_proj(memory) + module.query_proj(state).unsqueeze(1) + features
        scores = module.scale * (torch.tanh(z) @ module.weight[0])
        shown = visible
        if module.window is not None:
            medians = [next((j for j in range(T) if 2 * p[: j + 1].sum() >= p.sum()), 0) for p in weights]
            left, right = (T if n == -1 else n for n in module.window)
            shown = visible & torch.tensor([[m - left <= j <= m + right for j in range(T)] for m in medians])
        scores = scores.masked_fill(~shown, -math.inf)
        weights = scores.softmax(-1)
        if module.normalizer == "sigmoid":
            weights = torch.sigmoid(scores) / torch.sigmoid(scores).sum(-1, keepdim=True)
        total = total + weights
        found.append(((weights.unsqueeze(-1) * memory).sum(1), weights))
    return [*(torch.stack(of) for of in zip(*found, strict=True)), total]


@pairwise(
    projected=[True, False],
    cumulative=[True, False],
    window=[None, (0, 3), (2, -1)],
    scale=[1.0, 2.5],
    normalizer=["softmax", "sigmoid"],
    num_filters=[2, 40],
)
def test_the_formula_and_its_gradients(projected, cumulative, window, scale, normalizer, num_filters):
    module, states, memory = make(
        cumulative=cumulative, window=window, scale=scale, normalizer=normalizer, num_filters=num_filters
    )
    lengths, mask = torch.tensor([T, 6]), torch.ones(2, T, dtype=torch.bool)
    mask[0, 4] = False
    leaves, options = [states, memory, *module.parameters()], {"mask": mask, "key_lengths": lengths}
    if projected:
        actual = loop(module, states, module.project_keys(memory, **options))
    else:
        actual = loop(module, states, memory, **options)
    expected = written_out(module, states, memory, mask & (torch.arange(T) < lengths[:, None]))
    torch.testing.assert_close(actual, expected)
    grads = [torch.randn_like(t) for t in expected]
    torch.testing.assert_close(*(torch.autograd.grad(of, leaves, grads) for of in (actual, expected)))


def test_gradients_of_what_steps_share_are_made_once():
    module, states, memory = make(steps=50)
    keys = module.project_keys(memory, key_lengths=torch.tensor([T, 4]))
    contexts, weights, _ = loop(module, states, keys)
    waiting, seen = [contexts.grad_fn], {None}
    while waiting:
        node = waiting.pop()
        seen.add(node)
        waiting += {n for n, _ in node.next_functions} - seen
    assert sum("location_attention_fwd_step" in node.name() for node in seen - {None}) == 50
    leaves = [states, memory, *module.parameters()]
    expected = written_out(module, states, memory, torch.arange(T) < torch.tensor([[T], [4]]))
    grads = torch.randn_like(contexts), torch.randn_like(weights)
    torch.testing.assert_close(
        torch.autograd.grad([contexts, weights], leaves, grads), torch.autograd.grad(expected[:2], leaves, grads)
    )


def test_a_step_adds_up_all_but_the_gradients_of_values():
    """By one operator, on the CPU; batched gradients, which it does not take, go the joint way."""
    module, states, memory = make(dtype=torch.float32)
    states, memory = (t.detach().float().requires_grad_() for t in (states, memory))
    leaves = [states, memory, *module.parameters()]
    contexts, *_ = loop(module, states, module.project_keys(memory))
    grads = torch.randn(2, *contexts.shape)
    with torch.profiler.profile() as profiled:
        found = torch.autograd.grad(contexts, leaves, grads[0], retain_graph=True)
    calls = {event.key.partition("::")[2]: event.count for event in profiled.key_averages()}
    assert calls["location_attention_step_bwd"] == STEPS and calls["location_attention_bwd"] == 1
    batched = torch.autograd.grad(contexts, leaves, grads, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(found, tuple(t[0] for t in batched), rtol=1e-4, atol=1e-5)
    (of_states,) = torch.autograd.grad(contexts, states, grads[0])
    assert torch.equal(of_states, found[0])


def test_a_batch_that_shrinks():
    module, states, memory = make()
    leaves, found = [states, memory, *module.parameters()], []
    for keys in (module.project_keys(memory), memory):
        state, total = None, 0.0
        for n, query in enumerate(states):
            B = 2 if n < 3 else 1
            state = state and LocationState(*(t[:B] for t in state))
            context, _, state = module(query[:B], keys[:B], state)
            total = total + context.sum()
        found.append(torch.autograd.grad(total, leaves))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("projected", [True, False])
def test_a_memory_that_all_batch_elements_share(projected):
    module, states, memory = make()
    memory = memory[:1].detach().requires_grad_()
    leaves, found = [states, memory, *module.parameters()], []
    for expanded in (False, True):
        given = memory.expand(2, -1, -1) if expanded else memory
        contexts, *_ = loop(module, states, module.project_keys(given) if projected else given)
        found.append(torch.autograd.grad(contexts.square().sum(), leaves))
    torch.testing.assert_close(*found)


def test_half_precision_and_autocast():
    module, states, memory = make(dtype=torch.bfloat16)
    context, weights, state = module(states[0].bfloat16(), memory.bfloat16())
    assert context.dtype is weights.dtype is torch.bfloat16 and state.cumulative.dtype is torch.float32
    module, states, memory = make(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        *_, total = loop(module, states.float(), module.project_keys(memory.float()))
    torch.testing.assert_close(total.sum(-1), torch.full((2,), float(STEPS)), rtol=0.02, atol=0)
    sum_of_grads = torch.autograd.grad(total.square().sum(), list(module.parameters()))
    assert all(g.isfinite().all() and g.any() for g in sum_of_grads)


def test_compiles_as_one_graph():
    module, states, memory = make()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    lengths = torch.tensor([T, 4])
    _, _, state = module(states[0], memory, key_lengths=lengths)
    torch.testing.assert_close(
        compiled(states[1], memory, state, key_lengths=lengths),
        module(states[1], memory, state, key_lengths=lengths),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 4}, "kernel_size: expected an odd number, got 4"),
        ({"window": (1, -2)}, r"window: expected two numbers from -1 on, got \(1, -2\)"),
        ({"normalizer": "max"}, "normalizer: expected one of"),
    ],
)
def test_errors_when_it_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_a_state_of_another_memory_is_named():
    module, states, memory = make()
    state = LocationState(torch.zeros(2, 4), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"state.weights: expected shape \(B, 9\), got \(2, 4\)"):
        module(states[0], memory, state)
