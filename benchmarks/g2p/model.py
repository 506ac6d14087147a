"""The encoder-decoder, written once; only the class of its attention differs between the runs compared."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fusedattn

from .data import LETTERS, START, STOP

# The drop-in: same constructor, parameters, methods and results as PlainAttention below.
FusedAttention = fusedattn.AdditiveAttention


@dataclass(frozen=True)
class PlainKeys:
    key: Tensor  # (B, S, D)
    value: Tensor  # (B, S, M)
    visible: Tensor  # (B, 1, S)


class PlainAttention(nn.Module):
    """Additive attention as tutorials write it; ``tanh(q + k)`` is a (B, T, S, D) tensor."""

    def __init__(self, query_dim: int, key_dim: int, attention_dim: int):
        super().__init__()
        self.query_proj = nn.Linear(query_dim, attention_dim)
        self.key_proj = nn.Linear(key_dim, attention_dim, bias=False)
        self.weight = nn.Parameter(torch.empty(1, attention_dim))

    def project_keys(self, key: Tensor, *, key_lengths: Tensor) -> PlainKeys:
        visible = torch.arange(key.shape[1]) < key_lengths[:, None]
        return PlainKeys(self.key_proj(key), key, visible[:, None])

    def scores(self, features: Tensor) -> Tensor:
        return features @ self.weight[0]

    def forward(self, query: Tensor, keys: PlainKeys, *, return_weights: bool) -> tuple[Tensor, Tensor]:
        query = self.query_proj(query)
        scores = self.scores(torch.tanh(query[:, :, None] + keys.key[:, None]))
        weights = torch.softmax(scores.masked_fill(~keys.visible, float("-inf")), -1)
        return weights @ keys.value, weights[:, None]


class PlainAttentionSummed(PlainAttention):
    """The same formula with another order of summation: how far rounding alone moves a training run."""

    def scores(self, features: Tensor) -> Tensor:
        return (features * self.weight[0]).sum(-1)


class Model(nn.Module):
    """Letters to phones. The encoder is a bidirectional LSTM of total width ``hidden``.

    ``stepwise``: the query is the decoder's previous state and the context feeds its next (Bahdanau et al. 2015).
    Otherwise a teacher-forced LSTM runs first and all its states attend at once (Luong et al. 2015,
    arXiv:1508.04025, with the additive score).
    """

    def __init__(self, attention: type[nn.Module], hidden: int, phones: int, stepwise: bool):
        super().__init__()
        self.stepwise = stepwise
        self.letters = nn.Embedding(len(LETTERS) + 1, hidden, padding_idx=0)
        self.encoder = nn.LSTM(hidden, hidden // 2, bidirectional=True, batch_first=True)
        self.phones = nn.Embedding(phones, hidden, padding_idx=0)
        self.decoder = nn.LSTM(2 * hidden if stepwise else hidden, hidden, batch_first=True)
        self.attention = attention(hidden, hidden, hidden)
        self.output = nn.Linear(2 * hidden, phones)

    def encode(self, letters: Tensor, lengths: Tensor):
        packed = nn.utils.rnn.pack_padded_sequence(
            self.letters(letters), lengths, batch_first=True, enforce_sorted=False
        )
        memory, _ = nn.utils.rnn.pad_packed_sequence(self.encoder(packed)[0], batch_first=True)
        return self.attention.project_keys(memory, key_lengths=lengths)

    def start(self, B: int) -> tuple[Tensor, Tensor]:
        return (torch.zeros(1, B, self.decoder.hidden_size),) * 2

    def decode(self, phones: Tensor, state, keys):
        """Logits (B, T, phones), state and weights (B, T, S) for the inputs ``phones`` (B, T)."""
        embedded = self.phones(phones)
        if not self.stepwise:
            states, state = self.decoder(embedded, state)
            context, weights = self.attention(states, keys, return_weights=True)
            return self.output(torch.cat([states, context], -1)), state, weights[:, 0]
        outputs, weights = [], []
        for t in range(phones.shape[1]):
            context, weight = self.attention(state[0].transpose(0, 1), keys, return_weights=True)
            hidden, state = self.decoder(torch.cat([embedded[:, t : t + 1], context], -1), state)
            outputs.append(torch.cat([hidden, context], -1))
            weights.append(weight[:, 0])
        return self.output(torch.cat(outputs, 1)), state, torch.cat(weights, 1)

    def forward(self, letters: Tensor, lengths: Tensor, inputs: Tensor) -> Tensor:
        keys = self.encode(letters, lengths)
        return self.decode(inputs, self.start(len(letters)), keys)[0]

    @torch.no_grad()
    def greedy(self, letters: Tensor, lengths: Tensor, limit: int = 40) -> tuple[list[list[int]], Tensor]:
        """The most likely phone at each step, up to STOP; and the weights (B, steps, S)."""
        keys, state = self.encode(letters, lengths), self.start(len(letters))
        phone = torch.full((len(letters), 1), START)
        steps, weights = [], []
        for _ in range(limit):
            logits, state, weight = self.decode(phone, state, keys)
            phone = logits.argmax(-1)
            steps.append(phone)
            weights.append(weight)
            if bool((torch.cat(steps, 1) == STOP).any(1).all()):
                break
        spoken = [row[: row.index(STOP)] if STOP in row else row for row in torch.cat(steps, 1).tolist()]
        return spoken, torch.cat(weights, 1)
