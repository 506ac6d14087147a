"""Patterns in graphs: what is rewritten answers as before, in values and gradients; what nearly matches stays."""

import copy
import functools
import math
import operator

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close_to_reference
from torch import nn
from torch.utils.checkpoint import checkpoint

from fusedattn import dropin
from fusedattn.ops.additive_attention import additive_attention
from fusedattn.ops.additive_scores import additive_scores
from fusedattn.ops.attention_pool import attention_pool
from fusedattn.ops.film import film
from fusedattn.ops.norm_film import norm_film

INF = -math.inf
B, TQ, TK, D, DV = 2, 3, 5, 8, 6
PAIRS = {"q": (B, TQ, D), "k": (B, TK, D), "x": (B, TK, DV), "w": (D,)}
STEP = {"q": (B, D), "k": (B, TK, D), "x": (B, TK, DV), "w": (D,)}


# True at keys that a query may attend to, one of them at least.
KEYS = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 0, 0]], dtype=torch.bool)[:, None]
PLACES = KEYS[:, None] | torch.eye(TQ, TK, dtype=torch.bool)


def pairs(q, k):
    return torch.tanh(q.unsqueeze(-2) + k.unsqueeze(-3))


class Linear(nn.Module):
    """A linear layer to the score, a mask that is written in place, and the weights returned, too."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.score = nn.Linear(D, D), nn.Linear(D, D, bias=False), nn.Linear(D, 1)
        self.act, self.softmax = nn.Tanh(), nn.Softmax(-1)

    def forward(self, q, k, x):
        z = self.query(q)[:, :, None] + self.key(k)[:, None]
        scores = self.score(self.act(z)).squeeze(-1).masked_fill_(~KEYS, INF)
        weights = self.softmax(scores)
        return weights @ x, weights


class Concatenation(nn.Module):
    """bentrevett's: a layer over the state, repeated, and the keys; a finite fill keeps its softmax."""

    def __init__(self):
        super().__init__()
        self.attn, self.v = nn.Linear(2 * D, D), nn.Linear(D, 1, bias=False)

    def forward(self, q, k, x):
        q = q.unsqueeze(1).repeat(1, k.shape[1], 1)
        energy = torch.tanh(self.attn(torch.cat((q, k), dim=2)))
        attention = F.softmax(self.v(energy).squeeze(2).masked_fill(~KEYS[:, 0], -1e10), dim=1)
        return torch.bmm(attention.unsqueeze(1), x).squeeze(1)


def matmul_heads(q, k, x, w):
    scores = torch.matmul(pairs(q, k), w) / math.sqrt(D)
    return torch.softmax(torch.where(PLACES, scores, INF), dim=-1).matmul(x)


def einsum_weight_of_heads(q, k, x, w):
    weights = torch.einsum("bhqkd,hd->bhqk", pairs(q, k), w).softmax(-1)
    return torch.einsum("bhqk,bhkv->bqhv", weights, x)


def sums_of_a_step(q, k, x, w):
    weights = F.softmax((w * torch.tanh(q.unsqueeze(1) + k)).sum(-1), dim=1)
    return (weights.unsqueeze(-1) * x).sum(dim=1), weights


def product_from_the_left(q, k, x, w):
    """Of keys in the first dimension, (Tk, B, D); the weight repeated over the batch."""
    energy = (q.expand(TK, B, D) + k).tanh().permute(1, 2, 0)
    scores = torch.bmm(w.repeat(B, 1).unsqueeze(1), energy).squeeze(1)
    return F.softmax(scores, dim=1).unsqueeze(1).bmm(x.transpose(0, 1))


def channels_first(q, k, x, w):
    """(B, D, Tq, Tk), summands of all kinds, no batch in the values."""
    z = (q.transpose(1, 2)[:, :, :, None] + w[:, None, None]) + k.mT.unsqueeze(2)
    return torch.softmax(torch.einsum("bdqk,d->bqk", torch.tanh(z), w), 2) @ x


def without_a_batch(q, k, x, w):
    return ((torch.tanh(q[:, None] + k) @ w).softmax(1)[..., None] * x).sum(1)


