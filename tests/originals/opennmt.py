"""OpenNMT/OpenNMT-py, onmt/modules/global_attention.py: its MLP attention, without coverage, as a formula."""

import torch
from torch import nn


class GlobalAttention(nn.Module):
    def __init__(self, dim, coverage=False, attn_type="mlp", attn_func="softmax"):
        super().__init__()
        self.dim, self.attn_type, self.attn_func = dim, attn_type, attn_func
        self.linear_context = nn.Linear(dim, dim, bias=False)
        self.linear_query = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, 1, bias=False)
        self.linear_out = nn.Linear(2 * dim, dim)

    def score(self, h_t, h_s):
        return self.v((self.linear_query(h_t)[:, :, None] + self.linear_context(h_s)[:, None]).tanh()).squeeze(-1)

    def forward(self, source, memory_bank, src_len=None):
        queries = source if source.dim() == 3 else source[:, None]
        align = self.score(queries, memory_bank)
        if src_len is not None:
            align.masked_fill_(torch.arange(align.shape[-1]) >= src_len[:, None, None], -torch.inf)
        weights = align.softmax(-1)
        attn_h = self.linear_out(torch.cat([weights @ memory_bank, queries], -1))
        return (attn_h, weights) if source.dim() == 3 else (attn_h[:, 0], weights[:, 0])
