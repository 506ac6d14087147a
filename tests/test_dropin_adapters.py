"""Every adapter against its original: the package where it is installed, and the formula of its source.

A case makes an original and uses it as people do. Answers, state_dict, and the gradients of all parameters and
inputs of the replaced module are compared with float64, beside the original in the same dtype.
"""

import collections
import copy
import importlib
import pickle
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from tolerance import assert_close_to_reference
from torch.utils import _pytree

from fusedattn import dropin
from fusedattn.dropin import _small

# Where the packages keep the classes that tests/originals has as formulas.
PACKAGES = {
    "diffusers": "diffusers.models.normalization",
    "diffusers.BasicTransformerBlock": "diffusers.models.attention",
    "diffusers.FluxSingleTransformerBlock": "diffusers.models.transformers.transformer_flux",
    "diffusers.FluxTransformerBlock": "diffusers.models.transformers.transformer_flux",
    "diffusers.JointTransformerBlock": "diffusers.models.attention",
    "diffusers.ResnetBlock2D": "diffusers.models.resnet",
    "espnet": "espnet.nets.pytorch_backend.rnn.attentions",
    "speechbrain": "speechbrain.nnet.attention",
    "torch_geometric": "torch_geometric.nn.conv.film_conv",
    "torchmil": "torchmil.nn.attention.attention_pool",
}


@pytest.fixture(autouse=True)
def always_fused():
    """Cases are small, which would leave most of them to the originals."""
    with _small.always_fused():
        yield


@dataclass
class Case:
    """``make(classes)`` gives a module, ``use(module, *inputs)`` its answers to random inputs of these shapes.

    ``std`` of parameters: small where an attention inside would saturate, and rounding be magnified.
    """

    make: Callable
    shapes: tuple
    use: Callable = lambda module, *inputs: module(*inputs)
    std: float = 1.0


def with_emb(module, x, emb):
    return module(x, emb=emb)


def with_class(module, x):
    return module(x, torch.tensor([2, 0]))


def with_edges(module, source, target):
    edges = torch.tensor([[0, 1, 1, 2, 3, 3], [0, 0, 2, 2, 1, 1]])
    return module((source, target), edges, torch.tensor([0, 1, 0, 1, 0, 0]))


def with_mask(*lengths):
    def use(module, query, keys):
        module.set_mask(torch.tensor(lengths), keys)
        return module(query, keys)

    return use


def lengths_mask(lengths, T):
    """True at valid places."""
    return torch.arange(T) < torch.tensor(lengths)[:, None]


def hide_first(module, query, ref):
    """As its decoder does, in place."""
    keys, logits = module(query, ref)
    logits[:, 0] = -torch.inf
    return keys, logits.softmax(1)


def steps(module, states, first, second):
    """Two steps, the second of which depends on the first, and after reset() another loop."""
    lengths, found = [6, 4], []
    for _ in range(2):
        module.reset()
        found.append(module(states, lengths, first, None))
        found.append(module(states, lengths, second + found[-1][0].sum(), found[-1][1]))
    found.append(module(states, lengths, None, None, scaling=0.5))
    return found


def seeing_steps(first):
    """Two steps, of which the second sees what the first did; ``first(uniform)`` is what that sees.

    The packages make it themselves in float32 alone.
    """

    def use(module, states, *queries, out_prev=()):
        module.reset()
        uniform = lengths_mask((6, 4), 6).to(states.dtype) / torch.tensor([[6], [4]])
        previous, found = None if states.dtype is torch.float32 else first(uniform), []
        for query in queries:
            context, previous = module(states, [6, 4], query, previous, *out_prev)
            found += [context, *previous] if isinstance(previous, list) else [context, previous]
        return found

    return use


def with_agent(module, states, first, second, out_prev):
    return seeing_steps(lambda _: None)(module, states, first, second, out_prev=(out_prev,))


def speech_steps(module, states, first, second):
    module.reset()
    lengths = torch.tensor([6.0, 3.5], dtype=states.dtype)
    found = [module(states, lengths, first)]
    found.append(module(states, lengths, second + found[0][0].sum()))
    return [*found, module(2 * states, lengths, second), module.mask]


def tacotron_steps(module, states, memory):
    """A loop of two, of which the second sees the weights of the first."""
    processed, padding = module.memory_layer(memory), ~lengths_mask((6, 4), 6)
    weights = total = memory.new_zeros(2, 6)
    found = []
    for state in states:
        previous = torch.stack([weights, total], 1)
        context, weights = module(state, memory, processed, previous, padding)
        total = total + weights
        found += [context, weights]
    return found


