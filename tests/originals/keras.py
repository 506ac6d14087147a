"""keras-team/keras, keras/src/layers/attention: additive attention on the torch backend as a formula."""

import torch
from torch import nn


class Variable:
    """What holds a parameter there."""

    def __init__(self, layer):
        self.layer = layer

    @property
    def value(self):
        return self.layer._torch_params["scale"]


class AdditiveAttention(nn.Module):
    def __init__(self, dim, use_scale=True, dropout=0.0):
        super().__init__()
        self.use_scale, self.dropout = use_scale, dropout
        self._torch_params = nn.ParameterDict({"scale": nn.Parameter(torch.randn(dim))} if use_scale else {})

    def _calculate_scores(self, query, key):
        scale = self._torch_params["scale"] if self.use_scale else 1.0
        return (scale * (query.unsqueeze(-2) + key.unsqueeze(-3)).tanh()).sum(-1)

    @property
    def scale(self):
        return Variable(self)

    def forward(self, inputs, mask=None, return_attention_scores=False):
        query, value, key = inputs if len(inputs) == 3 else (*inputs, inputs[1])
        e = self._calculate_scores(query, key)
        if mask is not None:
            e = torch.where(mask[1].unsqueeze(-2), e, e - 1e9)
        weights = e.softmax(-1)
        dropped = nn.functional.dropout(weights, self.dropout, self.training)
        context = dropped @ value
        if mask is not None:
            context = torch.where(mask[0].unsqueeze(-1), context, 0)
        return (context, dropped) if return_attention_scores else context
