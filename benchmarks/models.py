"""Sizes of real models as cases: attention, FiLM, modules, decoders that call their attention once per step."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusedattn

from . import contenders
from .contenders import Function, Stepwise


@dataclass(frozen=True)
class ModelCase:
    """What the cases below share. All inputs are leaves: a training step returns the gradient of each."""

    model: str  # where such sizes occur
    dtype: str
    unit = ""
    compiles_eager = True  # whether the code that ours is compared with is measured compiled, too
    compiles_fused = False  # whether our code is measured inside a compiled program, too

    def work(self, mode: str) -> float:
        return 0.0  # times are compared, not rates

    def eager_bytes(self, mode: str) -> int:
        """Of the large tensors that eager code keeps."""
        return 0

    def reduced(self) -> "ModelCase":
        """A smaller one, of which the results are checked."""
        raise NotImplementedError

    def blocks(self) -> Iterator[tuple]:
        yield tuple(... for _ in self.inputs())

    def summed_terms(self) -> dict[str, int]:
        """As many terms as that are added up at most for each result."""
        sizes = [x.numel() for x in self.inputs()]
        return {name: max(sizes) for name in ("output", *(f"grad {n}" for n in range(len(sizes))))}

    def normal(self, *shape: int, seed: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return (scale * x).to(getattr(torch, self.dtype))

    @property
    def itemsize(self) -> int:
        return getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class Attention(ModelCase):
    """With Dv = D; heads are made by transposing (B, T, H, D), as projections leave them."""

    B: int
    Tq: int
    Tk: int
    D: int
    heads: int | None = None
    activation: str = "tanh"  # other ones without heads
    biased: bool = False  # a bias (Tq, Tk), without heads

    @property
    def name(self) -> str:
        heads = f" {self.heads} heads" if self.heads else ""
        activation = "" if self.activation == "tanh" else f" {self.activation}"
        bias = " bias" if self.biased else ""
        return f"attention ({self.B}, {self.Tq}, {self.Tk}, {self.D}){heads}{activation}{bias} {self.dtype}"

    def _rows(self, T: int, seed: int) -> Tensor:
        if self.heads is None:
            return self.normal(self.B, T, self.D, seed=seed)
        return self.normal(self.B, T, self.heads, self.D, seed=seed).transpose(1, 2)

    def inputs(self) -> tuple[Tensor, ...]:
        shape = (self.D,) if self.heads is None else (self.heads, self.D)
        weight = self.normal(*shape, seed=3, scale=self.D**-0.5)
        bias = (self.normal(self.Tq, self.Tk, seed=5),) if self.biased else ()
        return self._rows(self.Tq, 0), self._rows(self.Tk, 1), self._rows(self.Tk, 2), weight, *bias

    def grad_output(self) -> Tensor:
        return self._rows(self.Tq, 4)

    def eager_bytes(self, mode: str) -> int:
        scored = self.B * (self.heads or 1) * self.Tq * self.Tk * self.D
        return self.itemsize * scored * (2 if mode == "forward" else 3)

    def reduced(self) -> "Attention":
        return replace(self, B=min(self.B, 2), Tq=min(self.Tq, 16), Tk=min(self.Tk, 2000))

    def eager(self) -> dict[str, Function]:
        if self.heads is None:
            phi = getattr(torch, self.activation)
            forms = (contenders.attention_matmul, contenders.attention_sum)
            return {name: partial(form, phi=phi) for name, form in zip(contenders.EAGER, forms, strict=True)}
        return {"eager": attention_of_heads}

    def fused(self) -> Function:
        attend = partial(fusedattn.additive_attention, activation=self.activation)
        return (lambda *inputs: attend(*inputs[:4], bias=inputs[4])) if self.biased else attend


def attention_of_heads(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> Tensor:
    features = torch.tanh(query[:, :, :, None] + key[:, :, None])
    return (features * weight[:, None, None]).sum(-1).softmax(-1) @ value


@dataclass(frozen=True)
class WindowedAttention(Attention):
    """To keys that are no farther away than ``window``; PyTorch has a mask for that."""

    window: int = 64

    @property
    def name(self) -> str:
        return f"window {self.window} {super().name}"

    def eager(self) -> dict[str, Function]:
        return {"eager": partial(windowed_in_eager, window=self.window)}

    def fused(self) -> Function:
        return partial(fusedattn.additive_attention, window_size=(self.window, self.window))


def windowed_in_eager(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, window: int) -> Tensor:
    far = torch.arange(key.shape[1])[None] - torch.arange(query.shape[1])[:, None]
    scores = torch.tanh(query[:, :, None] + key[:, None]) @ weight
    return scores.masked_fill(far.abs() > window, -torch.inf).softmax(-1) @ value


@dataclass(frozen=True)
class HardAttention(Attention):
    """One key of each query, sampled. Of the results the entropy alone is the same for all, whatever they draw."""

    @property
    def name(self) -> str:
        return f"hard {super().name}"

    def grad_output(self) -> Tensor:
        return self.normal(self.B, self.Tq, seed=4)

    def eager(self) -> dict[str, Function]:
        return {"eager": sampled_in_eager}

    def fused(self) -> Function:
        return sampled


def sampled_in_eager(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> Tensor:
    log_p = (torch.tanh(query[:, :, None] + key[:, None]) @ weight).log_softmax(-1)
    p = log_p.exp()
    index = torch.multinomial(p.detach().flatten(0, 1), 1).view(*p.shape[:2], 1)
    context = value.gather(1, index.expand(-1, -1, value.shape[-1]))
    return _entropy_of(context, log_p.gather(-1, index).squeeze(-1), -(p * log_p).sum(-1))


def sampled(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> Tensor:
    found = fusedattn.hard_additive_attention(query, key, value, weight)
    return _entropy_of(found.context, found.log_prob, found.entropy)


def _entropy_of(context: Tensor, log_prob: Tensor, entropy: Tensor) -> Tensor:
    """In a sum with all results: torch.compile leaves out what nobody reads."""
    return entropy + 0.0 * (log_prob + context.sum(-1))


def fewer(x: tuple[int, ...], channel_dim: int) -> tuple[int, ...]:
    """A shape with all its channels, and with few samples of few places."""
    kept = {0: min(x[0], 2), channel_dim % len(x): x[channel_dim]}
    return tuple(kept.get(d, min(n, 96)) for d, n in enumerate(x))


@dataclass(frozen=True)
class Film(ModelCase):
    x: tuple[int, ...]
    channel_dim: int = 1
    shared: bool = False  # gamma and beta are (C,), not (B, C)
    activation: str | None = None
    residual: bool = False

    @property
    def name(self) -> str:
        options = [self.activation or "", "residual" if self.residual else "", "shared" if self.shared else ""]
        return " ".join(["film", str(self.x), *filter(None, options), self.dtype])

    def inputs(self) -> tuple[Tensor, ...]:
        C = self.x[self.channel_dim]
        shape = (C,) if self.shared else (self.x[0], C)
        tensors = self.normal(*self.x, seed=0), self.normal(*shape, seed=1), self.normal(*shape, seed=2)
        return (*tensors, self.normal(*self.x, seed=3)) if self.residual else tensors

    def grad_output(self) -> Tensor:
        return self.normal(*self.x, seed=4)

    def reduced(self) -> "Film":
        return replace(self, x=fewer(self.x, self.channel_dim))

    def eager(self) -> dict[str, Function]:
        shape = [1] * len(self.x)
        shape[self.channel_dim] = self.x[self.channel_dim]
        shape[0] = 1 if self.shared else self.x[0]
        return {"eager": partial(modulated, shape=shape, activation=self.activation)}

    def fused(self) -> Function:
        def call(x: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor | None = None) -> Tensor:
            options = {"channel_dim": self.channel_dim, "activation": self.activation}
            return fusedattn.film(x, gamma, beta, residual=residual, **options)

        return call


def modulated(x, gamma, beta, residual=None, *, shape: list[int], activation: str | None) -> Tensor:
    y = (x * gamma.view(shape)).add_(beta.view(shape))
    if activation is not None:
        y = getattr(F, activation)(y, inplace=True)
    return y if residual is None else y + residual


class Bound:
    """A module as a function of its inputs and then its parameters of these names."""

    def __init__(self, module: nn.Module, *names: str):
        self._module, self._places = module, []
        for name in names:
            owner, _, parameter = name.rpartition(".")
            owner = module.get_submodule(owner)
            delattr(owner, parameter)
            self._places.append((owner.__dict__, parameter))

    @classmethod
    def to_all(cls, module: nn.Module) -> "Bound":
        """To all of its parameters."""
        return cls(module, *(name for name, _ in module.named_parameters()))

    def __call__(self, *tensors: Tensor) -> Tensor:
        count = len(tensors) - len(self._places)
        for (attributes, name), parameter in zip(self._places, tensors[count:], strict=True):
            attributes[name] = parameter
        return self._module(*tensors[:count])


@dataclass(frozen=True)
class Loop(ModelCase):
    """A decoder's attention, step after step over the same keys; projections are left out on both sides."""

    B: int
    T: int
    D: int
    values: int  # their width
    steps: int

    @property
    def name(self) -> str:
        sizes = f"({self.B}, {self.T}, {self.D}), values {self.values}, {self.steps} steps"
        return f"loop {sizes} {self.dtype}"

    def inputs(self) -> tuple[Tensor, ...]:
        B, T, D = self.B, self.T, self.D
        key, value = self.normal(B, T, D, seed=1), self.normal(B, T, self.values, seed=2)
        return self.normal(self.steps, B, D, seed=0), key, value, self.normal(1, D, seed=3, scale=D**-0.5)

    def grad_output(self) -> Tensor:
        return self.normal(self.steps, self.B, self.values, seed=4)

    def eager_bytes(self, mode: str) -> int:
        return 2 * self.itemsize * self.B * self.T * self.D * (1 if mode == "forward" else self.steps)

    def reduced(self) -> "Loop":
        return replace(self, B=min(self.B, 2), steps=3)

    def eager(self) -> dict[str, Function]:
        return {"eager": Stepwise(decoder_step)}

    def fused(self) -> Function:
        module = fusedattn.BahdanauAttention(self.D, self.D, self.D)
        module.query_proj, module.key_proj, module.value_dim = nn.Identity(), nn.Identity(), self.values
        return Bound(DecoderLoop(module), "attention.weight")


