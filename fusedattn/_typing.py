"""What type checkers are told beyond the signatures: what a call returns by the flags that it passes.

Imported by nobody at run time but for :func:`attention_function`, which returns its argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict, overload

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AttentionOptions(TypedDict, total=False):
    """Of :func:`fusedattn.additive_attention`, but those that decide what it returns."""

    mask: Tensor | None
    bias: Tensor | None
    key_lengths: Tensor | None
    is_causal: bool
    window_size: tuple[int, int] | None
    window_center: Tensor | None
    scale: float
    softcap: float | None
    activation: str
    negative_slope: float
    normalizer: str | Callable[[Tensor], Tensor]
    dropout_p: float
    generator: torch.Generator | None
    backend: str


class AttentionFunction(Protocol):
    """context, then weights and lse if asked for."""

    @overload
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        weight: Tensor,
        *,
        return_weights: Literal[False] = False,
        return_lse: Literal[False] = False,
        **options: Unpack[AttentionOptions],
    ) -> Tensor: ...
    @overload
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        weight: Tensor,
        *,
        return_weights: Literal[True],
        return_lse: Literal[False] = False,
        **options: Unpack[AttentionOptions],
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        weight: Tensor,
        *,
        return_weights: Literal[False] = False,
        return_lse: Literal[True],
        **options: Unpack[AttentionOptions],
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        weight: Tensor,
        *,
        return_weights: Literal[True],
        return_lse: Literal[True],
        **options: Unpack[AttentionOptions],
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    @overload
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        weight: Tensor,
        *,
        return_weights: bool = False,
        return_lse: bool = False,
        **options: Unpack[AttentionOptions],
    ) -> Tensor | tuple[Tensor, ...]: ...


def attention_function(function: Callable[..., Any]) -> AttentionFunction:
    """Decorator: has the type above."""
    return function


class ScoreOptions(TypedDict, total=False):
    """Of the constructors of modules with one head that cap the scores in their own way."""

    normalize: bool
    activation: str
    negative_slope: float
    backend: str
    device: torch.device | str | int | None
    dtype: torch.dtype | None


class CappedScoreOptions(ScoreOptions, total=False):
    """Of the constructors of the others."""

    scale: float
    softcap: float | None
    normalizer: str | Callable[[Tensor], Tensor]


class HidingOptions(TypedDict, total=False):
    """Of modules, which keys are hidden."""

    mask: Tensor | None
    key_lengths: Tensor | None


class StepOptions(HidingOptions, total=False):
    """Of :meth:`fusedattn.BahdanauAttention.forward`, but ``return_weights``."""

    bias: Tensor | None
    window_size: tuple[int, int] | None
    window_center: Tensor | None


class ModuleOptions(StepOptions, total=False):
    """Of :meth:`fusedattn.AdditiveAttention.forward`, but ``return_weights``."""

    is_causal: bool
