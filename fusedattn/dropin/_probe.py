"""Whether a replaced module answers as the original does, found out on a small input.

Both run on copies without hooks, on the CPU in float64, with parameters drawn at random: half precision, zero
initialisation and the meta device hide nothing, and the module itself is neither called nor changed.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from fusedattn.dropin._adapter import Adapter, Sizes

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)


class _Copy:
    """Copies a module and all in it, with values of their own for parameters; what is shared stays so."""

    def __init__(self, is_training: bool):
        self._is_training = is_training
        self._generator = torch.Generator("cpu").manual_seed(0)
        self._made: dict[int, Any] = {}

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64, device="cpu")

    def module(self, module: nn.Module, cls: type[nn.Module] | None = None) -> nn.Module:
        if id(module) in self._made:
            return self._made[id(module)]
        copy = object.__new__(cls or type(module))
        self._made[id(module)] = copy
        children = {name: child and self.module(child) for name, child in module._modules.items()}
        copy.__dict__.update(
            module.__dict__,
            **{name: type(module.__dict__[name])() for name in _HOOKS},
            training=self._is_training,
            _parameters={name: self._parameter(t) for name, t in module._parameters.items()},
            _buffers={name: self._buffer(t) for name, t in module._buffers.items()},
            _modules=children,
        )
        return copy

    def _parameter(self, t: nn.Parameter | None) -> nn.Parameter | None:
        if t is not None and id(t) not in self._made:
            fan_in = t[0].numel() if t.dim() > 1 and t.shape[0] else 1
            self._made[id(t)] = nn.Parameter(self.draw(*t.shape) / math.sqrt(fan_in), requires_grad=False)
        return None if t is None else self._made[id(t)]

    def _buffer(self, t: Tensor | None) -> Tensor | None:
        if t is None or t.is_floating_point():
            return None if t is None else 0.5 + self.draw(*t.shape).square()  # variances are among them
        return torch.zeros(t.shape, dtype=t.dtype) if t.is_meta else t.cpu().clone()


def answers(module: nn.Module, adapter: Adapter, sizes: Sizes, cls: type[nn.Module]) -> list[Any]:
    """What copies of the module, as instances of ``cls``, answer to a probe in evaluation and in training."""
    found = []
    for is_training in (False, True):
        copy = _Copy(is_training)
        probed = copy.module(module, cls)
        with torch.no_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False), torch.random.fork_rng([]):
            torch.manual_seed(0)  # of dropout
            found += [adapter.probe(probed, sizes, copy.draw), list(probed.buffers())]
    return found


def difference(expected, found, tolerance: float) -> str | None:
    """How two answers differ, in words; None where they do not, but for ``tolerance`` of the largest value."""
    expected, structure = _pytree.tree_flatten(expected)
    found, other = _pytree.tree_flatten(found)
    if structure != other:
        return f"answers a probe with {structure}, fused {other}"
    for a, b in zip(expected, found, strict=True):
        if not isinstance(a, Tensor):
            if a != b:
                return f"answers a probe with {a!r}, fused {b!r}"
        elif a.shape != b.shape or a.dtype != b.dtype:
            return f"answers a probe with {tuple(a.shape)} {a.dtype}, fused {tuple(b.shape)} {b.dtype}"
        elif a.numel():
            error, largest = float((a.double() - b.double()).abs().max()), float(a.double().abs().max())
            if not error <= tolerance * max(largest, 1.0):
                return f"answers a probe differently: by {error:.2g}, where the largest value is {largest:.2g}"
    return None
