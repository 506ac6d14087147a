"""Patterns in graphs: what is rewritten answers as before, in values and gradients; what nearly matches stays."""

import functools
import math

import pytest
import rewritten
import torch
import torch.nn.functional as F
from rewritten import (
    DV,
    STEP,
    TK,
    TQ,
    B,
    D,
    answers,
    assert_as_before,
    functions,
    fused,
    made,
    parameters,
    sums_of_a_step,
)
from torch import nn

from fusedattn import dropin
from fusedattn.ops.additive_attention import additive_attention
from fusedattn.ops.additive_scores import additive_scores
from fusedattn.ops.attention_pool import attention_pool

INF = -math.inf
PAIRS = {"q": (B, TQ, D), "k": (B, TK, D), "x": (B, TK, DV), "w": (D,)}


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


# Core ATen

CORE = {
    "linear": (Linear, {name: PAIRS[name] for name in "qkx"}),
    "a-step": (Step, STEP),
    "heads": (functools.partial(Of, matmul_heads), HEADS),
}


@pytest.mark.parametrize("changing", [False, True])
@pytest.mark.parametrize("name", CORE)
def test_core_aten_is_rewritten(name, changing):
    rewritten.check_core(*CORE[name], 1, changing)
