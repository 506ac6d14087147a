"""A translation model with an attention copied from NVIDIA's GNMT, as many have one: made fused in one line.

It learns to reverse sequences of random words, first as it is, then replaced, from the same weights; printed are
the report, the losses, and time and memory of a step of training.
"""

import torch
import torch.nn.functional as F
from dropin_training import compare
from torch import nn


class BahdanauAttention(nn.Module):
    """Time first; the mask is True at padding. In a model of your own this is what you have already."""

    def __init__(self, query_size, key_size, num_units):
        super().__init__()
        self.normalize, self.batch_first, self.mask = False, False, None
        self.linear_q = nn.Linear(query_size, num_units, bias=False)
        self.linear_k = nn.Linear(key_size, num_units, bias=False)
        self.linear_att = nn.Parameter(torch.empty(num_units).uniform_(-0.1, 0.1))

    def calc_score(self, att_query, att_keys):
        return torch.tanh(att_query.unsqueeze(2) + att_keys.unsqueeze(1)) @ self.linear_att

    def forward(self, query, keys):
        query, keys = query.transpose(0, 1), keys.transpose(0, 1)
        scores = self.calc_score(self.linear_q(query), self.linear_k(keys))
        if self.mask is not None:
            scores = scores.masked_fill(self.mask.unsqueeze(1), -65504.0)
        weights = torch.softmax(scores, -1)
        return (weights @ keys).transpose(0, 1), weights.transpose(0, 1)


class Translator(nn.Module):
    """Under teacher forcing: the first decoder layer's outputs ask, the second layer reads what was found."""

    def __init__(self, words, width):
        super().__init__()
        self.embedding, self.encoder = nn.Embedding(words + 1, width), nn.LSTM(width, width)
        self.asking, self.attention = nn.LSTM(width, width), BahdanauAttention(width, width, width)
        self.reading, self.output = nn.LSTM(2 * width, width), nn.Linear(width, words)

    def forward(self, source, target):
        memory, state = self.encoder(self.embedding(source))
        begin = torch.full_like(target[:1], self.output.out_features)
        asked, _ = self.asking(self.embedding(torch.cat([begin, target[:-1]])), state)
        context, _ = self.attention(asked, memory)
        return self.output(self.reading(torch.cat([asked, context], -1))[0])


def main(width=256, steps=5, words=50, length=80, batch=16):
    torch.manual_seed(0)

    def loss_of(model, generator):
        source = torch.randint(words, (length, batch), generator=generator)
        return F.cross_entropy(model(source, source.flip(0)).flatten(0, 1), source.flip(0).flatten())

    compare(Translator(words, width), loss_of, steps)


if __name__ == "__main__":
    main()
