"""huggingface/lerobot, src/lerobot/policies/diffusion/modeling_diffusion.py: its residual block as a formula."""

from originals.diffusion_policy import Conv1dBlock, shortcut
from torch import nn


class DiffusionConditionalResidualBlock1d(nn.Module):
    def __init__(self, in_channels, out_channels, cond_dim, n_groups, use_film_scale_modulation=False):
        super().__init__()
        self.conv1 = Conv1dBlock(in_channels, out_channels, 3, n_groups)
        self.conv2 = Conv1dBlock(out_channels, out_channels, 3, n_groups)
        self.use_film_scale_modulation = use_film_scale_modulation
        parts = 1 + use_film_scale_modulation
        self.cond_encoder = nn.Sequential(nn.Mish(), nn.Linear(cond_dim, parts * out_channels))
        self.residual_conv = shortcut(in_channels, out_channels)

    def forward(self, x, cond):
        scale, *bias = self.cond_encoder(cond)[:, :, None].split(self.conv2.block[0].out_channels, 1)
        out = self.conv1(x)
        return self.conv2(scale * out + bias[0] if bias else out + scale) + self.residual_conv(x)
