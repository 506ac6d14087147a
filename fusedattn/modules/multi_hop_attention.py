"""Several reads over one memory, around :func:`fusedattn.additive_attention`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fusedattn.modules._tracing import recorded_whole
from fusedattn.modules.attention import BahdanauAttention, _check

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fusedattn._typing import CappedScoreOptions


class MultiHopAttention(nn.Module):
    """Attention that reads a memory several times, each read steering the next (Sukhbaatar et al. 2015).

    "End-to-end memory networks" (arXiv:1503.08895) and the glimpses of Vinyals et al. 2016 (arXiv:1511.06391) and
    Bello et al. 2017 (arXiv:1611.09940), with the additive score. Hop k reads the memory m with the query q_k::

        o_k = sum_i softmax_i(weight . tanh(W_q q_k + b + W_m m_i)) m_i
        update="add"        q_{k+1} = q_k + o_k         memory networks
        update="replace"    q_{k+1} = o_k               glimpses

    Args:
        query_dim: width of the first query.
        memory_dim: width of the memory, and of later queries: ``query_dim``, unless there is one hop.
        attention_dim: width of the score network.
        hops: how many reads, 1 or more.
        update: ``"add"`` or ``"replace"``. Default: ``"add"``.
        shared: whether all hops have the same parameters; the memory is projected once then. Default: True.
        bias, normalize, scale, softcap, activation, negative_slope, normalizer, backend, device, dtype: see
            :class:`AdditiveAttention`.

    Raises:
        ValueError: no hops, an unknown update, widths that differ; when called, inputs of another shape.
    """

    def __init__(
        self,
        query_dim: int,
        memory_dim: int,
        attention_dim: int,
        hops: int,
        *,
        update: str = "add",
        shared: bool = True,
        bias: bool = True,
        **options: Unpack[CappedScoreOptions],
    ) -> None:
        super().__init__()
        if hops < 1:
            raise ValueError(f"MultiHopAttention: hops: expected 1 or more, got {hops}")
        if update not in ("add", "replace"):
            raise ValueError(f"MultiHopAttention: update: expected 'add' or 'replace', got {update!r}")
        if query_dim != memory_dim and (hops > 1 or update == "add"):
            raise ValueError(
                f"MultiHopAttention: memory_dim: expected query_dim={query_dim} for more than one read, "
                f"got {memory_dim}"
            )
        self.query_dim, self.hops, self.update = query_dim, hops, update
        self.attention = nn.ModuleList(
            BahdanauAttention(query_dim, memory_dim, attention_dim, bias=bias, **options)
            for _ in range(1 if shared else hops)
        )

    def extra_repr(self) -> str:
        return f"hops={self.hops}, update={self.update!r}"

    @recorded_whole
    def forward(
        self,
        query: Tensor,
        memory: Tensor,
        *,
        mask: Tensor | None = None,
        key_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Reads the memory ``hops`` times.

        Args:
            query: (B, query_dim).
            memory: (B, T, memory_dim).
            mask: bool (B, T), True = may attend.
            key_lengths: int (B,); keys at or after a length are invisible.

        Returns:
            the query after the last hop (B, memory_dim), and the weights of all hops (B, hops, T).
        """
        _check(query, "MultiHopAttention: query", "B", self.query_dim)
        of_hops, keys = [], None
        for hop in range(self.hops):
            if keys is None or len(self.attention) > 1:
                attention: Any = self.attention[hop]
                keys = attention.project_keys(memory, mask=mask, key_lengths=key_lengths)
            read, weights = attention(query, keys)
            query = query + read if self.update == "add" else read
            of_hops.append(weights)
        return query, torch.stack(of_hops, 1)

    if TYPE_CHECKING:
        __call__ = forward
