"""Networks for several styles (kewellcjj/pytorch-multiple-style-transfer and copies): their norms as formulas."""

import torch
from torch import nn


class batch_InstanceNorm2d(nn.Module):
    def __init__(self, style_num, in_channels):
        super().__init__()
        self.inns = nn.ModuleList([nn.InstanceNorm2d(in_channels, affine=True) for _ in range(style_num)])

    def forward(self, x, style_id):
        return torch.cat([self.inns[style](image[None]) for style, image in zip(style_id, x, strict=False)])


class ConditionInstanceNorm2d(nn.Module):
    def __init__(self, num_features, n_style):
        super().__init__()
        self.norm = nn.InstanceNorm2d(num_features)
        self.gamma = nn.Parameter(torch.randn(n_style, num_features, 1, 1))
        self.beta = nn.Parameter(torch.randn(n_style, num_features, 1, 1))

    def forward(self, input, style_idx):
        return self.gamma[style_idx] * self.norm(input) + self.beta[style_idx]


class ConditionalInstanceNorm2d(nn.Module):
    def __init__(self, num_features, num_classes):
        super().__init__()
        self.inst_norm = nn.InstanceNorm2d(num_features)
        self.embed = nn.Embedding(num_classes, 2 * num_features)

    def forward(self, x, style_index):
        gamma, beta = self.embed(style_index)[:, :, None, None].chunk(2, 1)
        return gamma * self.inst_norm(x) + beta
