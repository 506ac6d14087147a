"""Forward attention: monotonic alignment by the alignment of the step before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedattn import _normalizers
from fusedattn.modules._tracing import recorded_whole
from fusedattn.modules.attention import BahdanauAttention, _check, _for_one_query
from fusedattn.modules.projected_keys import ProjectedKeys


class ForwardAttention(BahdanauAttention):
    """Attention that stays at its place or moves on by one at each step (Zhang et al. 2018, arXiv:1807.06736).

    With y_t, the weights of additive attention, and the alignment of the step before::

        alpha'_t(n) = (alpha_{t-1}(n) + alpha_{t-1}(n - 1)) y_t(n)                      alpha_0 = (1, 0, 0, ...)
        alpha'_t(n) = ((1 - u) alpha_{t-1}(n) + u alpha_{t-1}(n - 1)) y_t(n)            with a transition agent u
        alpha_t = alpha'_t / sum_n alpha'_t(n)          c_t = sum_n alpha_t(n) x_n

    In a decoder::

        keys = attention.project_keys(memory, key_lengths=lengths)
        alignment = attention.start(keys)
        for x in inputs:
            context, alignment = attention(state, keys, alignment)

    Arguments: see :class:`BahdanauAttention`.
    """

    @staticmethod
    def start(memory: Tensor | ProjectedKeys) -> Tensor:
        """alpha_0 (B, T) of a memory (B, T, memory_dim) or its keys: all of it at the first place."""
        rows = memory.key if isinstance(memory, ProjectedKeys) else memory
        return F.pad(rows.new_ones(rows.shape[0], 1), (0, rows.shape[1] - 1))

    @recorded_whole
    def forward(  # type: ignore[override]  # with the alignment of the step before
        self,
        query: Tensor,
        memory: Tensor | ProjectedKeys,
        alignment: Tensor,
        transition: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        key_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            query: (B, query_dim), the decoder state.
            memory: (B, T, memory_dim), or ``project_keys(memory, ...)``, made once for all steps.
            alignment: (B, T), that of the step before; :meth:`start` at first.
            transition: u (B,) in [0, 1], how probable it is to move on, as the net makes it of context, output and
                query of the step before. Default: None, staying and moving on are alike.
            mask: bool (B, T), True = may attend.
            key_lengths: int (B,).

        Returns:
            context (B, memory_dim) and the alignment (B, T). Where no place in reach is visible both are 0.
        """
        _check(query, "ForwardAttention: query", "B", self.query_dim)
        T = (memory.key if isinstance(memory, ProjectedKeys) else memory).shape[1]
        _check(alignment, "ForwardAttention: alignment", "B", T)
        moved = F.pad(alignment, (1, 0))[:, :-1]
        if transition is None:
            reach = alignment + moved
        else:
            if transition.dim() != 1:
                raise ValueError(
                    f"ForwardAttention: transition: expected shape (B,), got {tuple(transition.shape)}"
                )
            reach = torch.lerp(alignment, moved, transition.unsqueeze(1))

        normalize = _normalizers.function("ForwardAttention", self.normalizer)

        def normalizer(scores: Tensor) -> Tensor:
            weights = normalize(scores) * reach.unsqueeze(1)
            return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)

        context, weights = self._attend(
            query.unsqueeze(1),
            memory,
            mask=_for_one_query(mask, "ForwardAttention"),
            key_lengths=key_lengths,
            return_weights=True,
            normalizer=normalizer,
        )
        return context.squeeze(1), weights.flatten(1)

    if TYPE_CHECKING:
        __call__ = forward  # type: ignore[assignment]
