"""Modules that condition features, each against a plain composition of PyTorch's functions."""

import copy
import inspect
import io
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from device import not_on_the_standin
from pairwise import EVERYTHING
from torch import nn

import fusedattn
from fusedattn import (
    AdaGroupNorm,
    AdaIN,
    AdaLayerNorm,
    AdaLayerNormSingle,
    AdaLayerNormZero,
    ConcatConditioning,
    ConditionalBatchNorm,
    ConditionalBias,
    ConditionalGate,
    ConditionalInstanceNorm,
    ConditionalScale,
    FiLM,
    FiLMResBlock,
    GatedConditionalConv2d,
    MultiHopFiLM,
    SqueezeExcite,
)
from fusedattn.modules.conditioning import Conditioned

pytestmark = pytest.mark.filterwarnings("ignore:fusedattn. no kernel of .* can run:UserWarning")


def over_places(t, x):
    """A parameter (B, C) along a map x."""
    return t.view(*t.shape, *[1] * (x.dim() - t.dim()))


def bias(module, x, condition, residual=None):
    y = torch.relu(x + over_places(module.conditioner(condition), x))
    return y if residual is None else y + residual


def scale(module, x, condition):
    return x * (1 + module.conditioner(condition))


def gate(module, x, condition):
    return x * over_places(module.conditioner(condition).sigmoid(), x)


def ada_layer_norm(module, x, condition, residual):
    gamma, beta = module.linear(F.silu(condition)).chunk(2, -1)
    y = F.layer_norm(x, (6,), module.norm.weight, module.norm.bias) * (1 + gamma) + beta
    return residual + F.gelu(y)


def ada_group_norm(module, x, condition):
    gamma, beta = (over_places(t, x) for t in module.linear(condition).chunk(2, -1))
    return F.silu(F.group_norm(x, 3, module.norm.weight, module.norm.bias, 1e-4) * (1 + gamma) + beta)


