"""Packed sequences in Triton: the kernels are attention's (``additive_attention.py``), a segment a batch element.

A program learns from the offsets where its segment's rows begin and how many there are; tiles count from there, as
those of a batch of one. The grid is that of a batch of the longest segments: a program past the end of its own
returns at once, so that nobody waits for a copy of the lengths. Scratch is as long as the packed rows: scores are
(H, total_q, max_seqlen_k); exponentials and gradients of pairs begin a tile of their own with each segment.
"""

from typing import NamedTuple

import torch

from fusedattn._dtypes import accumulation_dtype
from fusedattn._options import SCORE_ACTIVATIONS, schema
from fusedattn._options import AdditiveAttentionVarlenOptions as Options
from fusedattn.triton._common import Kernel, asked_for, distinct, on_device_of, recorded, register
from fusedattn.triton.additive_attention import backward, forward
from fusedattn.triton.additive_attention_problem import Problem, Segments, check

_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor weight, Tensor cu_seqlens_q, Tensor cu_seqlens_k"
# One graph for all lengths.
_OPTIONS = schema(Options).replace("int max_seqlen", "SymInt max_seqlen")


class Flags(NamedTuple):
    """What forward alone takes."""

    keep_scores: bool
    allow_tf32: bool = False


def _check_offsets(query, cu_seqlens_q, cu_seqlens_k) -> None:
    for name, offsets in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if (
            offsets.dim() != 1 or not offsets.numel() or offsets.shape != cu_seqlens_q.shape
            or offsets.dtype != torch.int32 or offsets.device != query.device or not offsets.is_contiguous()
        ):  # fmt: skip
            raise RuntimeError(
                f"additive_attention_varlen: {name}: expected int32 offsets (segments + 1,), contiguous, on "
                f"{query.device}, got shape {tuple(offsets.shape)}, {offsets.dtype}, on {offsets.device}"
            )
    if query.shape[0] != 1:
        raise RuntimeError(f"additive_attention_varlen: query: expected one batch element, got {query.shape[0]}")


def _problem(query, key, value, weight, cu_seqlens_q, cu_seqlens_k, options: Options) -> Problem:
    segments = Segments(cu_seqlens_q, cu_seqlens_k, options.max_seqlen_q, options.max_seqlen_k)
    absent = (None,) * 4
    return Problem(query, key, value, weight, *absent, options.of_attention, segments=segments)


def _packed(t):
    """Rows (1, [H,] total, width) as they are returned: in memory (total, H, width)."""
    return t if t.dim() == 3 else t.squeeze(0).transpose(0, 1).contiguous().transpose(0, 1).unsqueeze(0)


def additive_attention_varlen_fwd(query, key, value, weight, cu_seqlens_q, cu_seqlens_k, *numbers):
    """``fusedattn::additive_attention_varlen_fwd_triton``."""
    options = Options(*numbers[: len(Options._fields)])
    keep_scores, allow_tf32 = Flags(*numbers[len(Options._fields) :])
    check(query, key, value, weight, None, None, None)
    _check_offsets(query, cu_seqlens_q, cu_seqlens_k)
    rows, acc = query.shape[:-1], accumulation_dtype(query.dtype)
    context, lse = query.new_empty((*rows, value.shape[-1])), query.new_empty(rows, dtype=acc)
    scores = query.new_empty((*rows, options.max_seqlen_k) if keep_scores else 0, dtype=acc)
    if options.max_seqlen_k == 0:
        context.zero_()
        lse.fill_(float("-inf"))
    elif lse.numel():
        with on_device_of(query):
            problem = _problem(query, key, value, weight, cu_seqlens_q, cu_seqlens_k, options)
            heads = (1, problem.H, problem.rows_q)
            forward(problem, context.view(*heads, problem.Dv), lse.view(heads), scores, allow_tf32)
    return _packed(context), lse, scores


def additive_attention_varlen_bwd(
    grad_context, grad_lse, query, key, value, weight, cu_seqlens_q, cu_seqlens_k, *rest
):  # fmt: skip
    """``fusedattn::additive_attention_varlen_bwd_triton``: gradients of query, key, value and weight."""
    *numbers, context, lse, scores, output_mask = rest
    options, inputs, asked = Options(*numbers), (query, key, value, weight), asked_for(output_mask, 4)
    Tq, Dv, wide = query.shape[-2], value.shape[-1], accumulation_dtype(query.dtype)
    check(
        *inputs,
        None,
        None,
        None,
        grad_context=(grad_context, (Tq, Dv), query.dtype),
        grad_lse=(grad_lse, (Tq,), wide),
        context=(context, (Tq, Dv), query.dtype),
        lse=(lse, (Tq,), wide),
        scores=(scores if scores.numel() else None, (Tq, options.max_seqlen_k), wide),
    )
    _check_offsets(query, cu_seqlens_q, cu_seqlens_k)
    if not (lse.numel() and options.max_seqlen_k):
        found = [t.new_zeros(t.shape) for t in inputs]
    else:
        with on_device_of(query):
            problem = _problem(*inputs, cu_seqlens_q, cu_seqlens_k, options)
            grads = backward(problem, (*asked, False), grad_context, grad_lse, None, context, lse, scores)
        found = [
            grad.to(t.dtype).reshape(t.shape) if a else t
            for grad, t, a in zip(grads[:4], inputs, asked, strict=True)
        ]
    return tuple(
        (grad if t is weight else _packed(grad)) if a else query.new_empty(0)
        for grad, t, a in zip(found, inputs, asked, strict=True)
    )


register(
    f"additive_attention_varlen_fwd_triton({_INPUTS}, {_OPTIONS}, {schema(Flags, are_last=True)}) "
    "-> (Tensor context, Tensor lse, Tensor scores)",
    additive_attention_varlen_fwd,
)
register(
    f"additive_attention_varlen_bwd_triton(Tensor? grad_context, Tensor? grad_lse, {_INPUTS}, {_OPTIONS}, "
    "Tensor context, Tensor lse, Tensor scores, int output_mask) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_weight)",
    additive_attention_varlen_bwd,
)


# For tools


def kernels(target=("cuda", 90)) -> list[Kernel]:
    """Attention's with offsets, of many queries, causal and not, and of few, in float32 and bfloat16."""
    found = list[Kernel]()
    for total, longest, D, is_causal, dtype in (
        (8192, 512, 256, True, torch.float32),
        (8192, 512, 256, False, torch.bfloat16),
        (64, 4, 256, False, torch.float32),
    ):
        found += recorded(lambda: _typical_call(total, longest, D, is_causal, dtype), target)  # noqa: B023
    return distinct(found)


def _typical_call(total, longest, D, is_causal, dtype):
    inputs = [torch.empty(1, total, D, dtype=dtype, device="meta") for _ in range(3)]
    inputs.append(torch.empty(D, dtype=dtype, device="meta"))
    inputs += [torch.empty(33, dtype=torch.int32, device="meta") for _ in range(2)]
    options = Options(longest, longest, -1, 0 if is_causal else -1, 1.0, 0.0, SCORE_ACTIVATIONS["tanh"], 0.2)
    context, lse, scores = additive_attention_varlen_fwd(*inputs, *options, False, False)
    additive_attention_varlen_bwd(context, lse, *inputs, *options, context, lse, scores, 0b1111)
