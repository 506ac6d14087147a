"""A captioning decoder with the attention of sgrvinod's tutorial, as many have one: made fused in one line.

It learns to read words that lie somewhere in an image's feature map, first as it is, then replaced, from the same
weights; printed are the report, the losses, and time and memory of a step of training. The original projects the
feature map in every step, replaced it does so once.
"""

import torch
import torch.nn.functional as F
from dropin_training import compare
from torch import nn


class Attention(nn.Module):
    """In a model of your own this is what you have already."""

    def __init__(self, encoder_dim, decoder_dim, attention_dim):
        super().__init__()
        self.encoder_att = nn.Linear(encoder_dim, attention_dim)
        self.decoder_att = nn.Linear(decoder_dim, attention_dim)
        self.full_att = nn.Linear(attention_dim, 1)
        self.relu, self.softmax = nn.ReLU(), nn.Softmax(dim=1)

    def forward(self, encoder_out, decoder_hidden):
        hidden = self.relu(self.encoder_att(encoder_out) + self.decoder_att(decoder_hidden).unsqueeze(1))
        alpha = self.softmax(self.full_att(hidden).squeeze(2))
        return (encoder_out * alpha.unsqueeze(2)).sum(1), alpha


class Captioner(nn.Module):
    """Under teacher forcing; captions come longest first, and the batch shrinks as they end."""

    def __init__(self, words, encoder_dim, width):
        super().__init__()
        self.attention = Attention(encoder_dim, width, width)
        self.embedding = nn.Embedding(words + 1, width)
        self.decode_step = nn.LSTMCell(width + encoder_dim, width)
        self.f_beta, self.fc = nn.Linear(width, encoder_dim), nn.Linear(width, words)

    def forward(self, encoder_out, captions, lengths):
        h = c = encoder_out.new_zeros(len(captions), self.decode_step.hidden_size)
        inputs = self.embedding(F.pad(captions, (1, -1), value=self.fc.out_features))
        found = []
        for t in range(max(lengths)):
            images = sum(length > t for length in lengths)
            context, _ = self.attention(encoder_out[:images], h[:images])
            gate = torch.sigmoid(self.f_beta(h[:images]))
            seen = torch.cat([inputs[:images, t], gate * context], 1)
            h, c = self.decode_step(seen, (h[:images], c[:images]))
            found.append(self.fc(h))
        return found


def main(width=256, steps=5, words=50, encoder_dim=512, places=196, batch=16):
    torch.manual_seed(0)
    look = torch.randn(words, encoder_dim)
    lengths = sorted((4 + n % 9 for n in range(batch)), reverse=True)

    def loss_of(model, generator):
        captions = torch.randint(words, (batch, max(lengths)), generator=generator)
        features = 0.1 * torch.randn(batch, places, encoder_dim, generator=generator)
        where = torch.rand(batch, places, generator=generator).argsort(1)[:, : max(lengths), None]
        features = features.scatter_add(1, where.expand(-1, -1, encoder_dim), look[captions])
        found = model(features, captions, lengths)
        said = [
            F.cross_entropy(scores, captions[: len(scores), t], reduction="sum") for t, scores in enumerate(found)
        ]
        return sum(said) / sum(lengths)

    compare(Captioner(words, encoder_dim, width), loss_of, steps)


if __name__ == "__main__":
    main()
