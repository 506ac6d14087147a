"""facebookresearch/fairseq, fairseq/models/speech_to_text/berard.py: its attention as a formula."""

import torch
from torch import nn


class MLPAttention(nn.Module):
    def __init__(self, decoder_hidden_state_dim, context_dim, attention_dim):
        super().__init__()
        self.encoder_proj = nn.Linear(context_dim, attention_dim)
        self.decoder_proj = nn.Linear(decoder_hidden_state_dim, attention_dim, bias=False)
        self.to_scores = nn.Linear(attention_dim, 1, bias=False)

    def forward(self, decoder_state, source_hids, encoder_padding_mask):
        e = self.to_scores((self.decoder_proj(decoder_state) + self.encoder_proj(source_hids)).tanh()).squeeze(-1)
        if encoder_padding_mask is not None:
            e = e.masked_fill(encoder_padding_mask, -torch.inf)
        weights = e.softmax(0)
        return (source_hids * weights[..., None]).sum(0), weights
