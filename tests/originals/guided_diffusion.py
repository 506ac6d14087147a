"""openai/guided-diffusion, guided_diffusion/unet.py: its residual block as a formula."""

import torch
import torch.nn.functional as F
from torch import nn


class GroupNorm32(nn.GroupNorm):
    """In float32 at least, so that float64 is what the rest is measured by."""

    def forward(self, x):
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide, weight, bias = x.to(dtype), self.weight.to(dtype), self.bias.to(dtype)
        return F.group_norm(wide, self.num_groups, weight, bias, self.eps).to(x.dtype)


def norm(channels):
    return GroupNorm32(min(32, channels // 2), channels)


class ResBlock(nn.Module):
    def __init__(
        self, channels, emb_channels, dropout, out_channels, use_scale_shift_norm=False, dims=2, up=False
    ):
        super().__init__()
        convolution = (nn.Conv1d, nn.Conv2d)[dims - 1]
        self.updown, self.use_scale_shift_norm = up, use_scale_shift_norm
        self.in_layers = nn.Sequential(
            norm(channels), nn.SiLU(), convolution(channels, out_channels, 3, padding=1)
        )
        self.h_upd, self.x_upd = (nn.Upsample(scale_factor=2) if up else nn.Identity() for _ in range(2))
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(emb_channels, (1 + use_scale_shift_norm) * out_channels)
        )
        last = convolution(out_channels, out_channels, 3, padding=1)
        self.out_layers = nn.Sequential(norm(out_channels), nn.SiLU(), nn.Dropout(dropout), last)
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else convolution(channels, out_channels, 1)

    def forward(self, x, emb):
        return self._forward(x, emb)

    def _forward(self, x, emb):
        h = self.in_layers[2](self.h_upd(self.in_layers[:2](x)))
        x, made = self.x_upd(x), self.emb_layers(emb).to(h.dtype)
        made = made.unflatten(1, (-1, *[1] * (x.dim() - 2), h.shape[1])).movedim(-1, 2)
        if self.use_scale_shift_norm:
            h = self.out_layers[0](h) * (1 + made[:, 0]) + made[:, 1]
        else:
            h = self.out_layers[0](h + made[:, 0])
        return self.skip_connection(x) + self.out_layers[1:](h)
