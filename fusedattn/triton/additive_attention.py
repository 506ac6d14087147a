"""Additive attention in Triton, for NVIDIA and AMD GPUs. Mathematics: ``fusedattn/ops/additive_attention.py``.

Forward runs three kernels, over as many queries at a time as keep the scratch small (``CHUNK`` scores)::

    pack      exp(2q), exp(2k)    [tile, channel, row]: the loop below then has neither masks nor strides
    scores    e_ij                one tile of pairs a program, channels in a loop: 2 FMA, 1 MUL, 1/2 MUFU a tanh
    context   c_i, L_i            online softmax over the scores, p . x by tl.dot

Why not one kernel: the loop over channels wants each thread to own 32 pairs (a load serves 8 FMA), the product
p . x wants short key tiles. In one kernel, tiles of 32 x 128 pairs and 256 value columns spilled 1800 times; apart
each kernel has its own tile and spills nothing. The scores between them are 4 bytes for D tanh.

A key tile and a query tile whose largest |q| + |k| allows it (``PAIR_RANGE``) take the paired loop; the others
read the inputs themselves and evaluate exp(2 (q + k)), which has no range. Few queries (``FEW_QUERIES``) skip the
packing, which would move more bytes than it saves: lanes own channels, and a program has one query and a block of
keys (``few``). Keys are split over programs where rows are too few to fill the device; ``combine`` joins parts.

Backward needs the scores (kept, or made again per chunk) and runs::

    gradient  g_ij                twice, also transposed, so that both passes below read consecutive numbers
    value     dx_j                sum_i p_ij dc_i by tl.dot
    inputs    dq_i and dw, dk_j   one kernel, twice: a program holds rows of one side, the other side's pass by

The two passes over inputs cost 12.3 issue slots and 1 MUFU a tanh (5.5 for the keys, 6.8 for queries and weight).
One joint pass would take fewer, but needs atomics: its results would differ from run to run.

relu and leaky_relu pack the inputs themselves and take 3 slots a pair forward, without a MUFU.

Dropout is in the kernels that multiply by values: context, gradient and value make the bits of their tiles.

float64 takes the same loops. Kernels read the dtype of their arithmetic off their scratch; a reciprocal takes two
steps of Newton from float32's, and an exponential is a function of tens of instructions.

Counts are of sm_90 machine code, disassembled; none is a time. Tiles (``_tiles.py``) are chosen by counting, too.

This file has the raw operators: which launches follow each other, and what is done between them. Kernels and their
launches are in ``additive_attention_fwd.py`` and ``_bwd.py``; what both share, in ``_problem.py``.
"""

import functools
import itertools
from dataclasses import replace
from typing import NamedTuple

import torch

from fusedattn._dtypes import accumulation_dtype
from fusedattn._options import SCORE_ACTIVATIONS, schema
from fusedattn._options import AdditiveAttentionOptions as Options
from fusedattn.triton._common import Kernel, asked_for, distinct, on_device_of, recorded, register
from fusedattn.triton.additive_attention_bwd import (
    key_gradient,
    key_rows,
    query_gradient,
    query_rows,
    score_gradient,
    value_gradient,
)
from fusedattn.triton.additive_attention_fwd import attend, write_scores
from fusedattn.triton.additive_attention_problem import Problem, check

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor weight, Tensor? bias, Tensor? mask, Tensor? key_lengths, "
    "Tensor? window_center, Tensor? key_exp, Tensor? key_bound, Tensor? dropout_seed"
)


class Flags(NamedTuple):
    """What forward alone takes."""

    return_weights: bool
    keep_scores: bool
    allow_tf32: bool = False


def _weights(scores, lse, dtype):
    """exp(scores - lse), 0 for masked keys."""
    p = scores - lse.masked_fill(lse.isinf(), float("nan")).unsqueeze(-1)
    return p.exp_().masked_fill_(scores == float("-inf"), 0.0).to(dtype)


def forward(problem: Problem, context, lse, scores, allow_tf32) -> None:
    """Writes context (B, H, Tq, Dv) and lse, and, unless they are empty, scores."""
    kept = scores.numel() > 0
    for first, end in problem.chunks(kept):
        s = scores if kept else lse.new_empty(problem.batch * problem.H * (end - first) * problem.Tk)
        write_scores(problem, s, first, end)
        attend(problem, s, context[:, :, first:end], lse[:, :, first:end], first, allow_tf32)


