"""CausalAdditiveAttention: whole sequences, keys that grow, and keys that come into sight, against the formula."""

import math

import pytest
import torch
from device import cpu_alone, not_on_the_standin
from test_steps import Calls
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fusedattn import CausalAdditiveAttention
from fusedattn.modules.growing_rows import LEAST

T = 5
VARIANTS = {"plain": {}, "heads": {"num_heads": 2, "context_dim": 4, "out_dim": 3}, "values": {"value_dim": 6}}


def make(variant="plain", dtype=torch.float64):
    torch.manual_seed(0)
    options = VARIANTS[variant]
    module = CausalAdditiveAttention(3, 4, 6, dtype=dtype, **options)
    value = torch.randn(2, T, 6, dtype=dtype).requires_grad_() if "value_dim" in options else None
    query, key = (torch.randn(2, T, n, dtype=dtype).requires_grad_() for n in (3, 4))
    return module, query, key, value


def written_out(module, query, key, value=None, mask=None):
    """The formula, query by query, over the keys that it sees alone."""
    value = key if value is None else value
    H, contexts = module.num_heads, []
    for t in range(query.shape[1]):
        of_batch = []
        for b in range(len(query)):
            seen = torch.arange(key.shape[1]) <= t
            seen = seen if mask is None else seen & mask[b]
            k, x = key[b, seen], value[b, seen]
            q, k = module.query_proj(query[b, t]).view(H, -1), module.key_proj(k).unflatten(-1, (H, -1))
            p = (torch.tanh(q + k) * module.weight).sum(-1).softmax(0)  # (keys, H)
            x = x.unsqueeze(1) if module.value_proj is None else module.value_proj(x).unflatten(-1, (H, -1))
            of_batch.append((p.unsqueeze(-1) * x).sum(0).flatten())
        contexts.append(torch.stack(of_batch))
    context = torch.stack(contexts, 1)
    return context if module.out_proj is None else module.out_proj(context)


def grown(module, query, key, value=None):
    keys, contexts = None, []
    for t in range(query.shape[1]):
        keys = module.append(keys, key[:, t], None if value is None else value[:, t])
        contexts.append(module.step(query[:, t], keys))
    return torch.stack(contexts, 1)


def in_sight(module, query, key, value=None):
    keys = module.project_keys(key, value)
    return torch.stack([module.step(query[:, t], keys, t + 1) for t in range(query.shape[1])], 1)


FORMS = {"whole": lambda module, *inputs: module(*inputs), "grown": grown, "in_sight": in_sight}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", FORMS)
def test_the_formula_and_its_gradients(form, variant):
    module, *inputs = make(variant)
    leaves = [t for t in (*inputs, *module.parameters()) if t is not None]
    context, expected = FORMS[form](module, *inputs), written_out(module, *inputs)
    torch.testing.assert_close(context, expected)
    grad = torch.randn_like(context)
    actual = torch.autograd.grad(context, leaves, grad)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, leaves, grad))
    again = torch.autograd.grad(FORMS[form](module, *inputs), leaves, grad)
    assert all(map(torch.equal, actual, again))


class Recurrent(nn.Module):
    """A recurrent net that attends to its own past."""

    def __init__(self, attention):
        super().__init__()
        self.attention, self.cell = attention, nn.Linear(8, 4, dtype=torch.float64)

    def forward(self, state, steps, attend):
        states = [state]
        for _ in range(steps):
            context = attend(torch.stack(states, 1))
            states.append(torch.tanh(self.cell(torch.cat([states[-1], context], -1))))
        return torch.stack(states, 1)


@pytest.mark.parametrize("steps", [4, 2 * LEAST + 3])  # the memory grows
def test_a_net_that_attends_to_its_own_past(steps):
    torch.manual_seed(0)
    attention = CausalAdditiveAttention(4, 4, 6, dtype=torch.float64)
    net, state = Recurrent(attention), torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    leaves = [state, *net.parameters()]
    keys = None

    def stepping(states):
        nonlocal keys
        keys = attention.append(keys, states[:, -1])
        return attention.step(states[:, -1], keys)

    actual = net(state, steps, stepping)
    expected = net(state, steps, lambda states: written_out(attention, states, states)[:, -1])
    torch.testing.assert_close(actual, expected)
    grads = [torch.autograd.grad(states.sin().sum(), leaves, retain_graph=True) for states in (actual, expected)]
    torch.testing.assert_close(*grads)
    first = torch.autograd.grad(actual.sin().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.sin().sum() for g in first), leaves)
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in second)


def test_keys_are_continued_in_several_ways():
    module, query, key, _ = make()
    start = module.append(module.append(None, key[:, 0]), key[:, 1])
    ends = [module.append(start, key[:, n]) for n in (2, 3)]
    longer = [module.append(end, key[:, 4]) for end in ends]
    for keys, order in ((start, [0, 1]), *zip(ends, ([0, 1, 2], [0, 1, 3]), strict=True)):
        torch.testing.assert_close(keys.key, module.key_proj(key[:, order]))
    for keys, order in zip(longer, ([0, 1, 2, 4], [0, 1, 3, 4]), strict=True):
        last = module.step(query[:, 0], keys)
        expected = module.step(query[:, 0], module.project_keys(key[:, order]))
        torch.testing.assert_close(last, expected)
        grads = [torch.autograd.grad(c.sin().sum(), key, retain_graph=True)[0] for c in (last, expected)]
        torch.testing.assert_close(*grads)
    projected = module.append(module.project_keys(key[:, :4]), key[:, 4])
    torch.testing.assert_close(projected.key, module.key_proj(key))
    chosen = module.append(start[[1, 0]], key[:, 2])
    torch.testing.assert_close(chosen.key[0, :2], start.key[1])


