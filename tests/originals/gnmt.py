"""NVIDIA/DeepLearningExamples, PyTorch/Translation/GNMT: its attention as a formula."""

import torch
from torch import nn


class BahdanauAttention(nn.Module):
    def __init__(self, query_size, key_size, num_units, normalize=False, batch_first=False):
        super().__init__()
        self.normalize, self.batch_first = normalize, batch_first
        self.linear_q = nn.Linear(query_size, num_units, bias=False)
        self.linear_k = nn.Linear(key_size, num_units, bias=False)
        self.linear_att = nn.Parameter(torch.empty(num_units).uniform_(-1, 1))
        self.mask = None
        self.normalize_scalar = nn.Parameter(torch.full((1,), 0.3)) if normalize else None
        self.normalize_bias = nn.Parameter(torch.randn(num_units)) if normalize else None

    def set_mask(self, context_len, context):
        T = context.shape[1 if self.batch_first else 0]
        self.mask = torch.arange(T) >= context_len[:, None]

    def calc_score(self, att_query, att_keys):
        summed, v = att_query[:, :, None] + att_keys[:, None], self.linear_att
        if self.normalize:
            summed = summed + self.normalize_bias
            v = self.normalize_scalar * (v / v.norm())
        return torch.tanh(summed) @ v

    def forward(self, query, keys):
        if not self.batch_first:
            keys = keys.transpose(0, 1)
            query = query.transpose(0, 1) if query.dim() == 3 else query
        queries = query if query.dim() == 3 else query[:, None]
        e = self.calc_score(self.linear_q(queries), self.linear_k(keys))
        if self.mask is not None:
            e.masked_fill_(self.mask[:, None].expand(e.shape), -65504.0)
        weights = torch.softmax(e, -1)
        context = weights @ keys
        if query.dim() == 2:
            return context[:, 0], weights[:, 0]
        if not self.batch_first:
            return context.transpose(0, 1), weights.transpose(0, 1)
        return context, weights
