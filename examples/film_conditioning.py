"""A residual block conditioned on a diffusion time step: scale, shift, SiLU and residual in one pass."""

import torch

import fusedattn

features, time_embedding = torch.randn(2, 64, 32, 32), torch.randn(2, 128)
norm, film = torch.nn.GroupNorm(8, 64), fusedattn.FiLM(128, 64, activation="silu")

out = film(norm(features), time_embedding, residual=features)
out.mean().backward()
print("features", tuple(out.shape), "gradient of the conditioner", tuple(film.conditioner.weight.grad.shape))