def modulated(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Block(nn.Module):
    """A transformer block but for its layers, by the fused operations."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def reset_parameters(self):
        self.norm.reset_parameters()

    def forward(self, x, condition):
        y, gate, shift, scale, gate_mlp = self.norm(x, condition)
        y, h = self.norm.add_norm(y.sin(), x, gate, shift, scale)
        return fusedattn.film(y.cos(), gate_mlp, residual=h, channel_dim=-1)


def block(six, x):
    """What it computes."""
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = six
    h = x + gate * modulated(x, shift, scale).sin()
    return h + gate_mlp * modulated(h, shift_mlp, scale_mlp).cos()


def zero(module, x, condition):
    return block(module.norm.linear(F.silu(condition)).unsqueeze(1).chunk(6, -1), x)


def single(module, x, condition):
    return block((module.norm.scale_shift_table + condition.unflatten(-1, (6, -1))).unbind(-2), x)


def adain(module, x, style):
    var, mean = torch.var_mean(style, (2, 3), correction=0, keepdim=True)
    return F.instance_norm(x) * (var + 1e-5).sqrt() + mean


def by_index(module, x, style):
    n = F.instance_norm(x)
    return torch.relu(n * over_places(module.weight[style], x) + over_places(module.bias[style], x))


def by_mix(module, x, style):
    n = F.instance_norm(x)
    return torch.relu(n * over_places(style @ module.weight, x) + over_places(style @ module.bias, x))


def batch_norm(module, x, condition, residual=None):
    gamma, beta = module.conditioner(condition).chunk(2, -1)
    gamma = 1 + gamma if module.weight is None else module.weight + gamma
    beta = beta if module.bias is None else module.bias + beta
    n = F.batch_norm(x, module.running_mean, module.running_var, training=module.training)
    if module.training and module.num_batches_tracked is not None:
        module.num_batches_tracked += 1
    y = torch.relu(n * over_places(gamma, x) + over_places(beta, x))
    return y if residual is None else y + residual


def concat(module, x, condition):
    tiled = over_places(condition, x).expand(-1, -1, *x.shape[2:])
    return F.gelu(F.conv2d(torch.cat([x, tiled], 1), module.weight, module.bias, padding=1))


def concat_linear(module, x, condition):
    return F.linear(torch.cat([condition, x], -1), module.weight)


def squeeze_excite(module, x, residual):
    return x * over_places(module.fc2(module.fc1(x.mean((2, 3))).relu()).sigmoid(), x) + residual


def res_block(module, x, condition):
    """With coordinate maps, or without."""
    if module.coordinates:
        H, W = x.shape[2:]
        right = torch.linspace(-1, 1, W, dtype=x.dtype).view(1, 1, 1, W).expand(len(x), 1, H, W)
        down = torch.linspace(-1, 1, H, dtype=x.dtype).view(1, 1, H, 1).expand(len(x), 1, H, W)
        x = torch.cat([x, right, down], 1)
    h = F.conv2d(x, module.input_proj.weight, module.input_proj.bias).relu()
    gamma, beta = (over_places(t, x) for t in module.bn1.conditioner(condition).chunk(2, -1))
    n = F.batch_norm(module.conv1(h), module.bn1.running_mean, module.bn1.running_var, training=True)
    module.bn1.num_batches_tracked += 1
    return h + torch.relu((1 + gamma) * n + beta)


def gated(module, x, condition):
    weight = module.weight.clone()
    if module.mask is not None:
        weight[:, :, 1, 1 + (module.mask == "B") :] = weight[:, :, 2:] = 0
    a, b = F.conv2d(x, weight, module.bias, padding=1).chunk(2, 1)
    if condition.dim() == 2:
        condition = over_places(condition, x)
    h_a, h_b = F.conv2d(condition, module.conditioner.weight[..., None, None]).chunk(2, 1)
    return torch.tanh(a + h_a) * torch.sigmoid(b + h_b)


def multi_hop(module, x, states, lengths):
    """By the authors' formula, with tanh."""
    context = states[torch.arange(len(states)), lengths - 1]
    hidden = torch.arange(states.shape[1]) >= lengths[:, None]
    for n, block in enumerate(module.blocks):
        attention = module.attention[n % len(module.attention)]
        tiled = context.unsqueeze(1).expand_as(states)
        if module.fusing == "hadamard":
            scores = (tiled * states) @ attention.weight
        elif module.fusing == "sum":
            scores = attention.query_proj(tiled + states).tanh() @ attention.weight.flatten()
        else:
            weight = torch.cat([attention.key_proj.weight, attention.query_proj.weight], 1)
            both = F.linear(torch.cat([states, tiled], -1), weight, attention.query_proj.bias)
            scores = both.tanh() @ attention.weight.flatten()
        context = (scores.masked_fill(hidden, -torch.inf).softmax(1).unsqueeze(2) * states).sum(1)
        x = block(x, torch.cat([context, x.mean(2)], 1) if module.feedback else context)
    return x


class WithLengths(nn.Module):
    """Takes lengths by position."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def reset_parameters(self):
        self.module.reset_parameters()

    def forward(self, x, states, lengths):
        return self.module(x, states, lengths=1 + lengths)


def hops(**options):
    width = 4 + 3 * options.get("feedback", False)
    make = lambda: WithLengths(MultiHopFiLM(4, [FiLM(width, 3), FiLM(width, 3, activation="relu")], **options))  # noqa: E731
    plain = lambda module, x, states, lengths: multi_hop(module.module, x, states, 1 + lengths)  # noqa: E731
    return make, [(2, 3, 5), (2, 6, 4), ("index", 6, 2)], plain


def evaluated(make):
    module = make().eval()
    nn.init.normal_(module.running_mean)
    return module


# By name: how the module is made, the shapes of its inputs, what it computes.
CASES = {
    "bias": (lambda: ConditionalBias(4, 3, activation="relu"), [(2, 3, 5), (2, 4), (2, 3, 5)], bias),
    "scale": (lambda: ConditionalScale(4, 3, channel_dim=-1), [(2, 5, 3), (2, 5, 4)], scale),
    "gate": (lambda: ConditionalGate(4, 3), [(2, 3, 5, 2), (2, 4)], gate),
    "ada_layer_norm": (
        lambda: AdaLayerNorm(4, 6, elementwise_affine=True, activation="gelu"),
        [(2, 5, 6), (2, 5, 4), (2, 5, 6)],
        ada_layer_norm,
    ),
    "ada_group_norm": (
        lambda: AdaGroupNorm(4, 6, 3, eps=1e-4, affine=True, condition_activation=None, activation="silu"),
        [(2, 6, 3, 5), (2, 4)],
        ada_group_norm,
    ),
    "zero": (lambda: Block(AdaLayerNormZero(4, 6)), [(2, 5, 6), (2, 4)], zero),
    "single": (lambda: Block(AdaLayerNormSingle(6)), [(2, 5, 6), (2, 5, 36)], single),
    "adain": (lambda: AdaIN(), [(2, 3, 5, 4), (2, 3, 2, 6)], adain),
    "by_index": (
        lambda: ConditionalInstanceNorm(7, 3, activation="relu"),
        [(4, 3, 5), ("index", 7, 4)],
        by_index,
    ),
    "by_mix": (lambda: ConditionalInstanceNorm(7, 3, activation="relu"), [(4, 3, 5), (4, 7)], by_mix),
    "batch_norm": (
        lambda: ConditionalBatchNorm(4, 3, hidden_dim=8, activation="relu"),
        [(5, 3, 2, 6), (5, 4), (5, 3, 2, 6)],
        batch_norm,
    ),
    "concat": (
        lambda: ConcatConditioning(nn.Conv2d(5, 6, 3, padding=1), 2, activation="gelu"),
        [(2, 3, 4, 5), (2, 2)],
        concat,
    ),
    "concat_linear": (
        lambda: ConcatConditioning(nn.Linear(5, 6, bias=False), 2, condition_first=True),
        [(2, 4, 3), (2, 4, 2)],
        concat_linear,
    ),
    "squeeze_excite": (lambda: SqueezeExcite(6, 3), [(2, 6, 4, 5), (2, 6, 4, 5)], squeeze_excite),
    "res_block": (lambda: FiLMResBlock(4, 3), [(2, 3, 5, 6), (2, 4)], res_block),
    "res_block_without_coordinates": (
        lambda: FiLMResBlock(4, 3, in_channels=5, coordinates=False, kernel_size=1),
        [(2, 5, 3, 4), (2, 4)],
        res_block,
    ),
    "gated": (lambda: GatedConditionalConv2d(3, 2, 3, 4), [(2, 3, 5, 6), (2, 4)], gated),
    "gated_masked": (
        lambda: GatedConditionalConv2d(3, 2, 3, 4, mask="B", bias=False),
        [(2, 3, 5, 6), (2, 4, 5, 6)],
        gated,
    ),
    "hops": hops(feedback=True),
    "hops_concat": hops(fusing="concat", attention_dim=5, shared_attention=False),
    "hops_shared": hops(fusing="concat"),
    "hops_sum": hops(fusing="sum"),
    "batch_norm_evaluated": (
        lambda: evaluated(lambda: ConditionalBatchNorm(4, 3, affine=False, activation="relu")),
        [(5, 3, 2, 6), (5, 4)],
        batch_norm,
    ),
}
EVERY = pytest.mark.parametrize("name", CASES)
# Of tests that take half a second each: what differs in more than sizes and options of the same operations.
OF_EVERY_KIND = ["gate", "zero", "by_mix", "batch_norm", "concat", "squeeze_excite", "res_block", "gated", "hops"]


def inputs_of(name, dtype=torch.float64):
    """Floating-point inputs require gradients; a shape ("index", n, ...) is one of integers below n."""
    made = []
    for shape in CASES[name][1]:
        if shape[0] == "index":
            made.append(torch.randint(0, shape[1], shape[2:]))
        else:
            made.append(torch.randn(shape, dtype=dtype).requires_grad_())
    return made


def trained(name, dtype=torch.float64):
    """With parameters that are nobody's first ones."""
    torch.manual_seed(0)
    module = CASES[name][0]().to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def results(function, module, inputs):
    """Outputs, then the gradients of inputs and parameters."""
    outputs = as_tuple(function(*inputs))
    leaves = [t for t in inputs if t.requires_grad] + list(module.parameters())
    torch.manual_seed(1)
    grads = torch.autograd.grad(outputs, leaves, [torch.randn_like(y) for y in outputs])
    return *outputs, *grads


@EVERY
def test_is_the_plain_composition(name):
    module = trained(name)
    inputs = inputs_of(name)
    plain = copy.deepcopy(module)  # one that counts batches of its own
    expected = results(lambda *args: CASES[name][2](plain, *args), plain, inputs)
    torch.testing.assert_close(results(module, module, inputs), expected)
    torch.testing.assert_close(dict(module.named_buffers()), dict(plain.named_buffers()))


@EVERY
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision(name, half):
    module = trained(name, half)
    inputs = inputs_of(name, half)
    wide = [t.float() if t.is_floating_point() else t for t in inputs]
    expected = as_tuple(CASES[name][2](copy.deepcopy(module).float(), *wide))
    for actual, y in zip(as_tuple(module(*inputs)), expected, strict=True):
        assert actual.dtype == half
        torch.testing.assert_close(actual.float(), y, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("name", CASES if EVERYTHING else OF_EVERY_KIND)
@not_on_the_standin("compiles nothing")
def test_compiles_as_one_graph(name):
    module = trained(name, torch.float32)
    inputs = inputs_of(name, torch.float32)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled, compiled, inputs), results(module, module, inputs))


