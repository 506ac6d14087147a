"""pyg-team/pytorch_geometric, torch_geometric/nn/conv/film_conv.py: its FiLM convolution as a formula."""

import torch
from torch import nn

RELU = nn.ReLU()


class FiLMConv(nn.Module):
    def __init__(self, in_channels, out_channels, num_relations=1, act=RELU):
        super().__init__()
        source, target = in_channels
        self.num_relations, self.act = num_relations, act
        self.lins = nn.ModuleList([nn.Linear(source, out_channels, bias=False) for _ in range(num_relations)])
        self.films = nn.ModuleList([nn.Linear(target, 2 * out_channels) for _ in range(num_relations)])
        self.lin_skip = nn.Linear(target, out_channels, bias=False)
        self.film_skip = nn.Linear(target, 2 * out_channels, bias=False)

    def forward(self, x, edge_index, edge_type=None):
        source, target = x
        beta, gamma = self.film_skip(target).chunk(2, -1)
        out = self.message(self.lin_skip(target), beta, gamma)
        for relation, (lin, film) in enumerate(zip(self.lins, self.films, strict=True)):
            chosen = edge_index if self.num_relations == 1 else edge_index[:, edge_type == relation]
            j, i = chosen
            beta, gamma = film(target)[i].chunk(2, -1)
            messages = self.message(lin(source)[j], beta, gamma)
            counts = torch.bincount(i, minlength=len(target)).clamp(min=1)
            out = out + torch.zeros_like(out).index_add(0, i, messages) / counts[:, None]
        return out

    def message(self, x_j, beta_i, gamma_i):
        out = gamma_i * x_j + beta_i
        return out if self.act is None else self.act(out)
