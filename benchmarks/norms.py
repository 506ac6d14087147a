"""Cases of norm_film and gated_film, as models have them."""

from dataclasses import dataclass, replace
from functools import partial
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

import fusedattn

from .contenders import Function
from .models import ModelCase, fewer


class StreamCase(ModelCase):
    """Bound by the tensors as large as x that go through it."""

    x: tuple[int, ...]

    def streams(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """How many of them the forward and the backward pass must (read, write)."""
        raise NotImplementedError

    def _bytes(self, mode: str, way: int) -> int:
        forward, backward = self.streams()
        count = forward[way] + (backward[way] if mode == "training" else 0)
        return int(self.itemsize * prod(self.x) * count)

    def bytes_read(self, mode: str) -> int:
        return self._bytes(mode, 0)

    def bytes_written(self, mode: str) -> int:
        return self._bytes(mode, 1)

    def bytes_moved(self, mode: str) -> int:
        return self.bytes_read(mode) + self.bytes_written(mode)


@dataclass(frozen=True)
class NormFilm(StreamCase):
    """A norm with its own weight and bias (``affine``) or without, then gamma and beta of each batch element, or
    of each place (``per_place``); ``gated``: of a residual and the gated x, returned too."""

    norm: str
    x: tuple[int, ...]
    channel_dim: int = -1
    num_groups: int | None = None
    affine: bool = False
    per_place: bool = False
    activation: str | None = None
    residual: bool = False
    gated: bool = False
    channels_last: bool = False

    @property
    def name(self) -> str:
        flags = ("affine", "per_place", "residual", "gated", "channels_last")
        options = [self.activation or "", *(flag.replace("_", " ") for flag in flags if getattr(self, flag))]
        return " ".join(["norm", self.norm, str(self.x), *filter(None, options), self.dtype])

    def _features(self, seed: int) -> Tensor:
        t = self.normal(*self.x, seed=seed)
        return t.contiguous(memory_format=torch.channels_last) if self.channels_last else t

    def inputs(self) -> tuple[Tensor, ...]:
        B, C = self.x[0], self.x[self.channel_dim]
        shape = self.x if self.per_place else (B, C)
        given = [self._features(0), self.normal(*shape, seed=1), self.normal(*shape, seed=2)]
        if self.affine:
            given += [self.normal(C, seed=3), self.normal(C, seed=4)]
        if self.gated:
            given += [self._features(5), self.normal(B, C, seed=6)]
        return (*given, self._features(7)) if self.residual else tuple(given)

    def grad_output(self):
        return (self._features(8), self._features(9)) if self.gated else self._features(8)

    def summed_terms(self) -> dict[str, int]:
        terms = super().summed_terms()
        return {"output": terms["output"], "h": terms["output"], **terms} if self.gated else terms

    def eager_bytes(self, mode: str) -> int:
        return self.itemsize * prod(self.x) * (4 if mode == "forward" else 8)

    def streams(self) -> tuple[tuple[float, float], tuple[float, float]]:
        forward = 1 + 2 * self.per_place + self.residual + self.gated, 1 + self.gated
        # dy, and x or h; gated: x and dh, too; gamma, and beta where an activation is computed anew
        reads = 2 + 2 * self.gated + self.per_place * (1 + (self.activation is not None))
        return forward, (reads, 1 + self.gated + 2 * self.per_place)

    def reduced(self) -> "NormFilm":
        return replace(self, x=fewer(self.x, self.channel_dim))

    def _parts(self, given: tuple[Tensor, ...]) -> dict[str, Tensor]:
        names = [
            *(("weight", "bias") if self.affine else ()),
            *(("pre_residual", "pre_gate") if self.gated else ()),
        ]
        return dict(zip([*names, *(("residual",) if self.residual else ())], given, strict=True))

    def eager(self) -> dict[str, Function]:
        def call(x: Tensor, gamma: Tensor, beta: Tensor, *given: Tensor):
            parts = self._parts(given)
            shape = [1] * x.dim()
            shape[0], shape[self.channel_dim] = x.shape[0], x.shape[self.channel_dim]
            h = parts["pre_residual"] + parts["pre_gate"].view(shape) * x if self.gated else x
            y = normed(h, self.norm, self.num_groups, parts.get("weight"), parts.get("bias"))
            if not self.per_place:
                gamma, beta = gamma.view(shape), beta.view(shape)
            y = y * (1 + gamma) + beta
            if self.activation is not None:
                y = getattr(F, self.activation)(y)
            y = y + parts["residual"] if self.residual else y
            return (y, h) if self.gated else y

        return {"eager": call}

    def fused(self) -> Function:
        options = {"norm": self.norm, "channel_dim": self.channel_dim, "num_groups": self.num_groups}

        def call(x: Tensor, gamma: Tensor, beta: Tensor, *given: Tensor):
            return fusedattn.norm_film(
                x, gamma, beta, gamma_offset=1.0, activation=self.activation, **self._parts(given), **options
            )

        return call


@dataclass(frozen=True)
class GatedFilm(StreamCase):
    """Under a condition of each batch element, or of each place (``per_place``)."""

    x: tuple[int, ...]  # with 2C channels
    channel_dim: int = 1
    per_place: bool = False

    @property
    def name(self) -> str:
        return " ".join(["gated", str(self.x), *(["per place"] if self.per_place else []), self.dtype])

    def inputs(self) -> tuple[Tensor, ...]:
        shape = self.x if self.per_place else (self.x[0], self.x[self.channel_dim])
        return self.normal(*self.x, seed=0), self.normal(*shape, seed=1)

    def streams(self) -> tuple[tuple[float, float], tuple[float, float]]:
        return (1 + self.per_place, 0.5), (1.5 + self.per_place, 1 + self.per_place)

    def grad_output(self) -> Tensor:
        shape = [n // 2 if d == self.channel_dim else n for d, n in enumerate(self.x)]
        return self.normal(*shape, seed=2)

    def eager_bytes(self, mode: str) -> int:
        return self.itemsize * prod(self.x) * (3 if mode == "forward" else 6)

    def reduced(self) -> "GatedFilm":
        return replace(self, x=fewer(self.x, self.channel_dim))

    def eager(self) -> dict[str, Function]:
        def call(x: Tensor, condition: Tensor) -> Tensor:
            if not self.per_place:
                shape = [1] * x.dim()
                shape[0], shape[self.channel_dim] = condition.shape
                condition = condition.view(shape)
            a, b = (x + condition).chunk(2, self.channel_dim)
            return torch.tanh(a) * torch.sigmoid(b)

        return {"eager": call}

    def fused(self) -> Function:
        return partial(fusedattn.gated_film, channel_dim=self.channel_dim)


def normed(h: Tensor, norm: str, num_groups: int | None, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if norm == "layer":
        return F.layer_norm(h, h.shape[-1:], weight, bias)
    if norm == "rms":
        return F.rms_norm(h, h.shape[-1:], weight, 1e-5)
    if norm == "group":
        return F.group_norm(h, num_groups, weight, bias)
    if norm == "instance":
        return F.instance_norm(h, weight=weight, bias=bias)
    return F.batch_norm(h, None, None, weight, bias, training=True)
