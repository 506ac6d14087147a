"""Additive attention over packed sequences of different lengths, without padding.

Mathematics: that of ``additive_attention.py`` for each segment s by itself, whose queries are the rows
``cu_seqlens_q[s]`` to ``cu_seqlens_q[s + 1]`` of all queries, and whose keys those of ``cu_seqlens_k``. The
gradient of weight is the sum over the segments.

The kernels are those of ``additive_attention``: in C++ on the CPU run segment by segment
(``csrc/additive_attention/cpu_varlen.h``), in Triton with a segment for a batch element (``fusedattn/triton/
additive_attention_varlen.py``). For CUDA C++, and in the reference, segments are padded to the longest around it.

Symbols: S segments, total_q / total_k rows of all of them, H heads, D score width, Dv value width. Tests:
``tests/test_additive_attention_varlen.py``. Benchmark: ``benchmarks/wide.py``.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from fusedattn import _autograd, _scores, _windows
from fusedattn._dispatch import (
    UnsupportedError,
    autocast,
    autocast_enabled,
    choose,
    fail,
    overridable,
    tf32_allowed,
    triton_reasons,
    without_autocast,
)
from fusedattn._dtypes import accumulation_dtype
from fusedattn._options import AdditiveAttentionVarlenOptions as Options
from fusedattn._scores import shape_text
from fusedattn.ops import additive_attention as dense

OP = "additive_attention_varlen"


# Reference


def _padded(t: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """Rows (1, [H,] total, width) of segments as (S, [H,] longest, width), zeros at the end of short ones."""
    total, place = t.shape[-2], torch.arange(longest, device=t.device)
    inside = place < offsets.diff()[:, None]
    at = torch.where(inside, offsets[:-1, None] + place, total)
    rows = pad(t.squeeze(0), (0, 0, 0, 1)).index_select(-2, at.flatten())
    rows = rows.reshape(*rows.shape[:-2], offsets.shape[0] - 1, longest, rows.shape[-1])
    return rows if t.dim() == 3 else rows.transpose(0, 1)


def _packed(t: Tensor, offsets: Tensor, total: int) -> Tensor:
    """The rows of :func:`_padded` back in their places."""
    row = torch.arange(total, device=t.device)
    segment = torch.bucketize(row, offsets[1:].long(), right=True)
    at = segment * t.shape[-2] + row - offsets[segment]
    if t.dim() == 3:
        return t.flatten(0, 1).index_select(0, at).unsqueeze(0)
    return t.transpose(1, 2).flatten(0, 1).index_select(0, at).transpose(0, 1).unsqueeze(0)


def _through_padding(attend, query, key, value, cu_seqlens_q, cu_seqlens_k, options: Options):
    """(context, lse) by ``attend(query, key, value, key_lengths)`` of padded segments."""
    query, total = _padded(query, cu_seqlens_q, options.max_seqlen_q), query.shape[-2]
    key, value = (_padded(t, cu_seqlens_k, options.max_seqlen_k) for t in (key, value))
    context, lse = attend(query, key, value, cu_seqlens_k.diff().long())
    lse = _packed(lse.unsqueeze(-1), cu_seqlens_q, total).squeeze(-1)
    return _packed(context, cu_seqlens_q, total), lse


def _reference(query, key, value, weight, cu_seqlens_q, cu_seqlens_k, options: Options):
    """(context, lse) in plain PyTorch, differentiable to any order."""

    def attend(q, k, v, key_lengths):
        return dense.ATTENTION.reference(
            q, k, v, weight, None, None, key_lengths, None, None, None, None, options.of_attention
        )[:2]

    return _through_padding(attend, query, key, value, cu_seqlens_q, cu_seqlens_k, options)


@overridable
def additive_attention_varlen_ref(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool = False,
    window_size: tuple[int, int] | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    activation: str = "tanh",
    negative_slope: float = 0.2,
    return_lse: bool = False,
    backend: str = "reference",
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`additive_attention_varlen` in plain PyTorch, on any device.

    Same arguments (``backend`` is ignored), shapes, results and errors; differentiable to any order. It pads the
    segments and builds the (S, H, max_seqlen_q, max_seqlen_k, D) tensor that the kernels avoid.
    """
    return additive_attention_varlen(
        query,
        key,
        value,
        weight,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        is_causal=is_causal,
        window_size=window_size,
        scale=scale,
        softcap=softcap,
        activation=activation,
        negative_slope=negative_slope,
        return_lse=return_lse,
        backend=backend,
    )


# Declaration


def _empty_packed(t, width):
    """(1, [H,] total, width), whose rows lie in memory as (total, H, width)."""
    if t.dim() == 3:
        return t.new_empty((*t.shape[:-1], width))
    _, H, total, _ = t.shape
    return t.new_empty((total, H, width)).transpose(0, 1).unsqueeze(0)