def fewer_and_fewer(module, features, state):
    """A decoder whose captions end, of features that something else has made."""
    features, found = 2 * features, []
    for images in (3, 3, 2, 1):
        context, weights = module(features[:images], state[:images] + sum(t.sum() for t in found))
        found += [context, weights]
    return found


def coqui(**options):
    known = {"location_attention": True, "windowing": False, "norm": "softmax", "forward_attn": False}
    options = known | {"trans_agent": False, "forward_attn_mask": False} | options
    sizes = {"attention_location_n_filters": 2, "attention_location_kernel_size": 3}
    return lambda c: c.OriginalAttention(4, 3, 5, **sizes, **options)


def coqui_steps(module, states, memory):
    """Two, and what they keep; the package makes its first weights in float32."""
    module.init_states(memory)
    for name in ("attention_weights", "attention_weights_cum", "alpha", "u"):
        if hasattr(module, name):
            setattr(module, name, getattr(module, name).to(memory.dtype))
    processed, found = module.preprocess_inputs(memory), []
    for state in states:
        found += [module(state, memory, processed, lengths_mask((6, 4), 6)), module.attention_weights]
    return found, getattr(module, "attention_weights_cum", None), getattr(module, "u", None), module.win_idx


CASES = {
    "diffusers.AdaLayerNorm": {
        "chunk1": Case(
            lambda c: c.AdaLayerNorm(8, output_dim=12, chunk_dim=1),
            ((2, 5, 6), (2, 8)),
            lambda m, x, temb: m(x, temb=temb),
        ),
        "chunk0-affine": Case(
            lambda c: c.AdaLayerNorm(6, num_embeddings=3, norm_elementwise_affine=True),
            ((2, 5, 6),),
            lambda m, x: m(x, torch.tensor(2)),
        ),
    },
    "diffusers.AdaLayerNormZero": {"emb": Case(lambda c: c.AdaLayerNormZero(6), ((2, 5, 6), (2, 6)), with_emb)},
    "diffusers.SD35AdaLayerNormZeroX": {
        "emb": Case(lambda c: c.SD35AdaLayerNormZeroX(6), ((2, 5, 6), (2, 6)), with_emb),
    },
    "diffusers.AdaLayerNormZeroSingle": {
        "no-bias": Case(lambda c: c.AdaLayerNormZeroSingle(6, bias=False), ((2, 5, 6), (2, 6)), with_emb)
    },
    "diffusers.AdaLayerNormContinuous": {
        "layer": Case(lambda c: c.AdaLayerNormContinuous(6, 4), ((2, 5, 6), (2, 4))),
        "rms": Case(lambda c: c.AdaLayerNormContinuous(6, 4, norm_type="rms_norm"), ((2, 5, 6), (2, 4))),
    },
    "diffusers.AdaGroupNorm": {
        "silu": Case(lambda c: c.AdaGroupNorm(5, 6, 2, act_fn="silu"), ((2, 6, 3, 4), (2, 5))),
    },
    "abmil.Attention": {"bag": Case(lambda c: c.Attention(), ((1, 3, 1, 28, 28),), std=0.05)},
    "abmil.GatedAttention": {"bag": Case(lambda c: c.GatedAttention(), ((1, 3, 1, 28, 28),), std=0.05)},
    "allennlp.AdditiveAttention": {
        "masked": Case(
            lambda c: c.AdditiveAttention(4, 3),
            ((2, 4), (2, 6, 3)),
            lambda m, vector, matrix: m(vector, matrix, lengths_mask((5, 0), 6)),
        ),
        "scores": Case(lambda c: c.AdditiveAttention(4, 3, normalize=False), ((2, 4), (2, 6, 3))),
    },
    "attention_learn_to_route.Attention": {
        "clipped": Case(lambda c: c.Attention(4, use_tanh=True, C=3), ((2, 4), (5, 2, 4)), hide_first),
        "plain": Case(lambda c: c.Attention(4), ((2, 4), (5, 2, 4))),
    },
    "biggan.ccbn": {
        "linear": Case(lambda c: c.ccbn(4, 5, torch.nn.Linear), ((2, 4, 3, 5), (2, 5))),
        "classes": Case(lambda c: c.ccbn(4, 3, torch.nn.Embedding), ((2, 4, 3, 5),), with_class),
    },
    "bentrevett.Attention": {"plain": Case(lambda c: c.Attention(3, 4), ((2, 4), (5, 2, 6)))},
    "bentrevett.legacy.Attention": {
        "masked": Case(
            lambda c: c.Legacy.Attention(3, 4),
            ((3, 4), (5, 3, 6)),
            lambda m, hidden, outputs: m(hidden, outputs, lengths_mask((5, 2, 0), 5)),
        )
    },
    "captioning.Attention": {
        "step": Case(lambda c: c.Attention(3, 4, 5), ((2, 6, 3), (2, 4))),
        "steps": Case(lambda c: c.Attention(3, 4, 5), ((3, 6, 3), (3, 4)), fewer_and_fewer),
    },
    "coqui.OriginalAttention": {
        "location": Case(coqui(), ((2, 2, 4), (2, 6, 3)), coqui_steps),
        "sigmoid-forward-agent": Case(
            coqui(norm="sigmoid", forward_attn=True, trans_agent=True, forward_attn_mask=True),
            ((2, 2, 4), (2, 6, 3)),
            coqui_steps,
        ),
        "content-windows": Case(
            coqui(location_attention=False, windowing=True), ((2, 2, 4), (2, 6, 3)), coqui_steps
        ),
    },
    "clam.Attn_Net": {"heads": Case(lambda c: c.Attn_Net(3, 4, True, 2), ((6, 3),))},
    "clam.Attn_Net_Gated": {
        "heads": Case(lambda c: c.Attn_Net_Gated(3, 4, False, 2), ((6, 3),)),
        "dropout": Case(lambda c: c.Attn_Net_Gated(3, 4, True), ((6, 3),)),
    },
    "d2l.AdditiveAttention": {
        "lengths": Case(
            lambda c: c.AdditiveAttention(5, 0.5),
            ((2, 3, 4), (2, 6, 3), (2, 6, 2)),
            lambda m, *inputs: (m(*inputs, torch.tensor([0, 4])), m.attention_weights),
        ),
        "lengths-of-queries": Case(
            lambda c: c.AdditiveAttention(5, 0.0),
            ((2, 3, 4), (2, 6, 3), (2, 6, 2)),
            lambda m, *inputs: m(*inputs, torch.tensor([[1, 2, 3], [6, 0, 5]])),
        ),
        "all": Case(
            lambda c: c.AdditiveAttention(5, 0.0),
            ((2, 3, 4), (2, 6, 3), (2, 6, 2)),
            lambda m, *inputs: m(*inputs, None),
        ),
    },
    "diffusers.BasicTransformerBlock": {
        "zero": Case(
            lambda c: c.BasicTransformerBlock(6, 1, 6, num_embeds_ada_norm=5, norm_type="ada_norm_zero"),
            ((2, 5, 6),),
            lambda m, x: m(x, timestep=torch.tensor([3, 1]), class_labels=torch.tensor([0, 4])),
            std=0.3,
        ),
        "zero-cross": Case(
            lambda c: c.BasicTransformerBlock(
                6, 1, 6, cross_attention_dim=4, num_embeds_ada_norm=5, norm_type="ada_norm_zero"
            ),
            ((2, 5, 6), (2, 3, 4)),
            lambda m, x, context: m(
                x, None, context, timestep=torch.tensor([3, 1]), class_labels=torch.tensor([0, 4])
            ),
            std=0.3,
        ),
        "single": Case(
            lambda c: c.BasicTransformerBlock(6, 1, 6, cross_attention_dim=4, norm_type="ada_norm_single"),
            ((2, 5, 6), (2, 3, 4), (2, 36)),
            lambda m, x, context, timestep: m(x, None, context, timestep=timestep),
            std=0.3,
        ),
        "single-self": Case(
            lambda c: c.BasicTransformerBlock(6, 1, 6, norm_type="ada_norm_single"),
            ((2, 5, 6), (2, 36)),
            lambda m, x, timestep: m(x, timestep=timestep),
            std=0.3,
        ),
    },
    "diffusers.FluxSingleTransformerBlock": {
        "plain": Case(lambda c: c.FluxSingleTransformerBlock(6, 1, 6), ((2, 5, 6), (2, 3, 6), (2, 6))),
    },
    "diffusers.FluxTransformerBlock": {
        "plain": Case(lambda c: c.FluxTransformerBlock(6, 1, 6), ((2, 5, 6), (2, 3, 6), (2, 6))),
    },
    "diffusers.JointTransformerBlock": {
        "both": Case(lambda c: c.JointTransformerBlock(6, 1, 6), ((2, 5, 6), (2, 3, 6), (2, 6))),
        "dual-last": Case(
            lambda c: c.JointTransformerBlock(6, 1, 6, context_pre_only=True, use_dual_attention=True),
            ((2, 5, 6), (2, 3, 6), (2, 6)),
        ),
    },
    "diffusers.ResnetBlock2D": {
        "scale-shift": Case(
            lambda c: c.ResnetBlock2D(
                in_channels=4, out_channels=6, temb_channels=5, groups=2, time_embedding_norm="scale_shift"
            ),
            ((2, 4, 4, 6), (2, 5)),
        ),
        "up": Case(
            lambda c: c.ResnetBlock2D(in_channels=4, out_channels=4, temb_channels=5, groups=2, up=True),
            ((2, 4, 2, 3), (2, 5)),
        ),
        "no-time": Case(
            lambda c: c.ResnetBlock2D(in_channels=4, out_channels=4, temb_channels=None, groups=2),
            ((2, 4, 4, 6),),
            lambda m, x: m(x, None),
        ),
    },
    "dit.DiTBlock": {"dropout": Case(lambda c: c.DiTBlock(6, dropout=0.5), ((2, 5, 6), (2, 6)))},
    "dit.SiTBlock": {"plain": Case(lambda c: c.SiTBlock(6), ((2, 5, 6), (2, 6)))},
    "dit.FinalLayer": {"plain": Case(lambda c: c.FinalLayer(6, 4), ((2, 5, 6), (2, 6)))},
    "espnet.AttAdd": {
        "steps": Case(lambda c: c.AttAdd(3, 4, 5), ((2, 6, 3), (2, 4), (2, 4)), steps),
        "han": Case(lambda c: c.AttAdd(3, 4, 5, han_mode=True), ((2, 6, 3), (2, 4), (2, 4)), steps),
    },
    "espnet.AttLoc": {
        "steps": Case(lambda c: c.AttLoc(3, 4, 5, 2, 1), ((2, 6, 3), (2, 4), (2, 4)), steps),
    },
    "espnet.AttLoc2D": {
        "steps": Case(
            lambda c: c.AttLoc2D(3, 4, 5, 3, 2, 1),
            ((2, 6, 3), (2, 4), (2, 4)),
            seeing_steps(lambda uniform: uniform[:, None].repeat(1, 3, 1)),
        ),
    },
    "espnet.AttCov": {
        "steps": Case(lambda c: c.AttCov(3, 4, 5), ((2, 6, 3), (2, 4), (2, 4)), seeing_steps(lambda u: [u])),
    },
    "espnet.AttCovLoc": {
        "steps": Case(
            lambda c: c.AttCovLoc(3, 4, 5, 2, 1), ((2, 6, 3), (2, 4), (2, 4)), seeing_steps(lambda u: [u])
        ),
    },
    "espnet.AttForward": {
        "steps": Case(lambda c: c.AttForward(3, 4, 5, 2, 1), ((2, 6, 3), (2, 4), (2, 4)), steps),
    },
    "espnet.AttForwardTA": {
        "steps": Case(lambda c: c.AttForwardTA(3, 4, 5, 2, 1, 2), ((2, 6, 3), (2, 4), (2, 4), (2, 2)), with_agent),
    },
    "espnet.AttMultiHeadAdd": {
        "steps": Case(lambda c: c.AttMultiHeadAdd(3, 4, 2, 5, 6), ((2, 6, 3), (2, 4), (2, 4)), steps),
    },
    "espnet.AttMultiHeadLoc": {
        "steps": Case(
            lambda c: c.AttMultiHeadLoc(3, 4, 2, 5, 6, 2, 1),
            ((2, 6, 3), (2, 4), (2, 4)),
            seeing_steps(lambda u: [u, u]),
        ),
    },
    "fairseq.MLPAttention": {
        "padding": Case(
            lambda c: c.MLPAttention(4, 3, 5),
            ((2, 4), (6, 2, 3)),
            lambda m, state, source: m(state, source, ~lengths_mask((6, 4), 6).t()),
        ),
        "all": Case(
            lambda c: c.MLPAttention(4, 3, 5), ((2, 4), (6, 2, 3)), lambda m, state, source: m(state, source, None)
        ),
    },
    "film.FiLM": {"plain": Case(lambda c: c.FiLM(), ((2, 3, 4, 5), (2, 3), (2, 3)))},
    "film.FiLMedResBlock": {
        "coordinates": Case(
            lambda c: c.FiLMedResBlock(4, extra=2, freq=2, proj=1, affine=True),
            ((3, 4, 3, 5), (3, 4), (3, 4), (3, 2, 3, 5)),
        ),
        "cond-maps": Case(
            lambda c: c.FiLMedResBlock(4, cond_maps=2),
            ((3, 4, 3, 5), (3, 4), (3, 4), (3, 2, 3, 5)),
            lambda m, x, gammas, betas, maps: m(x, gammas, betas, cond_maps=maps),
        ),
    },
    "diffusion_policy.ConditionalResidualBlock1D": {
        "scale": Case(
            lambda c: c.ConditionalResidualBlock1D(3, 4, 5, n_groups=2, cond_predict_scale=True),
            ((2, 3, 6), (2, 5)),
        ),
    },
    "guided_diffusion.ResBlock": {
        "scale-shift": Case(
            lambda c: c.ResBlock(4, 5, 0.5, 6, use_scale_shift_norm=True, up=True), ((2, 4, 2, 3), (2, 5))
        ),
        "added": Case(lambda c: c.ResBlock(4, 5, 0.0, 4, dims=1), ((2, 4, 6), (2, 5))),
    },
    "lerobot.DiffusionConditionalResidualBlock1d": {
        "scale": Case(
            lambda c: c.DiffusionConditionalResidualBlock1d(4, 4, 5, n_groups=2, use_film_scale_modulation=True),
            ((2, 4, 6), (2, 5)),
        ),
    },
    "multiple_style_transfer.batch_InstanceNorm2d": {
        "list": Case(lambda c: c.batch_InstanceNorm2d(3, 4), ((3, 4, 3, 5),), lambda m, x: m(x, [2, 0])),
    },
    "multiple_style_transfer.ConditionInstanceNorm2d": {
        "plain": Case(lambda c: c.ConditionInstanceNorm2d(4, 3), ((2, 4, 3, 5),), with_class),
    },
    "multiple_style_transfer.ConditionalInstanceNorm2d": {
        "plain": Case(lambda c: c.ConditionalInstanceNorm2d(4, 3), ((2, 4, 3, 5),), with_class),
    },
    "torch_geometric.FiLMConv": {
        "relations": Case(lambda c: c.FiLMConv((3, 4), 5, num_relations=2), ((4, 3), (3, 4)), with_edges),
        "linear": Case(lambda c: c.FiLMConv((3, 4), 5, act=None), ((4, 3), (3, 4)), with_edges),
    },
    "keras.AdditiveAttention": {
        "masks": Case(
            lambda c: c.AdditiveAttention(4, dropout=0.5),
            ((2, 3, 4), (2, 5, 4)),
            lambda m, *inputs: m(list(inputs), [lengths_mask((2, 3), 3), lengths_mask((5, 0), 5)], True),
        ),
        "no-scale": Case(
            lambda c: c.AdditiveAttention(4, use_scale=False),
            ((2, 3, 4), (2, 5, 6), (2, 5, 4)),
            lambda m, *inputs: m(list(inputs)),
        ),
    },
    "ncsn.ConditionalInstanceNorm2d": {
        "plain": Case(lambda c: c.ConditionalInstanceNorm2d(4, 3), ((2, 4, 3, 5),), with_class),
        "no-bias": Case(lambda c: c.ConditionalInstanceNorm2d(4, 3, bias=False), ((2, 4, 3, 5),), with_class),
    },
    "ncsn.ConditionalBatchNorm2d": {
        "plain": Case(lambda c: c.ConditionalBatchNorm2d(4, 3), ((2, 4, 3, 5),), with_class),
    },
    "stargan_v2.AdaIN": {"plain": Case(lambda c: c.AdaIN(3, 4), ((2, 4, 3, 5), (2, 3)))},
    "stargan_v2.AdaIN1d": {"affine": Case(lambda c: c.AdaIN1d(3, 4, affine=True), ((2, 4, 7), (2, 3)))},
    "news_recommendation.AdditiveAttention": {"plain": Case(lambda c: c.AdditiveAttention(5, 3), ((2, 6, 3),))},
    "opennmt.GlobalAttention": {
        "lengths": Case(
            lambda c: c.GlobalAttention(4),
            ((2, 3, 4), (2, 6, 4)),
            lambda m, source, memory: m(source, memory, torch.tensor([6, 2])),
        ),
        "step": Case(lambda c: c.GlobalAttention(4), ((2, 4), (2, 6, 4))),
    },
    "pixelcnn.GatedActivation": {"plain": Case(lambda c: c.GatedActivation(), ((2, 6, 3, 5),))},
    "pytorch_tutorial.BahdanauAttention": {
        "step": Case(lambda c: c.BahdanauAttention(4), ((2, 1, 4), (2, 6, 4))),
        "place-by-place": Case(lambda c: c.BahdanauAttention(4), ((2, 6, 4), (2, 6, 4))),
    },
    "speechbrain.ContentBasedAttention": {
        "steps": Case(
            lambda c: c.ContentBasedAttention(3, 4, 5, 2, scaling=1.5), ((2, 6, 3), (2, 4), (2, 4)), speech_steps
        ),
    },
    "speechbrain.LocationAwareAttention": {
        "steps": Case(
            lambda c: c.LocationAwareAttention(3, 4, 5, 2, 2, 1, scaling=1.5),
            ((2, 6, 3), (2, 4), (2, 4)),
            speech_steps,
            std=0.5,
        ),
    },
    "tacotron2.Attention": {
        "steps": Case(lambda c: c.Attention(3, 4, 5, 2, 3), ((2, 2, 3), (2, 6, 4)), tacotron_steps),
        "unmasked": Case(
            lambda c: c.Attention(3, 4, 5, 4, 3),
            ((2, 3), (2, 6, 4), (2, 6, 5), (2, 2, 6)),
            lambda m, *inputs: m(*inputs, None),
        ),
    },
    "torchmil.AttentionPool": {
        "gated-mask": Case(
            lambda c: c.AttentionPool(3, 4, gated=True),
            ((2, 6, 3),),
            lambda m, X: m(X, lengths_mask((6, 2), 6), True),
        ),
        "plain": Case(lambda c: c.AttentionPool(3, 4), ((2, 6, 3),), lambda m, X: m(X, return_att=True)),
    },
    "gnmt.BahdanauAttention": {
        "time-first": Case(lambda c: c.BahdanauAttention(4, 3, 5), ((6, 3, 4), (7, 3, 3)), with_mask(7, 2, 0)),
        "normalized-step": Case(
            lambda c: c.BahdanauAttention(4, 3, 5, normalize=True, batch_first=True),
            ((2, 4), (2, 7, 3)),
            with_mask(5, 7),
        ),
        "unmasked": Case(lambda c: c.BahdanauAttention(4, 3, 5, batch_first=True), ((2, 5, 4), (2, 7, 3))),
    },
}


