"""pytorch/tutorials, seq2seq_translation_tutorial.py: its attention as a formula."""

from torch import nn


class BahdanauAttention(nn.Module):
    def __init__(self, hidden_size):
        super().__init__()
        self.Wa, self.Ua = nn.Linear(hidden_size, hidden_size), nn.Linear(hidden_size, hidden_size)
        self.Va = nn.Linear(hidden_size, 1)

    def forward(self, query, keys):
        e = self.Va((self.Wa(query) + self.Ua(keys)).tanh())
        weights = e.transpose(1, 2).softmax(-1)
        return weights @ keys, weights
