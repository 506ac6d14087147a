"""HardAttention: what it samples, its expectation, REINFORCE on a small problem, crops."""

import math

import pytest
import torch
from device import not_on_the_standin

from fusedattn import HardAttention, SpatialAttention

SIZES = (5, 6, 4)


def make(batch=3, places=(3, 4), dtype=torch.float64, **options):
    torch.manual_seed(0)
    module = HardAttention(*SIZES, dtype=dtype, **options)
    return module, torch.randn(batch, 5, dtype=dtype), torch.randn(batch, 6, *places, dtype=dtype)


def soft(module, state, features, mask=None):
    """(z, weights) of soft attention with the same parameters."""
    twin = SpatialAttention(*SIZES, gate=None if module.gate_proj is None else "scalar", dtype=state.dtype)
    twin.load_state_dict({name: t for name, t in module.state_dict().items() if name != "baseline"})
    return twin(state, features, mask=mask)


def distribution(module, state, features, mask=None):
    """log p (B, T)"""
    return soft(module, state, features, mask)[1].flatten(1).log()


@pytest.mark.parametrize("gate", [None, "scalar", "channel"])
@pytest.mark.parametrize("places", [(3, 4), (7,)])
def test_a_sample_is_one_place(places, gate):
    module, state, features = make(places=places, gate=gate, expectation_prob=0.0)
    mask = torch.rand(3, *places) > 0.4
    found = module(state, features, mask=mask)
    at = torch.arange(3)
    assert mask.flatten(1)[at, found.index].all()
    beta = 1.0 if gate is None else torch.sigmoid(module.gate_proj(state))
    torch.testing.assert_close(found.context, beta * features.flatten(2)[at, :, found.index])
    keys = module.project_keys(features, mask=mask)
    torch.manual_seed(1)
    stepped = module(state, keys)
    torch.manual_seed(1)
    torch.testing.assert_close(stepped, module(state, features, mask=mask))


def test_log_prob_and_entropy():
    module, state, features = make(expectation_prob=0.0)
    found, log_p = module(state, features), distribution(module, state, features)
    torch.testing.assert_close(found.log_prob, log_p[torch.arange(3), found.index])
    torch.testing.assert_close(found.entropy, -(log_p.exp() * log_p).sum(1))


def test_evaluation_takes_the_most_likely_place():
    module, state, features = make()
    found = module.eval()(state, features)
    log_p = distribution(module, state, features)
    assert torch.equal(found.index, log_p.argmax(1))
    torch.testing.assert_close(found.log_prob, log_p.amax(1))
    torch.testing.assert_close(module(state, features, sample=False), found)


def test_the_expectation_now_and_then():
    module, state, features = make(batch=400, places=(2,))
    found = module(state, features)
    is_expected = found.log_prob == 0
    assert abs(int(is_expected.sum()) - 200) < 4 * 10  # four standard deviations of 400 throws of a coin
    z, _ = soft(module, state, features)
    torch.testing.assert_close(found.context[is_expected], z[is_expected])
    module.expectation_prob = 1.0
    state.requires_grad_()
    always = module(state, features).context
    torch.testing.assert_close(always, z)
    expected = soft(module, state, features)[0].sin().sum()
    torch.testing.assert_close(
        torch.autograd.grad(always.sin().sum(), state), torch.autograd.grad(expected, state)
    )


def test_an_image_of_which_nothing_is_seen():
    for expectation_prob in (0.0, 1.0):
        module, state, features = make(expectation_prob=expectation_prob)
        mask = torch.ones(3, 3, 4, dtype=torch.bool)
        mask[1] = False
        found = module(state, features, mask=mask)
        assert found.index[1] == -1 and not any(t[1].any() for t in (found.context, *found[2:]))
        sum(t.sum() for t in (found.context, *found[2:])).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())
        features[1] = math.nan
        assert not module(state, features, mask=mask).context[1].any()