@EVERY
def test_copies_and_state_dicts(name):
    module = trained(name)
    inputs = inputs_of(name)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    fresh = CASES[name][0]().double()
    fresh.load_state_dict(module.state_dict())
    copies = copy.deepcopy(module), torch.load(buffer, weights_only=False), fresh
    expected = module(*inputs)
    for other in copies:
        torch.testing.assert_close(other(*inputs), expected, rtol=0, atol=0)


@EVERY
def test_parameters_are_made_and_reset_anywhere(name):
    with torch.device("meta"):
        module = CASES[name][0]()
    module.to_empty(device=torch.get_default_device())
    other = CASES[name][0]()
    for one in (module, other):
        torch.manual_seed(2)
        one.reset_parameters()
    torch.testing.assert_close(module.state_dict(), other.state_dict(), rtol=0, atol=0)


@EVERY
def test_symbolic_trace(name):
    module = trained(name)
    inputs = inputs_of(name)
    absent = list(inspect.signature(module.forward).parameters)[len(inputs) :]
    traced = torch.fx.symbolic_trace(copy.deepcopy(module), dict.fromkeys(absent))
    torch.testing.assert_close(traced(*inputs), module(*inputs))


@EVERY
def test_is_shown_and_not_scriptable(name):
    module = CASES[name][0]()
    assert repr(module).startswith(type(module).__name__)
    with pytest.raises(NotImplementedError, match=": torch.jit.script cannot compile it"):
        torch.jit.script(module)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ConditionalBias(4, 3),
        lambda: ConditionalScale(4, 3),
        lambda: ConditionalScale(4, 3, gamma_offset=0.0),
    ],
)
def test_starts_as_the_identity(make):
    x = torch.randn(2, 3, 5)
    assert torch.equal(make()(x, torch.randn(2, 4)), x)


