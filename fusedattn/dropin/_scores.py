"""What adapters of attention share: scores alone, or a step of a decoder over keys that stay."""

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedattn._dispatch import beside, is_eager
from fusedattn._dtypes import accumulation_dtype
from fusedattn._steps import are_recorded, version
from fusedattn.dropin._adapter import has_hooks
from fusedattn.modules.projected_keys import ProjectedKeys
from fusedattn.ops.additive_attention import attend
from fusedattn.ops.additive_scores import additive_scores
from fusedattn.ops.location_attention import attend as attend_located
from fusedattn.ops.location_attention import prepared

SCORES = "scores without the (B, Tq, Tk, D) tensor"
LEAST = 1 << 15  # (B, Tq, Tk, D) elements: smaller calls are the originals' (_small.py)
ATTENTION = "scores, softmax and context in one pass"
STEPS = f"{ATTENTION}; the gradients of keys once for all steps"
LOCATED = f"location features, {STEPS}"
LOCATED_SCORES = "location features and scores in one pass"
NAN_ROWS = "a row without a valid key gets context and weights 0, where the original gives NaN"
KEPT = "_fusedattn_keys"  # the attribute that holds what steps share


def scores(query: Tensor, key: Tensor, weight: Tensor, **options: Any) -> Tensor:
    """(B, Tq, Tk) of query (B, Tq, D), key (B, Tk, D) and weight (D,)."""
    return additive_scores(query, key, beside(query, weight), **options)


def pairs(query: Tensor, key: Tensor, *others: Tensor) -> int:
    """The size of the (B, Tq, Tk, D) tensor that (B, Tq, D) and (B, Tk, D) would make."""
    return query.shape[-2] * key.numel()


def score_weight(linear: nn.Linear) -> Tensor:
    """(D,) of the linear layer to one score. Its bias the softmax cancels: a gradient of zero, but not None."""
    weight = linear.weight.view(-1)
    return weight if linear.bias is None else torch.add(weight, linear.bias, alpha=0)


class _Kept(NamedTuple):
    sources: tuple
    versions: list
    keys: ProjectedKeys
    is_loop: bool  # whether a second step has come, which computes what a loop needs once


def kept_keys(
    module: nn.Module, sources: tuple, make: Callable[[], tuple], exponentials: bool = True
) -> ProjectedKeys:
    """The key, value and mask that ``make()`` makes of ``sources``, as the steps of a loop share them.

    They stay on the module for as long as it comes with the same sources, unedited. ``exponentials``: whether
    steps use those of the keys.
    """
    if torch.compiler.is_compiling():
        return ProjectedKeys(*make())
    kept: _Kept | None = getattr(module, KEPT, None)
    versions = [version(t) for t in sources if isinstance(t, Tensor)]
    if (
        kept is None
        or kept.versions != versions
        or any(a is not b for a, b in zip(kept.sources, sources, strict=True))
    ):
        keys, is_loop = ProjectedKeys(*make()), not exponentials
    elif kept.is_loop:
        return kept.keys
    else:
        keys, is_loop = kept.keys.with_exponentials(), True
    setattr(module, KEPT, _Kept(sources, versions, keys, is_loop))
    return keys


class _Projected(NamedTuple):
    base: Tensor  # whose view the memory is
    layer: nn.Module
    state: tuple
    keys: ProjectedKeys


def projected_keys(module: nn.Module, memory: Tensor, layer: nn.Module) -> ProjectedKeys:
    """Memory (B, T, K) and ``layer`` of it, which steps share that come with the same memory or its first batch
    elements, views of one tensor: a decoder that projects its memory in every step does so once.

    They stay on the module until a gradient has come back to them, another memory comes, or memory or layer were
    edited.
    """
    is_plain = type(layer) is nn.Linear and "forward" not in layer.__dict__ and not has_hooks(layer)
    if not is_plain or not is_eager() or memory.is_inference():
        return ProjectedKeys(layer(memory), memory)
    parameters: Any = [t for t in (layer.weight, layer.bias) if t is not None]
    device = memory.device.type
    state = (
        (memory.shape[1:], memory.stride(), memory.storage_offset(), version(memory), memory.requires_grad),
        *((t.data_ptr(), version(t), t.requires_grad) for t in parameters),
        (torch.is_grad_enabled(), torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)),
    )
    base = memory if memory._base is None else memory._base
    kept: _Projected | None = getattr(module, KEPT, None)
    if (
        kept is None
        or kept.base is not base
        or kept.layer is not layer
        or kept.state != state
        or len(kept.keys.key) < len(memory)
    ):
        keys = ProjectedKeys(layer(memory), memory)
        if keys.key.requires_grad:
            keys.key.register_hook(functools.partial(_forget, weakref.ref(module)))
        setattr(module, KEPT, _Projected(base, layer, state, keys))
        return keys
    return kept.keys if len(kept.keys.key) == len(memory) else kept.keys[: len(memory)]


