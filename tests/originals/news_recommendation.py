"""yusanshi/news-recommendation, src/model/general/attention/additive.py: its pooling as a formula."""

import torch
from torch import nn


class AdditiveAttention(nn.Module):
    def __init__(self, query_vector_dim, candidate_vector_dim, writer=None):
        super().__init__()
        self.linear = nn.Linear(candidate_vector_dim, query_vector_dim)
        self.attention_query_vector = nn.Parameter(torch.randn(query_vector_dim))
        self.writer = writer

    def forward(self, candidate_vector):
        weights = (self.linear(candidate_vector).tanh() @ self.attention_query_vector).softmax(1)
        return (weights[:, None] @ candidate_vector).squeeze(1)