def additive_attention_fwd(
    query, key, value, weight, bias, mask, key_lengths, window_center, key_exp, key_bound, seed, *numbers
):  # fmt: skip
    """``fusedattn::additive_attention_fwd_triton``; key_exp and key_bound are not used."""
    options = Options(*numbers[: len(Options._fields)])
    return_weights, keep_scores, allow_tf32 = Flags(*numbers[len(Options._fields) :])
    check(query, key, value, weight, bias, mask, key_lengths, window_center, seed)
    rows, (Tk, Dv) = query.shape[:-1], value.shape[-2:]
    context = query.new_zeros if Tk == 0 else query.new_empty
    context = context((*rows, Dv))
    empty = functools.partial(torch.empty, dtype=accumulation_dtype(query.dtype), device=query.device)
    lse, scores = empty(rows), empty((*rows, Tk) if keep_scores or return_weights else 0)
    if Tk == 0:
        lse.fill_(float("-inf"))
    elif lse.numel():
        with on_device_of(query):
            problem = Problem(query, key, value, weight, bias, mask, key_lengths, window_center, options, seed)
            heads = (problem.B, problem.H, problem.Tq)
            forward(problem, context.view(*heads, Dv), lse.view(heads), scores, allow_tf32)
    weights = _weights(scores, lse, query.dtype) if return_weights else query.new_empty(0)
    return context, lse, weights, (scores if keep_scores else lse.new_empty(0))


register(
    f"additive_attention_fwd_triton({_INPUTS}, {schema(Options)}, {schema(Flags, are_last=True)}) "
    "-> (Tensor context, Tensor lse, Tensor weights, Tensor scores)",
    additive_attention_fwd,
)


def backward(problem: Problem, asked, grad_context, grad_lse, grad_weights, context, lse, scores) -> tuple:
    """Gradients of query, key, value, weight and bias, those asked for, each with its batch and heads."""
    of_query, of_key, of_value, of_weight, of_bias = asked
    problem.find_queries_in_sight()
    rows, kept = (problem.batch, problem.H, problem.rows_q), scores.numel() > 0
    context = context.contiguous().view(*rows, problem.Dv)
    lse, scores = lse.reshape(rows), scores.contiguous()
    if grad_context is not None:
        grad_context = grad_context.contiguous().view(context.shape)
    if grad_weights is not None:
        grad_weights = grad_weights.contiguous()
    if grad_lse is not None:
        grad_lse = grad_lse.reshape(rows)
    grad_query = torch.empty(*rows, problem.D, dtype=context.dtype, device=context.device)
    keys = key_rows(problem)
    totals: dict = {}  # by input: sums over the chunks of queries
    biases = []  # gradients of the queries of each, where a bias has its own for every query
    for first, end in problem.chunks(kept or grad_weights is not None):
        part = slice(first, end)
        s, row_lse = scores, lse[:, :, part].contiguous()
        if not kept:
            s = row_lse.new_empty(*rows[:2], end - first, problem.Tk)
            write_scores(problem, s, first, end)
        shift = None
        if grad_weights is not None:
            p = _weights(s.view(*rows, problem.Tk), lse, lse.dtype)
            shift = (p * grad_weights.view(p.shape)).sum(-1)
        if grad_lse is not None:
            shift = -grad_lse[:, :, part] if shift is None else shift - grad_lse
        shift = None if shift is None else shift.contiguous()
        dc = None if grad_context is None else grad_context[:, :, part]
        outputs = (context[:, :, part], dc, grad_weights, shift)
        g, g_transposed, grad = score_gradient(problem, s, row_lse, *outputs, first, of_bias)
        queries = query_rows(problem, first, end)
        sums = {}
        if of_query or of_weight:
            grad_query[:, :, part], sums["weight"] = query_gradient(problem, g_transposed, queries, keys, first)
        if of_key:
            sums["key"] = key_gradient(problem, g, queries, keys, first)
        if of_value and dc is not None:
            sums["value"] = value_gradient(problem, s, row_lse, dc, first)
        if of_bias:
            grad = grad.sum_to_size(problem.bias_of(first, end)[0].shape)
            if problem.bias.shape[2] == 1:
                sums["bias"] = grad.contiguous()
            else:
                biases.append(grad)
        totals = {name: totals[name].add_(x) if name in totals else x for name, x in sums.items()}
    if of_value and grad_context is None:
        totals["value"] = context.new_zeros(problem.batch, problem.H, problem.rows_k, problem.Dv)
    if biases:
        totals["bias"] = torch.cat(biases, 2)
    return (grad_query, *(totals.get(name) for name in ("key", "value", "weight", "bias")))


def additive_attention_bwd(
    grad_context, grad_lse, grad_weights, query, key, value, weight, bias, mask, key_lengths, window_center,
    key_exp, key_bound, seed,
    *rest,
):  # fmt: skip
    """``fusedattn::additive_attention_bwd_triton``: gradients of query, key, value, weight and bias."""
    *options, context, lse, scores, output_mask = rest
    inputs = (query, key, value, weight, bias)
    asked = [a and t is not None for a, t in zip(asked_for(output_mask, 5), inputs, strict=True)]
    Tq, Tk, Dv, wide = query.shape[-2], key.shape[-2], value.shape[-1], accumulation_dtype(query.dtype)
    check(
        *inputs,
        mask,
        key_lengths,
        window_center,
        seed,
        grad_context=(grad_context, (Tq, Dv), query.dtype),
        grad_lse=(grad_lse, (Tq,), wide),
        grad_weights=(grad_weights, (Tq, Tk), query.dtype),
        context=(context, (Tq, Dv), query.dtype),
        lse=(lse, (Tq,), wide),
        scores=(scores if scores.numel() else None, (Tq, Tk), wide),
    )
    if not (lse.numel() and key.shape[-2]):
        return tuple(t.new_zeros(t.shape) if a else query.new_empty(0) for t, a in zip(inputs, asked, strict=True))
    with on_device_of(query):
        problem = Problem(*inputs, mask, key_lengths, window_center, Options(*options), seed)
        grads = backward(problem, asked, grad_context, grad_lse, grad_weights, context, lse, scores)
    return tuple(
        grad.to(t.dtype).reshape(t.shape) if a else query.new_empty(0)
        for grad, t, a in zip(grads, inputs, asked, strict=True)
    )


