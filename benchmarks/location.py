"""Cases of location_attention."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusedattn

from .contenders import Function, Stepwise
from .models import Bound, ModelCase


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


@dataclass(frozen=True)
class LocationLoop(LocationStep):
    """A decoder's steps, each of which sees the weights of the one before and their sum over all."""

    steps: int = 200

    @property
    def name(self) -> str:
        return super().name.replace("step", f"loop of {self.steps}")

    def inputs(self) -> tuple[Tensor, ...]:
        _, key, value, weight, _, *filters = super().inputs()
        return self.normal(self.steps, self.B, self.D, seed=9), key, value, weight[None], *filters

    def grad_output(self) -> Tensor:
        return self.normal(self.steps, self.B, self.values, seed=7)

    def summed_terms(self) -> dict[str, int]:
        return ModelCase.summed_terms(self)

    def eager_bytes(self, mode: str) -> int:
        return super().eager_bytes(mode) * (1 if mode == "forward" else self.steps)

    def reduced(self) -> "LocationLoop":
        return replace(self, B=min(self.B, 2), steps=3)

    def eager(self) -> dict[str, Function]:
        return {"eager": LocationStepwise(attention_step)}

    def fused(self) -> Function:
        options = {"num_filters": self.filters, "kernel_size": self.width}
        module = fusedattn.LocationSensitiveAttention(self.D, self.D, self.D, **options)
        module.query_proj, module.key_proj, module.value_dim = nn.Identity(), nn.Identity(), self.values
        names = "weight", "location_conv.weight", "location_proj.weight"
        return Bound(LocationDecoder(module), *(f"attention.{name}" for name in names))


class LocationStepwise(Stepwise):
    def __call__(self, queries: Tensor, key: Tensor, value: Tensor, weight: Tensor, *filters: Tensor) -> Tensor:
        weights = total = key.new_zeros(key.shape[:2])
        contexts = []
        for query in queries:
            previous = torch.stack([weights, total], 1)
            context, weights = self.step(query, key, value, weight[0], previous, *filters)
            total = total + weights
            contexts.append(context)
        return torch.stack(contexts)


class LocationDecoder(nn.Module):
    def __init__(self, attention: fusedattn.LocationSensitiveAttention):
        super().__init__()
        self.attention = attention

    def forward(self, queries: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, state, contexts = self.attention.project_keys(key, value), None, []
        for query in queries:
            context, _, state = self.attention(query, keys, state)
            contexts.append(context)
        return torch.stack(contexts)
