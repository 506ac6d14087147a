"""ConcatAttention against Luong's formulas written out, place by place."""

import math

import pytest
import torch
from device import cpu_alone, not_on_the_standin
from test_steps import Calls

from fusedattn import ConcatAttention

T, TQ = 9, 4
LOCAL = [None, "monotonic", "predictive"]


def make(local, dtype=torch.float64, window=2, **options):
    torch.manual_seed(0)
    module = ConcatAttention(5, 6, 4, local=local, window=window, dtype=dtype, **options)
    query, memory = (torch.randn(2, *s, dtype=dtype).requires_grad_() for s in ((TQ, 5), (T, 6)))
    return module, query, memory


def written_out(module, query, memory, lengths=(T, T), mask=None, position=0):
    """(h~ or context, weights, p_t), state by state."""
    W = torch.cat([module.query_proj.weight, module.key_proj.weight], 1)  # [W_q, W_k]
    outputs, of_weights = [], []
    for b, S in enumerate(lengths):
        for t, h in enumerate(query[b]):
            score = torch.stack([torch.tanh(W @ torch.cat([h, m])) @ module.weight[0] for m in memory[b]])
            p, factor = torch.tensor(float(t + position)), 1.0
            if module.local == "predictive":
                v_p = module.position_out.weight[0]
                p = int(S) * torch.sigmoid(v_p @ torch.tanh(module.position_proj.weight @ h))
                factor = torch.exp(-((torch.arange(T) - p) ** 2) / (2 * module.sigma**2))
            seen = torch.arange(T) < S
            if module.local is not None:
                seen = seen & ((torch.arange(T) - p.round()).abs() <= module.window)
            if mask is not None:
                seen = seen & mask[b, t]
            a = torch.zeros(T, dtype=score.dtype)
            if seen.any():
                a = score.masked_fill(~seen, -math.inf).softmax(0) * factor
            c = a @ memory[b].masked_fill(~seen[:, None], 0.0)
            if module.combine_proj is not None:
                c = torch.tanh(module.combine_proj.weight @ torch.cat([c, h]))
            outputs.append(c)
            of_weights.append(a)
    return torch.stack(outputs).view(2, len(query[0]), -1), torch.stack(of_weights).view(2, -1, T)


@pytest.mark.parametrize("out_dim", [None, 3])
@pytest.mark.parametrize("local", LOCAL)
def test_the_formula_and_its_gradients(local, out_dim):
    module, query, memory = make(local, out_dim=out_dim)
    lengths, mask = torch.tensor([T, 4]), torch.rand(2, TQ, T) > 0.3
    leaves = [query, memory, *module.parameters()]
    output, weights = module(query, memory, mask=mask, key_lengths=lengths)
    expected, expected_weights = written_out(module, query, memory, lengths, mask)
    torch.testing.assert_close((output, weights), (expected, expected_weights))
    grads = [torch.randn_like(output), torch.randn_like(weights)]
    actual = torch.autograd.grad((output, weights), leaves, grads)
    torch.testing.assert_close(actual, torch.autograd.grad((expected, expected_weights), leaves, grads))
    alone = module(query, memory, mask=mask, key_lengths=lengths, return_weights=False)
    torch.testing.assert_close(alone, output)


@pytest.mark.parametrize("local", LOCAL)
def test_steps_are_the_sequence(local):
    module, query, memory = make(local, out_dim=3)
    lengths, mask = torch.tensor([T, 4]), torch.rand(2, T) > 0.3
    expected = module(query, memory, mask=mask.unsqueeze(1), key_lengths=lengths)
    for keys, options in (
        (memory, {"mask": mask, "key_lengths": lengths}),
        (module.project_keys(memory), {"mask": mask, "key_lengths": lengths}),
        (module.project_keys(memory, mask=mask, key_lengths=lengths), {}),
    ):
        steps = [module(query[:, t], keys, position=t, **options) for t in range(TQ)]
        torch.testing.assert_close(tuple(torch.stack(of, 1) for of in zip(*steps, strict=True)), expected)


