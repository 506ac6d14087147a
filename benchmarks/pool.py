"""Cases of attention_pool."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import fusedattn

from .contenders import Function
from .norms import StreamCase


@dataclass(frozen=True)
class Pool(StreamCase):
    """Gated attention over the instances of one bag."""

    x: tuple[int, ...]  # (1, T, Dv), the values
    D: int

    @property
    def name(self) -> str:
        return f"pool {self.x} D {self.D} {self.dtype}"

    def inputs(self) -> tuple[Tensor, ...]:
        hidden, gate = (self.normal(*self.x[:2], self.D, seed=seed) for seed in (0, 1))
        return hidden, self.normal(*self.x, seed=2), self.normal(self.D, seed=3, scale=self.D**-0.5), gate

    def streams(self) -> tuple[tuple[float, float], tuple[float, float]]:
        every = 1 + 2 * self.D / self.x[2]  # hidden and gate, too
        return (every, 0), (every, every)

    def grad_output(self) -> Tensor:
        return self.normal(1, self.x[2], seed=4)

    def eager_bytes(self, mode: str) -> int:
        return self.itemsize * self.x[1] * (3 * self.D if mode == "forward" else 5 * self.D + self.x[2])

    def reduced(self) -> "Pool":
        return replace(self, x=(1, min(self.x[1], 2000), self.x[2]))

    def eager(self) -> dict[str, Function]:
        return {"eager": pooled}

    def fused(self) -> Function:
        return fusedattn.attention_pool


def pooled(hidden: Tensor, value: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    scores = (torch.tanh(hidden) * torch.sigmoid(gate)) @ weight
    return (scores.softmax(-1).unsqueeze(1) @ value).squeeze(1)