def test_norms_start_as_the_norms():
    rows, maps, condition = torch.randn(2, 5, 6), torch.randn(2, 6, 5), torch.randn(2, 4)
    torch.testing.assert_close(AdaLayerNorm(4, 6)(rows, condition), F.layer_norm(rows, (6,)))
    torch.testing.assert_close(AdaGroupNorm(4, 6, 2)(maps, condition), F.group_norm(maps, 2))
    torch.testing.assert_close(ConditionalBatchNorm(4, 6)(maps, condition), nn.BatchNorm1d(6)(maps))
    styled = ConditionalInstanceNorm(3, 6)(maps, torch.tensor(1))
    torch.testing.assert_close(styled, F.instance_norm(maps))
    torch.testing.assert_close(AdaIN()(maps, maps), maps)
    assert torch.equal(Block(AdaLayerNormZero(4, 6))(rows, condition), rows)


def test_single_starts_with_the_table_of_the_paper():
    torch.manual_seed(0)
    table = AdaLayerNormSingle(10000).scale_shift_table
    assert abs(table.std().item() - 0.01) < 1e-3 and abs(table.mean().item()) < 1e-3


def other_than_first(module):
    for t in module.state_dict().values():
        t.uniform_(0.5, 1.5) if t.is_floating_point() else t.fill_(7)
    return module


def test_batch_norm_takes_over_a_trained_one():
    plain = other_than_first(nn.BatchNorm2d(3)).eval()
    module = ConditionalBatchNorm(4, 3).eval()
    missing, unexpected = module.load_state_dict(plain.state_dict(), strict=False)
    assert missing == ["conditioner.weight", "conditioner.bias"] and not unexpected
    x = torch.randn(2, 3, 5, 4)
    torch.testing.assert_close(module(x, torch.randn(2, 4)), plain(x))
    assert module.num_batches_tracked == 7
    assert not any(
        isinstance(m, nn.SyncBatchNorm) for m in nn.SyncBatchNorm.convert_sync_batchnorm(module).modules()
    )