def transposed(q, k, x, w):
    """The softmax over the first of (Tk, B, Tq)."""
    scores = torch.tanh(k.transpose(0, 1).unsqueeze(2) + q) @ w[:, None]
    return torch.einsum("kbq,bkv->bqv", scores[..., 0].softmax(0), x)


def dropped(q, k, x, w):
    return F.dropout(torch.softmax(pairs(q, k) @ w, -1), 0.5, training=True) @ x


def biased(q, k, x, w):
    scores = torch.relu(x[:, :1, :TK]) + (pairs(q, k) @ w) * 2
    return torch.softmax((scores + x[0, 0, 0]).masked_fill(~KEYS, INF), -1) @ x


def leaky(q, k, x, w):
    return F.log_softmax(F.leaky_relu(q.unsqueeze(2) + k.unsqueeze(1), 0.1) @ w, -1)


def without_a_softmax(q, k, x, w):
    return torch.sigmoid(F.relu(q.unsqueeze(2) + k.unsqueeze(1)) @ w)


HEADS = {"q": (B, 2, TQ, D), "k": (B, 1, TK, D), "x": (B, 2, TK, DV), "w": (D,)}
WHOLE = {
    "linear": (Linear, {name: PAIRS[name] for name in "qkx"}),
    "matmul-heads": (matmul_heads, HEADS),
    "einsum-weight-of-heads": (einsum_weight_of_heads, HEADS | {"w": (2, D), "k": (B, 2, TK, D)}),
    "sums-of-a-step": (sums_of_a_step, STEP),
    "product-from-the-left": (
        product_from_the_left,
        {"q": (1, B, D), "k": (TK, B, D), "x": (TK, B, DV), "w": (D,)},
    ),
    "channels-first": (channels_first, PAIRS | {"x": (TK, DV)}),
    "without-a-batch": (without_a_batch, {"q": (TQ, D), "k": (TK, D), "x": (TK, DV), "w": (D,)}),
    "transposed": (transposed, PAIRS),
    "biased": (biased, PAIRS),
}
SCORES = {
    "concatenation": (Concatenation, {name: STEP[name] for name in "qkx"}),
    "dropped": (dropped, PAIRS),
    "leaky": (leaky, PAIRS),
    "without-a-softmax": (without_a_softmax, PAIRS),
}


def made(form, shapes, dtype=torch.float32):
    """A form, as a module or function of a seed, and its inputs."""
    torch.manual_seed(0)
    model = form().to(dtype) if isinstance(form, type) else form
    return model, [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes.values()]


def answers(function, inputs, parameters=()):
    """Results, and the gradients of all inputs and parameters."""
    torch.manual_seed(3)
    results = function(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    total = sum((r * torch.linspace(-1, 1, r.numel(), dtype=r.dtype).view(r.shape)).sum() for r in results)
    leaves = [*inputs, *parameters]
    return [*results, *torch.autograd.grad(total, leaves, materialize_grads=True)]


def parameters(model):
    return list(model.parameters()) if isinstance(model, nn.Module) else []


fused = functools.partial(dropin.backend, always=True)


def functions(graph_module):
    return [node.target for node in graph_module.graph.nodes]


def in_float64(model, inputs):
    wide = type(model)().double() if isinstance(model, nn.Module) else model
    if isinstance(model, nn.Module):
        wide.load_state_dict(model.state_dict())
    return answers(wide, [t.detach().double().requires_grad_() for t in inputs], parameters(wide))


def assert_as_before(found, model, inputs):
    plain, exact = answers(model, inputs, parameters(model)), in_float64(model, inputs)
    for n, (a, b, c) in enumerate(zip(found, plain, exact, strict=True)):
        scale = max(1.0, c.abs().max().item())
        assert_close_to_reference(a, b, c, terms=B * 2 * TQ * TK * D, name=f"answer {n}", scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*WHOLE, *SCORES])
