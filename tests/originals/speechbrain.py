"""speechbrain/speechbrain, speechbrain/nnet/attention.py: content-based attention as a formula."""

import torch
from torch import nn


class ContentBasedAttention(nn.Module):
    def __init__(self, enc_dim, dec_dim, attn_dim, output_dim, scaling=1.0):
        super().__init__()
        self.mlp_enc, self.mlp_dec = nn.Linear(enc_dim, attn_dim), nn.Linear(dec_dim, attn_dim)
        self.mlp_attn = nn.Linear(attn_dim, 1, bias=False)
        self.mlp_out = nn.Linear(enc_dim, output_dim)
        self.scaling = scaling
        self.reset()

    def reset(self):
        self.enc_len = self.precomputed_enc_h = self.mask = None

    def forward(self, enc_states, enc_len, dec_states):
        if self.precomputed_enc_h is None:
            self.precomputed_enc_h = self.mlp_enc(enc_states)
            T = enc_states.shape[1]
            self.mask = (torch.arange(T, dtype=enc_len.dtype) < enc_len[:, None]).to(enc_len.dtype)
        e = self.mlp_attn((self.precomputed_enc_h + self.mlp_dec(dec_states)[:, None]).tanh()).squeeze(-1)
        w = (e.masked_fill(self.mask == 0, -torch.inf) * self.scaling).softmax(-1)
        return self.mlp_out((w[:, None] @ enc_states).squeeze(1)), w
