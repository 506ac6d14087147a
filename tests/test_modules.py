"""Modules of additive attention against the formula written out, and as parts of larger models."""

import copy
import math
import pickle

import pytest
import torch
from device import DEVICE, cpu_alone
from torch import nn

from fusedattn import AdditiveAttention, BahdanauAttention, ProjectedKeys

VARIANTS = {
    "plain": {},
    "smoothed": {"scale": 2.0, "normalizer": "sigmoid"},
    "no_bias": {"bias": False},
    "heads": {"num_heads": 2},
    "projected_values": {"num_heads": 2, "context_dim": 6},
    "everything": {
        "num_heads": 4,
        "context_dim": 8,
        "out_dim": 5,
        "value_dim": 9,
        "normalize": True,
        "softcap": 2.0,
    },
}


def make(variant="plain", **more):
    torch.manual_seed(0)
    options = VARIANTS[variant] | more
    module = AdditiveAttention(7, 10, 12, **options)
    value = torch.randn(2, 5, options["value_dim"]) if options.get("value_dim") else None
    return module, torch.randn(2, 3, 7), torch.randn(2, 5, 10), value


def exponentials(keys, dtype):
    """Those at hand, and that there are some: on the CPU alone, whose kernels use them."""
    found = [t for t in keys.exponentials(dtype) if t is not None]
    assert len(found) == (2 if DEVICE == "cpu" else 0)
    return found


def written_out(module, query, key, value=None, mask=None):
    """The module's formula in plain PyTorch."""
    H = module.num_heads
    value = key if value is None else value

    def heads(t):
        return t.unflatten(-1, (H, -1)).transpose(1, 2)

    q, k = heads(module.query_proj(query)), heads(module.key_proj(key))
    x = value.unsqueeze(1).expand(-1, H, -1, -1) if module.value_proj is None else heads(module.value_proj(value))
    weight = module.weight
    if module.weight_g is not None:
        weight = module.weight_g[:, None] * weight / weight.norm(dim=1, keepdim=True)
    scores = module.scale * (torch.tanh(q.unsqueeze(3) + k.unsqueeze(2)) * weight[:, None, None]).sum(-1)
    if module.softcap is not None:
        scores = module.softcap * torch.tanh(scores / module.softcap)
    if module.normalizer == "sigmoid":
        scores = torch.sigmoid(scores).log()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = scores.softmax(-1)
    context = (weights @ x).transpose(1, 2).flatten(2)
    return (context if module.out_proj is None else module.out_proj(context)), weights


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_is_the_formula(variant):
    module, query, key, value = make(variant)
    query.requires_grad_()
    key.requires_grad_()
    leaves = [query, key, *module.parameters()]
    context, weights = module(query, key, value, return_weights=True)
    expected, expected_weights = written_out(module, query, key, value)
    torch.testing.assert_close(context, expected)
    torch.testing.assert_close(weights, expected_weights)
    torch.testing.assert_close(module(query, key, value), expected)
    grad = torch.randn_like(context)
    actual = torch.autograd.grad(context, leaves, grad)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, leaves, grad), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 1, 5), (2, 3, 5), (2, 2, 3, 5), (1, 2, 1, 5)])
def test_masks_of_attention(shape):
    module, query, key, _ = make("heads")
    mask = torch.rand(shape) > 0.4
    mask[..., 0] = True
    full = mask.unsqueeze(1) if mask.dim() == 3 else mask
    torch.testing.assert_close(module(query, key, mask=mask), written_out(module, query, key, mask=full)[0])


def test_causal_attention_and_lengths():
    module, query, key, _ = make()
    mask = torch.ones(3, 5, dtype=torch.bool).tril() & (torch.arange(5) < torch.tensor([5, 1])[:, None, None])
    actual = module(query, key, key_lengths=torch.tensor([5, 1]), is_causal=True)
    torch.testing.assert_close(actual, written_out(module, query, key, mask=mask.unsqueeze(1))[0])


