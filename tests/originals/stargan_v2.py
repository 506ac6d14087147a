"""clovaai/stargan-v2, core/model.py, and yl4579/StyleTTS2, Modules/istftnet.py: their AdaIN as formulas."""

from torch import nn


class _AdaIN(nn.Module):
    def __init__(self, style_dim, num_features, affine=False):
        super().__init__()
        self.norm = self.norm_type(num_features, affine=affine)
        self.fc = nn.Linear(style_dim, 2 * num_features)

    def forward(self, x, s):
        h = self.fc(s)
        gamma, beta = h.view(*h.shape, *[1] * (x.dim() - 2)).chunk(2, 1)
        return self.norm(x) * (1 + gamma) + beta


class AdaIN(_AdaIN):
    norm_type = nn.InstanceNorm2d


class AdaIN1d(_AdaIN):
    norm_type = nn.InstanceNorm1d
