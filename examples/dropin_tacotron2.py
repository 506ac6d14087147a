"""A speech decoder with the attention of NVIDIA's Tacotron 2, as many copied it: made fused in one line.

It learns to speak sequences of random sounds, each a spectrum that lasts for two frames, first as it is, then
replaced, from the same weights; printed are the report, the losses, and time and memory of a step of training.
"""

import torch
import torch.nn.functional as F
from dropin_training import compare
from torch import nn


class LinearNorm(nn.Module):
    def __init__(self, in_dim, out_dim, bias=False):
        super().__init__()
        self.linear_layer = nn.Linear(in_dim, out_dim, bias=bias)

    def forward(self, x):
        return self.linear_layer(x)


class ConvNorm(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size):
        super().__init__()
        self.conv = nn.Conv1d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x):
        return self.conv(x)


class LocationLayer(nn.Module):
    def __init__(self, filters, kernel_size, attention_dim):
        super().__init__()
        self.location_conv = ConvNorm(2, filters, kernel_size)
        self.location_dense = LinearNorm(filters, attention_dim)

    def forward(self, attention_weights_cat):
        return self.location_dense(self.location_conv(attention_weights_cat).transpose(1, 2))


class Attention(nn.Module):
    """In a model of your own this and the layers above are what you have already."""

    def __init__(self, attention_rnn_dim, embedding_dim, attention_dim, filters=32, kernel_size=31):
        super().__init__()
        self.query_layer = LinearNorm(attention_rnn_dim, attention_dim)
        self.memory_layer = LinearNorm(embedding_dim, attention_dim)
        self.v = LinearNorm(attention_dim, 1)
        self.location_layer = LocationLayer(filters, kernel_size, attention_dim)
        self.score_mask_value = -float("inf")

    def forward(self, attention_hidden_state, memory, processed_memory, attention_weights_cat, mask):
        query = self.query_layer(attention_hidden_state.unsqueeze(1))
        features = self.location_layer(attention_weights_cat)
        scores = self.v(torch.tanh(query + features + processed_memory)).squeeze(-1)
        if mask is not None:
            scores = scores.masked_fill(mask, self.score_mask_value)
        weights = torch.softmax(scores, 1)
        return torch.bmm(weights.unsqueeze(1), memory).squeeze(1), weights


class Speaker(nn.Module):
    """Under teacher forcing: a cell asks, another one reads what was found and makes the next frame."""

    def __init__(self, sounds, mels, width):
        super().__init__()
        self.embedding = nn.Embedding(sounds, width)
        self.encoder = nn.LSTM(width, width // 2, batch_first=True, bidirectional=True)
        self.attention_rnn = nn.LSTMCell(mels + width, width)
        self.attention = Attention(width, width, width)
        self.decoder_rnn = nn.LSTMCell(2 * width, width)
        self.output = nn.Linear(2 * width, mels)

    def forward(self, sounds, frames, mask):
        memory, _ = self.encoder(self.embedding(sounds))
        processed = self.attention.memory_layer(memory)
        weights = total = memory.new_zeros(sounds.shape)
        context = memory.new_zeros(len(sounds), memory.shape[2])
        asking = reading = None
        found = []
        for frame in F.pad(frames, (0, 0, 1, -1)).unbind(1):  # each frame is made of the one before
            asking = self.attention_rnn(torch.cat([frame, context], 1), asking)
            previous = torch.stack([weights, total], 1)
            context, weights = self.attention(asking[0], memory, processed, previous, mask)
            total = total + weights
            reading = self.decoder_rnn(torch.cat([asking[0], context], 1), reading)
            found.append(self.output(torch.cat([reading[0], context], 1)))
        return torch.stack(found, 1)


def main(width=256, steps=5, sounds=40, mels=80, length=40, batch=16):
    torch.manual_seed(0)
    spectra = torch.randn(sounds, mels)

    def loss_of(model, generator):
        spoken = torch.randint(sounds, (batch, length), generator=generator)
        lengths = torch.randint(length // 2, length + 1, (batch, 1), generator=generator)
        mask = torch.arange(length) >= lengths
        frames = spectra[spoken].repeat_interleave(2, 1)
        error = (model(spoken, frames, mask) - frames).square().mean(-1)
        return error.masked_fill(mask.repeat_interleave(2, 1), 0.0).mean()

    compare(Speaker(sounds, mels, width), loss_of, steps)


if __name__ == "__main__":
    main()