def _fwd_fake(query, key, value, weight, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *rest):
    keep_scores, *_ = rest[len(Options._fields) - 2 :]
    rows, acc = query.shape[:-1], accumulation_dtype(query.dtype)
    return (
        _empty_packed(query, value.shape[-1]),
        query.new_empty(rows, dtype=acc),
        query.new_empty((*rows, max_seqlen_k) if keep_scores else (0,), dtype=acc),
    )


def _bwd_fake(grad_context, grad_lse, query, key, value, weight, *rest):
    return (*(_empty_packed(t, t.shape[-1]) for t in (query, key, value)), weight.new_empty(weight.shape))


class _Fold(_scores.Fold):
    def folded(self):
        for name, dim in zip(("cu_seqlens_q", "cu_seqlens_k"), self.dims[4:6], strict=True):
            if dim is not None:
                raise UnsupportedError(f"{OP}: {name}: expected the same offsets for every element of vmap")
        return (*self.rows(3), self.weight(3), *self.tensors[4:6])


ATTENTION_VARLEN = _autograd.Op(
    OP,
    inputs=("query", "key", "value", "weight"),
    others=("cu_seqlens_q", "cu_seqlens_k"),
    options=Options,
    outputs=("context", "lse", "scores"),
    kept=("context", "lse", "scores"),
    hidden=("scores",),
    reference=_reference,
    fwd_fake=_fwd_fake,
    bwd_fake=_bwd_fake,
    fold=_Fold,
)


# Public function

_fail = partial(fail, OP)


def _check_rows(query, key, value) -> None:
    """What the checks of additive_attention, of a batch, would say in other words."""
    rank = query.dim()
    if rank not in (2, 3):
        _fail("query", "shape (total_q, D) or (total_q, H, D)", tuple(query.shape))
    rows = query, key, value
    heads = next((t.shape[1] for t in rows if t.dim() == 3 and t.shape[1] != 1), 1)
    lead, D = () if rank == 2 else (heads,), query.shape[-1]

    def fits(t):
        return t.dim() == rank and (rank == 2 or t.shape[1] in (1, heads))

    if not fits(query):
        _fail("query", f"shape {shape_text('total_q', *lead, 'D')}", tuple(query.shape))
    if not fits(key) or key.shape[-1] != D:
        _fail("key", f"shape {shape_text('total_k', *lead, D)}", tuple(key.shape))
    if not fits(value) or value.shape[0] != key.shape[0]:
        _fail("value", f"shape {shape_text(key.shape[0], *lead, 'Dv')}", tuple(value.shape))


def _check_offsets(name, offsets, longest_name, longest, total, device) -> None:
    if not isinstance(offsets, Tensor) or offsets.dtype != torch.int32:
        _fail(name, "a Tensor of int32", getattr(offsets, "dtype", type(offsets).__name__))
    if offsets.dim() != 1 or offsets.shape[0] == 0 or offsets.device != device:
        _fail(name, f"shape (segments + 1,) on {device}", f"{tuple(offsets.shape)} on {offsets.device}")
    if not isinstance(longest, (int, torch.SymInt)) or isinstance(longest, bool):
        _fail(longest_name, "an int", type(longest).__name__)
    # Values are looked at only where that neither synchronises a device nor breaks a trace.
    if device.type != "cpu" or type(offsets) is not Tensor or dense.is_traced():
        return
    at = offsets.tolist()
    if at[0] != 0 or at[-1] != total:
        _fail(name, f"offsets from 0 to {total}, the number of rows", f"{at[0]} to {at[-1]}")
    lengths = [end - first for first, end in zip(at, at[1:], strict=False)]
    if min(lengths, default=0) < 0:
        s = next(n for n, length in enumerate(lengths) if length < 0)
        _fail(name, "offsets that do not decrease", f"{at[s + 1]} after {at[s]}")
    if max(lengths, default=0) > longest:
        _fail(longest_name, f"at least {max(lengths)}, the longest segment", longest)