def sources():
    """Where the original is, which case of which adapter, and in which dtype: half precision once for each."""
    for name, cases in CASES.items():
        package = name.partition(".")[0]
        for case in cases:
            yield pytest.param(f"originals.{package}", name, case, torch.float32, id=f"{name}-{case}")
            if where := PACKAGES.get(name, PACKAGES.get(package)):
                yield pytest.param(where, name, case, torch.float32, id=f"{name}-{case}-package")
        yield pytest.param(f"originals.{package}", name, next(iter(cases)), torch.bfloat16, id=f"{name}-bfloat16")


def original(source, name, case):
    """A module, in training, whose parameters are none of the special values that it may start with."""
    if source.startswith("originals."):
        classes = importlib.import_module(source)
    else:
        classes = pytest.importorskip(source, reason=f"{source} cannot be imported (CONTRIBUTING.md)")
    torch.manual_seed(0)
    module = CASES[name][case].make(classes)
    with torch.no_grad():
        for t in module.parameters():
            t.normal_(std=CASES[name][case].std)
    return module


def flat(answers):
    return [t for t in _pytree.tree_leaves(answers) if isinstance(t, torch.Tensor)]


def run(module, case, dtype, is_training):
    """Answers, buffers, and the gradients of inputs and parameters, each by a name."""
    module.train(is_training)
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in case.shapes]
    torch.manual_seed(2)  # of dropout
    answers = flat(case.use(module, *inputs))
    wanted = {f"input {n}": t for n, t in enumerate(inputs)} | dict(module.named_parameters())
    made = [t for t in answers if t.requires_grad]
    grads = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in made]
    found = torch.autograd.grad(made, list(wanted.values()), grads, allow_unused=True)
    named = dict(zip(wanted, found, strict=True))
    answers += [t for t in module.buffers() if t.is_floating_point()]
    return {f"answer {n}": t.detach() for n, t in enumerate(answers)} | {
        f"gradient of {n}": t for n, t in named.items()
    }


