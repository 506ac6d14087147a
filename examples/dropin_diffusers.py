"""A diffusion transformer of diffusers, made fused in one line.

It learns to tell the noise in pictures of two stripes, first as it is, then replaced, from the same weights.
Without diffusers blocks as DiT has them are made here. Printed are the report, the losses, and time and memory of
a step.
"""

import torch
import torch.nn.functional as F
from dropin_training import compare
from torch import nn

try:
    from diffusers import DiTTransformer2DModel
except ImportError:
    DiTTransformer2DModel = None


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class DiTBlock(nn.Module):
    """In a model of your own this is what you have already."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.attn = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        made = self.adaLN_modulation(c).unsqueeze(1).chunk(6, -1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = made
        x = x + gate * self.attn(self.norm1(x) * (1 + scale) + shift)
        return x + mlp_gate * self.mlp(self.norm2(x) * (1 + mlp_scale) + mlp_shift)


class Denoiser(nn.Module):
    """What diffusers' model is, without it: pictures (B, 4, N, N), a step and a class of each."""

    def __init__(self, width, heads, layers, size):
        super().__init__()
        self.patches = nn.Conv2d(4, width, 2, stride=2)
        self.places = nn.Parameter(0.02 * torch.randn((size // 2) ** 2, width))
        self.steps, self.classes = nn.Embedding(1000, width), nn.Embedding(10, width)
        self.blocks = nn.ModuleList([DiTBlock(width, heads) for _ in range(layers)])
        self.output = nn.ConvTranspose2d(width, 4, 2, stride=2)

    def forward(self, noisy, step, kind):
        maps = self.patches(noisy)
        x, condition = maps.flatten(2).transpose(1, 2) + self.places, self.steps(step) + self.classes(kind)
        for block in self.blocks:
            x = block(x, condition)
        return self.output(x.transpose(1, 2).unflatten(2, maps.shape[2:]))


class OfDiffusers(nn.Module):
    def __init__(self, width, heads, layers, size):
        super().__init__()
        self.model = DiTTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=width // heads,
            in_channels=4,
            out_channels=4,
            num_layers=layers,
            sample_size=size,
            num_embeds_ada_norm=1000,
            norm_num_groups=1,
        )

    def forward(self, noisy, step, kind):
        return self.model(noisy, timestep=step, class_labels=kind).sample


def pictures(batch, size, generator):
    """(B, 4, N, N), a stripe across and a stripe down where the class says."""
    kind, x = torch.randint(10, (batch,), generator=generator), torch.zeros(batch, 4, size, size)
    for picture, place in zip(x, kind.tolist(), strict=True):
        picture[:2, place % size] = picture[2:, :, place % size] = 1.0
    return x, kind


def main(width=384, heads=6, layers=2, size=32, batch=4, steps=5):
    torch.manual_seed(0)

    def loss_of(model, generator):
        clean, kind = pictures(batch, size, generator)
        step = torch.randint(1000, (batch,), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        torch.manual_seed(0)  # of classes that diffusers leaves out at random
        share = (step / 1000)[:, None, None, None]
        return F.mse_loss(model((1 - share) * clean + share * noise, step, kind), noise)

    model = (Denoiser if DiTTransformer2DModel is None else OfDiffusers)(width, heads, layers, size)
    compare(model, loss_of, steps, rate=2e-4)


if __name__ == "__main__":
    main()