def test_reinforce_has_the_gradient_of_the_expected_reward():
    """Mean over 4,000 samples, within four standard errors; rewards are those of places."""
    n = 4000
    module, state, features = make(batch=1, places=(6,), expectation_prob=0.0, gate=None, baseline_decay=0.9)
    reward_of = torch.randn(6, dtype=torch.float64)
    states = state.repeat(n, 1).requires_grad_()
    found = module(states, features.expand(n, -1, -1))
    loss = n * module.reinforce_loss(reward_of[found.index], found.log_prob, found.entropy)
    estimates = -torch.autograd.grad(loss, states)[0]
    state.requires_grad_()
    expected = distribution(module, state, features).exp() @ reward_of
    exact = torch.autograd.grad(expected.sum(), state)[0][0]
    error = estimates.std(0) / math.sqrt(n)
    assert ((estimates.mean(0) - exact).abs() < 4 * error).all() and (exact.abs() > 4 * error).any()


def test_the_loss_and_its_baseline():
    module = HardAttention(*SIZES, baseline_decay=0.75, reward_weight=2.0, entropy_weight=0.5)
    reward = torch.tensor([1.0, 3.0], requires_grad=True)
    log_prob, entropy = torch.tensor([[-1.0, -2.0], [-0.5, 0.0]]), torch.tensor([[0.5, 0.25], [1.0, 0.0]])
    loss = module.reinforce_loss(reward, log_prob, entropy)
    torch.testing.assert_close(loss, torch.tensor(-(2 * (1 * -3 + 3 * -0.5) + 0.5 * 1.75) / 2))
    assert not loss.requires_grad
    torch.testing.assert_close(module.baseline, torch.tensor(0.5))
    after = module.reinforce_loss(reward, log_prob.sum(1), entropy.sum(1))
    torch.testing.assert_close(after, torch.tensor(-(2 * (0.5 * -3 + 2.5 * -0.5) + 0.5 * 1.75) / 2))
    baseline = module.baseline.clone()
    module.eval().reinforce_loss(reward, log_prob, entropy)
    assert torch.equal(module.baseline, baseline) and "baseline" in module.state_dict()


def test_crops():
    image = torch.arange(2 * 8 * 12, dtype=torch.float32).view(1, 2, 8, 12).requires_grad_()
    images = image.expand(4, -1, -1, -1)
    index = torch.tensor([5, 0, 11, -1])  # of 3 columns: (1, 2), (0, 0), (3, 2)
    crops = HardAttention.crop(images, index, (4, 3), (2, 4))
    torch.testing.assert_close(crops[0], image[0, :, 2:4, 8:12])
    torch.testing.assert_close(crops[1], image[0, :, 0:2, 0:4])
    torch.testing.assert_close(crops[2], image[0, :, 6:8, 8:12])
    assert not crops[3].any()
    wide = HardAttention.crop(images, index, (4, 3), (4, 6))
    torch.testing.assert_close(wide[1, :, 1:, 1:], image[0, :, 0:3, 0:5])
    assert not wide[1, :, 0].any() and not wide[1, :, :, 0].any()
    crops.sum().backward()
    assert image.grad.sum() == 3 * crops[0].numel()


@not_on_the_standin("compiles nothing")
def test_compiles_as_one_graph():
    module, state, features = make(dtype=torch.float32)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = compiled(state, features)
    assert found.index.shape == (3,) and found.context.requires_grad
    module.eval()
    torch.testing.assert_close(compiled(state, features), module(state, features))


def test_errors():
    for options, message in (
        ({"expectation_prob": 1.5}, r"expectation_prob: expected a number in \[0, 1\], got 1.5"),
        ({"baseline_decay": -1}, r"baseline_decay: expected a number in \[0, 1\], got -1"),
        ({"normalizer": "sigmoid"}, "normalizer: expected 'softmax', got 'sigmoid'"),
        ({"dropout": 0.1}, "dropout: expected 0.0, got 0.1"),
    ):
        with pytest.raises(ValueError, match=f"HardAttention: {message}"):
            HardAttention(*SIZES, **options)
    module, state, features = make()
    for call, message in (
        (lambda: module(state[:, :4], features), r"query: expected shape \(B, 5\), got \(3, 4\)"),
        (lambda: module(state, features, generator=1), "generator: expected a torch.Generator"),
        (
            lambda: module.reinforce_loss(torch.ones(2), torch.ones(3), torch.ones(3)),
            r"log_prob: expected shape \(B,\) or \(B, T\) with reward \(B,\), got \(3,\) with reward \(2,\)",
        ),
        (lambda: module.crop(features, torch.zeros(2), (3, 4), (2, 2)), r"crop: expected image \(B, C, H, W\)"),
    ):
        with pytest.raises(ValueError, match=f"HardAttention: {message}"):
            call()