def is_fused(module):
    return any(hasattr(type(m), "_fusedattn_adapter") for m in module.modules())


@pytest.mark.parametrize("source, name, case, dtype", list(sources()))
def test_answers_and_gradients_are_those_of_the_original(source, name, case, dtype):
    module = original(source, name, case).to(dtype)
    fused, exact, case = copy.deepcopy(module), copy.deepcopy(module).double(), CASES[name][case]
    report = dropin.replace(fused, only=name, strict=True)
    assert report.replaced[0].adapter.name == name
    assert fused.state_dict().keys() == module.state_dict().keys() and fused.load_state_dict(module.state_dict())
    for is_training in (True, False):
        eager, wide = run(module, case, dtype, is_training), run(exact, case, torch.float64, is_training)
        found = run(fused, case, dtype, is_training)
        assert found.keys() == eager.keys()
        # Of the terms of sums, and in half precision what lies between two products is rounded, too.
        size = max(t.abs().max().item() for t in wide.values() if t is not None)
        rounded = torch.finfo(dtype).eps if dtype is torch.bfloat16 else 0.0
        for what, t in found.items():
            assert (t is None) == (eager[what] is None), what
            if t is not None:
                assert_close_to_reference(
                    t, eager[what], wide[what], terms=64, scale=size, factor_eps=rounded, name=what
                )
    dropin.restore(fused)
    assert not is_fused(fused) and type(fused) is type(module) and fused.__dict__.keys() == module.__dict__.keys()