def test_every_style_starts_as_the_instance_norm_that_is_loaded():
    plain = other_than_first(nn.InstanceNorm2d(3, affine=True))
    module = ConditionalInstanceNorm(4, 3)
    module.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 5, 4)
    torch.testing.assert_close(module(x, torch.tensor([3, 0])), plain(x))


def test_a_style_or_a_mix_for_the_whole_batch():
    module = trained("by_index", torch.float32)
    x = torch.randn(2, 3, 5)
    expected = module(x, torch.tensor([4, 4]))
    mix = F.one_hot(torch.tensor(4), 7).float()
    for style in (torch.tensor(4), mix, mix.expand(2, -1)):
        torch.testing.assert_close(module(x, style), expected)


def test_starts_as_a_linear_layer_does():
    torch.manual_seed(0)
    gate = ConditionalGate(4, 3).conditioner
    torch.manual_seed(0)
    assert torch.equal(gate.weight, torch.nn.Linear(4, 3).weight)


def test_a_mask_hides_what_comes_later():
    x = torch.randn(1, 3, 5, 5)
    changed = x.flatten(2).clone()
    changed[..., 12:] += 1
    for mask, seen in (("A", 13), ("B", 12)):  # so many places see nothing of what has changed
        module = GatedConditionalConv2d(3, 2, 3, mask=mask)
        y, z = (module(t).flatten(2) for t in (x, changed.view_as(x)))
        torch.testing.assert_close(y[..., :seen], z[..., :seen])
        assert not torch.isclose(y[..., seen], z[..., seen]).any()
        with torch.no_grad():
            module.weight[:, :, 2] = torch.nan
        torch.testing.assert_close(module(x).flatten(2), y)


def test_weights_of_the_layers_that_modules_stand_for():
    conv = nn.Conv2d(3, 4, 3, padding=1)
    module = GatedConditionalConv2d(3, 2, 3)
    module.load_state_dict(conv.state_dict())
    x = torch.randn(2, 3, 5, 5)
    a, b = conv(x).chunk(2, 1)
    torch.testing.assert_close(module(x), torch.tanh(a) * torch.sigmoid(b))
    # As torchvision's: convolutions of one place.
    layers = nn.ModuleDict({"fc1": nn.Conv2d(4, 2, 1), "fc2": nn.Conv2d(2, 4, 1)})
    squeeze = SqueezeExcite(4, 2)
    squeeze.load_state_dict(layers.state_dict())
    z = conv(x)
    gate = layers["fc2"](layers["fc1"](z.mean((2, 3), keepdim=True)).relu()).sigmoid()
    torch.testing.assert_close(squeeze(z), gate * z)


class Zeroed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def reset_parameters(self):
        nn.init.zeros_(self.linear.weight)


def test_reset_leaves_blocks_to_reset_themselves():
    module = MultiHopFiLM(4, [nn.Sequential(Zeroed(), nn.Linear(4, 4))])
    for parameter in module.parameters():
        nn.init.constant_(parameter, 7.0)
    module.reset_parameters()
    zeroed, linear = module.blocks[0]
    assert not zeroed.linear.weight.any() and (zeroed.linear.bias == 7).all()
    assert not any((p == 7).any() for p in (*linear.parameters(), *module.attention.parameters()))


def test_the_first_context_may_be_given():
    module = trained("hops_sum", torch.float32).module
    x, states = torch.randn(2, 3, 5), torch.randn(2, 6, 4)
    torch.testing.assert_close(module(x, states), module(x, states, states[:, -1]))
    assert not torch.equal(module(x, states), module(x, states, states[:, 0]))


def test_the_documentation_lists_every_module():
    text = (Path(__file__).parents[1] / "docs" / "conditioning.md").read_text()
    listed = set(re.findall(r"`(\w+)\(", text.partition("## Where 1")[0]))
    assert all(hasattr(fusedattn, name) for name in listed)
    conditioned = {
        name for name, x in vars(fusedattn).items() if isinstance(x, type) and issubclass(x, Conditioned)
    }
    assert conditioned == {name for name in listed if name[0].isupper()}


def call(make, *shapes):
    return lambda: make()(*map(torch.randn, shapes))


