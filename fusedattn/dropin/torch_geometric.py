"""The FiLM convolution of PyTorch Geometric.

Conventions: a linear layer makes beta before gamma, no offset: act(gamma_i * W x_j + beta_i) on every edge.
Gathering and adding up remain PyTorch Geometric's.
"""

import torch
from torch import nn

from fusedattn.dropin._adapter import Adapter
from fusedattn.dropin._modulate import LEAST_OF_FILM, in_result_dtype
from fusedattn.ops.film import film

_ACTIVATIONS = {
    type(None): None,
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
}


def _message(self, x_j, beta_i, gamma_i):
    x, beta, gamma = in_result_dtype(x_j, beta_i, gamma_i)
    return film(x, gamma, beta, channel_dim=-1, activation=_ACTIVATIONS[type(self.act)])


def _probe(module, sizes, draw):
    edges = torch.tensor([[0, 1, 1, 2, 3, 3], [0, 0, 2, 1, 1, 2]])
    source, target = draw(4, sizes["I"]), draw(3, sizes["J"])
    return module((source, target), edges, torch.arange(6) % module.num_relations)


def _reasons(module):
    kind = type(module.act)
    return [] if kind in _ACTIVATIONS else [f"its activation is a {kind.__name__}"]


ADAPTERS = (
    Adapter(
        name="torch_geometric.FiLMConv",
        source="pyg-team/pytorch_geometric 2.8, torch_geometric/nn/conv/film_conv.py",
        fuses="scale, shift and activation of messages in one pass",
        least=2 * LEAST_OF_FILM,  # gamma and beta are as large as the messages
        shapes={
            "lins.0.weight": ("C", "I"),
            "lins.*.weight": ("C", "I"),
            "lin_skip.weight": ("C", "J"),
            "films.*": None,
            "film_skip.*": None,
        },
        fused=_message,
        probe=_probe,
        method="message",
        inside=("act",),
        reasons=_reasons,
    ),
)