def formula(name):
    """Of the first case."""
    return original(f"originals.{name.partition('.')[0]}", name, next(iter(CASES[name])))


class Louder(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_child_that_is_exchanged_afterwards_is_called():
    """As adapters of low rank and quantisation do."""
    name, case = "fairseq.MLPAttention", CASES["fairseq.MLPAttention"]["all"]
    module = formula(name)
    fused = copy.deepcopy(module)
    dropin.replace(fused, strict=True)
    for made in (module, fused):
        made.to_scores = Louder(*reversed(made.to_scores.weight.shape), bias=False)
        torch.nn.init.ones_(made.to_scores.weight)
    found, expected = (run(made, case, torch.float32, is_training=True) for made in (fused, module))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", CASES)
def test_under_autocast_answers_have_the_dtypes_of_the_original(name):
    module, case = formula(name).eval(), next(iter(CASES[name].values()))
    fused = copy.deepcopy(module)
    dropin.replace(fused, only=name, strict=True)
    inputs = [torch.randn(s) for s in case.shapes]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for expected, found in zip(flat(case.use(module, *inputs)), flat(case.use(fused, *inputs)), strict=True):
            torch.testing.assert_close(
                found, expected, rtol=0.05, atol=0.05 * max(1.0, expected.abs().max().item())
            )


@pytest.mark.parametrize(
    "name", ["espnet.AttAdd", "espnet.AttLoc", "espnet.AttMultiHeadLoc", "tacotron2.Attention"]
)
def test_steps_leave_the_gradients_of_keys_to_one_node_and_copies_are_without_them(name):
    module, case = formula(name), CASES[name]["steps"]
    dropin.replace(module, only=name, strict=True)
    nodes = [t.grad_fn for t in flat(case.use(module, *(torch.randn(s, requires_grad=True) for s in case.shapes)))]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [before for before, _ in node.next_functions]
    steps = [node for node in seen if "attention_fwd_step" in node.name()]
    assert len(steps) >= 2 and len({node.next_functions[-1][0] for node in steps}) < len(steps)
    (adapter,) = [entry.adapter for entry in dropin.replace(module).replaced]
    assert adapter.state[0] in module.__dict__
    assert adapter.state[0] not in pickle.loads(pickle.dumps(module)).__dict__


def test_features_are_projected_once_for_the_steps_of_a_loop_and_anew_where_something_changed(monkeypatch):
    module, linear, called = formula("captioning.Attention"), torch.nn.functional.linear, []
    dropin.replace(module, strict=True)
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, *layer: called.append(x) or linear(x, *layer))
    features, state = torch.randn(2, 6, 3), torch.randn(2, 4)

    def projections(*memories):
        called.clear()
        loss = sum(module(memory, state[: len(memory)])[0].sum() for memory in memories)
        return loss, sum(x.dim() == 3 for x in called)

    loss, count = projections(features[:2], features, features[:1])
    assert count == 1
    loss.backward()  # with the graph of the projection goes what was kept
    loss, count = projections(features, features[:1])
    assert count == 1
    loss.backward()
    assert projections(features, features[1:], features[:, :3])[1] == 3
    assert projections(features)[1] == 1 and projections(features)[1] == 0
    for t in (features, module.encoder_att.weight):
        with torch.no_grad():
            t += 1
        assert projections(features)[1] == 1
    with torch.no_grad():
        assert projections(features)[1] == 1 and projections(features[:1])[1] == 0
    module.encoder_att.register_forward_hook(lambda *_: None)
    assert projections(features, features)[1] == 2


