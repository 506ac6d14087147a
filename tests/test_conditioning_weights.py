"""What each module that conditions names, loads and starts as: its paper, the weights of the layer that it stands
for, the identity or the first values of the paper."""

import re

import pytest
import torch
import torch.nn.functional as F
from originals import diffusers, dit, film
from test_conditioning_modules import over_places
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

MODULES = {name: x for name, x in vars(fusedattn).items() if isinstance(x, type) and issubclass(x, Conditioned)}
B, Z, C = 2, 4, 6
MAPS, ROWS, CONDITION = (B, C, 5, 3), (B, 5, C), (B, Z)


@pytest.mark.parametrize("name", MODULES)
def test_names_its_paper(name):
    assert re.search(r"arXiv:\d{4}\.\d{4,5}|doi:10\.", MODULES[name].__doc__)


# Weights: the layer that a module stands for, how its state is named in the module, and what it computes.


def with_linear(module, width):
    """A conditioner is an nn.Linear of the condition."""
    layer = nn.Linear(Z, width)
    module.conditioner.load_state_dict(layer.state_dict())
    return layer


def of_bias():
    layer = with_linear(module := ConditionalBias(Z, C), C)
    return module, lambda x, z: x + over_places(layer(z), x)


def of_scale():
    layer = with_linear(module := ConditionalScale(Z, C), C)
    return module, lambda x, z: x * (1 + over_places(layer(z), x))


def of_gate():
    layer = with_linear(module := ConditionalGate(Z, C), C)
    return module, lambda x, z: x * over_places(layer(z).sigmoid(), x)


def of_film():
    layer, modulate = with_linear(module := FiLM(Z, C), 2 * C), film.FiLM()

    def plain(x, z):
        gamma, beta = layer(z).chunk(2, -1)
        return modulate(x, 1 + gamma, beta)

    return module, plain


def of_film_block():
    block, layer = film.FiLMedResBlock(C, extra=2, proj=1), nn.Linear(Z, 2 * C)
    module = FiLMResBlock(Z, C)
    missing, unexpected = module.load_state_dict(block.state_dict(), strict=False)
    assert missing == ["bn1.conditioner.weight", "bn1.conditioner.bias"] and not unexpected
    module.bn1.conditioner.load_state_dict(layer.state_dict())

    def plain(x, z):
        H, W = x.shape[2:]
        down, right = torch.meshgrid(torch.linspace(-1, 1, H), torch.linspace(-1, 1, W), indexing="ij")
        gamma, beta = layer(z).chunk(2, -1)
        return block(x, 1 + gamma, beta, torch.stack([right, down]).expand(len(x), 2, H, W))

    return module, plain


def of_instance_norm():
    layer = nn.InstanceNorm2d(C, affine=True)
    nn.init.normal_(layer.weight)
    module = ConditionalInstanceNorm(3, C)
    module.load_state_dict(layer.state_dict())
    return module, lambda x, style: layer(x)


def of_batch_norm():
    layer = nn.BatchNorm2d(C)
    nn.init.normal_(layer.weight)
    layer(torch.randn(MAPS))
    module = ConditionalBatchNorm(Z, C)
    module.load_state_dict(layer.state_dict(), strict=False)
    return module.eval(), lambda x, z: layer.eval()(x)


def of_group_norm():
    layer = diffusers.AdaGroupNorm(Z, C, 3)
    module = AdaGroupNorm(Z, C, 3, condition_activation=None)
    module.load_state_dict(layer.state_dict())
    return module, layer


def of_layer_norm(output_dim=2 * C):
    layer = diffusers.AdaLayerNorm(Z, output_dim=output_dim, norm_elementwise_affine=True, chunk_dim=0)
    module = AdaLayerNorm(Z, C, elementwise_affine=True)
    module.load_state_dict(layer.state_dict())
    return module, lambda x, z: torch.stack([layer(x[b], temb=z[b]) for b in range(B)])


def of_continuous_layer_norm():
    layer = diffusers.AdaLayerNormContinuous(C, Z)
    module = AdaLayerNorm(Z, C, elementwise_affine=True)
    module.load_state_dict(layer.state_dict())
    return module, layer


def of_final_layer():
    layer = dit.FinalLayer(C, C)
    layer.linear = nn.Identity()
    module = AdaLayerNorm(C, C, eps=1e-6)
    for name, t in layer.adaLN_modulation[1].named_parameters():
        shift, scale = t.detach().chunk(2)
        module.linear.get_parameter(name).data.copy_(torch.cat([scale, shift]))
    return module, layer


def of_zero():
    layer = diffusers.AdaLayerNormZero(C)
    module = AdaLayerNormZero(C, C)
    module.load_state_dict(layer.state_dict())
    return module, lambda x, z: layer(x, emb=z)


class ZeroBlock(nn.Module):
    """DiT's block with our norms between its layers."""

    def __init__(self, block):
        super().__init__()
        self.norm, self.attn, self.mlp = AdaLayerNormZero(C, C), block.attn, block.mlp
        self.norm.linear.load_state_dict(block.adaLN_modulation[1].state_dict())

    def forward(self, x, z):
        y, gate, shift_mlp, scale_mlp, gate_mlp = self.norm(x, z)
        y, h = self.norm.add_norm(self.attn(y), x, gate, shift_mlp, scale_mlp)
        return fusedattn.film(self.mlp(y), gate_mlp, residual=h, channel_dim=-1)


def of_dit_block():
    block = dit.DiTBlock(C)
    return ZeroBlock(block), block