def test_attention_is_rewritten_and_answers_as_before(name, dtype):
    form, shapes = (WHOLE | SCORES)[name]
    model, inputs = made(form, shapes, dtype)
    graph_module = torch.fx.symbolic_trace(model)
    report = dropin.rewrite(graph_module, *inputs)
    assert len(report.replaced) == 1 and not report.not_replaced, report
    used = functions(graph_module)
    assert (additive_attention in used, additive_scores in used) == (name in WHOLE, name in SCORES)
    assert not {torch.tanh, torch.einsum, "tanh", "repeat", torch.cat} & set(used)
    assert_as_before(answers(graph_module, inputs, parameters(graph_module)), model, inputs)


def attention(scores, x):
    return torch.softmax(scores, -1) @ x


def result_used_twice(q, k, x, w):
    energy = pairs(q, k)
    return attention(energy @ w, x), energy.sum()


def sum_used_twice(q, k, x, w):
    z = q.unsqueeze(2) + k.unsqueeze(1)
    return attention(torch.tanh(z) @ w, x), z.sum()


def difference(q, k, x, w):
    return attention(torch.tanh(q.unsqueeze(2) - k.unsqueeze(1)) @ w, x)


def two_times(q, k, x, w):
    return attention(torch.tanh(torch.add(q.unsqueeze(2), k.unsqueeze(1), alpha=2)) @ w, x)


def pooling(q, k, x, w):
    return attention(torch.tanh(k) @ w, x)


def written_between(q, k, x, w):
    k = k * 1
    energy = pairs(q, k)
    k.mul_(2)
    return attention(energy @ w, x)


def two_scores(q, k, x, w):
    return attention((pairs(q, k) @ torch.stack((w, w), 1)).sum(-1), x)


def weight_of_keys(q, k, x, w):
    return attention(torch.einsum("bqkd,bkd->bqk", pairs(q, k), k), x)


def over_two_dimensions(q, k, x, w):
    return (pairs(q, k) * w).sum((-1, -2))


def perceptron(q, k, x, w):
    return torch.tanh(k + w) @ w


def erf(q, k, x, w):
    return attention(F.gelu(q.unsqueeze(2) + k.unsqueeze(1)) @ w, x)


NEAR = {
    result_used_twice: "the result of tanh is used elsewhere",
    sum_used_twice: "the argument of tanh is used elsewhere",
    difference: "not taken of the sum",
    two_times: "not taken of the sum",
    pooling: "not taken of the sum",
    written_between: "written in place",
    two_scores: None,  # nothing like it: no line in the report
    weight_of_keys: None,
    over_two_dimensions: None,
    perceptron: None,
    erf: None,
}


@pytest.mark.parametrize("form", NEAR, ids=lambda form: form.__name__)
def test_what_nearly_matches_stays_as_it_is(form):
    _, inputs = made(form, PAIRS)
    graph_module = torch.fx.symbolic_trace(form)
    before = functions(graph_module)
    report = dropin.rewrite(graph_module, *inputs)
    assert functions(graph_module) == before and not report.replaced
    assert [NEAR[form] in found.reason for found in report] == [True] * (NEAR[form] is not None)
    torch.testing.assert_close(answers(graph_module, inputs), answers(form, inputs), rtol=0, atol=0)


def log_softmax(scores, x):
    return F.log_softmax(scores, -1) @ x


PARTS = {
    "a mask fills with -1e+10": lambda e, x: attention(e.masked_fill(~KEYS, -1e10), x),
    "the scores are used elsewhere": lambda e, x: (attention(e, x), e),
    "a log_softmax": log_softmax,
    "in another dtype": lambda e, x: torch.softmax(e, -1, dtype=torch.float32) @ x,
    "mul stands between": lambda e, x: attention(e * x.sum(), x),
    "weights are used before the values": lambda e, x: (p := torch.softmax(e, -1)) @ (x * p.sum()),
    "not multiplied with values": lambda e, x: torch.softmax(e, -1).cumsum(1) @ x,
    "values have more dimensions": lambda e, x: torch.einsum(
        "bqk,bqkv->bqv", torch.softmax(e, -1), x[:, None] * torch.ones(TQ, 1, 1)
    ),
}


