"""Additive attention to a past that grows: whole sequences at once, or step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from fusedattn.modules.attention import AdditiveAttention, _check
from fusedattn.modules.projected_keys import ProjectedKeys
from fusedattn.ops.additive_attention import check_lengths

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fusedattn._typing import HidingOptions


class CausalAdditiveAttention(AdditiveAttention):
    """Additive attention whose queries see one key more each (after Bahdanau et al. 2015, arXiv:1409.0473).

    With a decoder's states d and the states a that it attends to, query t, made of d_t, sees t + 1 keys::

        c_{t+1} = sum_{k <= t+1} alpha_{k,t+1} a_k
        alpha_{k,t+1} = softmax_k(weight . tanh(W_q d_t + b + W_k a_k))

    Whole sequences at once, where all states are known, or step by step. A recurrent net that attends to its own
    past appends each state to the keys, which costs no copy of those before it::

        keys = None
        for x in inputs:                                # x (B, width)
            keys = attention.append(keys, state)        # state (B, key_dim)
            context = attention.step(state, keys)
            state = cell(torch.cat([x, context], -1), state)

    Where the keys are known and come into sight one by one, as in simultaneous translation, they are projected
    once and their gradients are made once, as in other loops::

        keys = attention.project_keys(memory)
        for t in range(T):
            context = attention.step(state, keys, visible=t + 1)

    Either way a step costs as much as the keys that it sees; with another normaliser than the softmax, the latter
    as much as all. Arguments: see :class:`AdditiveAttention`.
    """

    def append(self, keys: ProjectedKeys | None, key: Tensor, value: Tensor | None = None) -> ProjectedKeys:
        """Projects one key more, key (B, key_dim) and value (B, value_dim) (default: key), after ``keys``.

        None begins. ``keys`` stay as they were, and may be continued in several ways; they share memory with the
        result, so neither is to be edited in place. Steps over them make their gradients by themselves: what they
        attend to depends on the steps before. Compiled and transformed, it is ``torch.cat``.
        """
        _check(key, "CausalAdditiveAttention: key", "B", self.key_dim)
        value = key if value is None else value
        _check(value, "CausalAdditiveAttention: value", "B", self.value_dim)
        more = ProjectedKeys(*self._project(key.unsqueeze(1), value.unsqueeze(1)))
        if keys is None:
            keys = ProjectedKeys(*(t.new_empty((*t.shape[:-2], 0, t.shape[-1])) for t in (more.key, more.value)))
        return keys.append(more)

    @overload
    def step(
        self,
        query: Tensor,
        keys: ProjectedKeys,
        visible: int | None = None,
        *,
        return_weights: Literal[False] = False,
        **options: Unpack[HidingOptions],
    ) -> Tensor: ...
    @overload
    def step(
        self,
        query: Tensor,
        keys: ProjectedKeys,
        visible: int | None = None,
        *,
        return_weights: Literal[True],
        **options: Unpack[HidingOptions],
    ) -> tuple[Tensor, Tensor]: ...
    def step(
        self,
        query: Tensor,
        keys: ProjectedKeys,
        visible: int | None = None,
        *,
        mask: Tensor | None = None,
        key_lengths: Tensor | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """One query.

        Args:
            query: (B, query_dim).
            keys: of :meth:`append` or :meth:`project_keys`.
            visible: how many of the keys it sees, from the first. Default: all.
            mask: bool (B, Tk); True = may attend.
            key_lengths: int (B,); keys at or after a length are invisible.
            return_weights: also return the weights (B, H, Tk).

        Returns:
            context (B, width), as of :meth:`AdditiveAttention.forward`.
        """
        _check(query, "CausalAdditiveAttention: query", "B", self.query_dim)
        if mask is not None:
            _check(mask, "CausalAdditiveAttention: mask", "B", keys.key.shape[-2])
            mask = mask[:, None, None]
        center = None
        if visible is not None:
            Tk = keys.key.shape[-2]
            if not 0 <= visible <= Tk:
                raise ValueError(
                    f"CausalAdditiveAttention: visible: expected a number in [0, {Tk}], got {visible}"
                )
            ends = torch.full((1, 1), visible, device=query.device)
            if key_lengths is not None:
                check_lengths(key_lengths, query.shape[0], Tk, query.device, "CausalAdditiveAttention")
                ends, key_lengths = ends.minimum(key_lengths.unsqueeze(1)), None
            center = ends - 1  # keys outside of a window are not computed, in the joint backward neither
        context, weights = self._attend(
            query.unsqueeze(1),
            keys,
            mask=mask,
            key_lengths=key_lengths,
            is_causal=visible is not None,
            window_center=center,
            return_weights=return_weights,
        )
        context = context.squeeze(1)
        return (context, weights.squeeze(2)) if return_weights else context

    @overload  # type: ignore[override]  # it is causal
    def forward(
        self,
        query: Tensor,
        key: Tensor | ProjectedKeys,
        value: Tensor | None = None,
        *,
        return_weights: Literal[False] = False,
        **options: Unpack[HidingOptions],
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        query: Tensor,
        key: Tensor | ProjectedKeys,
        value: Tensor | None = None,
        *,
        return_weights: Literal[True],
        **options: Unpack[HidingOptions],
    ) -> tuple[Tensor, Tensor]: ...
    def forward(
        self,
        query: Tensor,
        key: Tensor | ProjectedKeys,
        value: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        key_lengths: Tensor | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """All queries at once; query t sees the first t + 1 keys.

        Args:
            query: (B, Tq, query_dim): d_0, d_1, ...
            key: (B, Tk, key_dim): a_1, a_2, ..., or the result of :meth:`project_keys`.
            value, mask, key_lengths, return_weights: see :meth:`AdditiveAttention.forward`.

        Returns:
            (B, Tq, width), as of :meth:`AdditiveAttention.forward`: c_1, c_2, ...
        """
        return super().forward(
            query,
            key,
            value,
            mask=mask,
            key_lengths=key_lengths,
            is_causal=True,
            return_weights=return_weights,
        )

    if TYPE_CHECKING:
        __call__ = forward  # type: ignore[assignment]