ERRORS = {
    "width": (
        call(lambda: ConditionalBias(4, 3), (2, 3, 5), (2, 5)),
        r"ConditionalBias: condition: expected shape \(B, 4\), got \(2, 5\)",
    ),
    "channels": (call(lambda: ConditionalGate(4, 3), (2, 5, 3), (2, 4)), r"gamma: expected shape .*\(2, 3\)"),
    "groups": (lambda: AdaGroupNorm(4, 6, 4), "AdaGroupNorm: num_groups: expected a divisor of the 6 .*got 4"),
    "of_condition": (
        lambda: AdaLayerNorm(4, 6, condition_activation="x"),
        "condition_activation: expected one of",
    ),
    "table": (
        call(lambda: AdaLayerNormSingle(6), (2, 5, 6), (2, 6)),
        r"AdaLayerNormSingle: condition: expected shape \(B, 36\), got \(2, 6\)",
    ),
    "style": (
        call(AdaIN, (2, 3, 5), (2, 4, 5)),
        r"AdaIN: style: expected shape \(B, 3, ...\) of rank 3 or more, got \(2, 4, 5\)",
    ),
    "mix": (
        call(lambda: ConditionalInstanceNorm(7, 3), (2, 3, 5), (2, 6)),
        r"ConditionalInstanceNorm: style: expected shape \(B, 7\) or \(7,\), got \(2, 6\)",
    ),
    "index": (
        lambda: ConditionalInstanceNorm(7, 3)(torch.randn(2, 3, 5), torch.zeros(2, 1, dtype=torch.int64)),
        r"ConditionalInstanceNorm: style: expected shape \(B,\) or \(\), got \(2, 1\)",
    ),
    "channels_of_x": (
        call(lambda: SqueezeExcite(6), (2, 5, 3)),
        r"SqueezeExcite: x: expected shape \(B, 6, ...\)",
    ),
    "mask": (lambda: GatedConditionalConv2d(3, 2, 3, mask="C"), "mask: expected None, 'A' or 'B', got 'C'"),
    "even": (lambda: GatedConditionalConv2d(3, 2, (3, 2), mask="A"), r"kernel_size: expected odd .*\(3, 2\)"),
    "unconditional": (
        call(lambda: GatedConditionalConv2d(3, 2, 3), (2, 3, 5, 5), (2, 4)),
        "condition: expected None without condition_dim, got a Tensor",
    ),
    "gated": (
        call(lambda: GatedConditionalConv2d(3, 2, 3, 4), (2, 3, 5, 5), (2, 5)),
        r"condition: expected shape \(B, 4\) or \(B, 4, H, W\), got \(2, 5\)",
    ),
    "block": (
        call(lambda: FiLMResBlock(4, 3), (2, 3, 5, 5), (2, 5)),
        r"ConditionalBatchNorm: condition: expected shape \(B, 4\), got \(2, 5\)",
    ),
    "fusing": (lambda: MultiHopFiLM(4, [FiLM(4, 3)], fusing="dot"), "fusing: expected one of .*got 'dot'"),
    "blocks": (lambda: MultiHopFiLM(4, []), "blocks: expected one or more, got none"),
    "states": (
        call(lambda: MultiHopFiLM(4, [FiLM(4, 3)]), (2, 3, 5), (2, 6, 5)),
        r"MultiHopFiLM: states: expected shape \(B, T, 4\), got \(2, 6, 5\)",
    ),
    "batch_norm": (
        call(lambda: ConditionalBatchNorm(4, 3), (2, 3, 5), (2, 3)),
        r"ConditionalBatchNorm: condition: expected shape \(B, 4\), got \(2, 3\)",
    ),
    "activation": (lambda: ConditionalScale(4, 3, activation="swish"), "ConditionalScale: activation: .*'swish'"),
    "backend": (lambda: ConditionalGate(4, 3, backend="tpu"), "ConditionalGate: backend: .*'tpu'"),
}


def test_what_is_no_tensor_is_named():
    for module in (ConditionalBias(4, 3), AdaLayerNorm(4, 3), ConditionalBatchNorm(4, 3)):
        with pytest.raises(TypeError, match=f"{type(module).__name__}: condition: expected a Tensor, got list"):
            module(torch.randn(2, 3), [1.0])


def test_float32_parameters_beside_half_precision_are_not_rounded():
    torch.manual_seed(0)
    x, condition = torch.randn(2, 6, 5).bfloat16(), torch.randn(2, 4)
    for module in (FiLM(4, 6), AdaGroupNorm(4, 6, 2), ConditionalBatchNorm(4, 6)):
        for parameter in module.parameters():
            nn.init.normal_(parameter)
        expected = module(x.float(), condition).bfloat16()
        torch.testing.assert_close(module(x, condition), expected, rtol=2**-8, atol=0)


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    make, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        make()
