"""Cases of location_attention."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

import fusedattn

from .contenders import Function
from .models import ModelCase


@dataclass(frozen=True)
class LocationStep(ModelCase):
    """A step that sees ``channels`` of previous weights through F filters of ``width`` places."""

    B: int
    T: int
    D: int
    values: int  # their width
    channels: int
    filters: int
    width: int

    @property
    def name(self) -> str:
        sizes = f"({self.B}, {self.T}, {self.D}), values {self.values}"
        return f"location step {sizes}, {self.filters} x {self.channels} x {self.width} {self.dtype}"

    def inputs(self) -> tuple[Tensor, ...]:
        B, T, D, C, N, K = self.B, self.T, self.D, self.channels, self.filters, self.width
        return (
            self.normal(B, D, seed=0),
            self.normal(B, T, D, seed=1),
            self.normal(B, T, self.values, seed=2),
            self.normal(D, seed=3, scale=D**-0.5),
            self.normal(B, C, T, seed=4).softmax(-1),
            self.normal(N, C, K, seed=5),
            self.normal(D, N, seed=6, scale=N**-0.5),
        )

    def grad_output(self) -> tuple[Tensor, Tensor]:
        return self.normal(self.B, self.values, seed=7), self.normal(self.B, self.T, seed=8)

    def summed_terms(self) -> dict[str, int]:
        terms = super().summed_terms()
        return {"output": terms["output"], "weights": terms["output"], **terms}

    def eager_bytes(self, mode: str) -> int:
        return 3 * self.itemsize * self.B * self.T * self.D

    def reduced(self) -> "LocationStep":
        return replace(self, B=min(self.B, 2))

    def eager(self) -> dict[str, Function]:
        return {"eager": attention_step}

    def fused(self) -> Function:
        return fusedattn.location_attention


def attention_step(query, key, value, weight, previous, conv_weight, location_weight) -> tuple[Tensor, Tensor]:
    features = F.conv1d(previous, conv_weight, padding=(conv_weight.shape[2] - 1) // 2).mT @ location_weight.mT
    weights = (torch.tanh(query[:, None] + key + features) @ weight).softmax(-1)
    return (weights[:, None] @ value)[:, 0], weights
