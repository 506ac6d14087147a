"""Attention over feature maps, around :func:`fusedattn.additive_attention`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fusedattn.modules._tracing import recorded_whole
from fusedattn.modules.attention import BahdanauAttention, _check, _for_one_query
from fusedattn.modules.projected_keys import ProjectedKeys

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fusedattn._typing import CappedScoreOptions


class SpatialAttention(BahdanauAttention):
    """Soft attention of a decoder's state to the places of a feature map (Xu et al. 2015, arXiv:1502.03044).

    With the state h of the step before and the features a_i of place i ("Show, Attend and Tell", section 4.2)::

        e_i = weight . tanh(W_h h + b + W_a a_i)    alpha = softmax_i(e)    z = beta * sum_i alpha_i a_i
        beta = sigmoid(f_beta(h))                   the context gate

    The loss of a caption has lambda times :meth:`doubly_stochastic_penalty` of its weights beside the likelihood.

    Args:
        query_dim: width of h.
        num_channels: C, the channels of the map.
        attention_dim: width of the score network.
        gate: ``"scalar"``, one beta for a state as in the paper; ``"channel"``, one for each channel, as in
            many programs; None for beta = 1. Default: ``"scalar"``.
        bias, normalize, scale, softcap, activation, negative_slope, normalizer, backend, device, dtype: see
            :class:`AdditiveAttention`.

    Raises:
        ValueError: an unknown gate; when called, inputs of another shape.
    """

    def __init__(
        self,
        query_dim: int,
        num_channels: int,
        attention_dim: int,
        *,
        gate: str | None = "scalar",
        bias: bool = True,
        **options: Unpack[CappedScoreOptions],
    ) -> None:
        if gate not in (None, "scalar", "channel"):
            raise ValueError(f"SpatialAttention: gate: expected 'scalar', 'channel' or None, got {gate!r}")
        super().__init__(query_dim, num_channels, attention_dim, bias=bias, **options)
        width = num_channels if gate == "channel" else 1
        factory: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.gate_proj = None if gate is None else nn.Linear(query_dim, width, **factory)

    def project_keys(  # type: ignore[override]  # a map in place of keys and values
        self, features: Tensor, *, mask: Tensor | None = None
    ) -> ProjectedKeys:
        """Projects a map (B, C, *places) once for many steps; ``mask``, bool (B, *places), stays with it."""
        self._check_map(features)
        return super().project_keys(
            features.flatten(2).transpose(1, 2), mask=self._flat(mask, tuple(features.shape[2:]))
        )

    def _check_map(self, features: Tensor) -> None:
        if not isinstance(features, Tensor):
            raise TypeError(f"SpatialAttention: features: expected a Tensor, got {type(features).__name__}")
        if features.dim() < 3 or features.shape[1] != self.key_dim:
            raise ValueError(
                f"SpatialAttention: features: expected shape (B, {self.key_dim}, *places), "
                f"got {tuple(features.shape)}"
            )

    def _flat(self, mask: Tensor | None, places: tuple[int, ...]) -> Tensor | None:
        """A mask (B, *places) as (B, T)."""
        if mask is None:
            return None
        if mask.dim() < 2 or tuple(mask.shape[1:]) != places:
            shape = ", ".join(map(str, ("B", *places)))
            raise ValueError(f"SpatialAttention: mask: expected shape ({shape}), got {tuple(mask.shape)}")
        return mask.flatten(1)

    @recorded_whole
    def forward(  # type: ignore[override]  # a map in place of keys and values
        self,
        query: Tensor,
        features: Tensor | ProjectedKeys,
        *,
        places: Sequence[int] | None = None,
        mask: Tensor | None = None,
        return_map: bool = False,
    ) -> tuple[Tensor, ...]:
        """One step.

        Args:
            query: (B, query_dim), the state h.
            features: (B, C, *places), usually (B, C, H, W), or ``project_keys(features)``, made for all steps.
            places: of projected features, (H, W) for example; the weights have that shape. Default: (H W,).
            mask: bool (B, *places); True = may attend.
            return_map: also return the weighted map. Default: False.

        Returns:
            z (B, C), weights (B, *places) and, with ``return_map``, beta alpha_i a_i (B, C, *places), the map that
            z is the sum of.
        """
        _check(query, "SpatialAttention: query", "B", self.query_dim)
        if isinstance(features, ProjectedKeys):
            value: Any = features.value
            places = (value.shape[-2],) if places is None else tuple(places)
        else:
            self._check_map(features)
            places = tuple(features.shape[2:])
            features = value = features.flatten(2).transpose(1, 2)
        context, weights = self._attend(
            query.unsqueeze(1),
            features,
            mask=_for_one_query(self._flat(mask, places)),
            key_lengths=None,
            return_weights=True,
        )
        context, weights = context.squeeze(1), weights.flatten(1)
        gate = None if self.gate_proj is None else torch.sigmoid(self.gate_proj(query))
        context = context if gate is None else gate * context
        results = context, weights.unflatten(1, places)
        if not return_map:
            return results
        under = weights.unsqueeze(1) * value.to(weights.dtype).transpose(1, 2)
        under = under if gate is None else gate.unsqueeze(-1) * under
        return *results, under.unflatten(2, places)

    @staticmethod
    def doubly_stochastic_penalty(weights: Tensor) -> Tensor:
        """sum_i (1 - sum_t alpha_ti)^2, the mean over the batch (equation 14): every place gets its turn.

        Args:
            weights: (B, T, *places), those of all steps; zeros where a caption of the batch has ended.
        """
        return (1 - weights.flatten(2).sum(1)).square().sum(1).mean()

    if TYPE_CHECKING:
        __call__ = forward  # type: ignore[assignment]
