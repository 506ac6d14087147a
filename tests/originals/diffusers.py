"""huggingface/diffusers, src/diffusers/models/: adaptive norms, ResNet and transformer blocks as formulas."""

import torch
import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.eps, self.bias = eps, None
        self.weight = nn.Parameter(torch.randn(dim))

    def forward(self, x):
        normed = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        is_half = self.weight.dtype in (torch.float16, torch.bfloat16)
        return (normed.to(self.weight.dtype) if is_half else normed) * self.weight


class AdaLayerNorm(nn.Module):
    def __init__(
        self, embedding_dim, num_embeddings=None, output_dim=None, norm_elementwise_affine=False, chunk_dim=0
    ):
        super().__init__()
        width = output_dim or 2 * embedding_dim
        self.chunk_dim = chunk_dim
        self.emb = None if num_embeddings is None else nn.Embedding(num_embeddings, embedding_dim)
        self.silu, self.linear = nn.SiLU(), nn.Linear(embedding_dim, width)
        self.norm = nn.LayerNorm(width // 2, 1e-5, norm_elementwise_affine)

    def forward(self, x, timestep=None, temb=None):
        made = self.linear(self.silu(temb if self.emb is None else self.emb(timestep)))
        if self.chunk_dim == 1:
            shift, scale = made[:, None].chunk(2, -1)
        else:
            scale, shift = made.chunk(2)
        return self.norm(x) * (1 + scale) + shift


class _Zero(nn.Module):
    parts = 6

    def __init__(self, embedding_dim, bias=True):
        super().__init__()
        self.silu, self.linear = nn.SiLU(), nn.Linear(embedding_dim, self.parts * embedding_dim, bias=bias)
        self.norm = nn.LayerNorm(embedding_dim, 1e-6, elementwise_affine=False)

    def modulated(self, x, emb):
        shift, scale, *gates = self.linear(self.silu(emb)).chunk(self.parts, 1)
        return self.norm(x) * (1 + scale[:, None]) + shift[:, None], *gates


class LabelledTimesteps(nn.Module):
    def __init__(self, num_embeddings, embedding_dim):
        super().__init__()
        self.class_embedder = nn.Embedding(num_embeddings, embedding_dim)

    def forward(self, timestep, class_labels, hidden_dtype=None):
        return self.class_embedder(class_labels) + timestep[:, None].to(hidden_dtype).sin()


class AdaLayerNormZero(_Zero):
    def __init__(self, embedding_dim, num_embeddings=None):
        super().__init__(embedding_dim)
        self.emb = None if num_embeddings is None else LabelledTimesteps(num_embeddings, embedding_dim)

    def forward(self, x, timestep=None, class_labels=None, hidden_dtype=None, emb=None):
        if self.emb is not None:
            emb = self.emb(timestep, class_labels, hidden_dtype)
        return self.modulated(x, emb)


class SD35AdaLayerNormZeroX(_Zero):
    parts = 9

    def forward(self, hidden_states, emb=None):
        first, *gates, shift, scale, gate = self.modulated(hidden_states, emb)
        return first, *gates, self.norm(hidden_states) * (1 + scale[:, None]) + shift[:, None], gate


class AdaLayerNormZeroSingle(_Zero):
    parts = 3

    def forward(self, x, emb=None):
        return self.modulated(x, emb)


class AdaLayerNormContinuous(nn.Module):
    def __init__(self, embedding_dim, conditioning_embedding_dim, norm_type="layer_norm"):
        super().__init__()
        self.silu, self.linear = nn.SiLU(), nn.Linear(conditioning_embedding_dim, 2 * embedding_dim)
        self.norm = nn.LayerNorm(embedding_dim) if norm_type == "layer_norm" else RMSNorm(embedding_dim, 1e-5)

    def forward(self, x, conditioning_embedding):
        scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype))[:, None].chunk(2, -1)
        return self.norm(x) * (1 + scale) + shift


