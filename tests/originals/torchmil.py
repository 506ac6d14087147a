"""torchmil, torchmil/nn/attention/attention_pool.py: its pooling as a formula."""

import torch
from torch import nn


class Wrapped(nn.Module):
    def __init__(self, in_dim, out_dim):
        super().__init__()
        self.module = nn.Linear(in_dim, out_dim)

    def forward(self, x):
        return self.module(x)


class AttentionPool(nn.Module):
    def __init__(self, in_dim, att_dim=128, act="tanh", gated=False):
        super().__init__()
        self.act, self.gated, self.act_layer = act, gated, nn.Tanh() if act == "tanh" else nn.ReLU()
        self.fc1, self.fc2 = Wrapped(in_dim, att_dim), nn.Linear(att_dim, 1, bias=False)
        if gated:
            self.fc_gated, self.act_gated = Wrapped(in_dim, att_dim), nn.Sigmoid()

    def forward(self, X, mask=None, return_att=False):
        H = self.act_layer(self.fc1(X))
        f = self.fc2(H * self.act_gated(self.fc_gated(X)) if self.gated else H).squeeze(-1)
        s = (f if mask is None else f.masked_fill(mask == 0, -torch.inf)).softmax(1)
        z = torch.einsum("bnd,bn->bd", X, s)
        return (z, f) if return_att else z