@pytest.mark.parametrize("reason", PARTS)
def test_where_more_than_a_mask_of_inf_is_between_the_scores_alone_are_fused(reason):
    def form(q, k, x, w):
        return PARTS[reason](pairs(q, k) @ w, x)

    _, inputs = made(form, PAIRS)
    graph_module = torch.fx.symbolic_trace(form)
    (found,) = dropin.rewrite(graph_module, *inputs)
    assert found.replaced and reason in found.reason and additive_scores in functions(graph_module)
    torch.testing.assert_close(answers(graph_module, inputs), answers(form, inputs))


def test_a_bias_of_the_score_has_a_gradient_of_zero():
    model, inputs = made(*WHOLE["linear"])
    graph_module = torch.fx.symbolic_trace(model)
    dropin.rewrite(graph_module, *inputs)
    graph_module(*inputs)[0].square().sum().backward()
    assert torch.equal(model.score.bias.grad, torch.zeros(1))


def test_a_graph_without_shapes_or_of_another_kind_is_refused():
    graph_module = torch.fx.symbolic_trace(Linear())
    with pytest.raises(ValueError, match="example_inputs: expected those of the graph"):
        dropin.rewrite(graph_module)
    with pytest.raises(TypeError, match=r"expected a torch.fx.GraphModule, got Linear"):
        dropin.rewrite(Linear())
    report = dropin.rewrite(torch.fx.symbolic_trace(nn.Linear(D, D)), torch.ones(1, D))
    assert str(report) == "fusedattn.dropin: no pattern is in the graph"


class Of(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, q, k, x, w):
        return self.function(q, k, x, w)


class Step(Of):
    def __init__(self):
        super().__init__(sums_of_a_step)


def test_an_exported_program_is_rewritten_and_takes_other_sizes():
    model, inputs = made(Step, STEP)
    auto = torch.export.Dim.AUTO
    sizes = {"q": {0: auto}, "k": {0: auto, 1: auto}, "x": {0: auto, 1: auto}, "w": {}}
    program = torch.export.export(model, tuple(inputs), dynamic_shapes=sizes).module()
    (found,) = dropin.rewrite(program)
    assert found.replaced and additive_attention in functions(program)
    other = [torch.randn(shape, requires_grad=True) for shape in ((4, D), (4, 9, D), (4, 9, DV), (D,))]
    torch.testing.assert_close(answers(program, other), answers(model, other))


@pytest.fixture
def reports():
    torch.compiler.reset()
    yield []
    torch.compiler.reset()


def test_compiled_functions_take_other_sizes_without_more_compilations(reports):
    compiled = torch.compile(sums_of_a_step, backend=fused("aot_eager", report=reports.append), fullgraph=True)
    for b, tk in ((2, 5), (3, 9), (4, 7)):
        inputs = [torch.randn(shape, requires_grad=True) for shape in ((b, D), (b, tk, D), (b, tk, DV), (D,))]
        torch.testing.assert_close(answers(compiled, inputs), answers(sums_of_a_step, inputs))
    assert len(reports) == 2 and all(len(report.replaced) == 1 for report in reports)


def test_modes_that_are_switched_are_noticed(reports):
    def no_gradient_of_the_weights(q, k, x, w):
        energy = pairs(q, k)
        with torch.no_grad():
            scores = energy @ w
        return attention(scores, x)

    def autocast_in_part(q, k, x, w):
        with torch.autocast("cpu", torch.bfloat16):
            scores = (pairs(q, k) * w).sum(-1)
        return attention(scores, x)

    _, inputs = made(pairs, PAIRS)
    for function in (no_gradient_of_the_weights, autocast_in_part):
        compiled = torch.compile(function, backend=fused("aot_eager", report=reports.append))
        torch.testing.assert_close(answers(compiled, inputs), answers(function, inputs))
    reasons = [found.reason for report in reports for found in report if not found.replaced]
    assert len(reasons) == 2 and "gradients are switched" in reasons[0] and "under autocast" in reasons[1]


