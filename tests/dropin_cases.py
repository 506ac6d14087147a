"""How people use the modules that fusedattn.dropin knows: cases of each adapter, for test_dropin_adapters.py."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


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
