"""ethanjperez/film, vr/models/filmed_net.py: FiLM and the block around it as formulas."""

import torch
from torch import nn


class FiLM(nn.Module):
    def forward(self, x, gammas, betas):
        return gammas[:, :, None, None] * x + betas[:, :, None, None]


class FiLMedResBlock(nn.Module):
    def __init__(
        self, dim, extra=0, freq=1, proj=0, cond_maps=0, dropout=0.0, condition_method="bn-film", affine=False
    ):
        super().__init__()
        self.with_residual, self.with_batchnorm, self.with_cond = True, True, [True]
        self.dropout, self.extra_channel_freq, self.with_input_proj = dropout, freq if extra else 0, proj
        self.num_cond_maps, self.condition_method = cond_maps, condition_method
        if proj:
            self.input_proj = nn.Conv2d(dim + extra, dim, proj, padding=proj // 2)
        self.conv1 = nn.Conv2d(dim + cond_maps + extra * (freq == 2), dim, 3, padding=1)
        self.bn1, self.film = nn.BatchNorm2d(dim, affine=affine), FiLM()

    def forward(self, x, gammas=None, betas=None, extra_channels=None, cond_maps=None):
        if self.with_input_proj:
            x = self.input_proj(x if extra_channels is None else torch.cat([x, extra_channels], 1)).relu()
        parts = [x, cond_maps, extra_channels if self.extra_channel_freq == 2 else None]
        out = self.conv1(torch.cat([t for t in parts if t is not None], 1))
        if self.condition_method == "conv-film":
            out = self.bn1(self.film(out, gammas, betas))
        else:
            out = self.film(self.bn1(out), gammas, betas)
        if self.dropout:
            out = nn.functional.dropout2d(out, self.dropout, self.training)
        return x + out.relu()