class AdaGroupNorm(nn.Module):
    def __init__(self, embedding_dim, out_dim, num_groups, act_fn=None):
        super().__init__()
        self.num_groups, self.eps = num_groups, 1e-5
        self.act = None if act_fn is None else nn.SiLU()
        self.linear = nn.Linear(embedding_dim, 2 * out_dim)

    def forward(self, x, emb):
        made = self.linear(emb if self.act is None else self.act(emb))
        scale, shift = made[:, :, None, None].chunk(2, 1)
        return F.group_norm(x, self.num_groups, eps=self.eps) * (1 + scale) + shift


class ResnetBlock2D(nn.Module):
    def __init__(
        self, *, in_channels, out_channels, temb_channels, groups, time_embedding_norm="default", up=False
    ):
        super().__init__()
        self.time_embedding_norm, self.skip_time_act, self.output_scale_factor = time_embedding_norm, False, 1.0
        self.norm1, self.norm2 = nn.GroupNorm(groups, in_channels, 1e-6), nn.GroupNorm(groups, out_channels, 1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        width = out_channels * (1 + (time_embedding_norm == "scale_shift"))
        self.time_emb_proj = None if temb_channels is None else nn.Linear(temb_channels, width)
        self.dropout, self.nonlinearity, self.downsample = nn.Dropout(0.0), nn.SiLU(), None
        self.upsample = nn.Upsample(scale_factor=2) if up else None
        same = in_channels == out_channels
        self.conv_shortcut = None if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, input_tensor, temb, *args, **kwargs):
        x, h = input_tensor, self.nonlinearity(self.norm1(input_tensor))
        if self.upsample is not None:
            x, h = self.upsample(x), self.upsample(h)
        h = self.conv1(h)
        if temb is not None:
            temb = self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
        if self.time_embedding_norm == "scale_shift":
            scale, shift = temb.chunk(2, 1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h if temb is None else h + temb)
        h = self.conv2(self.dropout(self.nonlinearity(h)))
        return ((x if self.conv_shortcut is None else self.conv_shortcut(x)) + h) / self.output_scale_factor


class Attention(nn.Module):
    """Where ``added``, of two sequences to both of them."""

    def __init__(self, dim, context_dim=None, added=False, heads=1):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (
            nn.Linear(n, dim) for n in (dim, context_dim or dim, context_dim or dim)
        )
        self.added = added

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        x, context = hidden_states, encoder_hidden_states
        if self.added:
            x = context = torch.cat([hidden_states, encoder_hidden_states], 1)
        context = x if context is None else context
        made = (self.to_q(x), self.to_k(context), self.to_v(context))
        heads = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in made)
        y = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return y.split([hidden_states.shape[1], x.shape[1] - hidden_states.shape[1]], 1) if self.added else y


def feed_forward(dim):
    return nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))


def plain_norm(dim, affine=False):
    return nn.LayerNorm(dim, elementwise_affine=affine)


class BasicTransformerBlock(nn.Module):
    def __init__(
        self, dim, heads, head_dim, cross_attention_dim=None, num_embeds_ada_norm=None, norm_type="layer_norm"
    ):
        super().__init__()
        self.norm_type, self.cross_attention_dim, self.only_cross_attention = norm_type, cross_attention_dim, False
        self.pos_embed = self._chunk_size = self.attn2 = self.norm2 = None
        zero = norm_type == "ada_norm_zero"
        self.norm1 = AdaLayerNormZero(dim, num_embeds_ada_norm) if zero else plain_norm(dim, True)
        self.attn1, self.ff = Attention(dim, heads=heads), feed_forward(dim)
        if cross_attention_dim is not None:
            self.attn2 = Attention(dim, cross_attention_dim)
        if cross_attention_dim is not None or not zero:
            self.norm2 = plain_norm(dim, True)
        if zero:
            self.norm3 = plain_norm(dim, True)
        else:
            self.scale_shift_table = nn.Parameter(torch.randn(6, dim))

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        timestep=None,
        cross_attention_kwargs=None,
        class_labels=None,
        added_cond_kwargs=None,
    ):
        x = hidden_states
        if self.norm_type == "ada_norm_zero":
            y, *made = self.norm1(x, timestep, class_labels, hidden_dtype=x.dtype)
            gate, shift, scale, gate_after = (t[:, None] for t in made)
            between, last = self.norm2, self.norm3
        else:
            made = self.scale_shift_table + timestep.unflatten(-1, (6, -1))
            first_shift, first_scale, gate, shift, scale, gate_after = made.chunk(6, 1)
            y = self.norm1(x) * (1 + first_scale) + first_shift
            between, last = nn.Identity(), self.norm2
        x = x + gate * self.attn1(y)
        if self.attn2 is not None:
            x = x + self.attn2(between(x), encoder_hidden_states)
        return x + gate_after * self.ff(last(x) * (1 + scale) + shift)