def test_local_p_is_the_gradient_to_its_position():
    """By which it is trained: of the factor alone, the window does not move."""
    module, query, memory = make("predictive", window=100, sigma=1.5)
    output, _ = module(query, memory)
    grads = torch.autograd.grad(output.sum(), list(module.position_proj.parameters()))
    assert all(g.abs().sum() > 0 for g in grads)
    centres = module.predicted(query, T)
    assert ((centres > 0) & (centres < T)).all() and centres.shape == (2, TQ, 1)


def test_monotonic_windows_move_with_the_position():
    module, query, memory = make("monotonic")
    for position in (0, 3, T + 1, T + 2):
        _, weights = module(query, memory, position=position)
        torch.testing.assert_close(weights, written_out(module, query, memory, position=position)[1])
    output, weights = module(query, memory, position=T + 2)
    assert (output == 0).all() and (weights == 0).all()


def test_a_loop_makes_its_gradients_once():
    module, query, memory = make("monotonic", torch.float32, out_dim=6)
    keys, fed, losses = module.project_keys(memory), torch.zeros(2, 6), []
    with Calls() as calls:
        for t in range(TQ):  # input feeding
            fed, weights = module(query[:, t] + fed[:, :5], keys, position=t)
            losses.append(fed.sum() + weights.square().sum())
        sum(losses).backward()
    assert sorted(calls.masks) == [0b0001] * TQ + [0b1110]


@pytest.mark.parametrize("local", LOCAL)
def test_padding_may_hold_anything(local):
    module, query, memory = make(local)
    lengths = torch.tensor([5, 0])
    hidden = torch.arange(T) >= lengths[:, None]
    found = []
    for number in (0.0, math.nan):
        keys = module.project_keys(memory.masked_fill(hidden[..., None], number), key_lengths=lengths)
        output, weights = module(query, keys)
        leaves = query, keys.key, keys.value, module.weight
        found.append((output, weights, *torch.autograd.grad(output.sin().sum(), leaves)))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    assert (found[0][0][1] == 0).all()


@not_on_the_standin("Dynamo does not trace a tensor that is a subclass of its kind")
@pytest.mark.parametrize("local", LOCAL)
def test_compiles_as_one_graph(local):
    torch.compiler.reset()
    module, query, memory = make(local, out_dim=3)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(query, memory), module(query, memory)
    torch.testing.assert_close(actual, expected)
    leaves = [query, memory, *module.parameters()]
    torch.testing.assert_close(*(torch.autograd.grad(y.sin().sum(), leaves) for y, _ in (actual, expected)))


def test_state_dict_and_parameters():
    module, query, memory = make("predictive", out_dim=3)
    other = make("predictive", out_dim=3)[0]
    other.reset_parameters()
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(other(query, memory), module(query, memory), rtol=0, atol=0)
    layers = ("query_proj", "key_proj", "position_proj", "position_out", "combine_proj")
    assert set(module.state_dict()) == {"weight", *(f"{layer}.weight" for layer in layers)}
    assert "local='predictive', window=2" in repr(module)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_positions_are_not_rounded_to_half_precision(dtype):
    module, query, _ = make("predictive", torch.float32)
    centres = module.to(dtype).predicted(query.to(dtype), 1000)
    assert centres.dtype == torch.float32
    output, weights = module(query.to(dtype), torch.randn(2, 1000, 6).to(dtype))
    assert output.dtype == weights.dtype == dtype and output.isfinite().all()


@cpu_alone
def test_errors():
    for options, message in (
        ({"local": "local-p"}, "local: expected None, 'monotonic' or 'predictive', got 'local-p'"),
        ({"window": -1}, "window: expected 0 or more, got -1"),
        ({"local": "predictive", "window": 0}, "sigma: expected a positive number, got 0.0"),
    ):
        with pytest.raises(ValueError, match=f"ConcatAttention: {message}"):
            ConcatAttention(5, 6, 4, **options)
    module, query, memory = make(None)
    for call, message in (
        (lambda: module(query[..., :4], memory), r"query: expected shape \(B, Tq, 5\), got \(2, 4, 4\)"),
        (lambda: module(query[:, 0], memory, mask=torch.ones(T) > 0), r"mask: expected shape \(B, T\)"),
        (lambda: module.predicted(query, T), "local: expected 'predictive' for a prediction, got None"),
    ):
        with pytest.raises(ValueError, match=f"ConcatAttention: {message}"):
            call()