@pytest.mark.parametrize("name", ["dit.DiTBlock", "espnet.AttAdd"])
def test_a_replaced_module_compiles_in_one_graph(name):
    module, case = formula(name).eval(), next(iter(CASES[name].values()))
    dropin.replace(module, only=name, strict=True)
    inputs = [torch.randn(s) for s in case.shapes]
    expected = flat(case.use(module, *inputs))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for found, answer in zip(flat(case.use(compiled, *inputs)), expected, strict=True):
        torch.testing.assert_close(found, answer)


@pytest.mark.parametrize("name", CASES)
def test_hooks_of_children_are_called_as_often_as_by_the_original(name):
    """Of those that the fused module calls, and, because the original runs then, of those that it does not."""
    module, case = formula(name), next(iter(CASES[name].values()))
    adapter = dropin.replace(module, strict=True).replaced[0].adapter
    children = dict(module.named_modules())
    bypassed = {child for child in children if child.partition(".")[0] in adapter.inside}
    for watched in (children.keys() - {""} - bypassed, children.keys() - {""}):
        called = collections.Counter()

        def count(child, *_, called=called):
            called[id(child)] += 1

        handles = [children[child].register_forward_hook(count) for child in watched]
        run(module, case, torch.float32, is_training=False)
        by_the_fused = called.copy()
        dropin.restore(module)
        run(module, case, torch.float32, is_training=False)
        assert called == by_the_fused + by_the_fused
        if watched & bypassed:
            assert "has hooks" in dropin.replace(module, only=name).not_replaced[0].reason
        for handle in handles:
            handle.remove()
        dropin.replace(module, only=name, strict=True)


