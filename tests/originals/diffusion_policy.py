"""real-stanford/diffusion_policy, conditional_unet1d.py: its residual block as a formula."""

from torch import nn


class Conv1dBlock(nn.Module):
    def __init__(self, inner, outer):
        super().__init__()
        self.block = nn.Sequential(nn.Conv1d(inner, outer, 3, padding=1), nn.GroupNorm(2, outer), nn.Mish())

    def forward(self, x):
        return self.block(x)


class ConditionalResidualBlock1D(nn.Module):
    def __init__(self, in_channels, out_channels, cond_dim, cond_predict_scale=False):
        super().__init__()
        self.cond_predict_scale, self.out_channels = cond_predict_scale, out_channels
        self.blocks = nn.ModuleList(
            [Conv1dBlock(in_channels, out_channels), Conv1dBlock(out_channels, out_channels)]
        )
        width = out_channels * (1 + cond_predict_scale)
        self.cond_encoder = nn.Sequential(nn.Mish(), nn.Linear(cond_dim, width), nn.Unflatten(1, (width, 1)))
        same = in_channels == out_channels
        self.residual_conv = nn.Identity() if same else nn.Conv1d(in_channels, out_channels, 1)

    def forward(self, x, cond):
        out, made = self.blocks[0](x), self.cond_encoder(cond)
        if self.cond_predict_scale:
            scale, bias = made.unflatten(1, (2, -1)).unbind(1)
            out = scale * out + bias
        else:
            out = out + made
        return self.blocks[1](out) + self.residual_conv(x)
