"""Normalisers of additive attention other than the softmax, composed in PyTorch over the scores.

With the scores e_ij of ``fusedattn/ops/additive_scores.py``, -inf at the keys that query i does not see::

    p_i = normalizer(e_i)      c_i = sum_j p_ij x_j      "sigmoid": p_ij = sigma(e_ij) / sum_j sigma(e_ij)

What is only (Tq, Tk) large costs a few percent of the scores: a normaliser needs no kernels. Tests:
``tests/test_normalizers.py``.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedattn import _scores
from fusedattn._dispatch import fail
from fusedattn._dtypes import accumulation_dtype


def smoothed(scores: Tensor) -> Tensor:
    """sigma(e) / sum sigma(e), also where every sigma(e) is too small for a number."""
    return torch.softmax(F.logsigmoid(scores), -1)


NAMED: dict[str, Callable[[Tensor], Tensor]] = {"softmax": lambda scores: scores.softmax(-1), "sigmoid": smoothed}


def function(op: str, normalizer: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What makes weights of scores, by its name or itself."""
    named = normalizer if callable(normalizer) else NAMED.get(normalizer)
    if named is None:
        names = ", ".join(map(repr, NAMED))
        fail(op, "normalizer", f"one of {names}, or a callable on the scores", repr(normalizer))
    return named


def attend(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    visible: Tensor | None,
    normalizer: str | Callable[[Tensor], Tensor],
    score: Callable[[Tensor, Tensor, Tensor], Tensor],
    unseen_are_zero: bool,
    drop: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(context, weights); ``score`` makes the scores of query, key and weight, ``visible`` is None for all keys.

    Keys that no query sees are taken as zeros, unless they are. The weights that the context has are ``drop`` of
    those that are returned.

    Scores and normaliser work in float32 at least; weights and context are in the dtype of the query.
    """
    normalize = function(op, normalizer)
    if visible is not None and not unseen_are_zero:
        key, value = _scores.without_unseen(visible, key, value)
    wide = accumulation_dtype(query.dtype)
    scores = score(query.to(wide), key.to(wide), weight.to(wide))
    if bias is not None:
        scores, visible = _scores.biased(scores, bias, visible)
    return _normalized(op, scores, value, visible, normalize, query.dtype, drop)


def apply(
    op: str,
    scores: Tensor,
    value: Tensor,
    visible: Tensor | None,
    normalize: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    unseen_are_zero: bool = False,
) -> tuple[Tensor, Tensor]:
    """(context, weights) in ``dtype`` of scores that exist already."""
    if visible is not None and not unseen_are_zero:
        (value,) = _scores.without_unseen(visible, value)
    return _normalized(op, scores, value, visible, normalize, dtype)


def _normalized(op, scores, value, visible, normalize, dtype, drop=None) -> tuple[Tensor, Tensor]:
    if visible is not None:
        scores = _scores.of_visible(visible, scores)
    weights = normalize(scores)
    if not isinstance(weights, Tensor) or weights.shape != scores.shape:
        got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        fail(op, "normalizer", f"one that returns weights of shape {tuple(scores.shape)}", got)
    weights = weights.to(dtype)
    if visible is not None:
        weights = weights.masked_fill(~visible, 0.0)
    return (weights if drop is None else drop(weights)) @ value, weights