def decoder_step(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> Tensor:
    p = (torch.tanh(query[:, None] + key) @ weight[0]).softmax(-1)
    return (p[:, None] @ value)[:, 0]


class DecoderLoop(nn.Module):
    def __init__(self, attention: fusedattn.BahdanauAttention):
        super().__init__()
        self.attention = attention

    def forward(self, queries: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys = self.attention.project_keys(key, value)
        return torch.stack([self.attention(query, keys, return_weights=False) for query in queries])


class LayerCase(ModelCase):
    """What has parameters, against the same lines by hand, ``by_hand``: a function of data and parameters."""

    def data(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of what it is called with, of which the first is the result's."""
        raise NotImplementedError

    def parameters(self) -> tuple[tuple[int, ...], ...]:
        """Their shapes."""
        raise NotImplementedError

    def inputs(self) -> tuple[Tensor, ...]:
        parameters = self.parameters()
        scales = [1.0 for _ in self.data()] + [prod(shape[1:] or shape) ** -0.5 for shape in parameters]
        shapes = [*self.data(), *parameters]
        return tuple(
            self.normal(*shape, seed=n, scale=scale)
            for n, (shape, scale) in enumerate(zip(shapes, scales, strict=True))
        )

    def grad_output(self) -> Tensor:
        return self.normal(*self.data()[0], seed=99)

    def reduced(self) -> "LayerCase":
        return replace(self, B=2)

    def eager(self) -> dict[str, Function]:
        return {"eager": self.by_hand}


class ModuleCase(LayerCase):
    """A module with its projections."""

    def module(self) -> nn.Module:
        raise NotImplementedError

    def parameters(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(p.shape) for p in self.module().parameters())

    def fused(self) -> Function:
        return Bound.to_all(self.module())


@dataclass(frozen=True)
class FilmModule(ModuleCase):
    B: int
    C: int
    N: int
    condition: int

    @property
    def name(self) -> str:
        return f"module FiLM ({self.B}, {self.C}, {self.N}, {self.N}), condition {self.condition} {self.dtype}"

    def module(self) -> nn.Module:
        return fusedattn.FiLM(self.condition, self.C)

    def data(self) -> tuple[tuple[int, ...], ...]:
        return (self.B, self.C, self.N, self.N), (self.B, self.condition)

    @staticmethod
    def by_hand(x: Tensor, condition: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        gamma, beta = F.linear(condition, weight, bias)[:, :, None, None].chunk(2, 1)
        return (x * (1 + gamma)).add_(beta)


@dataclass(frozen=True)
class MultiheadModule(ModuleCase):
    B: int
    Tq: int
    Tk: int
    width: int
    heads: int

    @property
    def name(self) -> str:
        sizes = f"({self.B}, {self.Tq}, {self.Tk}, {self.width})"
        return f"module AdditiveAttention {sizes} {self.heads} heads {self.dtype}"

    def module(self) -> nn.Module:
        width, heads = self.width, self.heads
        return fusedattn.AdditiveAttention(width, width, width, num_heads=heads, context_dim=width, out_dim=width)

    def data(self) -> tuple[tuple[int, ...], ...]:
        return (self.B, self.Tq, self.width), (self.B, self.Tk, self.width)

    def eager_bytes(self, mode: str) -> int:
        return self.itemsize * self.B * self.Tq * self.Tk * self.width * (2 if mode == "forward" else 3)

    @staticmethod
    def by_hand(query, key, weight, to_q, q_bias, to_k, to_v, v_bias, to_out, out_bias) -> Tensor:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (weight.shape[0], -1)).transpose(1, 2)

        q, k = heads(F.linear(query, to_q, q_bias)), heads(F.linear(key, to_k))
        context = attention_of_heads(q, k, heads(F.linear(key, to_v, v_bias)), weight)
        return F.linear(context.transpose(1, 2).flatten(2), to_out, out_bias)
