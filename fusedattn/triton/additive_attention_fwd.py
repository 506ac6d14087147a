"""Additive attention in Triton, forward: scores, then context. See ``additive_attention.py``."""

import torch
import triton
import triton.language as tl

from fusedattn.triton import _tiles
from fusedattn.triton._common import NVIDIA, fast_reciprocal, launch, load_wide, number
from fusedattn.triton.additive_attention_problem import (
    LOG2E,
    PAIR_RANGE,
    UNSPECIALISED,
    at_most,
    batch_and_head,
    dropped,
    in_window,
    keys_in_windows,
    linear,
    programs_wanted,
    reciprocal_beyond_range,
    reciprocal_of_sum,
    segment,
    strides,
)

# Beyond it w1 t2 + w2 t1 might overflow.
WEIGHT_RANGE = tl.constexpr(1e18)
UNROLL = 1  # 2 saves 0.2 slots a tanh, and spills
MOST_SPLITS = 128  # of the keys of a row
COMBINED_BYTES = 32768  # a step of ``combine``: 64 registers of a thread


@triton.jit
def _exp_of_difference(x, top):
    """exp(x - top), 1 where they are equal, infinities too."""
    return tl.exp2(tl.where(x == top, 0.0, x - top) * LOG2E)


@triton.jit
def _lowest(dtype: tl.constexpr):
    """Stands for a visible score of -inf, from an infinite weight or a sum that overflows.

    Softmax of a row of them is NaN, while a row of masked ones, -inf, is zero.
    """
    return -1.7976931348623157e308 if dtype == tl.float64 else -3.4028234663852886e38


@triton.jit
def _stored(s, visible):
    """Scores as they are kept: -inf where a key is not visible."""
    return tl.where(visible, tl.where(s == float("-inf"), _lowest(s.dtype), s), float("-inf"))


