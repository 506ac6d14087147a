"""ritheshkumar95/pytorch-vqvae, modules.py: PixelCNN's gate as a formula."""

from torch import nn


class GatedActivation(nn.Module):
    def forward(self, x):
        a, b = x.chunk(2, 1)
        return a.tanh() * b.sigmoid()