register(
    f"additive_attention_bwd_triton(Tensor? grad_context, Tensor? grad_lse, Tensor? grad_weights, {_INPUTS}, "
    f"{schema(Options)}, Tensor context, Tensor lse, Tensor scores, int output_mask) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_weight, Tensor grad_bias)",
    additive_attention_bwd,
)


# For tools


def kernels(dtypes=(torch.float32, torch.bfloat16, torch.float64), target=("cuda", 90)) -> list[Kernel]:
    """Every kernel in the specialisations of typical calls: recorded from the launchers, so none is made up."""
    wide = (  # B, Tq, Tk, D; whether masked
        ((4, 512, 512, 256), False),
        ((1, 1, 100000, 512), False),  # keys split into as many parts as combine may join
        ((128, 10, 128, 1024), True),
        ((128, 64, 128, 1024), True),
    )
    narrow = (((2, 6, 300, 16), False), ((8, 40, 300, 64), True))
    found = list[Kernel]()
    calls = [(dtype, "tanh", *call) for dtype, call in itertools.product(dtypes, wide + narrow)]
    forms = (
        ("window", wide[0]),
        ("centers", wide[0]),
        ("centers", narrow[0]),
        ("centers", narrow[1]),
        ("relu", wide[0]),
        ("relu", wide[1]),
        ("leaky_relu", wide[0]),
    )
    calls += [(dtypes[0], form, *call) for form, call in forms]
    calls += [(dtypes[0], "bias", *call) for call in wide[:2]]
    calls += [(dtype, "bias", *wide[3]) for dtype in dtypes]
    calls += [(dtype, "bias", *wide[2]) for dtype in dtypes if dtype == torch.float64]
    for dtype, form, shape, masked in calls:
        activation = form if form in SCORE_ACTIVATIONS else "tanh"
        # Compiling takes its time: the others have the first one's kernels in float64, too, and what is narrow
        # takes fewer registers in half precision, where products have one term.
        if (dtype == torch.float64 and shape == wide[0][0]) or (dtype.itemsize == 2 and (shape, masked) in narrow):
            continue

        call = functools.partial(_typical_call, shape, dtype, masked, activation, form)
        every_tile = form == "tanh" and dtype == torch.float32 and shape in (wide[1][0], narrow[1][0])
        suffix = "" if form == "tanh" else f"-{form}"
        found += [replace(k, name=k.name + suffix) for k in recorded(call, target, every_tile)]
    for dtype, (shape, masked) in ((dtypes[0], wide[0]), *((dtype, wide[3]) for dtype in dtypes)):
        dropping = functools.partial(_typical_call, shape, dtype, masked, "tanh", dropout_p=0.1)
        found += [replace(k, name=f"{k.name}-dropout") for k in recorded(dropping, target)]
    return distinct(found)


def _typical_call(shape, dtype, masked, activation, form=None, dropout_p=0.0):
    B, Tq, Tk, D = shape
    empty = functools.partial(torch.empty, dtype=dtype, device="meta")
    inputs = [empty(B, T, D) for T in (Tq, Tk, Tk)] + [empty(D)]
    mask = torch.empty(B, Tq, Tk, dtype=torch.bool, device="meta") if masked else None
    lengths = torch.empty(B, dtype=torch.int64, device="meta") if masked else None
    centers = torch.empty(B, Tq, dtype=torch.int64, device="meta") if form == "centers" else None
    bias = torch.empty(1, Tq, Tk, device="meta", dtype=accumulation_dtype(dtype)) if form == "bias" else None
    seed = torch.empty(1, dtype=torch.int64, device="meta") if dropout_p else None
    inputs += [bias, mask, lengths, centers, None, None, seed]
    sides = (64, 64) if form in ("window", "centers") else (-1, 0 if masked else -1)
    options = Options(*sides, 1.0, 5.0 if masked else 0.0, SCORE_ACTIVATIONS[activation], 0.2, dropout_p)
    context, lse, weights, scores = additive_attention_fwd(*inputs, *options, *Flags(masked, keep_scores=False))
    grads = (context, lse, weights if masked else None)
    additive_attention_bwd(*grads, *inputs, *options, context, lse, scores, 0b11111)
