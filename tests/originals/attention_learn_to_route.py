"""wouterkool/attention-learn-to-route, nets/pointer_network.py: its attention as a formula."""

import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, dim, use_tanh=False, C=10):
        super().__init__()
        self.use_tanh, self.C = use_tanh, C
        self.project_query, self.project_ref = nn.Linear(dim, dim), nn.Conv1d(dim, dim, 1)
        self.v = nn.Parameter(torch.randn(dim))

    def forward(self, query, ref):
        e = self.project_ref(ref.permute(1, 2, 0))
        u = torch.einsum("d,bds->bs", self.v, (self.project_query(query)[..., None] + e).tanh())
        return e, self.C * u.tanh() if self.use_tanh else u
