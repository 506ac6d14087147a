"""One attention of the parts of a sequence of keys (Rabe and Staats 2021, arXiv:2112.05682).

Mathematics, of parts n with context c_n and log-sum-exp L_n of their own keys::

    L = log sum_n exp(L_n)         c = sum_n exp(L_n - L) c_n

which is exact: a weight of a part, exp(e_ij - L_n), becomes exp(e_ij - L). Of vectors alone, so it is composed in
PyTorch, differentiable to any order. Symbols: B batch, H heads, Tq query length, Dv value width. Tests:
``tests/test_merge_attention.py``.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fusedattn._dispatch import fail
from fusedattn._dtypes import accumulation_dtype

_fail = partial(fail, "merge_attention")


def _check(contexts: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    if len(contexts) != len(lses) or not contexts:
        _fail("lses", f"one of each context, of 1 or more ({len(contexts)})", f"{len(lses)} of them")
    for argument, parts in (("contexts", contexts), ("lses", lses)):
        for n, t in enumerate(parts):
            if not isinstance(t, Tensor):
                raise TypeError(f"merge_attention: {argument}[{n}]: expected a Tensor, got {type(t).__name__}")
    first = contexts[0]
    if not first.dtype.is_floating_point or first.dim() < 1:
        _fail("contexts[0]", "floating-point (..., Tq, Dv)", f"{first.dtype} {tuple(first.shape)}")
    dtypes = first.dtype, accumulation_dtype(first.dtype)
    for n, (context, lse) in enumerate(zip(contexts, lses, strict=True)):
        for name, t, shape, allowed in (
            ("contexts", context, first.shape, dtypes[:1]),
            ("lses", lse, first.shape[:-1], dtypes),
        ):
            if t.shape != shape or t.dtype not in allowed or t.device != first.device:
                expected = f"{allowed[-1]} {tuple(shape)} on {first.device}, as of contexts[0]"
                _fail(f"{name}[{n}]", expected, f"{t.dtype} {tuple(t.shape)} on {t.device}")


def merge_attention(contexts: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
    """Attention over all keys from that over parts of them, exactly: long or distributed sequences, prefixes.

    Args:
        contexts: one (..., Tq, Dv) for each part, as of :func:`fusedattn.additive_attention`; a sequence, or a
            Tensor of them along its first dimension.
        lses: the log-sum-exp (..., Tq) of each part, as of ``return_lse=True``: in float32 beside half precision.

    Returns:
        (context, lse) of all parts, in the shape and dtypes of one. Differentiable in contexts and lses. Where the
        lse of a part is -inf, that part is absent, whatever its context holds; where all are, the context is 0 and
        the lse -inf.

    The weights of a part, times ``exp(lse of the part - lse)``, are those of the whole. Autocast casts nothing:
    results have the dtypes of the parts.

    Raises:
        TypeError: a part is not a Tensor.
        ValueError: no parts, as many contexts as lses not, or parts that differ in shape, dtype or device.
    """
    contexts = contexts.unbind(0) if isinstance(contexts, Tensor) else tuple(contexts)
    lses = lses.unbind(0) if isinstance(lses, Tensor) else tuple(lses)
    _check(contexts, lses)
    stacked = torch.stack(lses).to(accumulation_dtype(contexts[0].dtype))
    absent = stacked == float("-inf")
    empty = absent.all(0)
    # Without any part over zeros, masked afterwards: no NaN in any derivative.
    scores = stacked.masked_fill(empty, 0.0)
    weights = torch.softmax(scores, 0).masked_fill(absent, 0.0)
    parts = zip(contexts, weights.unsqueeze(-1), absent.unsqueeze(-1), strict=True)
    context = sum(weight * context.masked_fill(hidden, 0.0) for context, weight, hidden in parts)
    lse = torch.logsumexp(scores, 0).masked_fill(empty, float("-inf"))
    return context.to(contexts[0].dtype), lse.to(lses[0].dtype)


# It has no kernels to be the reference of.
merge_attention_ref = merge_attention
