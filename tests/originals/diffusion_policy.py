"""real-stanford/diffusion_policy, diffusion_policy/model/diffusion/: its residual block as a formula."""

from torch import nn


class Conv1dBlock(nn.Module):
    def __init__(self, inp_channels, out_channels, kernel_size, n_groups):
        super().__init__()
        convolution = nn.Conv1d(inp_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.block = nn.Sequential(convolution, nn.GroupNorm(n_groups, out_channels), nn.Mish())

    def forward(self, x):
        return self.block(x)


def shortcut(in_channels, out_channels):
    return nn.Identity() if in_channels == out_channels else nn.Conv1d(in_channels, out_channels, 1)


class ConditionalResidualBlock1D(nn.Module):
    def __init__(self, in_channels, out_channels, cond_dim, n_groups, cond_predict_scale=False):
        super().__init__()
        widths, parts = ((in_channels, out_channels), (out_channels, out_channels)), 1 + cond_predict_scale
        self.blocks = nn.ModuleList([Conv1dBlock(a, b, 3, n_groups) for a, b in widths])
        self.cond_predict_scale = cond_predict_scale
        self.cond_encoder = nn.Sequential(
            nn.Mish(), nn.Linear(cond_dim, parts * out_channels), nn.Unflatten(1, (-1, 1))
        )
        self.residual_conv = shortcut(in_channels, out_channels)

    def forward(self, x, cond):
        out, made = self.blocks[0](x), self.cond_encoder(cond)
        if self.cond_predict_scale:
            scale, bias = made.chunk(2, 1)
            out = scale * out + bias
        else:
            out = out + made
        return self.blocks[1](out) + self.residual_conv(x)
