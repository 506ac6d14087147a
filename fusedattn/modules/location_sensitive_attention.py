"""Location-sensitive attention: a decoder's attention that sees where it attended to before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedattn._dispatch import beside
from fusedattn._dtypes import accumulation_dtype
from fusedattn._steps import are_recorded
from fusedattn.modules._tracing import recorded_whole
from fusedattn.modules.attention import BahdanauAttention, _check, _for_one_query
from fusedattn.modules.projected_keys import ProjectedKeys
from fusedattn.ops.location_attention import attend, prepared

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fusedattn._typing import CappedScoreOptions


class LocationState(NamedTuple):
    """What the steps so far attended to."""

    weights: Tensor  # (B, T), of the last step
    cumulative: Tensor  # (B, T), their sum over all steps, in float32 at least


class LocationSensitiveAttention(BahdanauAttention):
    """Attention that sees where it attended to before.

    After Chorowski et al. 2015 (arXiv:1506.07503), as in Tacotron 2 (Shen et al. 2018, arXiv:1712.05884).
    With the decoder's state s, the states h_j of the memory, and a, the weights of the step before and their sum::

        f = W * a      e_j = weight . tanh(W_q s + b + W_k h_j + U f_j)      p = softmax(e)      c = sum_j p_j h_j

    In a decoder::

        keys, state = attention.project_keys(memory, key_lengths=lengths), None
        for x in inputs:
            context, weights, state = attention(decoder_state, keys, state)

    The location features U f are never stored; the gradients of keys, values and parameters are made once for all
    steps over projected keys.

    Args:
        query_dim, memory_dim, attention_dim: see :class:`BahdanauAttention`.
        num_filters, kernel_size: of the convolution W; the size is odd. Default: 32 and 31, as in Tacotron 2.
        cumulative: convolve the sum of the weights of all steps beside those of the last; False: the last alone,
            as Chorowski et al. have it. Default: True.
        window: (left, right): a step sees the places from ``left`` before the median of the last step's weights to
            ``right`` after it, from place 0 on at first; -1 is unbounded. Default: None, all places.
        bias, normalize, softcap, activation, negative_slope, backend, device, dtype: see
            :class:`BahdanauAttention`.
        scale: above 1 it sharpens (section 2.3 of the paper). Default: 1.0.
        normalizer: ``"sigmoid"`` smooths (the same). See :class:`BahdanauAttention`. Default: ``"softmax"``.
    """

    _takes_exponentials = False  # those of sums with the features

    def __init__(
        self,
        query_dim: int,
        memory_dim: int,
        attention_dim: int,
        *,
        num_filters: int = 32,
        kernel_size: int = 31,
        cumulative: bool = True,
        window: tuple[int, int] | None = None,
        bias: bool = True,
        **options: Unpack[CappedScoreOptions],
    ) -> None:
        if kernel_size % 2 == 0:
            raise ValueError(f"LocationSensitiveAttention: kernel_size: expected an odd number, got {kernel_size}")
        if window is not None and (len(window) != 2 or min(window) < -1):
            raise ValueError(
                f"LocationSensitiveAttention: window: expected two numbers from -1 on, got {window!r}"
            )
        super().__init__(query_dim, memory_dim, attention_dim, bias=bias, **options)
        factory: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.cumulative, self.window = cumulative, window
        padding = (kernel_size - 1) // 2
        self.location_conv = nn.Conv1d(
            2 if cumulative else 1, num_filters, kernel_size, padding=padding, bias=False, **factory
        )
        self.location_proj = nn.Linear(num_filters, attention_dim, bias=False, **factory)

    def extra_repr(self) -> str:
        parts = [super().extra_repr()]
        if not self.cumulative:
            parts.append("cumulative=False")
        if self.window is not None:
            parts.append(f"window={self.window}")
        return ", ".join(parts)

    @recorded_whole
    def forward(  # type: ignore[override]  # with the state
        self,
        query: Tensor,
        memory: Tensor | ProjectedKeys,
        state: LocationState | None = None,
        *,
        mask: Tensor | None = None,
        key_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, LocationState]:
        """One step.

        Args:
            query: (B, query_dim), the decoder state.
            memory: (B, T, memory_dim), or ``project_keys(memory, ...)``, made once for all steps.
            state: that which the step before returned. Default: None, for zeros at the first step.
            mask: bool (B, T), True = may attend.
            key_lengths: int (B,).

        Returns:
            context (B, memory_dim), weights (B, T) and the state after this step.
        """
        name = "LocationSensitiveAttention"
        _check(query, f"{name}: query", "B", self.query_dim)
        if not isinstance(memory, ProjectedKeys):
            memory = ProjectedKeys(*self._project(memory, None))
        query = self.query_proj(query)
        keys, wide = memory.in_dtype(query.dtype), accumulation_dtype(query.dtype)
        B, T = query.shape[0], keys.key.shape[1]
        if state is None:
            state = LocationState(*query.new_zeros(2, B, T, dtype=wide).unbind())
        for part, t in zip(LocationState._fields, state, strict=True):
            _check(t, f"{name}: state.{part}", "B", T)
        parameters, token = self._parameters_of_steps(keys, wide)
        hidden = self._hiding(_for_one_query(mask, name), state.weights)
        unseen_are_zero = False
        if hidden is not None or key_lengths is not None:
            keys = keys.hiding(hidden, key_lengths)
        elif self.normalizer != "softmax":
            keys, unseen_are_zero = keys.without_unseen(), True
        seen = state if self.cumulative else state[:1]
        context, weights = attend(
            query,
            keys.key,
            keys.value,
            beside(query, self._score_weight()),
            torch.stack([t.to(wide) for t in seen], 1),
            beside(query, self.location_conv.weight),
            beside(query, self.location_proj.weight),
            mask=None if keys.mask is None else keys.mask.squeeze(1),
            key_lengths=keys.key_lengths,
            scale=self.scale,
            softcap=self.softcap,
            activation=self.activation,
            negative_slope=self.negative_slope,
            normalizer=self.normalizer,
            backend=self.backend,
            parameters=parameters,
            token=token,
            unseen_are_zero=unseen_are_zero,
        )
        return context, weights, LocationState(weights, state.cumulative + weights)

    def _parameters_of_steps(self, keys: ProjectedKeys, dtype: torch.dtype) -> tuple[Any, Tensor | None]:
        """What the steps over these keys share, and the token that stands for it."""
        if not are_recorded() or not keys.is_shared:
            return None, None
        conv_weight, location_weight = self.location_conv.weight, self.location_proj.weight
        return keys.shared().with_parameters(
            (self.weight, self.weight_g, conv_weight, location_weight),
            lambda: prepared(self._score_weight(), conv_weight, location_weight, dtype),
        )

    def _hiding(self, mask: Tensor | None, weights: Tensor) -> Tensor | None:
        """A mask (B, 1, T), with the window around the median of the weights."""
        if self.window is None:
            return mask
        left, right = self.window
        mass = weights.detach().cumsum(-1)
        median = (mass < mass[:, -1:] / 2).sum(-1, keepdim=True)
        offset = torch.arange(weights.shape[1], device=weights.device) - median
        within = torch.ones_like(offset, dtype=torch.bool) if left == -1 else offset >= -left
        within = (within if right == -1 else within & (offset <= right)).unsqueeze(1)
        return within if mask is None else mask & within

    if TYPE_CHECKING:
        __call__ = forward  # type: ignore[assignment]