def test_the_layer_of_keras_keeps_its_masks_dropout_and_scores(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras", reason="keras cannot be imported (CONTRIBUTING.md)")
    if keras.backend.backend() != "torch":
        pytest.skip(f"keras has the {keras.backend.backend()} backend")
    for use_scale in (True, False):
        layer = keras.layers.AdditiveAttention(use_scale=use_scale, dropout=0.0)
        inputs = [torch.randn(2, n, 4).requires_grad_() for n in (3, 5, 5)]
        layer.build([tuple(t.shape) for t in inputs])
        masks = [lengths_mask((2, 3), 3), lengths_mask((5, 0), 5)]

        def answers(layer=layer, inputs=inputs, masks=masks):
            found = layer(inputs, mask=masks, return_attention_scores=True, use_causal_mask=True)
            wanted = [*inputs, *layer.parameters()]
            return *found, *torch.autograd.grad([t.sin().sum() for t in found], wanted)

        expected = answers()
        dropin.replace(layer, strict=True)
        torch.testing.assert_close(answers(), expected)
        dropin.restore(layer)
        assert type(layer) is keras.layers.AdditiveAttention


def test_the_report_has_limits_beside_the_smallest_size():
    report = str(dropin.replace(formula("captioning.Attention")))
    assert "do not see edits of encoder_att through .data in between; below 65,536 elements" in report


def test_what_is_known_and_no_faster_is_left_and_the_report_says_why():
    module = importlib.import_module("originals.han").WordAttention(9, 3, 2, 1, 5, 0.5)
    (left,) = dropin.replace(module).not_replaced
    assert left.adapter.name == "han.WordAttention" and "recurrent networks take nearly all" in left.reason


def test_every_adapter_is_tested():
    left = {"han.WordAttention", "han.SentenceAttention"}
    assert CASES.keys() | left == {adapter.name for adapter in dropin.supported()}
