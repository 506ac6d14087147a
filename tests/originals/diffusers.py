"""huggingface/diffusers, src/diffusers/models/normalization.py: its adaptive norms as formulas."""

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


class AdaLayerNormZero(_Zero):
    emb = None

    def forward(self, x, timestep=None, class_labels=None, hidden_dtype=None, emb=None):
        return self.modulated(x, emb)


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
