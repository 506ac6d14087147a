"""Pointers into an input sequence, around :func:`fusedattn.additive_scores`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fusedattn import _scores
from fusedattn._dispatch import beside
from fusedattn.modules._tracing import recorded_whole
from fusedattn.modules.attention import BahdanauAttention, _cast, _check, _for_one_query
from fusedattn.modules.projected_keys import ProjectedKeys
from fusedattn.ops.additive_scores import additive_scores

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fusedattn._typing import ScoreOptions


class PointerAttention(BahdanauAttention):
    """Attention whose weights are the output, a choice of an input (Vinyals et al. 2015, arXiv:1506.03134).

    With the encoder's states e_j and the decoder's states d_i::

        u_ij = weight . tanh(W_1 e_j + W_2 d_i)         p(C_i = j) = softmax_j(u_i)

    and, with ``clip=C``, C tanh(u_ij) in place of u_ij (Bello et al. 2017, arXiv:1611.09940, with C = 10). Inputs
    that were chosen are hidden from later steps by the mask. Glimpses before pointing are
    :class:`MultiHopAttention` with ``update="replace"``.

    Args:
        query_dim: width of the decoder's states.
        key_dim: width of the encoder's states.
        attention_dim: width of the score network.
        bias: a bias beside W_2. Default: False, as in the paper.
        clip: C > 0; ``scale`` and ``softcap`` of :func:`fusedattn.additive_scores`. Default: None.
        normalize, activation, negative_slope, backend, device, dtype: see
            :class:`AdditiveAttention`.
    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        attention_dim: int,
        *,
        bias: bool = False,
        clip: float | None = None,
        **options: Unpack[ScoreOptions],
    ) -> None:
        if clip is not None and not clip > 0:
            raise ValueError(f"PointerAttention: clip: expected a positive number or None, got {clip}")
        super().__init__(query_dim, key_dim, attention_dim, bias=bias, softcap=clip, **options)

    @recorded_whole
    def forward(  # type: ignore[override]  # without values
        self,
        query: Tensor,
        key: Tensor | ProjectedKeys,
        *,
        mask: Tensor | None = None,
        key_lengths: Tensor | None = None,
    ) -> Tensor:
        """Scores of the inputs, for ``softmax``, ``cross_entropy`` or ``Categorical(logits=...)``.

        Args:
            query: (B, query_dim) for one step, or (B, Tq, query_dim).
            key: (B, Tk, key_dim), or ``project_keys(key, ...)``, made once for all steps.
            mask: bool, (B, Tk) for one step, else broadcastable to (B, Tq, Tk); True = may be pointed at.
            key_lengths: int (B,); keys at or after a length are invisible.

        Returns:
            u (B, [Tq,] Tk), -inf at invisible inputs, in a row that sees none everywhere.
        """
        is_step = isinstance(query, Tensor) and query.dim() == 2
        _check(query, "PointerAttention: query", "B", *([] if is_step else ["Tq"]), self.query_dim)
        if is_step:
            query, mask = query.unsqueeze(1), _for_one_query(mask, "PointerAttention")
        query = self.query_proj(query)
        if not isinstance(key, ProjectedKeys):
            key = ProjectedKeys(*self._project(key, None))
        visible = key.hiding(mask, key_lengths).visible()
        rows = _cast(key.key, query.dtype)
        if visible is not None:
            (rows,) = _scores.without_unseen(visible, rows)
        weight = beside(query, self._score_weight())
        clip = self.softcap
        scores = additive_scores(
            query,
            rows,
            weight,
            scale=clip or 1.0,
            softcap=clip,
            activation=self.activation,
            negative_slope=self.negative_slope,
            backend=self.backend,
        )
        if visible is not None:
            scores = scores.masked_fill(~visible, float("-inf"))
        return scores.squeeze(1) if is_step else scores

    if TYPE_CHECKING:
        __call__ = forward  # type: ignore[assignment]