def after_attention(norm, layer, y, x, gate, shift, scale, gate_after):
    x = x + gate[:, None] * y
    return x + gate_after[:, None] * layer(norm(x) * (1 + scale[:, None]) + shift[:, None])


class FluxTransformerBlock(nn.Module):
    def __init__(self, dim, heads, head_dim):
        super().__init__()
        self.norm1, self.norm1_context = AdaLayerNormZero(dim), AdaLayerNormZero(dim)
        self.attn = Attention(dim, added=True)
        self.norm2, self.ff = plain_norm(dim), feed_forward(dim)
        self.norm2_context, self.ff_context = plain_norm(dim), feed_forward(dim)

    def forward(
        self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None
    ):
        y, *of_x = self.norm1(hidden_states, emb=temb)
        z, *of_context = self.norm1_context(encoder_hidden_states, emb=temb)
        y, z = self.attn(y, z, image_rotary_emb=image_rotary_emb)
        x = after_attention(self.norm2, self.ff, y, hidden_states, *of_x)
        return after_attention(self.norm2_context, self.ff_context, z, encoder_hidden_states, *of_context), x


class FluxSingleTransformerBlock(nn.Module):
    def __init__(self, dim, heads, head_dim):
        super().__init__()
        self.norm, self.attn, self.act_mlp = AdaLayerNormZeroSingle(dim), Attention(dim), nn.GELU()
        self.proj_mlp, self.proj_out = nn.Linear(dim, 4 * dim), nn.Linear(5 * dim, dim)

    def forward(
        self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None
    ):
        x = torch.cat([encoder_hidden_states, hidden_states], 1)
        y, gate = self.norm(x, emb=temb)
        x = x + gate[:, None] * self.proj_out(torch.cat([self.attn(y), self.act_mlp(self.proj_mlp(y))], -1))
        return x.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], 1)


class JointTransformerBlock(nn.Module):
    def __init__(self, dim, heads, head_dim, context_pre_only=False, use_dual_attention=False):
        super().__init__()
        self.context_pre_only, self.use_dual_attention, self._chunk_size = (
            context_pre_only,
            use_dual_attention,
            None,
        )
        self.norm1 = SD35AdaLayerNormZeroX(dim) if use_dual_attention else AdaLayerNormZero(dim)
        self.norm1_context = AdaLayerNormContinuous(dim, dim) if context_pre_only else AdaLayerNormZero(dim)
        self.attn, self.attn2 = Attention(dim, added=True), Attention(dim) if use_dual_attention else None
        self.norm2, self.ff = plain_norm(dim), feed_forward(dim)
        self.norm2_context = None if context_pre_only else plain_norm(dim)
        self.ff_context = None if context_pre_only else feed_forward(dim)

    def forward(self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs=None):
        x, context = hidden_states, encoder_hidden_states
        y, gate, *made = self.norm1(x, emb=temb)
        if self.context_pre_only:
            z = self.norm1_context(context, temb)
        else:
            z, *of_context = self.norm1_context(context, emb=temb)
        y, z = self.attn(y, z)
        if self.use_dual_attention:
            x, again, next_gate = x + gate[:, None] * y, *made[3:]
            y, gate = self.attn2(again), next_gate
        x = after_attention(self.norm2, self.ff, y, x, gate, *made[:3])
        if self.context_pre_only:
            return None, x
        return after_attention(self.norm2_context, self.ff_context, z, context, *of_context), x