@triton.jit
def _biased(s, bias, visible):
    """Scores with their bias, of which -inf hides a key as a mask does.

    What overflows stays above the score that stands for -inf, and so does a bias of the lowest number, as float
    masks have it.
    """
    least: tl.constexpr = -1.7976931348623155e308 if s.dtype == tl.float64 else -3.4028232635611926e38
    biased = tl.maximum(s + bias, least, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(s == float("-inf"), s, biased), visible & (bias != float("-inf"))


@triton.jit
def _only_lowest(top, total):
    """Whether the visible scores of a row are all -inf; total is NaN where one is NaN."""
    return (top == _lowest(top.dtype)) & (total > 0.0)


@triton.jit
def _paired_sums(
    q, k, w, CHANNELS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, UNROLL: tl.constexpr,
    NVIDIA: tl.constexpr,
):  # fmt: skip
    """sum_d w_d r_d, [BLOCK_Q, BLOCK_K], from packed exponentials; two channels share a reciprocal."""
    s = tl.zeros((BLOCK_Q, BLOCK_K), w.dtype.element_ty)
    for d in tl.range(0, CHANNELS, 2 * UNROLL):
        for u in tl.static_range(UNROLL):
            w1 = tl.load(w + d + 2 * u)
            w2 = tl.load(w + d + 2 * u + 1)
            q1 = tl.load(q + (d + 2 * u) * BLOCK_Q)
            q2 = tl.load(q + (d + 2 * u + 1) * BLOCK_Q)
            k1 = tl.load(k + (d + 2 * u) * BLOCK_K)
            k2 = tl.load(k + (d + 2 * u + 1) * BLOCK_K)
            t1 = tl.fma(q1[:, None], k1[None, :], 1.0)
            t2 = tl.fma(q2[:, None], k2[None, :], 1.0)
            s = tl.fma(tl.fma(t2, w1, t1 * w2), fast_reciprocal(t1 * t2, NVIDIA), s)
    return s


@triton.jit
def _linear_sums(
    q, k, w, negative_slope, ACTIVATION: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sum_d w_d phi(q_d + k_d), [BLOCK_Q, BLOCK_K], from packed rows."""
    s = tl.zeros((BLOCK_Q, BLOCK_K), w.dtype.element_ty)
    for d in tl.range(0, CHANNELS, 2):
        for u in tl.static_range(2):
            z = tl.load(q + (d + u) * BLOCK_Q)[:, None] + tl.load(k + (d + u) * BLOCK_K)[None, :]
            s = tl.fma(linear(z, negative_slope, ACTIVATION), tl.load(w + d + u), s)
    return s


@triton.jit
def _plain_sums(
    q, k, w, stride_qd, stride_kd, in_q, in_k, RATE: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """sum_d w_d phi(q_d + k_d), [BLOCK_Q, BLOCK_K], from the inputs themselves, whatever their range."""
    s = tl.zeros((BLOCK_Q, BLOCK_K), w.dtype.element_ty)
    for d in tl.range(0, D):
        d64 = tl.cast(d, tl.int64)
        x = load_wide(q + d64 * stride_qd, in_q)
        y = load_wide(k + d64 * stride_kd, in_k)
        r = reciprocal_beyond_range(x[:, None] + y[None, :], RATE, NVIDIA)
        s = tl.fma(tl.fma(r, -RATE, 1.0), tl.load(w + d), s)
    return s


@triton.jit
def _capped(s, scale, softcap, NVIDIA: tl.constexpr):
    s *= number(scale, s.dtype)
    if softcap is not None:
        softcap = number(softcap, s.dtype)
        s = softcap * tl.fma(reciprocal_of_sum(s / softcap, NVIDIA), -2.0, 1.0)
    return s


@triton.jit(do_not_specialize=UNSPECIALISED)
def additive_attention_fwd_kernel_scores(
    query, key, weight, bias, mask, key_lengths, query_exp, key_exp, query_bound, key_bound, scores,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd,
    stride_bb, stride_bh, stride_bq, stride_bk, stride_mb, stride_mh, stride_mq, stride_mk,
    q_tiles_b, q_tiles_h, k_tiles_b, k_tiles_h, stride_wh,
    H, Tq, Tk, first_query, offsets_q, offsets_k, rows_q, rows_k, center, stride_n, left, right, scale, softcap,
    negative_slope,
    ACTIVATION: tl.constexpr, RATE: tl.constexpr, D: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """Scores (B, H, Tq, Tk) of one tile, -inf for keys not visible. Grid: (query tiles * key tiles * B * H,)."""
    q_tiles, k_tiles = tl.cdiv(Tq, BLOCK_Q), tl.cdiv(Tk, BLOCK_K)
    q_tile = tl.program_id(0) % q_tiles
    k_tile = (tl.program_id(0) // q_tiles) % k_tiles
    bh, b, h = batch_and_head(tl.program_id(0) // q_tiles // k_tiles, H)
    row_q, width = bh * Tq, Tk
    tile_q, tile_k = b * q_tiles_b + h * q_tiles_h + q_tile, b * k_tiles_b + h * k_tiles_h + k_tile
    if offsets_q is not None:
        first_q, Tq, first_query, first_k, Tk = segment(offsets_q, offsets_k, b, first_query, rows_q, rows_k)
        if (q_tile * BLOCK_Q >= Tq) | (k_tile * BLOCK_K >= Tk):
            return
        row_q = h * rows_q + first_q
        tile_q += first_q // BLOCK_Q + b
        tile_k += first_k // BLOCK_K + b
        query += first_q * stride_qt
        key += first_k * stride_kt
    # Rows and columns count within the tile, whose place is one number: on AMD a wave holds whole rows, and what
    # differs between rows lives in scalar registers, which are few.
    first_i, first_j = q_tile * BLOCK_Q, k_tile * BLOCK_K
    row, column = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    in_q, in_k = row < Tq - first_i, column < Tk - first_j
    first_i, first_j = first_i.to(tl.int64), first_j.to(tl.int64)
    row64, column64 = row.to(tl.int64), column.to(tl.int64)

    first, last = tl.cast(0, tl.int64), Tk.to(tl.int64)
    if key_lengths is not None:
        last = tl.minimum(last, tl.load(key_lengths + b))
    first, last = keys_in_windows(
        first, last, first_query + first_i, Tq - first_i, center, stride_n, left, right, bh, BLOCK_Q
    )

    weight += h * stride_wh
    d = tl.arange(0, BLOCK_D)
    w = tl.load(weight + d, mask=d < D, other=0.0)
    q_exp = query_exp + tile_q * (CHANNELS * BLOCK_Q) + row
    k_exp = key_exp + tile_k * (CHANNELS * BLOCK_K) + column
    paired = tl.load(query_bound + tile_q) + tl.load(key_bound + tile_k) <= PAIR_RANGE
    if (first_j >= last) | (first_j + BLOCK_K <= first):  # no key is visible
        s = tl.zeros((BLOCK_Q, BLOCK_K), scores.dtype.element_ty)
    elif RATE == 0.0:
        s = _linear_sums(q_exp, k_exp, weight, negative_slope, ACTIVATION, CHANNELS, BLOCK_Q, BLOCK_K)
    elif paired & (tl.max(tl.abs(w), 0) < WEIGHT_RANGE):
        s = tl.sum(w, 0) - RATE * _paired_sums(q_exp, k_exp, weight, CHANNELS, BLOCK_Q, BLOCK_K, UNROLL, NVIDIA)
    else:
        q = query + b * stride_qb + h * stride_qh + first_i * stride_qt + row64 * stride_qt
        k = key + b * stride_kb + h * stride_kh + first_j * stride_kt + column64 * stride_kt
        s = _plain_sums(q, k, weight, stride_qd, stride_kd, in_q, in_k, RATE, D, BLOCK_Q, BLOCK_K, NVIDIA)
    s = _capped(s, scale, softcap, NVIDIA)
    inside = in_q[:, None] & in_k[None, :]
    visible = column[None, :] < last - first_j
    i0 = first_query + first_i
    visible = in_window(
        visible, row, column, i0, first_j, Tq - first_i, center, stride_n, left, right, bh, BLOCK_K
    )
    if bias is not None:
        bias += b * stride_bb + h * stride_bh + first_i * stride_bq + first_j * stride_bk
        x = load_wide(bias + row64[:, None] * stride_bq + column64[None, :] * stride_bk, inside)
        s, visible = _biased(s, x, visible)
    if mask is not None:
        mask += b * stride_mb + h * stride_mh + first_i * stride_mq + first_j * stride_mk
        at = mask + row64[:, None] * stride_mq + column64[None, :] * stride_mk
        visible = visible & (tl.load(at, mask=inside, other=0) != 0)
    out = scores + (row_q + first_i) * width + first_j + row64[:, None] * width + column64[None, :]
    tl.store(out, _stored(s, visible), mask=inside)


@triton.jit(do_not_specialize=UNSPECIALISED)
def additive_attention_fwd_kernel_few(
    query, key, weight, bias, mask, key_lengths, scores,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd,
    stride_bb, stride_bh, stride_bq, stride_bk, stride_mb, stride_mh, stride_mq, stride_mk, stride_wh,
    H, Tq, Tk, first_query, offsets_q, offsets_k, rows_q, rows_k, center, stride_n, left, right, scale, softcap,
    negative_slope,
    ACTIVATION: tl.constexpr, RATE: tl.constexpr, D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    NVIDIA: tl.constexpr,
):  # fmt: skip
    """Scores of one query and BLOCK_K keys, read once and as they lie. Grid: (Tq * key tiles * B * H,).

    exp(2 (q + k)) is taken of the sum: for a query or two that is no more work than of every key; no range.
    """
    ARITHMETIC: tl.constexpr = scores.dtype.element_ty
    k_tiles = tl.cdiv(Tk, BLOCK_K)
    i = tl.program_id(0) % Tq
    k_tile = (tl.program_id(0) // Tq) % k_tiles
    bh, b, h = batch_and_head(tl.program_id(0) // Tq // k_tiles, H)
    row_q, width = bh * Tq, Tk
    if offsets_q is not None:
        first_q, Tq, first_query, first_k, Tk = segment(offsets_q, offsets_k, b, first_query, rows_q, rows_k)
        if (i >= Tq) | (k_tile * BLOCK_K >= Tk):
            return
        row_q = h * rows_q + first_q
        query += first_q * stride_qt
        key += first_k * stride_kt
    j = k_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    j64 = j.to(tl.int64)
    out = scores + (row_q + i) * width + j64

    first, last = tl.cast(0, tl.int64), Tk.to(tl.int64)
    if key_lengths is not None:
        last = tl.minimum(last, tl.load(key_lengths + b))
    first, last = keys_in_windows(
        first, last, first_query + i.to(tl.int64), 1, center, stride_n, left, right, bh, 1
    )
    if (k_tile * BLOCK_K >= last) | ((k_tile + 1) * BLOCK_K <= first):
        tl.store(out, tl.full((BLOCK_K,), float("-inf"), ARITHMETIC), mask=j < Tk)
        return

    query += b * stride_qb + h * stride_qh + i.to(tl.int64) * stride_qt
    keys = key + b * stride_kb + h * stride_kh + j64[:, None] * stride_kt
    weight += h * stride_wh
    sums = tl.zeros((BLOCK_K, BLOCK_D), ARITHMETIC)
    for start in tl.range(0, D, 2 * BLOCK_D):
        d1 = start + tl.arange(0, BLOCK_D)
        d2 = d1 + BLOCK_D
        d1_64, d2_64 = d1.to(tl.int64), d2.to(tl.int64)
        q1 = load_wide(query + d1_64 * stride_qd, d1 < D)
        q2 = load_wide(query + d2_64 * stride_qd, d2 < D)
        w1 = tl.load(weight + d1, mask=d1 < D, other=0.0)
        w2 = tl.load(weight + d2, mask=d2 < D, other=0.0)
        k1 = tl.load(keys + d1_64[None, :] * stride_kd, mask=(j[:, None] < Tk) & (d1[None, :] < D), other=0.0)
        k2 = tl.load(keys + d2_64[None, :] * stride_kd, mask=(j[:, None] < Tk) & (d2[None, :] < D), other=0.0)
        if RATE > 0.0:
            limit: tl.constexpr = 2.0 * PAIR_RANGE / RATE
            t1 = 1.0 + tl.exp2(at_most(q1[None, :] + k1.to(ARITHMETIC), limit) * (RATE * LOG2E))
            t2 = 1.0 + tl.exp2(at_most(q2[None, :] + k2.to(ARITHMETIC), limit) * (RATE * LOG2E))
            r = -RATE * fast_reciprocal(t1 * t2, NVIDIA)
            sums = tl.fma(tl.fma(t2, r, 1.0), w1[None, :], sums)
            sums = tl.fma(tl.fma(t1, r, 1.0), w2[None, :], sums)
        else:
            z1, z2 = q1[None, :] + k1.to(ARITHMETIC), q2[None, :] + k2.to(ARITHMETIC)
            sums = tl.fma(linear(z1, negative_slope, ACTIVATION), w1[None, :], sums)
            sums = tl.fma(linear(z2, negative_slope, ACTIVATION), w2[None, :], sums)
    s = _capped(tl.sum(sums, 1), scale, softcap, NVIDIA)
    visible = (j64 >= first) & (j64 < last)
    if bias is not None:
        x = bias + b * stride_bb + h * stride_bh + i.to(tl.int64) * stride_bq + j64 * stride_bk
        s, visible = _biased(s, load_wide(x, j < Tk), visible)
    if mask is not None:
        at = mask + b * stride_mb + h * stride_mh + i.to(tl.int64) * stride_mq + j64 * stride_mk
        visible = visible & (tl.load(at, mask=j < Tk, other=0) != 0)
    tl.store(out, _stored(s, visible), mask=j < Tk)


def write_scores(problem, out, first, end):
    """Writes the scores of queries first to end to out (B, H, end - first, Tk)."""
    kernel, size = ("few", problem.D) if problem.few else ("scores", problem.Tq)
    sizes = (end - first, problem.Tk, problem.D)
    problem.tiled(kernel, size, sizes, lambda tile: _write_scores_by(tile, problem, out, first, end))


def _write_scores_by(tile, problem, out, first, end):
    query, mask, options = problem.query[:, :, first:end], problem.mask, problem.options_of(first, end)
    if mask is not None:
        mask = mask[:, :, first:end]
    mask_strides = (0, 0, 0, 0) if mask is None else mask.stride()
    bias, bias_strides = problem.bias_of(first, end)
    Tq = problem.most_queries(end - first)
    if problem.few:
        block_k, block_d = tile.extents_in(query.dtype)
        launch(
            additive_attention_fwd_kernel_few, (Tq * triton.cdiv(problem.Tk, block_k) * problem.BH,),
            query, problem.key, problem.weight, bias, mask, problem.key_lengths, out,
            *query.stride(), *problem.key.stride(), *bias_strides, *mask_strides, problem.stride_wh,
            problem.H, Tq, problem.Tk, first,
            options=options, D=problem.D, BLOCK_K=block_k, BLOCK_D=block_d, NVIDIA=NVIDIA,
            num_warps=tile.warps,
        )  # fmt: skip
        return
    block_q, block_k = tile.extents_in(query.dtype)
    if block_k not in problem.key_packed:
        problem.key_packed[block_k] = problem.pack_keys(block_k)
    key_exp, key_bound = problem.key_packed[block_k]
    query_exp, query_bound = problem.pack_queries(first, end, block_q)
    gpu, warps = _tiles.gpu_of(query.device), tile.warps
    if (problem.options["left"] is not None or problem.options["center"] is not None) and gpu != _tiles.SM_90:
        warps = max(warps, 4)  # beside the bounds of windows two lack registers; on sm_90 four exchange too much
    if problem.segments is not None and problem.options["right"] is not None and gpu == _tiles.SM_120:
        warps = max(warps, 4)  # a right side alone does there beside what places a segment
    if bias is not None and gpu == _tiles.AMD:
        warps = max(warps, 8)  # so that a wave holds fewer rows, each with an address more
    launch(
        additive_attention_fwd_kernel_scores,
        (triton.cdiv(Tq, block_q) * triton.cdiv(problem.Tk, block_k) * problem.BH,),
        query, problem.key, problem.weight, bias, mask, problem.key_lengths,
        query_exp, key_exp, query_bound, key_bound, out,
        *query.stride(), *problem.key.stride(), *bias_strides, *mask_strides,
        *strides(query_bound), *strides(key_bound), problem.stride_wh,
        problem.H, Tq, problem.Tk, first,
        options=options, D=problem.D, CHANNELS=problem.channels, BLOCK_Q=block_q, BLOCK_K=block_k,
        BLOCK_D=triton.next_power_of_2(problem.channels), UNROLL=UNROLL, NVIDIA=NVIDIA, num_warps=warps,
    )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALISED)
def additive_attention_fwd_kernel_context(
    scores, value, key_lengths, context, lse,
    stride_vb, stride_vh, stride_vt, stride_vd, stride_cb, stride_ch, stride_cs, stride_lb, stride_lh, stride_ls,
    H, Tq, Tk, first_query, split_keys, offsets_q, offsets_k, rows_q, rows_k,
    seen, stride_sb, stride_sh, keys_end, center, stride_n, left, right,
    seed, heads_of_seed, first_head, heads, drop_query, drop_key, drop_below, drop_factor,
    Dv: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    TF32: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """Context and lse of a tile of queries over a range of keys.

    Grid: (query tiles * B * H, splits, value tiles).
    """
    ARITHMETIC: tl.constexpr = scores.dtype.element_ty
    q_tiles = tl.cdiv(Tq, BLOCK_Q)
    q_tile = tl.program_id(0) % q_tiles
    if left is None and right is not None:
        q_tile = q_tiles - 1 - q_tile  # those with most keys start first
    bh, b, h = batch_and_head(tl.program_id(0) // q_tiles, H)
    row_q, width = bh * Tq, Tk
    if offsets_q is not None:
        first_q, Tq, first_query, first_k, keys_end = segment(offsets_q, offsets_k, b, first_query, rows_q, rows_k)
        if q_tile * BLOCK_Q >= Tq:
            return
        row_q = h * rows_q + first_q
        value += first_k * stride_vt
        context += first_q * Dv
        lse += first_q
    split = tl.program_id(1).to(tl.int64)
    i = q_tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    v = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    i64 = i.to(tl.int64)
    in_q, in_v = i < Tq, v < Dv

    first = split * split_keys
    last = tl.minimum(first + split_keys, keys_end)
    if key_lengths is not None:
        last = tl.minimum(last, tl.load(key_lengths + b))
    i0 = (first_query + q_tile * BLOCK_Q).to(tl.int64)
    first, last = keys_in_windows(
        first, last, i0, Tq - q_tile * BLOCK_Q, center, stride_n, left, right, bh, BLOCK_Q
    )
    if left is not None:
        first = first // BLOCK_K * BLOCK_K

    rows = scores + (row_q + i64)[:, None] * width
    columns = value + b * stride_vb + h * stride_vh + v.to(tl.int64)[None, :] * stride_vd
    if seen is not None:
        seen += b * stride_sb + h * stride_sh
    top = tl.full((BLOCK_Q,), float("-inf"), ARITHMETIC)
    total = tl.zeros((BLOCK_Q,), ARITHMETIC)
    acc = tl.zeros((BLOCK_Q, BLOCK_V), ARITHMETIC)
    for start in tl.range(first, last, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        in_k = j < last
        s = tl.load(
            rows + j[None, :], mask=in_q[:, None] & in_k[None, :], other=float("-inf")
        )  # [BLOCK_Q, BLOCK_K]
        # Values of unseen keys are not loaded, or dropped: one spills on AMD, the other elsewhere.
        if seen is not None:
            in_sight = tl.load(seen + j, mask=in_k, other=0) != 0
            if NVIDIA:
                in_k = in_sight
        x = tl.load(columns + j[:, None] * stride_vt, mask=in_k[:, None] & in_v[None, :], other=0.0)
        if seen is not None and not NVIDIA:
            x = tl.where(in_sight[:, None], x, 0.0)
        new_top = tl.maximum(top, tl.max(s, 1))
        safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = _exp_of_difference(s, safe_top[:, None])
        shrink = _exp_of_difference(top, safe_top)
        total = total * shrink + tl.sum(p, 1)
        if seed is not None:
            p = dropped(
                p, b, h, i[:, None], j[None, :],
                seed, heads_of_seed, first_head, heads, drop_query, drop_key, drop_below, drop_factor,
            )  # fmt: skip
        precision: tl.constexpr = "ieee" if not NVIDIA else "tf32" if TF32 else "tf32x3"
        acc = tl.dot(p.to(x.dtype), x, acc * shrink[:, None], input_precision=precision, out_dtype=ARITHMETIC)
        top = new_top

    # total is NaN, not 0, where a score is.
    empty = total == 0.0
    # Where keys are split, that is for combine to say: other keys may have more.
    lowest = _only_lowest(top, total) & (tl.num_programs(1) == 1)
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    acc = tl.where(((top == float("inf")) | lowest)[:, None], float("nan"), acc)
    out = context + split * stride_cs + b * stride_cb + h * stride_ch + i64[:, None] * Dv + v[None, :]
    tl.store(out, acc.to(context.dtype.element_ty), mask=in_q[:, None] & in_v[None, :])
    if tl.program_id(2) == 0:
        lse_at = lse + split * stride_ls + b * stride_lb + h * stride_lh + i64
        tl.store(lse_at, tl.where(empty | lowest, float("-inf"), top + tl.log(total)), mask=in_q)


@triton.jit(do_not_specialize=UNSPECIALISED)
def additive_attention_fwd_kernel_combine(
    parts, lse_parts, context, lse, stride_cb, stride_ch, stride_lb, stride_lh, H, Tq, rows, splits,
    Dv: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Joins the contexts (splits, B, H, Tq, Dv) of key ranges: each counts exp(its lse). Grid: (B * H * Tq,)."""
    row = tl.program_id(0)
    i = row % Tq
    bh, b, h = batch_and_head(row // Tq, H)
    row = row.to(tl.int64)
    s = tl.arange(0, BLOCK_S).to(tl.int64)
    parts_lse = tl.load(lse_parts + s * rows + row, mask=s < splits, other=float("-inf"))
    top = tl.max(parts_lse, 0)
    p = _exp_of_difference(parts_lse, tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(p, 0)
    empty, lowest = total == 0.0, _only_lowest(top, total)
    p = tl.where(lowest, float("nan"), p / tl.where(empty, 1.0, total))
    for start in range(0, Dv, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        at = parts + (s[:, None] * rows + row) * Dv + v[None, :]
        c = tl.sum(p[:, None] * tl.load(at, mask=(s[:, None] < splits) & (v[None, :] < Dv), other=0.0), 0)
        c_at = context + b * stride_cb + h * stride_ch + i * Dv + v
        tl.store(c_at, c.to(context.dtype.element_ty), mask=v < Dv)
    lse += b * stride_lb + h * stride_lh + i
    tl.store(lse, tl.where(empty | lowest, float("-inf"), top + tl.log(total)))


def attend(problem, scores, context, lse, first, allow_tf32):
    """Writes context (B, H, n, Dv) and lse (B, H, n) of the queries from first on, whose scores are given."""
    arguments = (scores, context, lse, first, allow_tf32)
    sizes = (lse.shape[2], problem.Tk, problem.Dv)
    problem.tiled("context", problem.Dv, sizes, lambda tile: _attend_by(tile, problem, *arguments))


def _attend_by(tile, problem, scores, context, lse, first, allow_tf32):
    n, (block_q, block_k) = lse.shape[2], tile.extents_in(lse.dtype)
    block_v = min(128, max(16, triton.next_power_of_2(problem.Dv)))
    Tq = problem.most_queries(n)
    q_tiles, v_tiles = triton.cdiv(Tq, block_q), max(1, triton.cdiv(problem.Dv, block_v))
    wanted = programs_wanted(problem.query.device) // (q_tiles * v_tiles * problem.BH)
    split_keys = triton.cdiv(triton.cdiv(problem.Tk, max(1, min(wanted, MOST_SPLITS))), 256) * 256
    splits = triton.cdiv(problem.Tk, split_keys)
    parts, lse_parts = context.unsqueeze(0), lse.unsqueeze(0)
    if splits > 1:
        parts = problem.empty(splits, problem.batch, problem.H, n, problem.Dv)
        lse_parts = problem.empty(parts.shape[:-1])
    # A second stage of doubles spills on some GPUs, and on sm_100 that of narrow values beside hidden keys.
    crowded = problem.options["seen"] is not None and block_v <= 64 and _tiles.capability_of(lse.device) == 10
    stages = 1 if lse.dtype == torch.float64 or crowded else 2
    launch(
        additive_attention_fwd_kernel_context, (q_tiles * problem.BH, splits, v_tiles),
        scores, problem.value, problem.key_lengths, parts, lse_parts,
        *problem.value.stride(), *strides(parts[0]), parts.stride(0), *strides(lse_parts[0]), lse_parts.stride(0),
        problem.H, Tq, problem.Tk, first, split_keys,
        options=problem.options_of(first, first + n), Dv=problem.Dv, BLOCK_Q=block_q, BLOCK_K=block_k,
        BLOCK_V=block_v, TF32=allow_tf32, NVIDIA=NVIDIA, num_warps=tile.warps, num_stages=stages,
    )  # fmt: skip
    if splits > 1:
        block_s = 16 if splits <= 16 else MOST_SPLITS  # two kernels, whatever the lengths
        block_v = min(block_v, COMBINED_BYTES // (block_s * parts.itemsize))
        rows = problem.batch * problem.H * n
        launch(
            additive_attention_fwd_kernel_combine, (rows,),
            parts, lse_parts, context, lse, *context.stride()[:2], *lse.stride()[:2],
            problem.H, n, rows, splits,
            Dv=problem.Dv, BLOCK_S=block_s, BLOCK_V=block_v, num_warps=4,
        )  # fmt: skip
