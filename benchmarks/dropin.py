"""Modules of others as their authors wrote them against the same ones after ``fusedattn.dropin.replace``.

The originals are the formulas of tests/originals, with which adapters are tested.
"""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fusedattn import dropin

from . import contenders
from .cases import MODES
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
    """Of states and memory that are projected already: the attention alone."""

    def __init__(self, K: int, Q: int, D: int):
        super().__init__()
        self.attention = originals("tacotron2").Attention(Q, K, D, 32, 31)

    def forward(self, states: Tensor, memory: Tensor, processed: Tensor) -> Tensor:
        contexts = []
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
        state = "projected" if self.is_projected else f"state {self.Q}"
        sizes = f"({self.B}, {self.T}, {self.D}), memory {self.K}, {state}, {self.steps} steps"
        return f"dropin {self.adapter} {sizes} {self.dtype}"

    @property
    def is_projected(self) -> bool:
        return LOOPS[self.adapter] is TacotronLoop

    def module(self) -> nn.Module:
        return LOOPS[self.adapter](self.K, self.Q, self.D)

    def stripped(self, module: nn.Module) -> nn.Module:
        """Without the bias that the softmax cancels: by a gradient that is 0 no error can be measured."""
        for name in ("gvec", "full_att"):
            if hasattr(module.attention, name):
                getattr(module.attention, name).bias = None
        if self.is_projected:
            module.attention.query_layer = module.attention.memory_layer = nn.Identity()
        return module

    def data(self) -> tuple[tuple[int, ...], ...]:
        if self.is_projected:
            return (self.steps, self.B, self.D), (self.B, self.T, self.K), (self.B, self.T, self.D)
        return (self.steps, self.B, self.Q), (self.B, self.T, self.K)

    def grad_output(self) -> Tensor:
        return self.normal(self.steps, self.B, self.K, seed=99)

    def eager_bytes(self, mode: str) -> int:
        return 3 * self.itemsize * self.B * self.T * self.D * (1 if mode == "forward" else self.steps)

    def reduced(self) -> "ReplacedLoop":
        return replace(self, B=3, K=min(self.K, 512), steps=2)


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


# Networks: blocks that are conditioned


class Transformer(nn.Module):
    """Four of the blocks that diffusers' DiTTransformer2DModel has, six heads each."""

    def __init__(self, C: int):
        super().__init__()
        block = originals("diffusers").BasicTransformerBlock
        options = {"num_embeds_ada_norm": 16, "norm_type": "ada_norm_zero"}
        self.blocks = nn.ModuleList([block(C, 6, C // 6, **options) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(len(x))
        for block in self.blocks:
            x = block(x, timestep=steps, class_labels=steps)
        return x


class UNet(nn.Module):
    """One level down and up again, of guided-diffusion's residual blocks."""

    def __init__(self, C: int):
        super().__init__()
        block = originals("guided_diffusion").ResBlock
        options = {"emb_channels": 4 * C, "dropout": 0.0, "use_scale_shift_norm": True}
        down = [block(C, out_channels=C, **options), block(C, out_channels=2 * C, **options)]
        up = [block(2 * C, out_channels=2 * C, up=True, **options), block(2 * C, out_channels=C, **options)]
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(up)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for block in self.down:
            x = block(x, emb)
        x = nn.functional.avg_pool2d(x, 2)
        for block in self.up:
            x = block(x, emb)
        return x


class FilmedResNet(nn.Module):
    def __init__(self, C: int):
        super().__init__()
        self.blocks = nn.ModuleList([originals("film").FiLMedResBlock(C) for _ in range(4)])
        for block in self.blocks:  # running statistics would keep float32 beside the reference's float64
            block.bn1 = nn.BatchNorm2d(C, affine=False, track_running_stats=False)

    def forward(self, x: Tensor, conditions: Tensor) -> Tensor:
        made = conditions.unflatten(1, (4, 2, -1)).permute(1, 2, 0, 3)
        for block, (gammas, betas) in zip(self.blocks, made, strict=True):
            x = block(x, gammas, betas)
        return x


NETWORKS = {
    "diffusers.BasicTransformerBlock": Transformer,
    "guided_diffusion.ResBlock": UNet,
    "film.FiLMedResBlock": FilmedResNet,
}


@dataclass(frozen=True)
class ReplacedNetwork(ReplacedCase):
    """Blocks with all that is in them."""

    adapter: str  # one of NETWORKS
    C: int
    shape: tuple[int, ...]
    condition: int = 0  # its width

    @property
    def name(self) -> str:
        return f"dropin {self.adapter} {self.shape}, 4 blocks {self.dtype}"

    def module(self) -> nn.Module:
        return NETWORKS[self.adapter](self.C)

    def stripped(self, module: nn.Module) -> nn.Module:
        """Without biases that a softmax or a norm cancels: by a gradient that is 0 no error can be measured."""
        for name, layer in module.named_modules():
            if name.endswith((".to_k", ".conv1")):
                layer.bias = None
        return module

    def data(self) -> tuple[tuple[int, ...], ...]:
        return (self.shape, (self.shape[0], self.condition)) if self.condition else (self.shape,)

    def reduced(self) -> "ReplacedNetwork":
        return replace(self, shape=(2, *(size if size == self.C else 8 for size in self.shape[1:])))


# What stays as it is when a network is replaced; all else is parts that run fused, and what they need.
KEPT = ("convolution", "slow_conv", "mm", "scaled_dot", "gelu", "upsample", "pool2d", "embedding")


def shares(case: ReplacedCase, rounds: int = 5) -> dict[str, dict[str, float]]:
    """By mode, of a network: how many times faster it would be if the parts that run fused took no time
    (``allows``), and how many times faster these are (``parts``), by the operators' own times."""
    if not isinstance(case, ReplacedNetwork):
        return {}
    inputs, grad, found = case.inputs(), case.grad_output(), {}
    functions = {**case.eager(), contenders.FUSED: case.fused()}
    for mode in MODES:
        steps = [contenders.step(case, mode, name, f, inputs, grad) for name, f in functions.items()]
        times = [[_own_times(step) for step in steps] for _ in range(rounds + 1)][1:]
        kept = min(kept for of_round in times for kept, _ in of_round)
        eager, fused = (min(of_round[n][1] for of_round in times) for n in range(2))
        found[mode] = {"allows": (kept + eager) / kept, "parts": eager / fused}
    return found


def _own_times(step: Callable[[], object]) -> tuple[float, float]:
    """The time of the operators that are kept, and that of all others."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    kept = rest = 0.0
    for event in profiled.key_averages():
        if any(name in event.key for name in KEPT) and event.key.startswith("aten::"):
            kept += event.self_cpu_time_total
        else:
            rest += event.self_cpu_time_total
    return kept, rest


class FirstOf(nn.Module):
    """The first of what a module returns."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.module(*inputs)[0]
