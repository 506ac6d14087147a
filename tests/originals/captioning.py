"""sgrvinod/a-PyTorch-Tutorial-to-Image-Captioning, models.py: its attention as a formula."""

from torch import nn


class Attention(nn.Module):
    def __init__(self, encoder_dim, decoder_dim, attention_dim):
        super().__init__()
        self.encoder_att = nn.Linear(encoder_dim, attention_dim)
        self.decoder_att = nn.Linear(decoder_dim, attention_dim)
        self.full_att = nn.Linear(attention_dim, 1)
        self.relu, self.softmax = nn.ReLU(), nn.Softmax(dim=1)

    def forward(self, encoder_out, decoder_hidden):
        e = self.full_att(self.relu(self.encoder_att(encoder_out) + self.decoder_att(decoder_hidden)[:, None]))
        alpha = self.softmax(e.squeeze(2))
        return (encoder_out * alpha[..., None]).sum(1), alpha
