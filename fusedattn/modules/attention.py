"""Modules of additive attention: projections around :func:`fusedattn.additive_attention`."""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.overrides import has_torch_function_variadic

from fusedattn import _normalizers, _scores
from fusedattn._dispatch import beside, check_backend, is_eager, not_scriptable
from fusedattn._steps import are_recorded
from fusedattn.modules.projected_keys import ProjectedKeys, center_over_heads, over_heads
from fusedattn.ops.additive_attention import attend


def _check(t: Tensor, name: str, *shape: str | int) -> None:
    """Raises unless t is a Tensor with as many dimensions as ``shape`` and its last width."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")
    if t.dim() != len(shape) or t.shape[-1] != shape[-1]:
        raise ValueError(f"{name}: expected shape ({', '.join(map(str, shape))}), got {tuple(t.shape)}")


def _for_one_query(
    mask: Tensor | None, caller: str = "BahdanauAttention", argument: str = "mask"
) -> Tensor | None:
    """A mask, or a bias, (B, T) as (B, Tq, Tk)."""
    if mask is None:
        return None
    if mask.dim() != 2:
        raise ValueError(f"{caller}: {argument}: expected shape (B, T), got {tuple(mask.shape)}")
    return mask.unsqueeze(1)


_settings = attrgetter(
    *("scale", "softcap", "activation", "negative_slope", "dropout", "training", "backend", "num_heads")
)


def _held(module: nn.Module, name: str) -> Tensor | None:
    """A parameter, or what was put in its place."""
    found = module._parameters.get(name)
    return module.__dict__.get(name) if found is None else found


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype is dtype else t.to(dtype)


# torch.fx.symbolic_trace cannot follow what depends on sizes: it records these calls.
for _function in ("_check", "over_heads", "center_over_heads", "_for_one_query", "beside"):
    torch.fx.wrap(_function)


if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fusedattn._typing import ModuleOptions, StepOptions


class AdditiveAttention(nn.Module):
    """Additive attention with its projections (Bahdanau et al. 2015, arXiv:1409.0473).

    ``score_ij = weight . activation(W_q query_i + b + W_k key_j)``, per head. A bias of the key projection would
    add nothing to that of the query's, so there is none.

    Args:
        query_dim, key_dim: width of the inputs.
        attention_dim: width of the score network over all heads; divisible by ``num_heads``.
        value_dim: width of the values. Default: ``key_dim``.
        num_heads: heads, each with its own score network. Default: 1.
        context_dim: project the values to this width over all heads; divisible by ``num_heads``. Default: None,
            every head sees the values as they are, and the contexts of the heads are concatenated.
        out_dim: project the context to this width. Default: None, no output projection.
        bias: biases of the query, value and output projections. Default: True.
        normalize: use ``g weight / |weight|`` with a learned g per head: weight normalisation (Salimans and Kingma
            2016, arXiv:1602.07868), as TensorFlow's ``BahdanauAttention(normalize=True)``. Default: False.
        scale: of the scores; above 1 it sharpens. Default: 1.0.
        softcap: see :func:`fusedattn.additive_attention`. Default: None.
        activation, negative_slope: see :func:`fusedattn.additive_attention`. Default: ``"tanh"``, 0.2.
        normalizer: see :func:`fusedattn.additive_attention`; a module becomes part of this one.
            Default: ``"softmax"``.
        dropout: ``dropout_p`` of :func:`fusedattn.additive_attention` in training mode; weights are returned as
            they are before. Default: 0.0.
        backend: see :func:`fusedattn.additive_attention`. Default: ``"auto"``.
        device, dtype: of the parameters.
    """

    weight_g: Tensor  # None without normalize
    _takes_exponentials = True  # of keys, made ahead

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        attention_dim: int,
        *,
        value_dim: int | None = None,
        num_heads: int = 1,
        context_dim: int | None = None,
        out_dim: int | None = None,
        bias: bool = True,
        normalize: bool = False,
        scale: float = 1.0,
        softcap: float | None = None,
        activation: str = "tanh",
        negative_slope: float = 0.2,
        normalizer: str | Callable[[Tensor], Tensor] = "softmax",
        dropout: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"AdditiveAttention: num_heads: expected 1 or more, got {num_heads}")
        for name, width in (("attention_dim", attention_dim), ("context_dim", context_dim or 0)):
            if width % num_heads:
                raise ValueError(
                    f"AdditiveAttention: {name}: expected a multiple of num_heads={num_heads}, got {width}"
                )
        _scores.check_numbers("AdditiveAttention", scale, softcap, activation, negative_slope)
        _normalizers.function("AdditiveAttention", normalizer)
        _scores.check_dropout("AdditiveAttention", "dropout", dropout)
        check_backend("AdditiveAttention", backend)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        value_dim = key_dim if value_dim is None else value_dim
        self.query_dim, self.key_dim, self.value_dim = query_dim, key_dim, value_dim
        self.num_heads, self.softcap, self.backend = num_heads, softcap, backend
        self.activation, self.negative_slope = activation, negative_slope
        self.scale, self.normalizer, self.dropout = scale, normalizer, dropout
        self.query_proj = nn.Linear(query_dim, attention_dim, bias=bias, **factory)
        self.key_proj = nn.Linear(key_dim, attention_dim, bias=False, **factory)
        self.value_proj = None if context_dim is None else nn.Linear(value_dim, context_dim, bias=bias, **factory)
        width = num_heads * value_dim if context_dim is None else context_dim
        self.out_proj = None if out_dim is None else nn.Linear(width, out_dim, bias=bias, **factory)
        self.weight = nn.Parameter(torch.empty(num_heads, attention_dim // num_heads, **factory))
        self.normalize = normalize
        # A registered None: torch.nn.utils.weight_norm has a parameter of that name, too.
        self.register_parameter("weight_g", nn.Parameter(torch.empty(num_heads, **factory)) if normalize else None)
        self.reset_parameters()

    __prepare_scriptable__ = not_scriptable

    def reset_parameters(self) -> None:
        """Layers as PyTorch's own; weight uniform within 1 / sqrt(D); g = 1 / sqrt(D)."""
        for module in self.children():
            if isinstance(module, (nn.Linear, nn.Conv1d)):
                module.reset_parameters()
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.normalize:
            nn.init.constant_(self.weight_g, bound)

    def extra_repr(self) -> str:
        parts = [f"num_heads={self.num_heads}"]
        if self.normalize:
            parts.append("normalize=True")
        if self.scale != 1:
            parts.append(f"scale={self.scale}")
        if self.softcap is not None:
            parts.append(f"softcap={self.softcap}")
        if self.activation != "tanh":
            parts.append(f"activation={self.activation!r}")
        if self.activation == "leaky_relu":
            parts.append(f"negative_slope={self.negative_slope}")
        if self.normalizer != "softmax" and not isinstance(self.normalizer, nn.Module):  # which shows itself
            parts.append(f"normalizer={self.normalizer!r}")
        if self.dropout != 0:
            parts.append(f"dropout={self.dropout}")
        return ", ".join(parts)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, H D) as (B, H, T, D); a single head stays without a dimension of its own."""
        return x if self.num_heads == 1 else x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _score_weight(self) -> Tensor:
        weight: Tensor = self.weight
        if self.normalize:
            weight = weight * (self.weight_g / weight.norm(dim=1)).unsqueeze(1)
        return weight.flatten() if self.num_heads == 1 else weight

    def _project(self, key: Tensor, value: Tensor | None) -> tuple[Tensor, Tensor]:
        value = key if value is None else value
        _check(key, "AdditiveAttention: key", "B", "Tk", self.key_dim)
        _check(value, "AdditiveAttention: value", "B", "Tk", self.value_dim)
        if self.value_proj is not None:
            value = self._heads(self.value_proj(value))
        elif self.num_heads > 1:
            value = value.unsqueeze(1).expand(-1, self.num_heads, -1, -1)
        return self._heads(self.key_proj(key)), value

    def project_keys(
        self,
        key: Tensor,
        value: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        key_lengths: Tensor | None = None,
    ) -> ProjectedKeys:
        """Projects key (B, Tk, key_dim) and value (default: key) once, for use as ``key`` of :meth:`forward`.

        ``mask`` and ``key_lengths`` stay with the keys. Gradients of all steps flow to key and value.
        """
        keys = ProjectedKeys(*self._project(key, value), mask, key_lengths)
        return keys.with_exponentials() if self._takes_exponentials and self.activation == "tanh" else keys

    @overload
    def forward(
        self,
        query: Tensor,
        key: Tensor | ProjectedKeys,
        value: Tensor | None = None,
        *,
        return_weights: Literal[False] = False,
        **options: Unpack[ModuleOptions],
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        query: Tensor,
        key: Tensor | ProjectedKeys,
        value: Tensor | None = None,
        *,
        return_weights: Literal[True],
        **options: Unpack[ModuleOptions],
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self,
        query: Tensor,
        key: Tensor | ProjectedKeys,
        value: Tensor | None = None,
        *,
        return_weights: bool = False,
        **options: Unpack[ModuleOptions],
    ) -> Tensor | tuple[Tensor, Tensor]: ...
    def forward(
        self,
        query: Tensor,
        key: Tensor | ProjectedKeys,
        value: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        key_lengths: Tensor | None = None,
        is_causal: bool = False,
        window_size: tuple[int, int] | None = None,
        window_center: Tensor | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attends.

        Args:
            query: (B, Tq, query_dim).
            key: (B, Tk, key_dim), or the result of :meth:`project_keys`, of which ``mask`` and ``key_lengths``
                hide more than those that were projected with them.
            value: (B, Tk, value_dim). Default: key.
            mask: bool, broadcastable to (B, H, Tq, Tk), or to (B, Tq, Tk) for every head; True = may attend.
            bias: added to the scores, see :func:`fusedattn.additive_attention`; shapes as of ``mask``.
            key_lengths: int (B,); keys at or after a length are invisible.
            is_causal: query i sees keys j <= i only.
            window_size: (left, right), see :func:`fusedattn.additive_attention`.
            window_center: integers, broadcastable to (B, H, Tq), or to (B, Tq) for every head.
            return_weights: also return the weights (B, H, Tq, Tk).

        Returns:
            (B, Tq, out_dim), or the width of the concatenated contexts without an output projection.
        """
        _check(query, "AdditiveAttention: query", "B", "Tq", self.query_dim)
        context, weights = self._attend(
            query,
            key,
            value,
            mask=mask,
            bias=bias,
            key_lengths=key_lengths,
            is_causal=is_causal,
            window_size=window_size,
            window_center=window_center,
            return_weights=return_weights,
        )
        return (context, weights) if return_weights else context

    def _attend(
        self,
        query: Tensor,
        key: Tensor | ProjectedKeys,
        value: Tensor | None = None,
        *,
        mask: Tensor | None,
        key_lengths: Tensor | None,
        return_weights: bool,
        bias: Tensor | None = None,
        is_causal: bool = False,
        window_size: tuple[int, int] | None = None,
        window_center: Tensor | None = None,
        normalizer: Any = None,
    ) -> tuple[Tensor, Any]:
        """(context (B, Tq, width), weights (B, H, Tq, Tk) if asked for); perhaps by another normaliser."""
        normalizer = self.normalizer if normalizer is None else normalizer
        unseen_are_zero = False
        query = self._heads(self.query_proj(query))
        token, repeated, has_heads = None, None, self.num_heads > 1
        if isinstance(key, ProjectedKeys):
            if value is not None:
                raise ValueError("AdditiveAttention: value: pass it to project_keys, not with ProjectedKeys")
            if mask is bias is key_lengths is window_size is window_center is None and not is_causal:
                state = self._state_of_step(query, key, normalizer, return_weights)
                if state is not None and (kept := key.repeated(*state)) is not None:
                    context, _, weights, _ = kept(query)
                    return self._of_all_heads(context, weights if return_weights else None)
                repeated = None if state is None else key.to_repeat(*state)
            keys = key.in_dtype(query.dtype)
            key_exp, key_bound = keys.exponentials(query.dtype)
            if are_recorded() and key.is_shared:
                weight, token = keys.shared().with_weight((self.weight, self.weight_g), self._score_weight)
            else:
                weight = self._score_weight()
            if mask is not None or key_lengths is not None:
                keys = keys.hiding(over_heads(mask, has_heads), key_lengths)
            elif normalizer != "softmax" and not is_causal and window_size is None:
                keys, unseen_are_zero = keys.without_unseen(), True
        else:
            key, value = self._project(key, value)
            keys = ProjectedKeys(_cast(key, query.dtype), _cast(value, query.dtype), mask, key_lengths)
            key_exp, key_bound = None, None
            weight = self._score_weight()
        weight_beside = beside(query, weight)
        if key is not keys or weight_beside is not weight or (token is None and self.weight_g is not None):
            repeated = None  # what a step was given are copies, of which nobody would tell that they are old
        result: Any = attend(
            query,
            keys.key,
            keys.value,
            weight_beside,
            mask=over_heads(keys.mask, has_heads),
            bias=over_heads(bias, has_heads),
            key_lengths=keys.key_lengths,
            is_causal=is_causal,
            window_size=window_size,
            window_center=center_over_heads(window_center, has_heads),
            scale=self.scale,
            softcap=self.softcap,
            activation=self.activation,
            negative_slope=self.negative_slope,
            normalizer=normalizer,
            dropout_p=self.dropout if self.training else 0.0,
            return_weights=return_weights,
            backend=self.backend,
            key_exp=key_exp,
            key_bound=key_bound,
            token=token,
            repeated=repeated,
            unseen_are_zero=unseen_are_zero,
        )
        context, weights = result if return_weights else (result, None)
        return self._of_all_heads(context, weights)

    def _of_all_heads(self, context: Tensor, weights: Any) -> tuple[Tensor, Any]:
        if self.num_heads > 1:
            context = context.transpose(1, 2).flatten(2)
        elif weights is not None:
            weights = weights.unsqueeze(1)
        return (context if self.out_proj is None else self.out_proj(context)), weights

    def _state_of_step(
        self, query: Tensor, keys: ProjectedKeys, normalizer: Any, return_weights: bool
    ) -> tuple[tuple, tuple] | None:
        """What tells for :meth:`ProjectedKeys.repeated` whether a step with nothing of its own but the query is
        like another; None where there is more to it."""
        weight, weight_g = _held(self, "weight"), _held(self, "weight_g")
        if (
            type(query) is not Tensor
            or query.is_nested
            or query.layout is not torch.strided
            or weight is None  # a parametrization makes it anew at each step
            or not (is_eager() and query.is_cpu and keys.is_shared)
            or normalizer != "softmax"
            or has_torch_function_variadic(query)  # a mode
            or torch._C._len_torch_dispatch_stack() > 0
            or torch._C._is_any_autocast_enabled()
        ):
            return None
        of_query = query.shape, query.dtype, query.requires_grad, torch.is_grad_enabled(), return_weights
        return (self, of_query, _settings(self)), (weight, weight_g)

    if TYPE_CHECKING:
        __call__ = forward