@overridable
def additive_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool = False,
    window_size: tuple[int, int] | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    activation: str = "tanh",
    negative_slope: float = 0.2,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`additive_attention` over packed sequences of different lengths, by flash-attention's convention.

    Segment s has the queries ``cu_seqlens_q[s]:cu_seqlens_q[s + 1]`` and the keys and values
    ``cu_seqlens_k[s]:cu_seqlens_k[s + 1]``, and nothing to do with others: the result is that of a loop over the
    segments, and no padding is computed. On the CPU to the bit, gradients of query, key and value included; in
    Triton, too, where a segment by itself would take the same tiles. ``backend="cuda"``, which ``"auto"`` takes
    only where Triton cannot run, pads segments to the longest: keys past the end of one are skipped, queries are
    not. Shapes: S segments, H heads (or none), D score width, Dv value width.

    Args:
        query: (total_q, D) or (total_q, H, D), already projected; float32, float64, float16 or bfloat16. Heads of
            query, key and value may be 1 where the others have more.
        key: (total_k, D) or (total_k, H, D), already projected.
        value: (total_k, Dv) or (total_k, H, Dv).
        weight: (D,) or (H, D); of the dtype of the others, or float32 beside half-precision ones.
        cu_seqlens_q, cu_seqlens_k: int32 (S + 1,), offsets of the segments: 0 first, never decreasing, the number
            of rows last. Segments may be empty: without a key, contexts are 0 and lse is -inf. On the CPU other
            values raise; on a GPU, and by the reference while traced or transformed, nobody looks at them, and
            results of other values are undefined.
        max_seqlen_q, max_seqlen_k: no segment is longer.
        is_causal: query i of a segment sees its keys j <= i only, counted from the first of each (flash-attention
            counts from the last). Default: False.
        window_size: as in :func:`additive_attention`, counted as ``is_causal``. Default: None.
        scale, softcap, activation, negative_slope: as in :func:`additive_attention`.
        return_lse: also return the log-sum-exp of the scores, differentiable. Default: False.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"`` (plain PyTorch).

    Returns:
        context (total_q, [H,] Dv), or a tuple of it and lse, (total_q,) or (H, total_q), in float32 for
        half-precision inputs, else in their dtype.

    Under autocast the four inputs are cast to its dtype, except float64 ones. Second derivatives and forward-mode
    ones are computed through the reference formula, which pads. ``torch.vmap`` takes the offsets unbatched.

    Raises:
        TypeError: query, key, value or weight is not a Tensor.
        ValueError: an input with the wrong shape, dtype, device or value.
        UnsupportedError: no backend, or not the one asked for, can run these inputs.
    """
    _scores.require_dense(OP, query=query, key=key, value=value, weight=weight)
    device = query.device
    if autocast_enabled(device):
        query, key, value, weight = (autocast(t) for t in (query, key, value, weight))
    _check_rows(query, key, value)
    heads = query.dim() == 3
    rows = [(t.transpose(0, 1) if heads else t).unsqueeze(0) for t in (query, key, value)]
    with without_autocast(device):
        query, key, weight, value = _scores.broadcast(OP, rows[0], rows[1], weight, rows[2])
        _scores.check_numbers(OP, scale, softcap, activation, negative_slope)
        _check_offsets("cu_seqlens_q", cu_seqlens_q, "max_seqlen_q", max_seqlen_q, query.shape[-2], device)
        _check_offsets("cu_seqlens_k", cu_seqlens_k, "max_seqlen_k", max_seqlen_k, key.shape[-2], device)
        if cu_seqlens_q.shape[0] != cu_seqlens_k.shape[0]:
            _fail("cu_seqlens_k", f"{cu_seqlens_q.shape[0]} offsets as cu_seqlens_q", cu_seqlens_k.shape[0])
        left, right = _windows.sides(OP, window_size, None, is_causal)
        numbers = _scores.numbers(scale, softcap, activation, negative_slope)
        options = Options(max_seqlen_q, max_seqlen_k, left, right, *numbers)
        context, lse = _attend(query, key, value, weight, cu_seqlens_q, cu_seqlens_k, options, backend)
    context, lse = context.squeeze(0), lse.squeeze(0)
    context = context.transpose(0, 1) if heads else context
    return (context, lse) if return_lse else context


def _attend(query, key, value, weight, cu_seqlens_q, cu_seqlens_k, options, backend):
    """(context, lse) of rows (1, [H,] total, width)."""
    prefers_triton = backend == "auto" and not triton_reasons(query.device, query.dtype)
    backend = choose(
        OP,
        backend,
        query.device,
        query.dtype,
        lambda: f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}",
        {"cuda": "Triton needs no padding"} if prefers_triton else {},
    )
    if backend != "cuda":
        tensors = (query, key, value, weight, cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous())
        keeps = dense.keeps_scores(*tensors[:4], row=options.max_seqlen_k)
        flags = keeps, query.dtype == torch.float32 and tf32_allowed()
        context, lse, *_ = ATTENTION_VARLEN(backend, tensors, options, flags)
        return context, lse

    def attend(q, k, v, key_lengths):
        tensors = (q, k, v, weight, None, None, key_lengths, None, None, None, None)
        flags = False, dense.keeps_scores(*tensors[:4]), q.dtype == torch.float32 and tf32_allowed()
        return dense.ATTENTION(backend, tensors, options.of_attention, flags)[:2]

    return _through_padding(attend, query, key, value, cu_seqlens_q, cu_seqlens_k, options)