@pytest.mark.parametrize("variant", ["plain", "heads", "everything"])
@pytest.mark.parametrize("shape", [None, (3,), (2, 3), (2, 1, 3)])
def test_windows_of_attention(variant, shape):
    module, query, key, value = make(variant)
    centers = None if shape is None else torch.randint(-1, 6, shape)
    c = torch.arange(3) if centers is None else centers
    offset = torch.arange(5) - (c.unsqueeze(1) if c.dim() == 2 else c).unsqueeze(-1)
    actual = module(query, key, value, window_size=(1, 2), window_center=centers)
    mask = (offset >= -1) & (offset <= 2)
    expected = written_out(module, query, key, value, mask=mask)[0]
    seen = mask.expand(2, 1, 3, 5).any(-1)[:, 0]
    torch.testing.assert_close(actual[seen], expected[seen])


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_flow_through_many_steps(variant):
    module, query, key, value = make(variant)
    module.double()
    query, key = query.double(), key.double().requires_grad_()
    value = None if value is None else value.double().requires_grad_()
    leaves = [key, *([] if value is None else [value]), *module.parameters()]
    lengths = torch.tensor([5, 2])
    keys = module.project_keys(key, value, key_lengths=lengths)
    assert not any(t.requires_grad for t in exponentials(keys, torch.float64))
    steps = torch.cat([module(query[:, i : i + 1], keys) for i in range(3)], 1)
    at_once = module(query, key, value, key_lengths=lengths)
    torch.testing.assert_close(steps, at_once)
    grad = torch.randn_like(steps)
    actual = torch.autograd.grad(steps, leaves, grad)
    torch.testing.assert_close(actual, torch.autograd.grad(at_once, leaves, grad))


