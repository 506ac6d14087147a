"""Multiple-instance learning: one learned query pools a bag of 20,000 patch features into one vector."""

import torch

import fusedattn

patches = torch.randn(1, 20_000, 256)
project = torch.nn.Linear(256, 128)
query = torch.nn.Parameter(torch.zeros(1, 1, 128))  # the bias of Ilse et al. 2018, arXiv:1802.04712
weight = torch.nn.Parameter(torch.randn(128) / 128**0.5)

bag, weights = fusedattn.additive_attention(query, project(patches), patches, weight, return_weights=True)
bag.sum().backward()
print("bag", tuple(bag.shape), "largest weight", f"{weights.max().item():.2e}")