@pytest.mark.parametrize("inside", [False, True])
def test_under_autocast(inside, reports):
    """Of the whole call, or within what is compiled: products and scores are in its dtype, the softmax is not."""
    model, inputs = made(*WHOLE["linear"])
    autocast = torch.autocast("cpu", torch.bfloat16)

    def function(*inputs):
        with autocast:
            return model(*inputs)

    compile = torch.compile(backend=fused("aot_eager", report=reports.append))
    compiled = compile(function) if inside else compile(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        found = answers(compiled, inputs, parameters(model))
    expected = answers(function, inputs, parameters(model))
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    assert [len(report.replaced) for report in reports] == [1]


def test_inductor_compiles_what_was_rewritten_and_trains_it():
    torch.compiler.reset()
    _, inputs = made(sums_of_a_step, STEP)
    # A graph of nothing but the operators: no C++ is compiled.
    compiled = torch.compile(sums_of_a_step, backend=fused(), fullgraph=True, options={"max_autotune": False})
    torch.testing.assert_close(answers(compiled, inputs), answers(sums_of_a_step, inputs))
    torch.compiler.reset()


# Pooling


class Gated(nn.Module):
    """ABMIL's, of one bag or several; the weights are returned, too."""

    def __init__(self, heads=1):
        super().__init__()
        self.V = nn.Sequential(nn.Linear(DV, D), nn.Tanh())
        self.U = nn.Sequential(nn.Linear(DV, D), nn.Sigmoid())
        self.w = nn.Linear(D, heads)

    def forward(self, x):
        weights = F.softmax(torch.transpose(self.w(self.V(x) * self.U(x)), -1, -2), dim=-1)
        return torch.matmul(weights, x), weights


class GatedByTwoHeads(Gated):
    def __init__(self):
        super().__init__(heads=2)


def gated_sum(a, b, x, w):
    weights = torch.softmax((torch.sigmoid(b) * torch.tanh(a)) @ w, 1)
    return (weights[..., None] * x).sum(1)


def gated_scores(a, b, x, w):
    """Of which padding has a finite fill."""
    scores = (torch.tanh(a) * torch.sigmoid(b) * w).sum(-1).masked_fill(~KEYS[:, 0], -1e9)
    return torch.bmm(torch.softmax(scores, 1).unsqueeze(1), x).squeeze(1)


def gated_perceptron(a, b, x, w):
    return torch.einsum("btd,d->bt", torch.tanh(a).mul(b.sigmoid()), w)


BAG = {"a": (B, TK, D), "b": (B, TK, D), "x": (B, TK, DV), "w": (D,)}
POOLED = {
    "a-bag": (Gated, {"x": (TK, DV)}, True),
    "bags": (Gated, {"x": (B, TK, DV)}, True),
    "heads": (GatedByTwoHeads, {"x": (B, TK, DV)}, True),
    "heads-of-a-bag": (GatedByTwoHeads, {"x": (TK, DV)}, True),
    "sum": (gated_sum, BAG, True),
    "masked": (gated_scores, BAG, False),
    "without-a-softmax": (gated_perceptron, BAG, False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", POOLED)
def test_gated_pooling_is_rewritten_and_answers_as_before(name, dtype):
    form, shapes, is_whole = POOLED[name]
    model, inputs = made(form, shapes, dtype)
    graph_module = torch.fx.symbolic_trace(model)
    (found,) = dropin.rewrite(graph_module, *inputs)
    used = functions(graph_module)
    assert found.replaced and ("these alone" in found.reason) is not is_whole
    assert used.count(attention_pool) == 1 and not {torch.tanh, "sigmoid", "mul"} & set(used)
    assert (torch.softmax in used or F.softmax in used) is (name == "masked")
    assert_as_before(answers(graph_module, inputs, parameters(graph_module)), model, inputs)


def test_a_gate_that_is_used_elsewhere_stays():
    def form(a, b, x, w):
        gated = torch.tanh(a) * torch.sigmoid(b)
        return attention(gated @ w, x), gated

    _, inputs = made(form, BAG)
    graph_module = torch.fx.symbolic_trace(form)
    (found,) = dropin.rewrite(graph_module, *inputs)
    assert not found.replaced and "used elsewhere" in found.reason


# Conditioning

C, T = 6, 5


class Block(nn.Module):
    """Of a transformer: a gated residual, a norm, its scale and shift; then the gate of the last layer."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(C, elementwise_affine=False, eps=1e-6)
        self.condition, self.layer = nn.Linear(C, 4 * C), nn.Linear(C, C)

    def forward(self, x, r, c):
        shift, scale, gate, last = self.condition(c).unsqueeze(1).chunk(4, dim=2)
        h = r + gate * x
        return h + last * self.layer(self.norm(h) * (1 + scale) + shift)


def group_norm(x, r, c, w):
    scale, shift = (t[:, :, None, None].expand(-1, -1, T, T) for t in (c[:, :C], c[:, C:]))
    return F.silu(F.group_norm(x, 3, w, w, 1e-6) * (scale + 1) + shift) + r


def group_norm_activated(x):
    return F.gelu(F.group_norm(x, 2), approximate="tanh")


def instance_norm(x, c):
    mean, std = c.view(B, 2 * C, 1, 1).chunk(2, 1)
    return F.instance_norm(x) * std + mean


def rms_norm_per_token(x, c):
    scale, shift = c.chunk(2, -1)
    return torch.relu(torch.add(F.rms_norm(x, (C,), eps=1e-6).mul_(scale), shift))


def rms_norm_written_out(x, c, w):
    """With a weight, before scale and shift."""
    n = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w
    scale, shift = c.unsqueeze(1).chunk(2, -1)
    return n * (1 + scale) + shift


def rms_norm_by_division(x, w):
    return w * (x / torch.sqrt(1e-6 + torch.mean(x * x, dim=2, keepdim=True)))


def product_and_sum_in_one(x, r, c):
    """``addcmul`` of gate and residual before a norm, of scale and shift after it, SiLU written out."""
    scale, shift, gate = c.unsqueeze(1).chunk(3, -1)
    h = torch.addcmul(r, gate, x)
    z = torch.addcmul(shift, 1 + scale, F.layer_norm(h, (C,)))
    return torch.sigmoid(z) * z + r, h


def residual_is_the_norms_input(x, r, c):
    h = r + c.unsqueeze(1) * x
    return F.layer_norm(h, (C,)) * (1 + c.unsqueeze(1)) + h


def film_of_a_convolution(x, r, c, w):
    gamma, beta = c.unsqueeze(-1).unsqueeze(-1).chunk(2, 1)
    return F.conv2d(x, w).mul(gamma).add(beta).relu() + r


MAP = (B, C, T, T)
CONDITIONED = {
    "block": (Block, {"x": (B, T, C), "r": (B, T, C), "c": (B, C)}, 2),
    "group": (group_norm, {"x": MAP, "r": MAP, "c": (B, 2 * C), "w": (C,)}, 1),
    "group-activated": (group_norm_activated, {"x": MAP}, 1),
    "instance": (instance_norm, {"x": MAP, "c": (B, 2 * C)}, 1),
    "rms-per-token": (rms_norm_per_token, {"x": (B, T, C), "c": (B, T, 2 * C)}, 1),
    "rms-written-out": (rms_norm_written_out, {"x": (B, T, C), "c": (B, 2 * C), "w": (C,)}, 1),
    "rms-by-division": (rms_norm_by_division, {"x": (B, T, C), "w": (C,)}, 1),
    "addcmul": (product_and_sum_in_one, {"x": (B, T, C), "r": (B, T, C), "c": (B, 3 * C)}, 1),
    "film": (film_of_a_convolution, {"x": MAP, "r": MAP, "c": (B, 2 * C), "w": (C, C, 1, 1)}, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONDITIONED)
def test_conditioning_is_rewritten_and_answers_as_before(name, dtype):
    form, shapes, patterns = CONDITIONED[name]
    model, inputs = made(form, shapes, dtype)
    graph_module = torch.fx.symbolic_trace(model)
    report = dropin.rewrite(graph_module, *inputs)
    assert len(report.replaced) == patterns and not report.not_replaced, report
    used = functions(graph_module)
    assert len({norm_film, film} & set(used)) == patterns and not {operator.mul, "mul", "expand"} & set(used)
    assert_as_before(answers(graph_module, inputs, parameters(graph_module)), model, inputs)


def test_a_norm_whose_input_is_the_residual_too():
    _, inputs = made(residual_is_the_norms_input, {"x": (B, T, C), "r": (B, T, C), "c": (B, C)})
    graph_module = torch.fx.symbolic_trace(residual_is_the_norms_input)
    (found,) = dropin.rewrite(graph_module, *inputs)
    assert found.replaced and norm_film in functions(graph_module)
    torch.testing.assert_close(answers(graph_module, inputs), answers(residual_is_the_norms_input, inputs))


class Modulated(nn.Module):
    """What core ATen takes apart: norms, SiLU, linear layers."""

    def __init__(self):
        super().__init__()
        self.rows, self.map = nn.LayerNorm(C, elementwise_affine=False), nn.GroupNorm(2, C)
        self.condition = nn.Linear(C, 2 * C)

    def forward(self, x, y, c):
        scale, shift = self.condition(c).chunk(2, -1)
        modulated = self.rows(x) * (1 + scale[:, None]) + shift[:, None]
        return modulated, F.silu(self.map(y) * (1 + scale[..., None]) + shift[..., None])


CORE = {
    "linear": (Linear, {name: PAIRS[name] for name in "qkx"}, 1),
    "a-step": (Step, STEP, 1),
    "heads": (functools.partial(Of, matmul_heads), HEADS, 1),
    "modulated": (Modulated, {"x": (B, T, C), "y": (B, C, T), "c": (B, C)}, 2),
}


@pytest.mark.parametrize("changing", [False, True])
@pytest.mark.parametrize("name", CORE)
def test_core_aten_is_rewritten(name, changing):
    form, shapes, patterns = CORE[name]
    torch.manual_seed(0)
    model, inputs = form(), [torch.randn(shape, requires_grad=True) for shape in shapes.values()]
    sizes = {name: {0: torch.export.Dim.AUTO} if len(shape) > 1 else {} for name, shape in shapes.items()}
    sizes = tuple(sizes.values()) if changing else None
    program = torch.export.export(model, tuple(inputs), dynamic_shapes=sizes).run_decompositions().module()
    report = dropin.rewrite(program)
    assert len(report.replaced) == patterns and not report.not_replaced, report
    assert not {torch.ops.aten.tanh.default, torch.ops.aten.native_layer_norm.default} & set(functions(program))
    found, expected = (answers(f, inputs) for f in (program, model))
    torch.testing.assert_close(found, expected)


def layer_norm(x, *sizes):
    return F.layer_norm(x, sizes or (C,))


def norm_used_twice(x, c, w):
    n = layer_norm(x)
    return n * (1 + w) + n


def one_value_a_place(x, c, w):
    return F.group_norm(x, 5) * (1 + x.mean(1, keepdim=True)) + w


def norm_of_two_dimensions(x, c, w):
    return layer_norm(x, T, C) * (1 + w) + w


def eps_of_the_dtype(x, c, w):
    return F.rms_norm(x, (C,)) * (1 + w)


def scale_in_float64(x, c, w):
    return layer_norm(x) * (1 + w.double()) + w


def written_while_scaled(x, c, w):
    w = w * 1
    n = layer_norm(x) * w
    w.mul_(2)
    return n + w


def running_statistics(x, c, w):
    return F.instance_norm(x, torch.zeros(T), torch.ones(T), use_input_stats=False) * (1 + w)


def norm_alone(x, c, w):
    return layer_norm(x) + x


def root_used_twice(x, c, w):
    root = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    return x * root * w + root


def mean_of_another(x, c, w):
    return x * torch.rsqrt((x * w).square().mean(-1, keepdim=True) + 1e-6) * w


def half_of_a_product(x, c, w):
    return torch.addcmul(w, layer_norm(x), w, value=0.5)


def gated_unit(x, c, w):
    return F.linear(x, c) * x + x


def padding_masked(x, c, w):
    return F.linear(x, c) * x[:, :, :1] + x


def subtracted(x, c, w):
    return F.linear(x, c) * w - x


LEFT = {
    norm_used_twice: None,
    one_value_a_place: "one value a place",
    norm_of_two_dimensions: "over several dimensions",
    eps_of_the_dtype: "eps depends on the dtype",
    scale_in_float64: "its steps are of torch.float32 and torch.float64",
    written_while_scaled: "written in place",
    running_statistics: "keeps running statistics",
    norm_alone: None,
    root_used_twice: None,
    mean_of_another: None,
    half_of_a_product: None,
    gated_unit: None,
    padding_masked: None,
    subtracted: None,
}


@pytest.mark.parametrize("form", LEFT, ids=lambda form: form.__name__)
def test_conditioning_that_nearly_matches_stays_as_it_is(form):
    _, inputs = made(form, {"x": (B, T, C), "c": (C, C), "w": (C,)})
    graph_module = torch.fx.symbolic_trace(form)
    before = functions(graph_module)
    report = dropin.rewrite(graph_module, *inputs)
    assert functions(graph_module) == before
    assert [LEFT[form] in found.reason for found in report] == [True] * (LEFT[form] is not None)


def test_compiled_blocks_train_with_other_sizes(reports):
    model, inputs = made(*CONDITIONED["block"][:2])
    compiled = torch.compile(model, backend=fused("aot_eager", report=reports.append), fullgraph=True)
    for b, t in ((B, T), (3, 9), (4, 7)):
        inputs = [torch.randn(shape, requires_grad=True) for shape in ((b, t, C), (b, t, C), (b, C))]
        expected = answers(model, inputs, parameters(model))
        torch.testing.assert_close(answers(compiled, inputs, parameters(model)), expected)
    assert [len(report.replaced) for report in reports] == [2, 2]


class BatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)

    def forward(self, x, c):
        gamma, beta = c[:, :, None, None].chunk(2, 1)
        return F.relu(self.norm(self.layer(x)) * (1 + gamma) + beta, inplace=True)


def test_a_batch_norm_keeps_its_running_statistics(reports):
    model, inputs = made(BatchNorm, {"x": MAP, "c": (B, 2 * C)})
    original = copy.deepcopy(model)
    compiled = torch.compile(model, backend=fused("aot_eager", report=reports.append), fullgraph=True)
    for training in (True, True, False):
        model.train(training), original.train(training)
        expected = answers(original, inputs, parameters(original))
        torch.testing.assert_close(answers(compiled, inputs, parameters(model)), expected)
        torch.testing.assert_close(model.state_dict(), original.state_dict())
    assert [found.replaced for report in reports for found in report] == [True, True]


def test_what_is_checkpointed_is_rewritten(reports):
    model, inputs = made(*CONDITIONED["block"][:2])

    def checkpointed(*inputs):
        return checkpoint(model, *inputs, use_reentrant=False)

    compiled = torch.compile(checkpointed, backend=fused("aot_eager", report=reports.append), fullgraph=True)
    found = answers(compiled, inputs, parameters(model))
    torch.testing.assert_close(found, answers(model, inputs, parameters(model)))
    assert [str(report) for report in reports] == [
        "fusedattn.dropin: 2 of 2 patterns are fused\n"
        "  fused  norm (layer_norm)  norm, scale and shift in one pass\n"
        "  fused  layer (linear_1)   scale, shift and what follows in one pass"
    ]


def test_what_inductor_does_as_well_is_left_to_it_where_the_size_is_known(reports):
    model, inputs = made(*CONDITIONED["block"][:2])
    _, step = made(sums_of_a_step, STEP)

    def both(*inputs):
        return model(*inputs[:3]), *sums_of_a_step(*inputs[3:])

    for dynamic in (False, True):
        backend = dropin.backend("eager", report=reports.append)
        compiled = torch.compile(both, backend=backend, dynamic=dynamic)
        torch.testing.assert_close(compiled(*inputs, *step), both(*inputs, *step))
    small, unknown = reports
    assert [(found.replaced, "as fast" in found.reason) for found in small] == [(False, True)] * 2
    assert [found.replaced for found in unknown] == [True, True]