def test_the_past_is_not_copied():
    module, _, key, _ = make()
    keys, places = None, set()
    with torch.no_grad():
        for n in range(LEAST):
            keys = module.append(keys, key[:, n % T])
            places.add((keys.key.data_ptr(), keys.value.data_ptr()))
    assert len(places) == 1


def test_inference_mode_and_after():
    module, query, key, _ = make()
    expected = grown(module, query, key)
    with torch.inference_mode():
        torch.testing.assert_close(grown(module, query, key), expected)
        keys = module.append(None, key[:, 0].clone())
    with torch.no_grad():
        torch.testing.assert_close(module.append(keys, key[:, 1]).key, module.key_proj(key[:, :2]))


def test_keys_in_sight_get_their_gradients_once():
    module, query, key, _ = make(dtype=torch.float32)
    with Calls() as calls:
        in_sight(module, query, key).sum().backward()
    assert sorted(calls.masks) == [0b0001] * T + [0b1110]


class Made(TorchDispatchMode):
    """The size of every tensor that an operator returns alone, as all but attention's do."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            self.sizes.append(found.numel())
        return found


@pytest.mark.parametrize("lengths", [None, torch.tensor([30, 7], dtype=torch.uint8)], ids=["all", "lengths"])
def test_a_step_makes_nothing_of_the_keys_out_of_sight(lengths):
    module, query, _, _ = make()
    keys = module.project_keys(torch.randn(2, 64, 4, dtype=torch.float64))
    with torch.no_grad(), Made() as made:
        context = module.step(query[:, 0], keys, 9, key_lengths=lengths)
    assert max(made.sizes) < 64
    seen = torch.arange(64) < torch.tensor([9, 9 if lengths is None else 7]).unsqueeze(1)
    torch.testing.assert_close(context, module.step(query[:, 0], keys, mask=seen))


@pytest.mark.parametrize("variant", ["plain", "heads"])
def test_masks_and_lengths(variant):
    module, query, key, _ = make(variant)
    mask, lengths = torch.rand(2, T) > 0.4, torch.tensor([T, 2])
    mask[:, 0] = True
    visible = mask & (torch.arange(T) < lengths[:, None])
    expected = written_out(module, query, key, mask=visible)
    torch.testing.assert_close(module(query, key, mask=mask.unsqueeze(1), key_lengths=lengths), expected)
    keys, own = module.project_keys(key), module.project_keys(key, mask=mask.unsqueeze(1), key_lengths=lengths)
    for t in range(T):
        options = {"mask": mask, "key_lengths": lengths, "return_weights": True}
        context, weights = module.step(query[:, t], keys, t + 1, **options)
        torch.testing.assert_close(context, expected[:, t])
        assert weights.shape == (2, module.num_heads, T)
        assert (weights.masked_select(~visible[:, None]) == 0).all() and (weights[..., t + 1 :] == 0).all()
        torch.testing.assert_close(module.step(query[:, t], own, t + 1), expected[:, t])


def test_what_is_not_yet_visible_may_hold_anything():
    module, query, key, _ = make()
    with torch.no_grad():
        key[:, 3:] = math.nan
    keys = module.project_keys(key)
    contexts = [module.step(query[:, t], keys, t + 1) for t in range(3)]
    leaves = [key, query, module.weight, *module.query_proj.parameters()]  # the layer of the keys sees the NaN
    grads = torch.autograd.grad(sum(c.sin().sum() for c in contexts), leaves)
    assert all(g.isfinite().all() for g in grads) and (grads[0][:, 3:] == 0).all()
    assert (module.step(query[:, 0], keys, 0) == 0).all()


@not_on_the_standin("Dynamo does not trace a tensor that is a subclass of its kind")
@pytest.mark.parametrize("form", FORMS)
def test_compiles_as_one_graph(form):
    torch.compiler.reset()
    module, *inputs = make("heads")
    query, key = (t[:, :3] for t in inputs[:2])
    compiled = torch.compile(FORMS[form], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(module, query, key), FORMS[form](module, query, key))


@pytest.mark.parametrize("form", FORMS)
def test_vmap_and_grad(form):
    module, query, key, _ = make()
    queries = torch.stack([query, 2 * query]).detach()

    def loss(query):
        return FORMS[form](module, query, key).sin().sum()

    actual = torch.vmap(torch.func.grad(loss))(queries)
    for n in range(2):
        one = queries[n].clone().requires_grad_()
        torch.testing.assert_close(actual[n], torch.autograd.grad(loss(one), one)[0])


def test_state_dict_and_representation():
    module, query, key, _ = make("heads")
    other = CausalAdditiveAttention(3, 4, 6, dtype=torch.float64, **VARIANTS["heads"])
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(other(query, key), module(query, key), rtol=0, atol=0)
    assert repr(module).startswith("CausalAdditiveAttention(")


@cpu_alone
def test_errors():
    module, query, key, _ = make()
    keys = module.project_keys(key)
    for call, message in (
        (lambda: module.step(query, keys), r"query: expected shape \(B, 3\), got \(2, 5, 3\)"),
        (lambda: module.step(query[:, 0], keys, 6), r"visible: expected a number in \[0, 5\], got 6"),
        (lambda: module.step(query[:, 0], keys, mask=torch.ones(2, 4) > 0), r"mask: expected shape \(B, 5\)"),
        (lambda: module.append(None, key), r"key: expected shape \(B, 4\), got \(2, 5, 4\)"),
        (
            lambda: module.append(module.project_keys(key, key_lengths=torch.tensor([5, 5])), key[:, 0]),
            "append: expected keys without mask",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
