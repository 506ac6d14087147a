"""facebookresearch/DiT, models.py: its blocks as formulas, with plain attention and MLP inside."""

import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        return self.proj(F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1)))


def modulated(x, shift, scale):
    return (1 + scale)[:, None] * x + shift[:, None]


def modulation(dim, parts):
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, parts * dim))


def norm(dim):
    return nn.LayerNorm(dim, 1e-6, elementwise_affine=False)


class DiTBlock(nn.Module):
    def __init__(self, dim, dropout=0.0):
        super().__init__()
        self.norm1, self.attn, self.norm2 = norm(dim), Attention(dim), norm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(approximate="tanh"), nn.Linear(2 * dim, dim))
        self.mlp.append(nn.Dropout(dropout))
        self.adaLN_modulation = modulation(dim, 6)

    def forward(self, x, c):
        a_shift, a_scale, a_gate, m_shift, m_scale, m_gate = self.adaLN_modulation(c).chunk(6, 1)
        x = x + a_gate[:, None] * self.attn(modulated(self.norm1(x), a_shift, a_scale))
        return x + m_gate[:, None] * self.mlp(modulated(self.norm2(x), m_shift, m_scale))


class SiTBlock(DiTBlock):
    """willisma/SiT, models.py."""


class FinalLayer(nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        self.norm_final, self.linear, self.adaLN_modulation = norm(dim), nn.Linear(dim, out), modulation(dim, 2)

    def forward(self, x, c):
        return self.linear(modulated(self.norm_final(x), *self.adaLN_modulation(c).chunk(2, 1)))