class BahdanauAttention(AdditiveAttention):
    """Attention of one decoder state per step over an encoder's memory (Bahdanau et al. 2015, section 3.1).

    Args:
        query_dim: width of the decoder state.
        memory_dim: width of the memory.
        attention_dim: width of the score network.
        bias, normalize, scale, softcap, activation, negative_slope, normalizer, dropout, backend, device, dtype:
            see :class:`AdditiveAttention`.
    """

    def __init__(
        self,
        query_dim: int,
        memory_dim: int,
        attention_dim: int,
        *,
        bias: bool = True,
        normalize: bool = False,
        scale: float = 1.0,
        softcap: float | None = None,
        activation: str = "tanh",
        negative_slope: float = 0.2,
        normalizer: str | Callable[[Tensor], Tensor] = "softmax",
        dropout: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            query_dim,
            memory_dim,
            attention_dim,
            bias=bias,
            normalize=normalize,
            scale=scale,
            softcap=softcap,
            activation=activation,
            negative_slope=negative_slope,
            normalizer=normalizer,
            dropout=dropout,
            backend=backend,
            device=device,
            dtype=dtype,
        )

    def project_keys(
        self,
        key: Tensor,
        value: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        key_lengths: Tensor | None = None,
    ) -> ProjectedKeys:
        """As :meth:`AdditiveAttention.project_keys`, with a mask (B, T)."""
        return super().project_keys(key, value, mask=_for_one_query(mask), key_lengths=key_lengths)

    @overload  # type: ignore[override]  # one step has other arguments
    def forward(
        self,
        query: Tensor,
        memory: Tensor | ProjectedKeys,
        *,
        return_weights: Literal[True] = True,
        **options: Unpack[StepOptions],
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self,
        query: Tensor,
        memory: Tensor | ProjectedKeys,
        *,
        return_weights: Literal[False],
        **options: Unpack[StepOptions],
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        query: Tensor,
        memory: Tensor | ProjectedKeys,
        *,
        return_weights: bool = True,
        **options: Unpack[StepOptions],
    ) -> Tensor | tuple[Tensor, Tensor]: ...
    def forward(
        self,
        query: Tensor,
        memory: Tensor | ProjectedKeys,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        key_lengths: Tensor | None = None,
        window_size: tuple[int, int] | None = None,
        window_center: Tensor | None = None,
        return_weights: bool = True,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """One step.

        Args:
            query: (B, query_dim), the decoder state.
            memory: (B, T, memory_dim), or ``project_keys(memory, ...)``, made once for all steps.
            mask: bool (B, T), True = may attend.
            bias: (B, T), added to the scores, see :func:`fusedattn.additive_attention`.
            key_lengths: int (B,).
            window_size, window_center: (left, right), and integers (B,): the step sees the places from center -
                left to center + right, and no others are computed. Default: all of them.
            return_weights: a step without weights is quicker. Default: True.

        Returns:
            context (B, memory_dim) and, with ``return_weights``, weights (B, T).
        """
        _check(query, "BahdanauAttention: query", "B", self.query_dim)
        context, weights = self._attend(
            query.unsqueeze(1),
            memory,
            mask=_for_one_query(mask),
            bias=_for_one_query(bias, argument="bias"),
            key_lengths=key_lengths,
            window_size=window_size,
            window_center=None if window_center is None else window_center.unsqueeze(-1),
            return_weights=return_weights,
        )
        context = context.squeeze(1)
        return (context, weights.flatten(1)) if return_weights else context

    if TYPE_CHECKING:
        __call__ = forward  # type: ignore[assignment]
