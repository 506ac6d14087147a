"""Additive attention of jagged nested tensors: packed sequences of which PyTorch keeps the offsets."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fusedattn._dispatch import fail

_fail = partial(fail, "additive_attention")


def any_of(*tensors: Any) -> bool:
    return any([isinstance(t, Tensor) and t.is_nested for t in tensors])


def require_default(**options: Any) -> None:
    """Raises for what is not None or False."""
    for name, x in options.items():
        if x is not None and x is not False:
            _fail(name, "its default with nested tensors", "a Tensor" if isinstance(x, Tensor) else x)


def _rows(name: str, t: Tensor, like: Any = None) -> tuple[Any, Tensor]:
    """(t with what PyTorch's class of nested tensors has, its rows (total, [H,] width))"""
    nested: Any = t
    if not isinstance(t, Tensor) or not t.is_nested or t.layout != torch.jagged:
        got = type(t).__name__ if not isinstance(t, Tensor) else f"a nested one of layout {t.layout}"
        _fail(name, "a nested Tensor of layout torch.jagged, as the others", got if any_of(t) else "a dense one")
    rank = nested.dim() if like is None else like.dim()
    if rank not in (3, 4) or nested.dim() != rank or nested._ragged_idx != rank - 2:
        shape = f"{nested.dim()} dimensions, of which {nested._ragged_idx} is ragged"
        _fail(name, "shape (B, ragged, D) or (B, H, ragged, D)", shape)
    if nested.lengths() is not None:
        _fail(name, "a nested Tensor without holes between its rows", "one with lengths of its own")
    return nested, nested.values() if rank == 3 else nested.values().transpose(0, 1)


def attend(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, *, return_lse: bool, **options: Any):
    """:func:`fusedattn.additive_attention`, in nested tensors that share query's offsets."""
    from fusedattn.ops.additive_attention_varlen import additive_attention_varlen  # which is made of it

    q, q_rows = _rows("query", query)
    k, k_rows = _rows("key", key, q)
    v, v_rows = _rows("value", value, q)
    if q.shape[0] != k.shape[0]:
        _fail("key", f"{q.shape[0]} sequences, as query", k.shape[0])
    # A compiled program cannot look at values: there it must be the same tensor.
    if v.offsets() is not k.offsets() and (
        torch.compiler.is_compiling() or not torch.equal(v.offsets(), k.offsets())
    ):
        _fail("value", "the offsets of key", "others")
    longest = q._get_max_seqlen()
    context, lse = additive_attention_varlen(
        q_rows,
        k_rows,
        v_rows,
        weight,
        q.offsets().int(),
        k.offsets().int(),
        max_seqlen_q=longest,
        max_seqlen_k=k._get_max_seqlen(),
        return_lse=True,
        **options,
    )
    heads = q.dim() == 4

    def nested(rows: Tensor) -> Tensor:
        made = torch.nested.nested_tensor_from_jagged(rows, q.offsets(), max_seqlen=longest)
        return made.transpose(1, 2) if heads else made

    return (nested(context), nested(lse.transpose(0, 1) if heads else lse)) if return_lse else nested(context)
