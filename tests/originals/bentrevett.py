"""bentrevett/pytorch-seq2seq: the attention of notebook 3, and that of legacy 4 with its mask, as formulas."""

import torch
from torch import nn


class Attention(nn.Module):
    names = "attn_fc", "v_fc"

    def __init__(self, encoder_hidden_dim, decoder_hidden_dim):
        super().__init__()
        width = 2 * encoder_hidden_dim + decoder_hidden_dim
        setattr(self, self.names[0], nn.Linear(width, decoder_hidden_dim))
        setattr(self, self.names[1], nn.Linear(decoder_hidden_dim, 1, bias=False))

    def energies(self, hidden, encoder_outputs):
        attn, v = (getattr(self, name) for name in self.names)
        states = hidden.expand(len(encoder_outputs), *hidden.shape)
        return v(attn(torch.cat([states, encoder_outputs], -1)).tanh()).squeeze(-1).t()

    def forward(self, hidden, encoder_outputs):
        return self.energies(hidden, encoder_outputs).softmax(1)


class Legacy:
    class Attention(Attention):
        names = "attn", "v"

        def forward(self, hidden, encoder_outputs, mask):
            return self.energies(hidden, encoder_outputs).masked_fill(mask == 0, -1e10).softmax(1)
