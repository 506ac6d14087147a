"""Additive attention in Triton, backward: g_ij, then its sums over pairs. See ``additive_attention.py``."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedattn.triton import _tiles
from fusedattn.triton._common import NVIDIA, fast_reciprocal, launch, load_wide, number
from fusedattn.triton.additive_attention_problem import (
    LOG2E,
    NO_BIAS,
    PAIR_RANGE,
    UNSPECIALISED,
    batch_and_head,
    dropped,
    keys_in_windows,
    linear,
    linear_gradient,
    pairs_of_segment,
    programs_wanted,
    queries_in_sight,
    reciprocal_beyond_range,
    segment,
    strides,
)

# What a step of tl.dot sums over, 16 numbers of float32: with 32, three TF32 products spill on sm_80. Triton 3.6
# takes no fewer than 16.
DOT_BYTES, DOT_TERMS = 64, 16
# Rows of scratch are padded to this many numbers, so that wide loads are aligned.
PAD = 32


def _dot_terms(dtype):
    return max(DOT_TERMS, DOT_BYTES // dtype.itemsize)


@triton.jit
def _probability(s, lse):
    """exp(s - lse), NaN where lse is infinite, as softmax is; there of masked keys, too, whose s is -inf."""
    return tl.exp2((s - tl.where(tl.abs(lse) == float("inf"), float("nan"), lse)) * LOG2E)


@triton.jit
def _part_of_cap(s, softcap, bias, i64, j64, stride_bq, stride_bk, inside):
    """Scores of a tile without their bias, as a part of the cap."""
    if bias is not None:
        s -= load_wide(bias + i64[:, None] * stride_bq + j64[None, :] * stride_bk, inside)
    part = s / number(softcap, s.dtype)
    if bias is not None:
        part = tl.minimum(tl.maximum(part, -1.0), 1.0)  # a large one left little of the score
    return part


@triton.jit(do_not_specialize=UNSPECIALISED)
def additive_attention_bwd_kernel_gradient(
    scores, lse, value, bias, context, grad_context, grad_weights, shift, g, g_transposed, grad_bias,
    stride_vb, stride_vh, stride_vt, stride_vd, stride_bb, stride_bh, stride_bq, stride_bk, stride_cb, stride_ch,
    H, Tq, Tk, first_query, offsets_q, offsets_k, rows_q, rows_k, center, stride_n, left, right, scale, softcap,
    seed, heads_of_seed, first_head, heads, drop_query, drop_key, drop_below, drop_factor,
    Dv: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PAD: tl.constexpr,
    NVIDIA: tl.constexpr,
):  # fmt: skip
    """g_ij, the gradient of the score before cap and scale, of one tile; rows are padded with 0 to PAD.

    shift is sum_j p_ij dp_ij - dL_i, or None. bias is None without a cap, grad_bias (B, H, Tq, Tk), the gradient
    after cap and scale, where it is not asked for. Grid: (query tiles * key tiles * B * H,).
    """
    ARITHMETIC: tl.constexpr = scores.dtype.element_ty
    q_tiles, k_tiles = tl.cdiv(Tq, BLOCK_Q), tl.cdiv(Tk, BLOCK_K)
    q_tile = tl.program_id(0) % q_tiles
    k_tile = (tl.program_id(0) // q_tiles) % k_tiles
    bh, b, h = batch_and_head(tl.program_id(0) // q_tiles // k_tiles, H)
    row_q, width = bh * Tq, Tk
    if offsets_q is not None:
        first_q, Tq, first_query, first_k, Tk = segment(offsets_q, offsets_k, b, first_query, rows_q, rows_k)
        if (q_tile * BLOCK_Q >= Tq) | (k_tile * BLOCK_K >= Tk):
            return
        row_q = h * rows_q + first_q
        value += first_k * stride_vt
        if grad_context is not None:
            context += first_q * Dv
            grad_context += first_q * Dv
    i, j = q_tile * BLOCK_Q + tl.arange(0, BLOCK_Q), k_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    i64, j64 = i.to(tl.int64), j.to(tl.int64)
    in_q, in_k = i < Tq, j < Tk
    at = (row_q + i64)[:, None] * width + j64[None, :]
    inside = in_q[:, None] & in_k[None, :]

    s = tl.load(scores + at, mask=inside, other=float("-inf"))  # [BLOCK_Q, BLOCK_K]
    row_lse = tl.load(lse + row_q + i64, mask=in_q, other=0.0)
    p = _probability(s, row_lse[:, None])
    # Before the products on AMD, which would spill scalars, its addresses, beside them; others lack registers.
    is_early: tl.constexpr = bias is not None and not NVIDIA
    if bias is not None:
        bias += b * stride_bb + h * stride_bh
    if is_early:
        part = _part_of_cap(s, softcap, bias, i64, j64, stride_bq, stride_bk, inside)
    a = tl.zeros((BLOCK_Q, BLOCK_K), ARITHMETIC)
    mean = tl.zeros((BLOCK_Q,), ARITHMETIC)
    if grad_context is not None:
        summed = Dv
        if left is not None or right is not None:  # nothing is summed where no key of the tile is visible
            j0, i0 = k_tile * BLOCK_K, (first_query + q_tile * BLOCK_Q).to(tl.int64)
            first, last = keys_in_windows(
                j0.to(tl.int64), (j0 + BLOCK_K).to(tl.int64), i0, Tq - q_tile * BLOCK_Q,
                center, stride_n, left, right, bh, BLOCK_Q,
            )  # fmt: skip
            summed = tl.where(first < last, Dv, 0)
        terms = tl.zeros((BLOCK_Q, BLOCK_V), ARITHMETIC)
        base = b * stride_cb + h * stride_ch + i64[:, None] * Dv
        values = value + b * stride_vb + h * stride_vh + j64[None, :] * stride_vt
        for start in tl.range(0, summed, BLOCK_V):
            v = start + tl.arange(0, BLOCK_V)
            rows = in_q[:, None] & (v < Dv)[None, :]
            dc = tl.load(grad_context + base + v[None, :], mask=rows, other=0.0)
            c = tl.load(context + base + v[None, :], mask=rows, other=0.0)
            x_at = values + v.to(tl.int64)[:, None] * stride_vd
            x = tl.load(x_at, mask=in_k[None, :] & (v < Dv)[:, None], other=0.0)  # [BLOCK_V, BLOCK_K]
            a = tl.dot(dc, x, a, input_precision="tf32x3" if NVIDIA else "ieee", out_dtype=ARITHMETIC)
            terms = tl.fma(dc.to(ARITHMETIC), c.to(ARITHMETIC), terms)
        # Summed across threads once. A product summed at once would become an FMA in each thread, and what threads
        # add would not be the same number: copies of a sum would differ in the last bit.
        mean = tl.sum(terms, 1)
        if seed is not None:
            a = dropped(
                a, b, h, i[:, None], j[None, :],
                seed, heads_of_seed, first_head, heads, drop_query, drop_key, drop_below, drop_factor,
            )  # fmt: skip
    if grad_weights is not None:
        a += load_wide(grad_weights + at, inside)
    if shift is not None:
        mean += tl.load(shift + row_q + i64, mask=in_q, other=0.0)
    gradient = p * (a - mean[:, None])
    if grad_bias is not None:
        tl.store(grad_bias + at, tl.where(s == float("-inf"), 0.0, gradient), mask=inside)
    gradient *= number(scale, ARITHMETIC)
    if softcap is not None:
        if not is_early:
            part = _part_of_cap(s, softcap, bias, i64, j64, stride_bq, stride_bk, inside)
        gradient *= 1.0 - part * part
    gradient = tl.where(s == float("-inf"), 0.0, gradient)
    q_padded, k_padded = tl.cdiv(Tq, PAD) * PAD, tl.cdiv(Tk, PAD) * PAD
    row_g, row_transposed = bh * Tq, bh * Tk
    if offsets_q is not None:
        pairs = pairs_of_segment(b, h, H, first_q, Tq, width, PAD)
        g, g_transposed, row_g, row_transposed = g + pairs, g_transposed + pairs, 0, 0
    out = g + (row_g + i64)[:, None] * k_padded + j64[None, :]
    tl.store(out, gradient, mask=in_q[:, None] & (j < k_padded)[None, :])
    out_transposed = g_transposed + (row_transposed + j64)[:, None] * q_padded + i64[None, :]
    tl.store(out_transposed, tl.trans(gradient), mask=in_k[:, None] & (i < q_padded)[None, :])


def score_gradient(problem, scores, lse, context, grad_context, grad_weights, shift, first, of_bias):
    """(g (B, H, n, Tk) and its transpose, rows padded to PAD; that of the bias (B, H, n, Tk), if asked for).

    Of the queries from first on; context and its gradient are (B, H, n, Dv).
    """
    n, block_q, block_k = lse.shape[2], 32, 32
    Tq = problem.most_queries(n)
    q_padded, k_padded = (triton.cdiv(size, PAD) * PAD for size in (n, problem.Tk))
    if problem.segments is None:
        g, g_transposed = problem.empty(problem.BH, n, k_padded), problem.empty(problem.BH, problem.Tk, q_padded)
    else:
        pairs = (problem.H, n // PAD + problem.B, PAD, k_padded)  # see pairs_of_segment
        g, g_transposed = problem.empty(pairs), problem.empty(pairs)
    grad_bias = problem.empty(problem.B, problem.H, n, problem.Tk) if of_bias and problem.is_sloped else None
    bias, bias_strides = problem.bias_of(first, first + n) if problem.options["softcap"] else NO_BIAS
    # Where no tensor core takes float64 (sm_120), its products spill beside the operands of a second stage.
    warps, stages = (8, 1) if g.dtype == torch.float64 else (4, 2)
    launch(
        additive_attention_bwd_kernel_gradient,
        (triton.cdiv(Tq, block_q) * triton.cdiv(problem.Tk, block_k) * problem.BH,),
        scores, lse, problem.value, bias, context, grad_context, grad_weights, shift, g, g_transposed, grad_bias,
        *problem.value.stride(), *bias_strides, *strides(context), problem.H, Tq, problem.Tk, first,
        options=problem.options_of(first, first + n), Dv=problem.Dv, BLOCK_Q=block_q, BLOCK_K=block_k,
        BLOCK_V=_dot_terms(context.dtype), PAD=PAD, NVIDIA=NVIDIA, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if of_bias and grad_bias is None:
        grad_bias = g.view(problem.B, problem.H, n, k_padded)[..., : problem.Tk]
    return g, g_transposed, grad_bias


@triton.jit(do_not_specialize=UNSPECIALISED)
def additive_attention_bwd_kernel_value(
    scores, lse, grad_context, key_lengths, grad_value, stride_cb, stride_ch, H, Tq, Tk, first_query,
    offsets_q, offsets_k, rows_q, rows_k, seeing, tiles_seen, center, left, right,
    seed, heads_of_seed, first_head, heads, drop_query, drop_key, drop_below, drop_factor,
    Dv: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """dx_j = sum_i p_ij dc_i, (B, H, Tk, Dv) in the arithmetic's dtype. Grid: (key tiles * B * H, value tiles)."""
    ARITHMETIC: tl.constexpr = scores.dtype.element_ty
    k_tiles = tl.cdiv(Tk, BLOCK_K)
    k_tile = tl.program_id(0) % k_tiles
    bh, b, h = batch_and_head(tl.program_id(0) // k_tiles, H)
    row_q, row_k, width = bh * Tq, bh * Tk, Tk
    if offsets_q is not None:
        first_q, Tq, first_query, first_k, Tk = segment(offsets_q, offsets_k, b, first_query, rows_q, rows_k)
        if k_tile * BLOCK_K >= Tk:
            return
        row_q, row_k = h * rows_q + first_q, h * rows_k + first_k
        grad_context += first_q * Dv
    j = k_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    j64 = j.to(tl.int64)
    in_k, in_v = j < Tk, v < Dv
    first, last, j0 = 0, Tq, k_tile * BLOCK_K
    if left is not None or right is not None:
        first, last = queries_in_sight(
            first, last, j0, first_query, seeing, center, tiles_seen, left, right, bh, BLOCK_K, BLOCK_Q
        )
    if key_lengths is not None:
        last = tl.where(tl.load(key_lengths + b) <= k_tile * BLOCK_K, first, last)

    scores += row_q * width
    lse += row_q
    grad_context += b * stride_cb + h * stride_ch
    acc = tl.zeros((BLOCK_K, BLOCK_V), ARITHMETIC)
    for start in tl.range(first, last, BLOCK_Q):
        i = start + tl.arange(0, BLOCK_Q)
        i64 = i.to(tl.int64)
        in_q = i < Tq
        s_at = scores + i64[None, :] * width + j64[:, None]
        s = tl.load(s_at, mask=in_k[:, None] & in_q[None, :], other=float("-inf"))  # [BLOCK_K, BLOCK_Q]
        row_lse = tl.load(lse + i64, mask=in_q, other=0.0)
        p = tl.where(s == float("-inf"), 0.0, _probability(s, row_lse[None, :]))
        if seed is not None:
            p = dropped(
                p, b, h, i[None, :], j[:, None],
                seed, heads_of_seed, first_head, heads, drop_query, drop_key, drop_below, drop_factor,
            )  # fmt: skip
        dc_at = grad_context + i64[:, None] * Dv + v[None, :]
        dc = tl.load(dc_at, mask=in_q[:, None] & in_v[None, :], other=0.0)
        precision: tl.constexpr = "tf32x3" if NVIDIA else "ieee"
        acc = tl.dot(p.to(dc.dtype), dc, acc, input_precision=precision, out_dtype=ARITHMETIC)
    out = grad_value + (row_k + j64)[:, None] * Dv + v[None, :]
    tl.store(out, acc, mask=in_k[:, None] & in_v[None, :])


def value_gradient(problem, scores, lse, grad_context, first):
    """(B, H, Tk, Dv): what the queries from first on give."""
    n, out = lse.shape[2], problem.empty(problem.batch, problem.H, problem.rows_k, problem.Dv)
    block_q, block_k = _dot_terms(grad_context.dtype), 32
    block_v = min(64, max(16, triton.next_power_of_2(problem.Dv)))
    stages = 2 if problem.options["seed"] is None else 1  # a second one spills beside the random words
    launch(
        additive_attention_bwd_kernel_value,
        (triton.cdiv(problem.Tk, block_k) * problem.BH, triton.cdiv(problem.Dv, block_v), 1),
        scores, lse, grad_context, problem.key_lengths, out, *strides(grad_context),
        problem.H, problem.most_queries(n), problem.Tk, first,
        options=problem.options_of(first, first + n), Dv=problem.Dv, BLOCK_Q=block_q, BLOCK_K=block_k,
        BLOCK_V=block_v, NVIDIA=NVIDIA, num_warps=4, num_stages=stages,
    )  # fmt: skip
    return out


@triton.jit
def _largest_bound(bounds, bh, tile, T, offsets, PAD: tl.constexpr):
    """Of all rows of a batch element and head: found before, or of a segment, whose tiles begin with this one."""
    if offsets is None:
        top = tl.load(bounds + bh)
    else:
        n, tiles = tl.arange(0, 32), tl.cdiv(T, PAD)
        tops = tl.zeros((32,), bounds.dtype.element_ty)
        for start in tl.range(0, tiles, 32):
            tops = tl.maximum(tops, tl.load(bounds + tile + start + n, mask=start + n < tiles, other=0.0))
        top = tl.max(tops, 0)
    return top


@triton.jit(do_not_specialize=UNSPECIALISED)
def additive_attention_bwd_kernel_inputs(
    held, passing, held_exp, passing_exp, held_bound, passing_bound, weight, g, key_lengths, grad, grad_weight,
    stride_hb, stride_hh, stride_ht, stride_hd, stride_pb, stride_ph, stride_pt, stride_pd,
    held_tiles_b, held_tiles_h, passing_tiles_b, passing_tiles_h, stride_wh, H, BH, T, passing_T, first_query,
    split_rows, offsets_q, offsets_k, rows_q, rows_k, seeing, tiles_seen, center, stride_n, left, right,
    negative_slope,
    ACTIVATION: tl.constexpr, RATE: tl.constexpr, D: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, PAD: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_T held rows (queries or keys), BLOCK_D channels, from a range of the passing rows.

    With held queries, also grad_weight (splits, B, H, tiles, D). Two passing rows share a reciprocal,
    r1 = t2 / (t1 t2), and g is one number for all channels: nothing is summed across threads. One warp holds the
    tile: every thread has all BLOCK_T rows of 4 channels. Grid: (held tiles * B * H, channel tiles, splits).
    """
    ARITHMETIC: tl.constexpr = g.dtype.element_ty
    tiles = tl.cdiv(T, BLOCK_T)
    tile = tl.program_id(0) % tiles
    if left is None and right is not None and grad_weight is not None:
        tile = tiles - 1 - tile  # queries that see most keys start first; keys that most see do so anyway
    bh, b, h = batch_and_head(tl.program_id(0) // tiles, H)
    split = tl.program_id(2).to(tl.int64)
    held_tile, passing_tile = b * held_tiles_b + h * held_tiles_h, b * passing_tiles_b + h * passing_tiles_h
    if offsets_q is not None:
        first_q, Tq, first_query, first_k, Tk = segment(offsets_q, offsets_k, b, first_query, rows_q, rows_k)
        if grad_weight is not None:
            g += pairs_of_segment(b, h, H, first_q, Tq, passing_T, PAD)
            T, passing_T, first_t, first_p, rows_t = Tq, Tk, first_q, first_k, rows_q
        else:
            g += pairs_of_segment(b, h, H, first_q, Tq, T, PAD)
            T, passing_T, first_t, first_p, rows_t = Tk, Tq, first_k, first_q, rows_k
        if tile * BLOCK_T >= T:
            return
        row = (split * H + h) * rows_t + first_t
        held += first_t * stride_ht
        passing += first_p * stride_pt
        held_tile += first_t // PAD + b
        passing_tile += first_p // PAD + b
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    t64 = t.to(tl.int64)
    in_d, in_pack = d < D, d < CHANNELS

    first = split * split_rows
    last = tl.minimum(first + split_rows, passing_T)
    if grad_weight is not None:  # held queries, passing keys
        if key_lengths is not None:
            last = tl.minimum(last, tl.load(key_lengths + b))
        i0 = (first_query + tile * BLOCK_T).to(tl.int64)
        first, last = keys_in_windows(
            first, last, i0, T - tile * BLOCK_T, center, stride_n, left, right, bh, BLOCK_T
        )
    else:
        if key_lengths is not None:
            last = tl.where(tl.load(key_lengths + b) <= tile * BLOCK_T, first, last)
        if left is not None or right is not None:
            first, last = queries_in_sight(
                first, last, tile * BLOCK_T, first_query, seeing, center, tiles_seen, left, right, bh, BLOCK_T, 2
            )

    padded = tl.cdiv(T, PAD) * PAD
    g += t64 if offsets_q is not None else bh * passing_T * padded + t64
    acc = tl.zeros((BLOCK_T, BLOCK_D), ARITHMETIC)
    sums = tl.zeros((BLOCK_T, BLOCK_D), ARITHMETIC)  # of g r, or of g phi
    total = tl.zeros((BLOCK_T,), ARITHMETIC)  # of g
    if RATE == 0.0:
        x_at = held_exp + (held_tile * PAD + t64)[:, None] * CHANNELS + d[None, :]
        x = tl.load(x_at, mask=in_pack[None, :], other=0.0)  # [BLOCK_T, BLOCK_D]
        rows = passing_exp + passing_tile * (PAD * CHANNELS) + d
        UNROLL: tl.constexpr = 2 if NVIDIA else 1  # 1 spills on sm_100, 2 on AMD
        for n in tl.range(first, last, loop_unroll_factor=UNROLL):
            z = x + tl.load(rows + n * CHANNELS, mask=in_pack, other=0.0)[None, :]
            g1 = tl.load(g + n * padded)[:, None]
            acc += linear_gradient(z, g1, negative_slope, ACTIVATION)
            if grad_weight is not None:
                sums = tl.fma(g1, linear(z, negative_slope, ACTIVATION), sums)
    elif (
        tl.load(held_bound + held_tile + tile * BLOCK_T // PAD)
        + _largest_bound(passing_bound, bh, passing_tile, passing_T, offsets_q, PAD)
        <= PAIR_RANGE
    ):
        e_at = held_exp + (held_tile * PAD + t64)[:, None] * CHANNELS + d[None, :]
        e = tl.load(e_at, mask=in_pack[None, :], other=0.0)  # [BLOCK_T, BLOCK_D]
        rows = passing_exp + passing_tile * (PAD * CHANNELS) + d
        for n in tl.range(first, last, 2):
            t1 = tl.fma(e, tl.load(rows + n * CHANNELS, mask=in_pack, other=0.0)[None, :], 1.0)
            t2 = tl.fma(e, tl.load(rows + (n + 1) * CHANNELS, mask=in_pack, other=0.0)[None, :], 1.0)
            g1 = tl.load(g + n * padded)
            # no second row after the last one
            g2 = tl.load(g + (n + 1) * padded, mask=t < tl.minimum(last - n - 1, 1) * padded, other=0.0)
            r = fast_reciprocal(t1 * t2, NVIDIA)
            r1, r2 = t2 * r, t1 * r
            if grad_weight is not None:
                gr1, gr2 = g1[:, None] * r1, g2[:, None] * r2
                sums += gr1 + gr2
                acc = tl.fma(gr1, r1, tl.fma(gr2, r2, acc))
                total += g1 + g2
            else:
                acc = tl.fma(g1[:, None], tl.fma(-r1, r1, r1), acc)
                acc = tl.fma(g2[:, None], tl.fma(-r2, r2, r2), acc)
    else:
        x_at = (
            held + b * stride_hb + h * stride_hh + t64[:, None] * stride_ht + d.to(tl.int64)[None, :] * stride_hd
        )
        x = load_wide(x_at, (t < T)[:, None] & in_d[None, :])
        y_at = passing + b * stride_pb + h * stride_ph + d.to(tl.int64) * stride_pd
        for n in tl.range(first, last):
            y = load_wide(y_at + n * stride_pt, in_d)
            g1 = tl.load(g + n * padded)
            # 0 where g is: a masked key may be NaN
            r1 = tl.where((g1 == 0.0)[:, None], 0.0, reciprocal_beyond_range(x + y[None, :], RATE, NVIDIA))
            if grad_weight is not None:
                gr1 = g1[:, None] * r1
                sums += gr1
                acc = tl.fma(gr1, r1, acc)
                total += g1
            else:
                acc = tl.fma(g1[:, None], tl.fma(-r1, r1, r1), acc)

    part = split * BH + bh
    if grad_weight is not None:
        w_at = grad_weight + (part * tiles + tile) * D + d
        if RATE > 0.0:
            tl.store(w_at, tl.sum(total, 0) - RATE * tl.sum(sums, 0), mask=in_d)
            acc = sums - acc
        else:
            tl.store(w_at, tl.sum(sums, 0), mask=in_d)
    w = tl.load(weight + h * stride_wh + d, mask=in_d, other=0.0)
    if offsets_q is None:
        row = part * T
    out = grad + (row + t64)[:, None] * D + d[None, :]
    slope: tl.constexpr = RATE * RATE if RATE > 0.0 else 1.0
    tl.store(out, slope * acc * w[None, :], mask=(t < T)[:, None] & in_d[None, :])


class Rows(NamedTuple):
    """Queries or keys, as the pass over inputs takes them."""

    x: Tensor  # (B, H, T, D)
    packed: Tensor  # exponentials in tiles of PAD rows, and their bounds; B and H are 1 where x is expanded
    bounds: Tensor


def query_rows(problem, first, end):
    return Rows(problem.query[:, :, first:end], *problem.pack_queries(first, end, PAD, by_row=True))


def key_rows(problem):
    return Rows(problem.key, *problem.pack_keys(PAD, by_row=True))


def query_gradient(problem, g_transposed, queries, keys, first):
    """Gradients (B, H, n, D) of the queries from first on, and (H, D) of weight."""
    return _input_gradient(problem, g_transposed, queries, keys, first, of_query=True)


def key_gradient(problem, g, queries, keys, first):
    """(B, H, Tk, D): what the queries from first on give."""
    return _input_gradient(problem, g, keys, queries, first, of_query=False)[0]


def _input_gradient(problem, g, held, passing, first, of_query):
    results = []

    def run(tile):
        results[:] = _input_gradient_by(tile, problem, g, held, passing, first, of_query)

    problem.tiled("inputs", problem.D, (held.x.shape[2], passing.x.shape[2], problem.D), run)
    return results


def _input_gradient_by(tile, problem, g, held, passing, first, of_query):
    rows, n = held.x.shape[2], (held if of_query else passing).x.shape[2]
    block_t, block_d = tile.extents_in(held.x.dtype)
    T, passing_T = problem.most_queries(n), problem.Tk
    if not of_query:
        T, passing_T = passing_T, T
    tiles, channel_tiles = triton.cdiv(T, block_t), max(1, triton.cdiv(problem.D, block_d))
    # A program is one warp or two: a multiprocessor wants many. Their number bounds the scratch, too.
    wanted = 8 * programs_wanted(held.x.device) // (tiles * channel_tiles * problem.BH)
    split_rows = triton.cdiv(triton.cdiv(passing_T, max(1, wanted)), PAD) * PAD
    splits = triton.cdiv(passing_T, split_rows)
    # Beside the ranges that centers give one warp lacks registers, but on sm_90, and for 16 rows on sm_100.
    device = held.x.device
    alone = problem.options["center"] is None or _tiles.capability_of(device) == 9
    alone |= block_t > 8 and _tiles.gpu_of(device) == _tiles.SM_90
    # So it does there for keys of segments, of which it has 8.
    alone &= problem.segments is None or of_query or block_t > 8 or _tiles.capability_of(device) != 9
    warps = tile.warps if alone else max(tile.warps, 2)
    grad = problem.empty(splits, problem.batch, problem.H, rows, problem.D)
    grad_weight = problem.empty(splits, problem.B, problem.H, tiles, problem.D) if of_query else None
    passing_bounds = passing.bounds
    if problem.segments is None:
        passing_bounds = passing_bounds.amax(-1).expand(problem.B, problem.H).contiguous()
    elif of_query:
        grad_weight.zero_()  # most segments are not the longest
    launch(
        additive_attention_bwd_kernel_inputs, (tiles * problem.BH, channel_tiles, splits),
        held.x, passing.x, held.packed, passing.packed, held.bounds, passing_bounds,
        problem.weight, g, problem.key_lengths, grad, grad_weight,
        *held.x.stride(), *passing.x.stride(), *strides(held.bounds), *strides(passing.bounds), problem.stride_wh,
        problem.H, problem.BH, T, passing_T, first, split_rows,
        options=problem.options_of(first, first + n), D=problem.D, CHANNELS=problem.channels, BLOCK_T=block_t,
        BLOCK_D=block_d, PAD=PAD, NVIDIA=NVIDIA, num_warps=warps,
    )  # fmt: skip
    grad = grad.sum(0) if splits > 1 else grad[0]
    return grad, (grad_weight.sum((0, 1, 3)) if of_query else None)
