"""allenai/allennlp, allennlp/modules/attention: additive attention and its masked softmax as formulas."""

import torch
from torch import nn


class AdditiveAttention(nn.Module):
    def __init__(self, vector_dim, matrix_dim, normalize=True):
        super().__init__()
        self._normalize = normalize
        self._w_matrix = nn.Parameter(torch.randn(vector_dim, vector_dim))
        self._u_matrix = nn.Parameter(torch.randn(matrix_dim, vector_dim))
        self._v_vector = nn.Parameter(torch.randn(vector_dim, 1))

    def _forward_internal(self, vector, matrix):
        return (((vector @ self._w_matrix)[:, None] + matrix @ self._u_matrix).tanh() @ self._v_vector).squeeze(2)

    def forward(self, vector, matrix, matrix_mask=None):
        e = self._forward_internal(vector, matrix)
        if not self._normalize:
            return e
        if matrix_mask is None:
            return e.softmax(-1)
        weights = (e * matrix_mask).softmax(-1) * matrix_mask
        return weights / (weights.sum(-1, keepdim=True) + 1e-13)
