"""Norms, scales, shifts, gates in graphs: what is rewritten answers as before; what nearly matches stays."""

import copy
import operator

import pytest
import rewritten
import torch
import torch.nn.functional as F
from rewritten import STEP, B, answers, assert_as_before, functions, fused, made, parameters, sums_of_a_step
from torch import nn
from torch.utils.checkpoint import checkpoint

from fusedattn import dropin
from fusedattn.ops.film import film
from fusedattn.ops.norm_film import norm_film

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


@pytest.mark.parametrize("changing", [False, True])
def test_core_aten_is_rewritten(changing):
    rewritten.check_core(Modulated, {"x": (B, T, C), "y": (B, C, T), "c": (B, C)}, 2, changing)


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
