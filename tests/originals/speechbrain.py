"""speechbrain/speechbrain, speechbrain/nnet/attention.py: its attentions of a decoder's step as formulas."""

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

    def prepare(self, enc_states, enc_len):
        self.precomputed_enc_h = self.mlp_enc(enc_states)
        T = enc_states.shape[1]
        self.mask = (torch.arange(T, dtype=enc_len.dtype) < enc_len[:, None]).to(enc_len.dtype)

    def features(self):
        return 0.0

    def forward(self, enc_states, enc_len, dec_states):
        if self.precomputed_enc_h is None:
            self.prepare(enc_states, enc_len)
        query = self.mlp_dec(dec_states)[:, None]
        e = self.mlp_attn((self.precomputed_enc_h + query + self.features()).tanh()).squeeze(-1)
        w = (e.masked_fill(self.mask == 0, -torch.inf) * self.scaling).softmax(-1)
        return self.mlp_out((w[:, None] @ enc_states).squeeze(1)), w


class LocationAwareAttention(ContentBasedAttention):
    def __init__(self, enc_dim, dec_dim, attn_dim, output_dim, conv_channels, kernel_size, scaling=1.0):
        super().__init__(enc_dim, dec_dim, attn_dim, output_dim, scaling)
        self.conv_loc = nn.Conv1d(1, conv_channels, 2 * kernel_size + 1, padding=kernel_size, bias=False)
        self.mlp_loc = nn.Linear(conv_channels, attn_dim)

    def reset(self):
        super().reset()
        self.prev_attn = None

    def prepare(self, enc_states, enc_len):
        super().prepare(enc_states, enc_len)
        self.prev_attn = (self.mask / enc_len[:, None]).to(enc_states.dtype)

    def features(self):
        return self.mlp_loc(self.conv_loc(self.prev_attn[:, None]).mT)

    def forward(self, enc_states, enc_len, dec_states):
        context, w = super().forward(enc_states, enc_len, dec_states)
        self.prev_attn = w.detach()
        return context, w
