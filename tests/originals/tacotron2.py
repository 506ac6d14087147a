"""NVIDIA/tacotron2, model.py and layers.py: the attention of a decoder's step as a formula."""

import torch
from torch import nn


class LinearNorm(nn.Module):
    def __init__(self, in_dim, out_dim, bias=True):
        super().__init__()
        self.linear_layer = nn.Linear(in_dim, out_dim, bias=bias)

    def forward(self, x):
        return self.linear_layer(x)


class ConvNorm(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size, padding):
        super().__init__()
        self.conv = nn.Conv1d(in_channels, out_channels, kernel_size, padding=padding, bias=False)

    def forward(self, signal):
        return self.conv(signal)


class LocationLayer(nn.Module):
    def __init__(self, attention_n_filters, attention_kernel_size, attention_dim):
        super().__init__()
        self.location_conv = ConvNorm(
            2, attention_n_filters, attention_kernel_size, (attention_kernel_size - 1) // 2
        )
        self.location_dense = LinearNorm(attention_n_filters, attention_dim, bias=False)

    def forward(self, attention_weights_cat):
        return self.location_dense(self.location_conv(attention_weights_cat).mT)


class Attention(nn.Module):
    def __init__(
        self,
        attention_rnn_dim,
        embedding_dim,
        attention_dim,
        attention_location_n_filters,
        attention_location_kernel_size,
    ):
        super().__init__()
        self.query_layer = LinearNorm(attention_rnn_dim, attention_dim, bias=False)
        self.memory_layer = LinearNorm(embedding_dim, attention_dim, bias=False)
        self.v = LinearNorm(attention_dim, 1, bias=False)
        self.location_layer = LocationLayer(
            attention_location_n_filters, attention_location_kernel_size, attention_dim
        )
        self.score_mask_value = -torch.inf

    def forward(self, attention_hidden_state, memory, processed_memory, attention_weights_cat, mask):
        query = self.query_layer(attention_hidden_state[:, None])
        e = self.v((query + self.location_layer(attention_weights_cat) + processed_memory).tanh()).squeeze(-1)
        e = e if mask is None else e.masked_fill(mask, self.score_mask_value)
        weights = e.softmax(1)
        return (weights[:, None] @ memory).squeeze(1), weights