def _forget(module: weakref.ref, _: Tensor) -> None:
    """The graph of what is kept is gone with its backward pass."""
    if (found := module()) is not None:
        found.__dict__.pop(KEPT, None)


def summed(context: Tensor, value: Tensor, weights: Tensor) -> Tensor:
    """The context in the dtype of ``(weights * value).sum()``, which autocast leaves wider than a product's."""
    return context.to(torch.promote_types(value.dtype, weights.dtype))


def _weights(linears: Sequence[nn.Linear]) -> Tensor:
    weights = [score_weight(linear) for linear in linears]
    return weights[0] if len(weights) == 1 else torch.stack(weights)


def step(
    query: Tensor, keys: ProjectedKeys, linears: Sequence[nn.Linear], **options: Any
) -> tuple[Tensor, Tensor]:
    """Context and weights of a query (B, 1, D) and one linear layer to a score, or (B, H, 1, D) and H of them."""
    keys, token = keys.in_dtype(query.dtype), None
    key_exp, key_bound = keys.exponentials(query.dtype)
    if are_recorded():
        sources = tuple(t for linear in linears for t in (linear.weight, linear.bias))
        weight, token = keys.shared().with_weight(sources, functools.partial(_weights, linears))
    else:
        weight = _weights(linears)
    result: Any = attend(
        query,
        keys.key,
        keys.value,
        beside(query, weight),
        mask=keys.mask,
        return_weights=True,
        key_exp=key_exp,
        key_bound=key_bound,
        token=token,
        **options,
    )
    return result


class Seeing(NamedTuple):
    """The layers by which scores see weights of steps before: ``dense`` makes D of what ``conv`` makes of them, or
    of themselves without it, and ``score`` one of the sum of D with query and key."""

    score: nn.Linear
    conv: Any
    dense: nn.Linear

    @property
    def sources(self) -> tuple[Tensor | None, ...]:
        conv_weight = None if self.conv is None else self.conv.weight
        return self.score.weight, self.score.bias, conv_weight, self.dense.weight

    @property
    def filters(self) -> Tensor:
        """(F, C, K)."""
        return self.dense.weight.new_ones(1, 1, 1) if self.conv is None else self.conv.weight.flatten(1, -2)


def _prepared(layers: Sequence[Seeing], dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    every = [prepared(score_weight(of.score), of.filters, of.dense.weight, dtype) for of in layers]
    if len(every) == 1:
        return every[0]
    return tuple(None if parts[0] is None else torch.cat(parts) for parts in zip(*every, strict=True))


def locate(
    query: Tensor, keys: ProjectedKeys, previous: Tensor, *layers: Seeing, **options: Any
) -> tuple[Tensor, Tensor]:
    """Context and weights of a query (B, D) that sees the weights of steps before, ``previous`` (B, C, T).

    Of H heads with layers each, all B are H times as many, head by head.
    """
    keys, wide = keys.in_dtype(query.dtype), accumulation_dtype(query.dtype)
    if are_recorded():
        sources = sum([of.sources for of in layers], ())
        parameters, token = keys.shared().with_parameters(sources, lambda: _prepared(layers, wide))
    else:
        parameters, token = _prepared(layers, wide), None
    first = layers[0]  # for the checks of shapes
    return attend_located(
        query,
        keys.key,
        keys.value,
        beside(query, first.score.weight.view(-1)),
        beside(query, previous),
        beside(query, first.filters),
        beside(query, first.dense.weight),
        mask=None if keys.mask is None else keys.mask.squeeze(1),
        parameters=parameters,
        token=token,
        **options,
    )