@pytest.mark.parametrize("key", [1e3, math.nan], ids=["large", "nan"])
def test_exponentials_of_keys_out_of_range_are_not_used(key):
    module, query, keys, _ = make()
    keys[0, 0, 0] = key
    projected = module.project_keys(keys)
    assert not any(t.isfinite().all() for t in exponentials(projected, torch.float32)[:1])
    torch.testing.assert_close(module(query, projected), module(query, keys), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    module, query, key, _ = make("everything", value_dim=None)
    module.to(dtype)
    keys = module.project_keys(key.to(dtype))
    assert all(t.dtype == torch.float32 for t in exponentials(keys, dtype)[:1])
    context = module(query.to(dtype), keys)
    assert context.dtype == dtype
    expected = written_out(module.float(), query.to(dtype).float(), key.to(dtype).float())[0]
    torch.testing.assert_close(context.float(), expected, atol=0.02, rtol=0.02)


def test_autocast():
    module, query, key, _ = make("everything", value_dim=None)
    expected = module(query, key)
    with torch.autocast(DEVICE, torch.bfloat16):
        actual = module(query, key)
        steps = module(query, module.project_keys(key))
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, atol=0.05, rtol=0.05)
    torch.testing.assert_close(steps, actual, atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_copies(variant, copied):
    module, query, key, value = make(variant)
    torch.testing.assert_close(copied(module)(query, key, value), module(query, key, value), rtol=0, atol=0)


def test_projected_keys_can_be_copied():
    module, query, key, _ = make("heads")
    keys = module.project_keys(key.requires_grad_(False))
    for module_, keys_ in (
        copy.deepcopy((module.eval(), detached(keys))),
        pickle.loads(pickle.dumps((module, keys))),
    ):
        torch.testing.assert_close(module_(query, keys_), module(query, keys))


def detached(keys):
    return ProjectedKeys(keys.key.detach(), keys.value.detach())


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dict(variant):
    module, query, key, value = make(variant)
    other, *_ = make(variant)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(other(query, key, value), module(query, key, value), rtol=0, atol=0)


def test_names_of_parameters():
    names = set(make("everything")[0].state_dict())
    assert names == {"weight", "weight_g", "key_proj.weight"} | {
        f"{layer}_proj.{name}" for layer in ("query", "value", "out") for name in ("weight", "bias")
    }


def test_factory_arguments():
    module = AdditiveAttention(
        3, 4, 6, context_dim=2, out_dim=2, normalize=True, device="meta", dtype=torch.float64
    )
    assert all(p.device.type == "meta" and p.dtype == torch.float64 for p in module.parameters())
    module = module.to_empty(device=DEVICE)
    module.reset_parameters()
    assert module(torch.randn(1, 2, 3).double(), torch.randn(1, 5, 4).double()).isfinite().all()


def test_reset_parameters():
    module, *_ = make("everything")
    torch.manual_seed(3)
    module.reset_parameters()
    before = copy.deepcopy(module.state_dict())
    torch.manual_seed(3)
    module.reset_parameters()
    assert all(torch.equal(before[name], t) for name, t in module.state_dict().items())
    assert module.weight.abs().max() <= 3**-0.5 and (module.weight_g == 3**-0.5).all()


def test_representation():
    assert "num_heads=4, normalize=True, softcap=2.0" in repr(make("everything")[0])


def test_bad_arguments():
    with pytest.raises(ValueError, match="attention_dim: expected a multiple of num_heads=5, got 12"):
        AdditiveAttention(7, 10, 12, num_heads=5)
    with pytest.raises(ValueError, match="context_dim: expected a multiple of num_heads=4, got 6"):
        AdditiveAttention(7, 10, 12, num_heads=4, context_dim=6)
    module, query, key, _ = make()
    with pytest.raises(ValueError, match=r"query: expected shape \(B, Tq, 7\), got \(3, 7\)"):
        module(query[0], key)
    with pytest.raises(ValueError, match=r"key: expected shape \(B, Tk, 10\), got \(5, 10\)"):
        module(query, key[0])
    with pytest.raises(ValueError, match="value: pass it to project_keys"):
        module(query, module.project_keys(key), key)


@cpu_alone
def test_lengths_out_of_range_are_refused():
    module, query, key, _ = make()
    with pytest.raises(ValueError, match="key_lengths: expected values"):
        module(query, key, key_lengths=torch.tensor([6, 1]))


# Bahdanau's decoder step


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("masked", ["none", "mask", "key_lengths"])
def test_bahdanau_step(masked, normalize):
    torch.manual_seed(0)
    module = BahdanauAttention(7, 10, 12, normalize=normalize)
    state, memory = torch.randn(3, 7), torch.randn(3, 5, 10)
    lengths = torch.tensor([5, 1, 3])
    visible = torch.arange(5) < lengths[:, None]
    options = {"none": {}, "mask": {"mask": visible}, "key_lengths": {"key_lengths": lengths}}[masked]
    context, weights = module(state, memory, **options)
    mask = None if masked == "none" else visible[:, None, None]
    expected, expected_weights = written_out(module, state.unsqueeze(1), memory, mask=mask)
    assert context.shape == (3, 10) and weights.shape == (3, 5)
    torch.testing.assert_close(context, expected.squeeze(1))
    torch.testing.assert_close(weights, expected_weights[:, 0, 0])
    torch.testing.assert_close(module(state, module.project_keys(memory, **options)), (context, weights))


def test_bahdanau_in_a_decoder():
    """A decoder over keys projected once learns to copy: gradients reach the encoder through every step."""
    torch.manual_seed(0)

    class Copier(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(6, 16)
            self.attention = BahdanauAttention(16, 16, 16)
            self.cell = nn.RNNCell(16, 16)
            self.out = nn.Linear(32, 6)

        def forward(self, tokens):
            memory = self.embed(tokens) + torch.eye(16)[: tokens.shape[1]]
            keys, state = self.attention.project_keys(memory), memory.new_zeros(len(tokens), 16)
            logits = []
            for _ in range(tokens.shape[1]):
                context, _ = self.attention(state, keys)
                state = self.cell(context, state)
                logits.append(self.out(torch.cat([context, state], -1)))
            return torch.stack(logits, 1)

    model, tokens = Copier(), torch.randint(0, 6, (32, 4))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_bahdanau_bad_arguments():
    module = BahdanauAttention(7, 10, 12)
    with pytest.raises(ValueError, match=r"query: expected shape \(B, 7\), got \(3, 1, 7\)"):
        module(torch.randn(3, 1, 7), torch.randn(3, 5, 10))
    with pytest.raises(ValueError, match=r"mask: expected shape \(B, T\), got \(5,\)"):
        module(torch.randn(3, 7), torch.randn(3, 5, 10), mask=torch.ones(5) > 0)


def test_a_step_without_weights_returns_the_context_alone():
    module = BahdanauAttention(5, 6, 4)
    query, memory = torch.randn(3, 5), torch.randn(3, 7, 6)
    context, _ = module(query, memory)
    torch.testing.assert_close(module(query, memory, return_weights=False), context, rtol=0, atol=0)


@pytest.mark.parametrize("lead", [(3, 1), (1, 1), (3,), (1,), ()])
def test_a_single_head_takes_masks_with_and_without_heads(lead):
    module = AdditiveAttention(5, 6, 4)
    query, key = torch.randn(3, 2, 5), torch.randn(3, 7, 6)
    mask = torch.rand(*lead, 2, 7) > 0.4
    full = mask if len(lead) == 2 else mask.view(-1, 1, 2, 7)
    context, weights = module(query, key, mask=mask, return_weights=True)
    assert weights.shape == (3, 1, 2, 7)
    assert weights.masked_select(~full.expand(3, 1, 2, 7)).count_nonzero() == 0
    torch.testing.assert_close(context, (weights.squeeze(1) @ key))
