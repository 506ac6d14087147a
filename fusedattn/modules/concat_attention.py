"""Luong's attention with the concat score, global and local, around :func:`fusedattn.additive_attention`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from fusedattn import _normalizers
from fusedattn._dtypes import accumulation_dtype
from fusedattn.modules._tracing import recorded_whole
from fusedattn.modules.attention import BahdanauAttention, _check, _for_one_query
from fusedattn.modules.projected_keys import ProjectedKeys

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fusedattn._typing import CappedScoreOptions, HidingOptions


class ConcatAttention(BahdanauAttention):
    """Attention with the concat score, over all places or those near one (Luong et al. 2015, arXiv:1508.04025).

    With the decoder's state h_t and the encoder's states hbar_s, W = [W_q, W_k] of one linear layer over both::

        score(h_t, hbar_s) = v . tanh(W [h_t; hbar_s])      a_t = softmax_s(score)      c_t = sum_s a_t(s) hbar_s
        h~_t = tanh(W_c [c_t; h_t])                         with out_dim

    Local attention sees the places within ``window`` of p_t, and no others::

        local="monotonic"   (local-m)  p_t = t
        local="predictive"  (local-p)  p_t = S sigmoid(v_p . tanh(W_p h_t)), S the length; the window is around
                                       p_t rounded, and a_t(s) is times exp(-(s - p_t)^2 / (2 sigma^2))

    where the weights of local-p sum to less than 1, as in the paper, and p_t has its gradient through the factor.

    A decoder with input feeding has h~ beside its next input::

        keys, fed = attention.project_keys(memory), memory.new_zeros(B, out_dim)
        for t, x in enumerate(inputs):                      # x (B, width)
            state = cell(torch.cat([x, fed], -1), state)
            fed, weights = attention(state, keys, position=t)

    Args:
        query_dim: width of h.
        memory_dim: width of hbar.
        attention_dim: width of the score network, and of that which predicts p_t.
        local: None, ``"monotonic"`` or ``"predictive"``. Default: None, all places.
        window: how many places before and after p_t are seen. Default: 10, the paper's.
        sigma: width of the factor of local-p. Default: ``window / 2``, the paper's.
        out_dim: width of h~. Default: None, the context itself is returned.
        bias: a bias in W. Default: False, as in the paper.
        normalize, scale, softcap, activation, negative_slope, normalizer, backend, device, dtype: see
            :class:`AdditiveAttention`.

    Raises:
        ValueError: an unknown ``local``, a negative window, a sigma that is not positive; when called, inputs of
            another shape.
    """

    def __init__(
        self,
        query_dim: int,
        memory_dim: int,
        attention_dim: int,
        *,
        local: str | None = None,
        window: int = 10,
        sigma: float | None = None,
        out_dim: int | None = None,
        bias: bool = False,
        **options: Unpack[CappedScoreOptions],
    ) -> None:
        if local not in (None, "monotonic", "predictive"):
            raise ValueError(f"ConcatAttention: local: expected None, 'monotonic' or 'predictive', got {local!r}")
        if window < 0:
            raise ValueError(f"ConcatAttention: window: expected 0 or more, got {window}")
        sigma = window / 2 if sigma is None else sigma
        if local == "predictive" and not sigma > 0:
            raise ValueError(f"ConcatAttention: sigma: expected a positive number, got {sigma}")
        super().__init__(query_dim, memory_dim, attention_dim, bias=bias, **options)
        factory: dict[str, Any] = {"bias": False, "device": options.get("device"), "dtype": options.get("dtype")}
        self.local, self.window, self.sigma = local, window, sigma
        predicts = local == "predictive"
        self.position_proj = nn.Linear(query_dim, attention_dim, **factory) if predicts else None
        self.position_out = nn.Linear(attention_dim, 1, **factory) if predicts else None
        self.combine_proj = None if out_dim is None else nn.Linear(memory_dim + query_dim, out_dim, **factory)

    def extra_repr(self) -> str:
        local = [] if self.local is None else [f"local={self.local!r}", f"window={self.window}"]
        return ", ".join([super().extra_repr(), *local])

    def predicted(self, query: Tensor, lengths: Tensor | int) -> Tensor:
        """p_t (B, Tq, 1) of local-p, of sequences of these lengths, a number or integers (B,)."""
        if self.position_proj is None or self.position_out is None:
            raise ValueError(f"ConcatAttention: local: expected 'predictive' for a prediction, got {self.local!r}")
        logit = self.position_out(torch.tanh(self.position_proj(query)))
        lengths = lengths[:, None, None] if isinstance(lengths, Tensor) else lengths
        return lengths * torch.sigmoid(logit.to(accumulation_dtype(logit.dtype)))

    def _window(
        self, query: Tensor, memory: Tensor | ProjectedKeys, position: int, key_lengths: Tensor | None
    ) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
        """(integers (B or 1, Tq): the center of each window, the normaliser of local-p)"""
        if isinstance(memory, ProjectedKeys):
            key_lengths = memory.key_lengths if key_lengths is None else key_lengths
            memory = memory.key
        Tq, Tk = query.shape[1], memory.shape[-2]
        if self.local == "monotonic":
            return torch.arange(position, position + Tq, device=query.device).unsqueeze(0), None
        centers = self.predicted(query, Tk if key_lengths is None else key_lengths)
        places = torch.arange(Tk, device=query.device)
        factor = torch.exp(-(places - centers).square() / (2 * self.sigma**2))
        normalize = _normalizers.function("ConcatAttention", self.normalizer)
        return centers.detach().round().long().squeeze(-1), lambda scores: normalize(scores) * factor

    @overload  # type: ignore[override]  # one step has other arguments
    def forward(
        self,
        query: Tensor,
        memory: Tensor | ProjectedKeys,
        *,
        position: int = 0,
        return_weights: Literal[True] = True,
        **options: Unpack[HidingOptions],
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self,
        query: Tensor,
        memory: Tensor | ProjectedKeys,
        *,
        position: int = 0,
        return_weights: Literal[False],
        **options: Unpack[HidingOptions],
    ) -> Tensor: ...
    @recorded_whole
    def forward(
        self,
        query: Tensor,
        memory: Tensor | ProjectedKeys,
        *,
        position: int = 0,
        mask: Tensor | None = None,
        key_lengths: Tensor | None = None,
        return_weights: bool = True,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """One step, or several at once.

        Args:
            query: (B, query_dim) or (B, Tq, query_dim), states h.
            memory: (B, T, memory_dim), or ``project_keys(memory, ...)``, made once for all steps.
            position: t of the first query, for ``local="monotonic"``. Default: 0.
            mask: bool, (B, T) for one step, else broadcastable to (B, Tq, T); True = may attend.
            key_lengths: int (B,); keys at or after a length are invisible, and local-p predicts within them.
            return_weights: a step without weights is quicker. Default: True.

        Returns:
            h~ (B, [Tq,] out_dim), or the context (B, [Tq,] memory_dim) without ``out_dim``, and, with
            ``return_weights``, weights (B, [Tq,] T). Where a window holds no visible place, both are 0.
        """
        is_step = isinstance(query, Tensor) and query.dim() == 2
        _check(query, "ConcatAttention: query", "B", *([] if is_step else ["Tq"]), self.query_dim)
        if is_step:
            query, mask = query.unsqueeze(1), _for_one_query(mask, "ConcatAttention")
        window_size, centers, normalizer = None, None, None
        if self.local is not None:
            window_size = (self.window, self.window)
            centers, normalizer = self._window(query, memory, position, key_lengths)
        context, weights = self._attend(
            query,
            memory,
            mask=mask,
            key_lengths=key_lengths,
            window_size=window_size,
            window_center=centers,
            return_weights=return_weights,
            normalizer=normalizer,
        )
        if self.combine_proj is not None:
            context = torch.tanh(self.combine_proj(torch.cat([context, query], -1)))
        context = context.squeeze(1) if is_step else context
        if not return_weights:
            return context
        weights = weights.squeeze(1)  # the only head
        return context, weights.squeeze(1) if is_step else weights

    if TYPE_CHECKING:
        __call__ = forward  # type: ignore[assignment]