def of_single():
    table = torch.randn(6, C)
    module = AdaLayerNormSingle(C)
    module.load_state_dict({"scale_shift_table": table})

    def plain(x, z):
        shift, scale, *others = (table + z.unflatten(-1, (6, C))).unsqueeze(2).unbind(1)
        return F.layer_norm(x, (C,), eps=1e-6) * (1 + scale) + shift, *others

    def summed(x, z):
        y, *pairs = module(x, z)
        return y, *((one + other).unsqueeze(1) for one, other in pairs)

    return summed, plain


def of_convolution():
    layer = nn.Conv2d(C, 2 * C, 3, padding=1)
    module = GatedConditionalConv2d(C, C, 3)
    module.load_state_dict(layer.state_dict())

    def plain(x):
        a, b = layer(x).chunk(2, 1)
        return torch.tanh(a) * torch.sigmoid(b)

    return module, plain


def of_squeeze_excitation():
    """As torchvision's: convolutions of one place."""
    layers = nn.ModuleDict({"fc1": nn.Conv2d(C, 2, 1), "fc2": nn.Conv2d(2, C, 1)})
    module = SqueezeExcite(C, 2)
    module.load_state_dict(layers.state_dict())
    return module, lambda x: layers["fc2"](layers["fc1"](x.mean((2, 3), keepdim=True)).relu()).sigmoid() * x


def of_concatenation():
    layer = nn.Conv2d(C + Z, 3, 3, padding=1)
    module = ConcatConditioning(nn.Conv2d(C + Z, 3, 3, padding=1), Z)
    module.load_state_dict(layer.state_dict())
    return module, lambda x, z: layer(torch.cat([x, over_places(z, x).expand(-1, -1, *x.shape[2:])], 1))


def of_hops():
    blocks = nn.ModuleList([FiLM(Z, C), FiLM(Z, C)])
    for parameter in blocks.parameters():
        nn.init.normal_(parameter)
    module = MultiHopFiLM(Z, [FiLM(Z, C), FiLM(Z, C)])
    module.blocks.load_state_dict(blocks.state_dict())
    # One state is all that a hop can read.
    return module, lambda x, states: blocks[1](blocks[0](x, states[:, 0]), states[:, 0])


STYLE = torch.tensor([2, 0])
LAYERS = {
    "ConditionalBias": [(of_bias, MAPS, CONDITION)],
    "ConditionalScale": [(of_scale, MAPS, CONDITION)],
    "ConditionalGate": [(of_gate, MAPS, CONDITION)],
    "FiLM": [(of_film, MAPS, CONDITION)],
    "FiLMResBlock": [(of_film_block, MAPS, CONDITION)],
    "ConditionalInstanceNorm": [(of_instance_norm, MAPS, STYLE)],
    "ConditionalBatchNorm": [(of_batch_norm, MAPS, CONDITION)],
    "AdaGroupNorm": [(of_group_norm, MAPS, CONDITION)],
    "AdaLayerNorm": [
        (of_layer_norm, ROWS, CONDITION),
        (of_continuous_layer_norm, ROWS, CONDITION),
        (of_final_layer, ROWS, (B, C)),
    ],
    "AdaLayerNormZero": [(of_zero, ROWS, (B, C)), (of_dit_block, ROWS, (B, C))],
    "AdaLayerNormSingle": [(of_single, ROWS, (B, 6 * C))],
    "GatedConditionalConv2d": [(of_convolution, MAPS)],
    "SqueezeExcite": [(of_squeeze_excitation, MAPS)],
    "ConcatConditioning": [(of_concatenation, MAPS, CONDITION)],
    "MultiHopFiLM": [(of_hops, MAPS, (B, 1, Z))],
}


@pytest.mark.parametrize(
    "of, inputs", [pytest.param(of, inputs, id=of.__name__) for rows in LAYERS.values() for of, *inputs in rows]
)
def test_loads_the_weights_of_the_layer_that_it_stands_for(of, inputs):
    torch.manual_seed(0)
    module, plain = of()
    inputs = [torch.randn(t) if isinstance(t, tuple) else t for t in inputs]
    torch.testing.assert_close(module(*inputs), plain(*inputs))


def test_every_module_loads_some():
    assert {*LAYERS, "AdaIN"} == set(MODULES)  # which has no parameters
    assert not AdaIN().state_dict()


# The start


def test_blocks_start_as_the_papers_do():
    x, z = torch.randn(MAPS), torch.randn(CONDITION)
    block = FiLMResBlock(Z, C, coordinates=False)
    h = block.input_proj(x).relu()
    expected = h + F.batch_norm(block.conv1(h), None, None, training=True).relu()
    torch.testing.assert_close(block(x, z), expected)
    hops = MultiHopFiLM(Z, [FiLM(Z, C), FiLM(Z, C)])
    assert torch.equal(hops(x, torch.randn(B, 7, Z)), x)
    assert torch.equal(FiLM(Z, C)(x, z), x)


def test_layers_start_as_those_of_torch():
    def parameters(make):
        torch.manual_seed(0)
        return list(make().parameters())

    def squeeze_and_excitation():
        return nn.ModuleList([nn.Linear(C, 2), nn.Linear(2, C)])

    def gated():
        return nn.ModuleList([nn.Conv2d(C, 2 * C, 3), nn.Linear(Z, 2 * C, bias=False)])

    def concatenated():
        return ConcatConditioning(nn.Linear(C + Z, 3), Z)

    for ours, theirs in (
        (lambda: SqueezeExcite(C, 2), squeeze_and_excitation),
        (lambda: GatedConditionalConv2d(C, C, 3, Z), gated),
        (lambda: ConditionalGate(Z, C), lambda: nn.Linear(Z, C)),
        (concatenated, lambda: nn.Linear(C + Z, 3)),
    ):
        assert all(map(torch.equal, parameters(ours), parameters(theirs)))
