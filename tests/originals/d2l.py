"""d2l-ai/d2l-en, d2l/torch.py: its additive attention as a formula, its lazy layers with their sizes."""

import torch
from torch import nn


class AdditiveAttention(nn.Module):
    def __init__(self, num_hiddens, dropout, query_size=4, key_size=3):
        super().__init__()
        self.W_k = nn.Linear(key_size, num_hiddens, bias=False)
        self.W_q = nn.Linear(query_size, num_hiddens, bias=False)
        self.w_v = nn.Linear(num_hiddens, 1, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries, keys, values, valid_lens):
        e = self.w_v((self.W_q(queries)[:, :, None] + self.W_k(keys)[:, None]).tanh()).squeeze(-1)
        if valid_lens is not None:
            lengths = valid_lens[:, None].expand(e.shape[:2]) if valid_lens.dim() == 1 else valid_lens
            e = e.masked_fill(torch.arange(e.shape[-1]) >= lengths[..., None], -1e6)
        self.attention_weights = e.softmax(-1)
        return self.dropout(self.attention_weights) @ values
