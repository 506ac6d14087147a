"""Attention that knows what it has covered."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fusedattn._dtypes import accumulation_dtype
from fusedattn.modules._tracing import recorded_whole
from fusedattn.modules.attention import BahdanauAttention, _cast, _check, _for_one_query
from fusedattn.modules.projected_keys import ProjectedKeys

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fusedattn._typing import CappedScoreOptions


class CoverageAttention(BahdanauAttention):
    """Attention whose scores see the sum of the weights of all steps before (See et al. 2017, arXiv:1704.04368).

    With the decoder's state s_t and the states h_i of the memory (after Tu et al. 2016, arXiv:1601.04811)::

        e_i = weight . tanh(W_h h_i + W_s s_t + w_c c_i + b)        a_t = softmax(e)        c = sum_{t' < t} a_{t'}
        loss = sum_i min(a_i, c_i)                                  for attending to a place again

    In a decoder::

        keys, coverage, loss = attention.project_keys(memory, key_lengths=lengths), None, 0.0
        for x in inputs:
            context, weights, after = attention(state, keys, coverage)
            if coverage is not None:
                loss = loss + attention.coverage_loss(weights, coverage)
            coverage = after

    A step adds w_c c to all keys, so it writes as much as it reads. Arguments: see :class:`BahdanauAttention`.
    """

    def __init__(
        self,
        query_dim: int,
        memory_dim: int,
        attention_dim: int,
        *,
        bias: bool = True,
        **options: Unpack[CappedScoreOptions],
    ) -> None:
        super().__init__(query_dim, memory_dim, attention_dim, bias=bias, **options)
        device, dtype = options.get("device"), options.get("dtype")
        self.coverage_proj = nn.Linear(1, attention_dim, bias=False, device=device, dtype=dtype)

    @recorded_whole
    def forward(  # type: ignore[override]  # with the coverage
        self,
        query: Tensor,
        memory: Tensor | ProjectedKeys,
        coverage: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        key_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step.

        Args:
            query: (B, query_dim), the decoder state.
            memory: (B, T, memory_dim), or ``project_keys(memory, ...)``, made once for all steps.
            coverage: (B, T), c. Default: None, for 0 at the first step.
            mask: bool (B, T), True = may attend.
            key_lengths: int (B,).

        Returns:
            context (B, memory_dim), weights (B, T) and the coverage after this step (B, T), in float32 at least.
        """
        _check(query, "CoverageAttention: query", "B", self.query_dim)
        if not isinstance(memory, ProjectedKeys):
            memory = ProjectedKeys(*self._project(memory, None))
        if coverage is not None:
            _check(coverage, "CoverageAttention: coverage", "B", memory.key.shape[1])
            key, w_c = memory.key, self.coverage_proj.weight.squeeze(1)
            covered = torch.addcmul(key, _cast(coverage, key.dtype).unsqueeze(-1), _cast(w_c, key.dtype))
            memory = memory.of_one_step(covered, memory.value)
        context, weights = self._attend(
            query.unsqueeze(1),
            memory,
            mask=_for_one_query(mask, "CoverageAttention"),
            key_lengths=key_lengths,
            return_weights=True,
        )
        weights = weights.flatten(1)
        after = weights.to(accumulation_dtype(weights.dtype))
        return context.squeeze(1), weights, after if coverage is None else coverage + after

    @staticmethod
    def coverage_loss(weights: Tensor, coverage: Tensor) -> Tensor:
        """sum_i min(a_i, c_i) of a step, (B,): of its weights (B, T) and the coverage before it (B, T)."""
        return torch.minimum(weights, coverage).sum(-1)

    if TYPE_CHECKING:
        __call__ = forward  # type: ignore[assignment]
