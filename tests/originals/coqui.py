"""coqui-ai/TTS, TTS/tts/layers/tacotron/attentions.py: the attention of its Tacotrons as a formula."""

import torch
from torch import nn

from .tacotron2 import LinearNorm as Linear


class LocationLayer(nn.Module):
    def __init__(self, attention_dim, attention_n_filters, attention_kernel_size):
        super().__init__()
        padding = (attention_kernel_size - 1) // 2
        self.location_conv1d = nn.Conv1d(
            2, attention_n_filters, attention_kernel_size, padding=padding, bias=False
        )
        self.location_dense = Linear(attention_n_filters, attention_dim, bias=False)

    def forward(self, attention_cat):
        return self.location_dense(self.location_conv1d(attention_cat).mT)


class OriginalAttention(nn.Module):
    def __init__(
        self,
        query_dim,
        embedding_dim,
        attention_dim,
        location_attention,
        attention_location_n_filters,
        attention_location_kernel_size,
        windowing,
        norm,
        forward_attn,
        trans_agent,
        forward_attn_mask,
    ):
        super().__init__()
        self.query_layer = Linear(query_dim, attention_dim, bias=False)
        self.inputs_layer = Linear(embedding_dim, attention_dim, bias=False)
        self.v = Linear(attention_dim, 1)
        if trans_agent:
            self.ta = nn.Linear(query_dim + embedding_dim, 1)
        if location_attention:
            sizes = attention_location_n_filters, attention_location_kernel_size
            self.location_layer = LocationLayer(attention_dim, *sizes)
        self._mask_value, self.win_idx = -torch.inf, None
        self.windowing, self.norm, self.location_attention = windowing, norm, location_attention
        self.forward_attn, self.trans_agent, self.forward_attn_mask = forward_attn, trans_agent, forward_attn_mask

    def init_states(self, inputs):
        self.attention_weights = torch.zeros(inputs.shape[:2])
        if self.location_attention:
            self.attention_weights_cum = torch.zeros(inputs.shape[:2])
        if self.forward_attn:
            self.alpha = torch.full((len(inputs), inputs.shape[1]), 1e-7)
            self.alpha[:, 0] = 1.0
            self.u = torch.full((len(inputs), 1), 0.5)
        if self.windowing:
            self.win_idx, self.win_back, self.win_front = -1, 2, 6

    def preprocess_inputs(self, inputs):
        return self.inputs_layer(inputs)

    def update_location_attention(self, alignments):
        self.attention_weights_cum += alignments

    def apply_windowing(self, attention, inputs):
        attention = attention.clone()
        attention[:, : max(self.win_idx - self.win_back, 0)] = -torch.inf
        attention[:, self.win_idx + self.win_front :] = -torch.inf
        if self.win_idx == -1:
            attention[:, 0] = attention.detach().max()
        self.win_idx = attention[0].argmax().item()
        return attention

    def apply_forward_attention(self, alignment):
        moved = torch.cat([torch.zeros_like(self.alpha[:, :1]), self.alpha[:, :-1]], 1)
        alpha = ((1 - self.u) * self.alpha + self.u * moved + 1e-8) * alignment
        if not self.training and self.forward_attn_mask:
            largest = alpha.max(1).values
            for b, n in enumerate(moved.argmax(1).tolist()):
                alpha[b, n + 3 :] = 0
                alpha[b, : n - 1] = 0
                alpha[b, n - 2] = 0.01 * largest[b]
        return alpha / alpha.sum(1, keepdim=True)

    def forward(self, query, inputs, processed_inputs, mask):
        z = self.query_layer(query[:, None]) + processed_inputs
        if self.location_attention:
            z = z + self.location_layer(torch.stack([self.attention_weights, self.attention_weights_cum], 1))
        attention = self.v(z.tanh()).squeeze(-1)
        if mask is not None:
            attention = attention.masked_fill(~mask, self._mask_value)
        if not self.training and self.windowing:
            attention = self.apply_windowing(attention, inputs)
        alignment = attention.softmax(-1)
        if self.norm == "sigmoid":
            alignment = attention.sigmoid() / attention.sigmoid().sum(1, keepdim=True)
        if self.location_attention:
            self.update_location_attention(alignment)
        if self.forward_attn:
            alignment = self.alpha = self.apply_forward_attention(alignment)
        context = (alignment[:, None] @ inputs).squeeze(1)
        self.attention_weights = alignment
        if self.forward_attn and self.trans_agent:
            self.u = self.ta(torch.cat([context, query.squeeze(1)], -1)).sigmoid()
        return context
