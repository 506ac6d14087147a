"""Modules of others as their authors wrote them against the same ones after ``fusedattn.dropin.replace``.

The originals are the formulas of tests/originals, with which adapters are tested.
"""

import importlib
import sys
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType

import torch
from torch import Tensor, nn

from fusedattn import dropin

from .contenders import Function
from .machine import ROOT
from .models import Bound, ModuleCase


@cache
def originals(package: str) -> ModuleType:
    """The formulas of a package's classes."""
    sys.path.append(str(ROOT / "tests"))
    return importlib.import_module(f"originals.{package}")


@dataclass(frozen=True)
class ReplacedCase(ModuleCase):
    """A subclass has the ``module`` that is replaced, and what it takes and returns."""

    compiles_eager = False  # many keep something between steps

    def stripped(self, module: nn.Module) -> nn.Module:
        """What is measured of the module, as it is or replaced."""
        return module

    def parameters(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(p.shape) for p in self.stripped(self.module()).parameters())

    def eager(self) -> dict[str, Function]:
        return {"eager": Bound.to_all(self.stripped(self.module()))}

    def fused(self) -> Function:
        module = self.module()
        dropin.replace(module, strict=True)
        return Bound.to_all(self.stripped(module))


# Decoders: their attention, step after step, of given states


class EspnetLoop(nn.Module):
    def __init__(self, K: int, Q: int, D: int):
        super().__init__()
        self.attention = originals("espnet").AttLoc(K, Q, D, 10, 100)

    def forward(self, states: Tensor, memory: Tensor) -> Tensor:
        self.attention.reset()
        weights, contexts = None, []
        for state in states:
            context, weights = self.attention(memory, [memory.shape[1]] * len(memory), state, weights)
            contexts.append(context)
        return torch.stack(contexts)


class TacotronLoop(nn.Module):
    def __init__(self, K: int, Q: int, D: int):
        super().__init__()
        self.attention = originals("tacotron2").Attention(Q, K, D, 32, 31)

    def forward(self, states: Tensor, memory: Tensor) -> Tensor:
        processed, contexts = self.attention.memory_layer(memory), []
        weights = total = memory.new_zeros(memory.shape[:2])
        for state in states:
            previous = torch.stack([weights, total], 1)
            context, weights = self.attention(state, memory, processed, previous, None)
            total = total + weights
            contexts.append(context)
        return torch.stack(contexts)


class CaptioningLoop(nn.Module):
    def __init__(self, K: int, Q: int, D: int):
        super().__init__()
        self.attention = originals("captioning").Attention(K, Q, D)

    def forward(self, states: Tensor, memory: Tensor) -> Tensor:
        return torch.stack([self.attention(memory[: len(state)], state)[0] for state in states])


LOOPS = {"espnet.AttLoc": EspnetLoop, "tacotron2.Attention": TacotronLoop, "captioning.Attention": CaptioningLoop}


@dataclass(frozen=True)
class ReplacedLoop(ReplacedCase):
    """An attention with its projections."""

    adapter: str  # one of LOOPS
    B: int
    T: int
    K: int  # width of the memory
    Q: int  # width of the state
    D: int
    steps: int

    @property
    def name(self) -> str:
        sizes = f"({self.B}, {self.T}, {self.D}), memory {self.K}, state {self.Q}, {self.steps} steps"
        return f"dropin {self.adapter} {sizes} {self.dtype}"

    def module(self) -> nn.Module:
        return LOOPS[self.adapter](self.K, self.Q, self.D)

    def stripped(self, module: nn.Module) -> nn.Module:
        """Without the bias that the softmax cancels: by a gradient that is 0 no error can be measured."""
        for name in ("gvec", "full_att"):
            if hasattr(module.attention, name):
                getattr(module.attention, name).bias = None
        return module

    def data(self) -> tuple[tuple[int, ...], ...]:
        return (self.steps, self.B, self.Q), (self.B, self.T, self.K)

    def grad_output(self) -> Tensor:
        return self.normal(self.steps, self.B, self.K, seed=99)

    def eager_bytes(self, mode: str) -> int:
        return 3 * self.itemsize * self.B * self.T * self.D * (1 if mode == "forward" else self.steps)

    def reduced(self) -> "ReplacedLoop":
        return replace(self, B=3, steps=3)


@dataclass(frozen=True)
class ReplacedTranslation(ReplacedCase):
    """GNMT's attention to all steps at once, without its projections."""

    B: int
    Tq: int
    Tk: int
    D: int

    @property
    def name(self) -> str:
        return f"dropin gnmt.BahdanauAttention ({self.B}, {self.Tq}, {self.Tk}, {self.D}) {self.dtype}"

    def module(self) -> nn.Module:
        return originals("gnmt").BahdanauAttention(self.D, self.D, self.D, batch_first=True)

    def stripped(self, module: nn.Module) -> nn.Module:
        module.linear_q = module.linear_k = nn.Identity()
        return FirstOf(module)

    def data(self) -> tuple[tuple[int, ...], ...]:
        return (self.B, self.Tq, self.D), (self.B, self.Tk, self.D)

    def eager_bytes(self, mode: str) -> int:
        return self.itemsize * self.B * self.Tq * self.Tk * self.D * (2 if mode == "forward" else 3)


@dataclass(frozen=True)
class ReplacedPool(ReplacedCase):
    """torchmil's gated pooling of a bag, which is that of ABMIL."""

    T: int
    K: int  # width of the instances
    D: int

    @property
    def name(self) -> str:
        return f"dropin torchmil.AttentionPool (1, {self.T}, {self.K}), D {self.D} {self.dtype}"

    def module(self) -> nn.Module:
        return originals("torchmil").AttentionPool(self.K, self.D, gated=True)

    def data(self) -> tuple[tuple[int, ...], ...]:
        return ((1, self.T, self.K),)

    def grad_output(self) -> Tensor:
        return self.normal(1, self.K, seed=99)

    def reduced(self) -> "ReplacedPool":
        return replace(self, T=min(self.T, 500))


class FirstOf(nn.Module):
    """The first of what a module returns."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.module(*inputs)[0]
