"""Multiple-instance learning: gated attention pools a bag of 20,000 patch features into one vector."""

import torch

import fusedattn

patches = torch.randn(1, 20_000, 256)
pool = fusedattn.GatedAttentionPool(256, 128)  # Ilse et al. 2018, arXiv:1802.04712

bag, weights = pool(patches, return_weights=True)
bag.sum().backward()
print("bag", tuple(bag.shape), "largest weight", f"{weights.max().item():.2e}")
