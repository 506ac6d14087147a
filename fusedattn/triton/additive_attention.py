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
keys (``_few``). Keys are split over programs where rows are too few to fill the device; ``combine`` joins parts.

Backward needs the scores (kept, or made again per chunk) and runs::

    gradient  g_ij                twice, also transposed, so that both passes below read consecutive numbers
    value     dx_j                sum_i p_ij dc_i by tl.dot
    inputs    dq_i and dw, dk_j   one kernel, twice: a program holds rows of one side, the other side's pass by

The two passes over inputs cost 12.3 issue slots and 1 MUFU a tanh (5.5 for the keys, 6.8 for queries and weight).
One joint pass would take fewer, but needs atomics: its results would differ from run to run.

float64 takes the same loops. Kernels read the dtype of their arithmetic off their scratch; a reciprocal takes two
steps of Newton from float32's, and an exponential is a function of tens of instructions.

Counts are of sm_90 machine code, disassembled; none is a time. Tiles (``_tiles.py``) are chosen by counting, too.
"""

import functools
import itertools
import struct

import torch
import triton
import triton.language as tl

from fusedattn.triton import _tiles
from fusedattn.triton._common import (
    NVIDIA,
    Kernel,
    fast_reciprocal,
    launch,
    load_wide,
    on_device_of,
    recorded,
    register,
)

# Largest |q| + |k| for which the product of two denominators, each at most 1 + exp(2 (|q| + |k|)), and its
# reciprocal are normal float32 numbers; tanh is 1 to rounding from there on.
PAIR_RANGE = tl.constexpr(21.0)
# Beyond it w1 t2 + w2 t1 might overflow.
WEIGHT_RANGE = tl.constexpr(1e18)
LOG2E = tl.constexpr(1.4426950408889634)

# Integers, or bits of float64, that change from call to call: else compiled anew for 1 and multiples of 16.
UNSPECIALISED = [
    *(f"stride_{t}{dim}" for t in "qkvclhp" for dim in "bh"), "stride_mb", "stride_mh", "stride_mq", "stride_mk",
    "stride_b", "stride_h", "stride_cs", "stride_ls", "stride_wh",
    "q_tiles_b", "q_tiles_h", "k_tiles_b", "k_tiles_h", "held_tiles_b", "held_tiles_h", "passing_tiles_b",
    "passing_tiles_h", "H", "BH", "passing_T", "split_rows", "T", "Tq", "Tk", "rows", "tiles", "first_query",
    "split_keys", "splits", "scale", "softcap",
]  # fmt: skip


@triton.jit
def _exp_twice(x):
    """exp(2x) to a few ulp; ex2.approx of a rounded 2x log2(e) would lose |x| ulp."""
    if x.dtype == tl.float64:
        e = tl.exp(x * 2.0)
    else:
        n = tl.floor(tl.fma(x, 2.8853900817779268, 0.5))
        fraction = tl.fma(x, 3.851925407e-08, tl.fma(x, 2.885390043258667, -n))
        power = (tl.minimum(tl.maximum(n, -126.0), 127.0).to(tl.int32) + 127) << 23
        e = tl.exp2(fraction) * power.to(tl.float32, bitcast=True)
    return e


@triton.jit
def _reciprocal_of_sum(z, NVIDIA: tl.constexpr):
    """r = 1 / (1 + exp(2z)) for any z, NaN included."""
    return fast_reciprocal(1.0 + tl.exp2(_at_most(z, PAIR_RANGE) * (2.0 * LOG2E)), NVIDIA)


@triton.jit
def _at_most(z, limit):
    return tl.minimum(z, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _batch_and_head(bh, H):
    """bh = b H + h, b and h in 64 bits, divided in 32: a division of 64 bits is a call, and spills."""
    return bh.to(tl.int64), (bh // H).to(tl.int64), (bh % H).to(tl.int64)


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
def _only_lowest(top, total):
    """Whether the visible scores of a row are all -inf; total is NaN where one is NaN."""
    return (top == _lowest(top.dtype)) & (total > 0.0)


@triton.jit
def _probability(s, lse):
    """exp(s - lse), NaN where lse is infinite, as softmax is; there of masked keys, too, whose s is -inf."""
    return tl.exp2((s - tl.where(tl.abs(lse) == float("inf"), float("nan"), lse)) * LOG2E)


# Forward


@triton.jit(do_not_specialize=UNSPECIALISED)
def additive_attention_pack_kernel(
    source, packed, bounds, stride_b, stride_h, stride_t, stride_d, H, T, tiles,
    D: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    """exp(2x) as [tile, channel, row], or [row, channel], padded with 0; the largest |x| of every tile.

    Grid: (tiles * B * H,).
    """
    tile = tl.program_id(0) % tiles
    bh, b, h = _batch_and_head(tl.program_id(0) // tiles, H)
    row = tl.arange(0, BLOCK_T)
    t = tile * BLOCK_T + row
    at = source + b * stride_b + h * stride_h + t.to(tl.int64)[:, None] * stride_t
    packed += (bh * tiles + tile) * (CHANNELS * BLOCK_T)
    bound = tl.zeros((BLOCK_T,), bounds.dtype.element_ty)
    for start in range(0, CHANNELS, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = (t[:, None] < T) & (d[None, :] < D)
        x = load_wide(at + d.to(tl.int64)[None, :] * stride_d, inside)
        bound = tl.maximum(bound, tl.max(tl.where(x == x, tl.abs(x), float("inf")), 1))
        e = tl.where(inside, _exp_twice(x), 0.0)  # [BLOCK_T, BLOCK_D]
        if BY_ROW:
            tl.store(packed + row[:, None] * CHANNELS + d[None, :], e, mask=d[None, :] < CHANNELS)
        else:
            tl.store(packed + d[:, None] * BLOCK_T + row[None, :], tl.trans(e), mask=d[:, None] < CHANNELS)
    tl.store(bounds + bh * tiles + tile, tl.max(bound, 0))


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
def _plain_sums(
    q, k, w, stride_qd, stride_kd, in_q, in_k, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    NVIDIA: tl.constexpr,
):  # fmt: skip
    """sum_d w_d tanh(q_d + k_d), [BLOCK_Q, BLOCK_K], from the inputs themselves, whatever their range."""
    s = tl.zeros((BLOCK_Q, BLOCK_K), w.dtype.element_ty)
    for d in tl.range(0, D):
        x = load_wide(q + d * stride_qd, in_q)
        y = load_wide(k + d * stride_kd, in_k)
        r = _reciprocal_of_sum(x[:, None] + y[None, :], NVIDIA)
        s = tl.fma(tl.fma(r, -2.0, 1.0), tl.load(w + d), s)
    return s


@triton.jit
def _number(x, dtype: tl.constexpr):
    """A float argument, from ``_scalar``."""
    if dtype == tl.float64:
        x = x.to(tl.int64).to(tl.float64, bitcast=True)
    return x


@triton.jit
def _capped(s, scale, softcap, NVIDIA: tl.constexpr):
    s *= _number(scale, s.dtype)
    if softcap is not None:
        softcap = _number(softcap, s.dtype)
        s = softcap * tl.fma(_reciprocal_of_sum(s / softcap, NVIDIA), -2.0, 1.0)
    return s


@triton.jit(do_not_specialize=UNSPECIALISED)
def additive_attention_fwd_kernel_scores(
    query, key, weight, mask, key_lengths, query_exp, key_exp, query_bound, key_bound, scores,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd,
    stride_mb, stride_mh, stride_mq, stride_mk, q_tiles_b, q_tiles_h, k_tiles_b, k_tiles_h, stride_wh,
    H, Tq, Tk, first_query, scale, softcap,
    IS_CAUSAL: tl.constexpr, D: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, UNROLL: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """Scores (B, H, Tq, Tk) of one tile, -inf for keys not visible. Grid: (query tiles * key tiles * B * H,)."""
    q_tiles, k_tiles = tl.cdiv(Tq, BLOCK_Q), tl.cdiv(Tk, BLOCK_K)
    q_tile = tl.program_id(0) % q_tiles
    k_tile = (tl.program_id(0) // q_tiles) % k_tiles
    bh, b, h = _batch_and_head(tl.program_id(0) // q_tiles // k_tiles, H)
    # Rows and columns count within the tile, whose place is one number: on AMD a wave holds whole rows, and what
    # differs between rows lives in scalar registers, which are few.
    first_i, first_j = q_tile * BLOCK_Q, k_tile * BLOCK_K
    row, column = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    in_q, in_k = row < Tq - first_i, column < Tk - first_j
    first_i, first_j = first_i.to(tl.int64), first_j.to(tl.int64)
    row64, column64 = row.to(tl.int64), column.to(tl.int64)

    last = Tk.to(tl.int64)
    if key_lengths is not None:
        last = tl.minimum(last, tl.load(key_lengths + b))
    if IS_CAUSAL:
        last = tl.minimum(last, first_query + first_i + BLOCK_Q)

    weight += h * stride_wh
    d = tl.arange(0, BLOCK_D)
    w = tl.load(weight + d, mask=d < D, other=0.0)
    tile_q = b * q_tiles_b + h * q_tiles_h + q_tile
    tile_k = b * k_tiles_b + h * k_tiles_h + k_tile
    paired = tl.load(query_bound + tile_q) + tl.load(key_bound + tile_k) <= PAIR_RANGE
    if first_j >= last:  # no key is visible
        s = tl.zeros((BLOCK_Q, BLOCK_K), scores.dtype.element_ty)
    elif paired & (tl.max(tl.abs(w), 0) < WEIGHT_RANGE):
        q_exp = query_exp + tile_q * (CHANNELS * BLOCK_Q) + row
        k_exp = key_exp + tile_k * (CHANNELS * BLOCK_K) + column
        s = tl.sum(w, 0) - 2.0 * _paired_sums(q_exp, k_exp, weight, CHANNELS, BLOCK_Q, BLOCK_K, UNROLL, NVIDIA)
    else:
        q = query + b * stride_qb + h * stride_qh + first_i * stride_qt + row64 * stride_qt
        k = key + b * stride_kb + h * stride_kh + first_j * stride_kt + column64 * stride_kt
        s = _plain_sums(q, k, weight, stride_qd, stride_kd, in_q, in_k, D, BLOCK_Q, BLOCK_K, NVIDIA)
    s = _capped(s, scale, softcap, NVIDIA)
    inside = in_q[:, None] & in_k[None, :]
    visible = column[None, :] < last - first_j
    if IS_CAUSAL:
        visible = visible & (column[None, :] - row[:, None] <= first_query + first_i - first_j)
    if mask is not None:
        mask += b * stride_mb + h * stride_mh + first_i * stride_mq + first_j * stride_mk
        at = mask + row64[:, None] * stride_mq + column64[None, :] * stride_mk
        visible = visible & (tl.load(at, mask=inside, other=0) != 0)
    out = scores + (bh * Tq + first_i) * Tk + first_j + row64[:, None] * Tk + column64[None, :]
    tl.store(out, _stored(s, visible), mask=inside)


@triton.jit(do_not_specialize=UNSPECIALISED)
def additive_attention_fwd_kernel_few(
    query, key, weight, mask, key_lengths, scores,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd,
    stride_mb, stride_mh, stride_mq, stride_mk, stride_wh, H, Tq, Tk, first_query, scale, softcap,
    IS_CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """Scores of one query and BLOCK_K keys, read once and as they lie. Grid: (Tq * key tiles * B * H,).

    exp(2 (q + k)) is taken of the sum: for a query or two that is no more work than of every key; no range.
    """
    ARITHMETIC: tl.constexpr = scores.dtype.element_ty
    k_tiles = tl.cdiv(Tk, BLOCK_K)
    i = tl.program_id(0) % Tq
    k_tile = (tl.program_id(0) // Tq) % k_tiles
    bh, b, h = _batch_and_head(tl.program_id(0) // Tq // k_tiles, H)
    j = k_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    j64 = j.to(tl.int64)
    out = scores + (bh * Tq + i) * Tk + j64

    last = Tk.to(tl.int64)
    if key_lengths is not None:
        last = tl.minimum(last, tl.load(key_lengths + b))
    if IS_CAUSAL:
        last = tl.minimum(last, first_query + i + 1)
    if k_tile * BLOCK_K >= last:
        tl.store(out, tl.full((BLOCK_K,), float("-inf"), ARITHMETIC), mask=j < Tk)
        return

    query += b * stride_qb + h * stride_qh + i.to(tl.int64) * stride_qt
    keys = key + b * stride_kb + h * stride_kh + j64[:, None] * stride_kt
    weight += h * stride_wh
    sums = tl.zeros((BLOCK_K, BLOCK_D), ARITHMETIC)
    for start in tl.range(0, D, 2 * BLOCK_D):
        d1 = start + tl.arange(0, BLOCK_D)
        d2 = d1 + BLOCK_D
        q1 = load_wide(query + d1 * stride_qd, d1 < D)
        q2 = load_wide(query + d2 * stride_qd, d2 < D)
        w1 = tl.load(weight + d1, mask=d1 < D, other=0.0)
        w2 = tl.load(weight + d2, mask=d2 < D, other=0.0)
        k1 = tl.load(keys + d1[None, :] * stride_kd, mask=(j[:, None] < Tk) & (d1[None, :] < D), other=0.0)
        k2 = tl.load(keys + d2[None, :] * stride_kd, mask=(j[:, None] < Tk) & (d2[None, :] < D), other=0.0)
        t1 = 1.0 + tl.exp2(_at_most(q1[None, :] + k1.to(ARITHMETIC), PAIR_RANGE) * (2.0 * LOG2E))
        t2 = 1.0 + tl.exp2(_at_most(q2[None, :] + k2.to(ARITHMETIC), PAIR_RANGE) * (2.0 * LOG2E))
        r = -2.0 * fast_reciprocal(t1 * t2, NVIDIA)
        sums = tl.fma(tl.fma(t2, r, 1.0), w1[None, :], sums)
        sums = tl.fma(tl.fma(t1, r, 1.0), w2[None, :], sums)
    s = _capped(tl.sum(sums, 1), scale, softcap, NVIDIA)
    visible = j64 < last
    if mask is not None:
        at = mask + b * stride_mb + h * stride_mh + i.to(tl.int64) * stride_mq + j64 * stride_mk
        visible = visible & (tl.load(at, mask=j < Tk, other=0) != 0)
    tl.store(out, _stored(s, visible), mask=j < Tk)


@triton.jit(do_not_specialize=UNSPECIALISED)
def additive_attention_fwd_kernel_context(
    scores, value, key_lengths, context, lse,
    stride_vb, stride_vh, stride_vt, stride_vd, stride_cb, stride_ch, stride_cs, stride_lb, stride_lh, stride_ls,
    H, Tq, Tk, first_query, split_keys,
    IS_CAUSAL: tl.constexpr, Dv: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    TF32: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """Context and lse of a tile of queries over a range of keys.

    Grid: (query tiles * B * H, splits, value tiles).
    """
    ARITHMETIC: tl.constexpr = scores.dtype.element_ty
    q_tiles = tl.cdiv(Tq, BLOCK_Q)
    q_tile = tl.program_id(0) % q_tiles
    bh, b, h = _batch_and_head(tl.program_id(0) // q_tiles, H)
    split = tl.program_id(1).to(tl.int64)
    i = q_tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    v = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    i64 = i.to(tl.int64)
    in_q, in_v = i < Tq, v < Dv
    rows = scores + (bh * Tq + i64)[:, None] * Tk
    columns = value + b * stride_vb + h * stride_vh + v.to(tl.int64)[None, :] * stride_vd

    first = split * split_keys
    last = tl.minimum(first + split_keys, Tk)
    if key_lengths is not None:
        last = tl.minimum(last, tl.load(key_lengths + b))
    if IS_CAUSAL:
        last = tl.minimum(last, first_query + (q_tile + 1) * BLOCK_Q)

    top = tl.full((BLOCK_Q,), float("-inf"), ARITHMETIC)
    total = tl.zeros((BLOCK_Q,), ARITHMETIC)
    acc = tl.zeros((BLOCK_Q, BLOCK_V), ARITHMETIC)
    for start in tl.range(first, last, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        in_k = j < last
        s = tl.load(
            rows + j[None, :], mask=in_q[:, None] & in_k[None, :], other=float("-inf")
        )  # [BLOCK_Q, BLOCK_K]
        x = tl.load(columns + j[:, None] * stride_vt, mask=in_k[:, None] & in_v[None, :], other=0.0)
        new_top = tl.maximum(top, tl.max(s, 1))
        safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = _exp_of_difference(s, safe_top[:, None])
        shrink = _exp_of_difference(top, safe_top)
        total = total * shrink + tl.sum(p, 1)
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
    bh, b, h = _batch_and_head(row // Tq, H)
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


# Backward


@triton.jit(do_not_specialize=UNSPECIALISED)
def additive_attention_bwd_kernel_gradient(
    scores, lse, value, context, grad_context, grad_weights, shift, g, g_transposed,
    stride_vb, stride_vh, stride_vt, stride_vd, stride_cb, stride_ch, H, Tq, Tk, scale, softcap,
    Dv: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PAD: tl.constexpr,
    NVIDIA: tl.constexpr,
):  # fmt: skip
    """g_ij, the gradient of the score before cap and scale, of one tile; rows are padded with 0 to PAD.

    shift is sum_j p_ij dp_ij - dL_i, or None. Grid: (query tiles * key tiles * B * H,).
    """
    ARITHMETIC: tl.constexpr = scores.dtype.element_ty
    q_tiles, k_tiles = tl.cdiv(Tq, BLOCK_Q), tl.cdiv(Tk, BLOCK_K)
    q_tile = tl.program_id(0) % q_tiles
    k_tile = (tl.program_id(0) // q_tiles) % k_tiles
    bh, b, h = _batch_and_head(tl.program_id(0) // q_tiles // k_tiles, H)
    i, j = q_tile * BLOCK_Q + tl.arange(0, BLOCK_Q), k_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    i64, j64 = i.to(tl.int64), j.to(tl.int64)
    in_q, in_k = i < Tq, j < Tk
    at = (bh * Tq + i64)[:, None] * Tk + j64[None, :]
    inside = in_q[:, None] & in_k[None, :]

    s = tl.load(scores + at, mask=inside, other=float("-inf"))  # [BLOCK_Q, BLOCK_K]
    row_lse = tl.load(lse + bh * Tq + i64, mask=in_q, other=0.0)
    p = _probability(s, row_lse[:, None])
    a = tl.zeros((BLOCK_Q, BLOCK_K), ARITHMETIC)
    mean = tl.zeros((BLOCK_Q,), ARITHMETIC)
    if grad_context is not None:
        terms = tl.zeros((BLOCK_Q, BLOCK_V), ARITHMETIC)
        base = b * stride_cb + h * stride_ch + i64[:, None] * Dv
        values = value + b * stride_vb + h * stride_vh + j64[None, :] * stride_vt
        for start in tl.range(0, Dv, BLOCK_V):
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
    if grad_weights is not None:
        a += load_wide(grad_weights + at, inside)
    if shift is not None:
        mean += tl.load(shift + bh * Tq + i64, mask=in_q, other=0.0)
    gradient = p * (a - mean[:, None]) * _number(scale, ARITHMETIC)
    if softcap is not None:
        softcap = _number(softcap, ARITHMETIC)
        gradient *= 1.0 - (s / softcap) * (s / softcap)
    gradient = tl.where(s == float("-inf"), 0.0, gradient)
    q_padded, k_padded = tl.cdiv(Tq, PAD) * PAD, tl.cdiv(Tk, PAD) * PAD
    out = g + (bh * Tq + i64)[:, None] * k_padded + j64[None, :]
    tl.store(out, gradient, mask=in_q[:, None] & (j < k_padded)[None, :])
    out_transposed = g_transposed + (bh * Tk + j64)[:, None] * q_padded + i64[None, :]
    tl.store(out_transposed, tl.trans(gradient), mask=in_k[:, None] & (i < q_padded)[None, :])


@triton.jit(do_not_specialize=UNSPECIALISED)
def additive_attention_bwd_kernel_value(
    scores, lse, grad_context, key_lengths, grad_value, stride_cb, stride_ch, H, Tq, Tk, first_query,
    IS_CAUSAL: tl.constexpr, Dv: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    NVIDIA: tl.constexpr,
):  # fmt: skip
    """dx_j = sum_i p_ij dc_i, (B, H, Tk, Dv) in the arithmetic's dtype. Grid: (key tiles * B * H, value tiles)."""
    ARITHMETIC: tl.constexpr = scores.dtype.element_ty
    k_tiles = tl.cdiv(Tk, BLOCK_K)
    k_tile = tl.program_id(0) % k_tiles
    bh, b, h = _batch_and_head(tl.program_id(0) // k_tiles, H)
    j = k_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    j64 = j.to(tl.int64)
    in_k, in_v = j < Tk, v < Dv
    first, last = 0, Tq
    if IS_CAUSAL:  # earlier queries do not see these keys
        first = tl.maximum(k_tile * BLOCK_K - first_query, 0) // BLOCK_Q * BLOCK_Q
    if key_lengths is not None:
        last = tl.where(tl.load(key_lengths + b) <= k_tile * BLOCK_K, first, last)

    scores += bh * Tq * Tk
    lse += bh * Tq
    grad_context += b * stride_cb + h * stride_ch
    acc = tl.zeros((BLOCK_K, BLOCK_V), ARITHMETIC)
    for start in tl.range(first, last, BLOCK_Q):
        i = start + tl.arange(0, BLOCK_Q)
        i64 = i.to(tl.int64)
        in_q = i < Tq
        s_at = scores + i64[None, :] * Tk + j64[:, None]
        s = tl.load(s_at, mask=in_k[:, None] & in_q[None, :], other=float("-inf"))  # [BLOCK_K, BLOCK_Q]
        row_lse = tl.load(lse + i64, mask=in_q, other=0.0)
        p = tl.where(s == float("-inf"), 0.0, _probability(s, row_lse[None, :]))
        dc_at = grad_context + i64[:, None] * Dv + v[None, :]
        dc = tl.load(dc_at, mask=in_q[:, None] & in_v[None, :], other=0.0)
        precision: tl.constexpr = "tf32x3" if NVIDIA else "ieee"
        acc = tl.dot(p.to(dc.dtype), dc, acc, input_precision=precision, out_dtype=ARITHMETIC)
    out = grad_value + (bh * Tk + j64)[:, None] * Dv + v[None, :]
    tl.store(out, acc, mask=in_k[:, None] & in_v[None, :])


@triton.jit(do_not_specialize=UNSPECIALISED)
def additive_attention_bwd_kernel_inputs(
    held, passing, held_exp, passing_exp, held_bound, passing_bound, weight, g, key_lengths, grad, grad_weight,
    stride_hb, stride_hh, stride_ht, stride_hd, stride_pb, stride_ph, stride_pt, stride_pd,
    held_tiles_b, held_tiles_h, passing_tiles_b, passing_tiles_h, stride_wh, H, BH, T, passing_T, first_query,
    split_rows,
    IS_CAUSAL: tl.constexpr, D: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    PAD: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_T held rows (queries or keys), BLOCK_D channels, from a range of the passing rows.

    With held queries, also grad_weight (splits, B, H, tiles, D). Two passing rows share a reciprocal,
    r1 = t2 / (t1 t2), and g is one number for all channels: nothing is summed across threads. One warp holds the
    tile: every thread has all BLOCK_T rows of 4 channels. Grid: (held tiles * B * H, channel tiles, splits).
    """
    ARITHMETIC: tl.constexpr = g.dtype.element_ty
    tiles = tl.cdiv(T, BLOCK_T)
    tile = tl.program_id(0) % tiles
    bh, b, h = _batch_and_head(tl.program_id(0) // tiles, H)
    split = tl.program_id(2).to(tl.int64)
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    t64 = t.to(tl.int64)
    in_d, in_pack = d < D, d < CHANNELS

    first = split * split_rows
    last = tl.minimum(first + split_rows, passing_T)
    if grad_weight is not None:  # held queries, passing keys
        if key_lengths is not None:
            last = tl.minimum(last, tl.load(key_lengths + b))
        if IS_CAUSAL:
            last = tl.minimum(last, first_query + (tile + 1) * BLOCK_T)
    else:
        if key_lengths is not None:
            last = tl.where(tl.load(key_lengths + b) <= tile * BLOCK_T, first, last)
        if IS_CAUSAL:
            first = tl.maximum(first, tl.maximum(tile * BLOCK_T - first_query, 0) // 2 * 2)

    padded = tl.cdiv(T, PAD) * PAD
    g += bh * passing_T * padded + t64
    held_tile = b * held_tiles_b + h * held_tiles_h
    acc = tl.zeros((BLOCK_T, BLOCK_D), ARITHMETIC)
    sums = tl.zeros((BLOCK_T, BLOCK_D), ARITHMETIC)  # of g r
    total = tl.zeros((BLOCK_T,), ARITHMETIC)  # of g
    if tl.load(held_bound + held_tile + tile * BLOCK_T // PAD) + tl.load(passing_bound + bh) <= PAIR_RANGE:
        e_at = held_exp + (held_tile * PAD + t64)[:, None] * CHANNELS + d[None, :]
        e = tl.load(e_at, mask=in_pack[None, :], other=0.0)  # [BLOCK_T, BLOCK_D]
        rows = passing_exp + (b * passing_tiles_b + h * passing_tiles_h) * (PAD * CHANNELS) + d
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
            r1 = _reciprocal_of_sum(x + y[None, :], NVIDIA)
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
        tl.store(w_at, tl.sum(total, 0) - 2.0 * tl.sum(sums, 0), mask=in_d)
        acc = sums - acc
    w = tl.load(weight + h * stride_wh + d, mask=in_d, other=0.0)
    out = grad + (part * T + t64)[:, None] * D + d[None, :]
    tl.store(out, 4.0 * acc * w[None, :], mask=(t < T)[:, None] & in_d[None, :])


# Launchers

UNROLL = 1  # 2 saves 0.2 slots a tanh, and spills
# Scores held between two kernels: 32 MiB stay in the second-level cache of a large GPU.
CHUNK = 1 << 23
# Up to here reading the keys once per query costs less than packing them.
FEW_QUERIES = 4
# What a step of tl.dot in backward sums over, 16 numbers of float32: with 32, three TF32 products spill on sm_80.
# Triton 3.6 takes no fewer than 16.
DOT_BYTES, DOT_TERMS = 64, 16
# Rows of scratch for backward are padded to this many numbers, so that wide loads are aligned.
PAD = 32


@functools.cache
def _programs_wanted(device: torch.device) -> int:
    """Enough programs to fill the device twice."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def _unexpanded(t):
    """t with the expanded (stride 0) ones of its first two dimensions reduced to one element."""
    for dim in (0, 1):
        if t.shape[dim] > 1 and t.stride(dim) == 0:
            t = t.narrow(dim, 0, 1)
    return t


def _strides(t, block=1):
    """Strides of the first two dimensions in units of rows of blocks, 0 where a dimension has one element."""
    return tuple(0 if t.shape[dim] == 1 else t.stride(dim) // block for dim in (0, 1))


def _arithmetic(dtype):
    """The dtype of scratch and sums."""
    return torch.promote_types(dtype, torch.float32)


def _dot_terms(dtype):
    return max(DOT_TERMS, DOT_BYTES // dtype.itemsize)


def _scalar(x, dtype):
    """A float argument of a kernel: Triton passes floats in single precision, so double goes as its bits."""
    if x is None or dtype != torch.float64:
        return x
    return struct.unpack("q", struct.pack("d", x))[0]


def _pack(t, channels, block, by_row=False):
    """Packed exponentials and bounds (B, H, tiles) of rows (B, H, T, D); B and H are 1 where t is expanded."""
    t = _unexpanded(t)
    (B, H, T, D), tiles = t.shape, triton.cdiv(t.shape[2], block)
    empty = functools.partial(torch.empty, dtype=_arithmetic(t.dtype), device=t.device)
    packed, bounds = empty(B, H, tiles, channels * block), empty(B, H, tiles)
    block_d = min(128, 8192 // block) // packed.itemsize  # whole sectors of a row; 16 numbers of float32 a thread
    launch(
        additive_attention_pack_kernel, (tiles * B * H,),
        t, packed, bounds, *t.stride(), H, T, tiles,
        D=D, CHANNELS=channels, BLOCK_T=block, BLOCK_D=block_d, BY_ROW=by_row, num_warps=4,
    )  # fmt: skip
    return packed, bounds


def _packed_weight(weight, channels):
    """(H or 1, channels) in the dtype of the arithmetic, padded with 0."""
    if weight.shape[0] > 1 and weight.stride(0) == 0:
        weight = weight[:1]
    weight = torch.nn.functional.pad(weight.to(_arithmetic(weight.dtype)), (0, channels - weight.shape[1]))
    return weight.contiguous(), (channels if weight.shape[0] > 1 else 0)


class _Problem:
    """The inputs of a call with heads, and what its kernels share."""

    def __init__(self, query, key, value, weight, mask, key_lengths, is_causal, scale, softcap):
        if query.dim() == 3:
            if mask is not None:
                mask = mask.expand(*query.shape[:-1], key.shape[-2]).unsqueeze(1)
            query, key, value = (t.unsqueeze(1) for t in (query, key, value))
            weight = weight.expand(1, -1)
        (self.B, self.H, self.Tq, self.D), (self.Tk, self.Dv) = query.shape, value.shape[-2:]
        self.query, self.key, self.value = query, key, value
        self.mask = None if mask is None else mask.expand(self.B, self.H, self.Tq, self.Tk).view(torch.uint8)
        self.key_lengths = None if key_lengths is None else key_lengths.contiguous()
        self.is_causal = is_causal
        self.scale, self.softcap = (_scalar(x, query.dtype) for x in (scale, softcap))
        self.empty = functools.partial(torch.empty, dtype=_arithmetic(query.dtype), device=query.device)
        self.BH = self.B * self.H
        self.channels = max(4, triton.cdiv(self.D, 4) * 4)
        self.weight, self.stride_wh = _packed_weight(weight, self.channels)
        self.few = self.Tq <= FEW_QUERIES
        self.key_packed = {}  # by BLOCK_K

    def chunks(self, all_at_once):
        """(first, end) of the queries whose scores are held at the same time."""
        rows = max(32, CHUNK // (self.BH * self.Tk) // 32 * 32)
        rows = self.Tq if all_at_once else rows
        return [(first, min(first + rows, self.Tq)) for first in range(0, self.Tq, rows)]

    def scores(self, out, first, end):
        """Writes the scores of queries first to end to out (B, H, end - first, Tk)."""
        kernel, size = ("few", self.D) if self.few else ("scores", self.Tq)
        self._tiled(kernel, size, (end - first, self.Tk, self.D), lambda tile: self._scores(tile, out, first, end))

    def _tiled(self, kernel, size, sizes, run):
        """Runs with the tile that the table, or tuning, has for these sizes."""
        run(_tiles.choose(kernel, size, self.query, (self.BH, *sizes), run))

    def _scores(self, tile, out, first, end):
        query, mask = self.query[:, :, first:end], self.mask
        if mask is not None:
            mask = mask[:, :, first:end]
        mask_strides = (0, 0, 0, 0) if mask is None else mask.stride()
        n = end - first
        if self.few:
            block_k, block_d = tile.extents_in(query.dtype)
            launch(
                additive_attention_fwd_kernel_few, (n * triton.cdiv(self.Tk, block_k) * self.BH,),
                query, self.key, self.weight, mask, self.key_lengths, out,
                *query.stride(), *self.key.stride(), *mask_strides, self.stride_wh, self.H, n, self.Tk, first,
                self.scale, self.softcap, IS_CAUSAL=self.is_causal, D=self.D, BLOCK_K=block_k, BLOCK_D=block_d,
                NVIDIA=NVIDIA, num_warps=tile.warps,
            )  # fmt: skip
            return
        block_q, block_k = tile.extents_in(query.dtype)
        if block_k not in self.key_packed:
            self.key_packed[block_k] = _pack(self.key, self.channels, block_k)
        key_exp, key_bound = self.key_packed[block_k]
        query_exp, query_bound = _pack(query, self.channels, block_q)
        launch(
            additive_attention_fwd_kernel_scores,
            (triton.cdiv(n, block_q) * triton.cdiv(self.Tk, block_k) * self.BH,),
            query, self.key, self.weight, mask, self.key_lengths,
            query_exp, key_exp, query_bound, key_bound, out,
            *query.stride(), *self.key.stride(), *mask_strides,
            *_strides(query_bound), *_strides(key_bound), self.stride_wh,
            self.H, n, self.Tk, first, self.scale, self.softcap,
            IS_CAUSAL=self.is_causal, D=self.D, CHANNELS=self.channels, BLOCK_Q=block_q, BLOCK_K=block_k,
            BLOCK_D=triton.next_power_of_2(self.channels), UNROLL=UNROLL, NVIDIA=NVIDIA, num_warps=tile.warps,
        )  # fmt: skip

    def attend(self, scores, context, lse, first, allow_tf32):
        """Writes context (B, H, n, Dv) and lse (B, H, n) of the queries from first on, whose scores are given."""
        arguments = (scores, context, lse, first, allow_tf32)
        sizes = (lse.shape[2], self.Tk, self.Dv)
        self._tiled("context", self.Dv, sizes, lambda tile: self._attend(tile, *arguments))

    def _attend(self, tile, scores, context, lse, first, allow_tf32):
        n, (block_q, block_k) = lse.shape[2], tile.extents_in(lse.dtype)
        block_v = min(128, max(16, triton.next_power_of_2(self.Dv)))
        q_tiles, v_tiles = triton.cdiv(n, block_q), max(1, triton.cdiv(self.Dv, block_v))
        wanted = _programs_wanted(self.query.device) // (q_tiles * v_tiles * self.BH)
        split_keys = triton.cdiv(triton.cdiv(self.Tk, max(1, min(wanted, 128))), 256) * 256
        splits = triton.cdiv(self.Tk, split_keys)
        parts, lse_parts, stride_s = context, lse, (0, 0)
        if splits > 1:
            parts = self.empty(splits, self.B, self.H, n, self.Dv)
            lse_parts = self.empty(parts.shape[:-1])
            stride_s = (parts.stride(0), lse_parts.stride(0))
        launch(
            additive_attention_fwd_kernel_context, (q_tiles * self.BH, splits, v_tiles),
            scores, self.value, self.key_lengths, parts, lse_parts,
            *self.value.stride(), *parts.stride()[-4:-2], stride_s[0], *lse_parts.stride()[-3:-1], stride_s[1],
            self.H, n, self.Tk, first, split_keys,
            IS_CAUSAL=self.is_causal, Dv=self.Dv, BLOCK_Q=block_q, BLOCK_K=block_k, BLOCK_V=block_v,
            TF32=allow_tf32, NVIDIA=NVIDIA, num_warps=tile.warps,
        )  # fmt: skip
        if splits > 1:
            launch(
                additive_attention_fwd_kernel_combine, (self.BH * n,),
                parts, lse_parts, context, lse, *context.stride()[:2], *lse.stride()[:2],
                self.H, n, self.BH * n, splits,
                Dv=self.Dv, BLOCK_S=triton.next_power_of_2(splits), BLOCK_V=block_v, num_warps=4,
            )  # fmt: skip

    def pack_rows(self):
        """Exponentials and bounds of queries and keys, row by row, for the passes over inputs."""
        channels, tensors = self.channels, (self.query, self.key)
        (self.query_rows, self.query_bound), (self.key_rows, self.key_bound) = (
            _pack(t, channels, PAD, by_row=True) for t in tensors
        )

    def gradient(self, scores, lse, context, grad_context, grad_weights, shift):
        """g (B, H, n, Tk) and its transpose, rows padded to PAD; context and its gradient are (B, H, n, Dv)."""
        n, block_q, block_k = lse.shape[2], 32, 32
        q_padded, k_padded = (triton.cdiv(size, PAD) * PAD for size in (n, self.Tk))
        g, g_transposed = self.empty(self.BH, n, k_padded), self.empty(self.BH, self.Tk, q_padded)
        # Where no tensor core takes float64 (sm_120), its products spill beside the operands of a second stage.
        warps, stages = (8, 1) if g.dtype == torch.float64 else (4, 2)
        launch(
            additive_attention_bwd_kernel_gradient,
            (triton.cdiv(n, block_q) * triton.cdiv(self.Tk, block_k) * self.BH,),
            scores, lse, self.value, context, grad_context, grad_weights, shift, g, g_transposed,
            *self.value.stride(), *context.stride()[:2], self.H, n, self.Tk, self.scale, self.softcap,
            Dv=self.Dv, BLOCK_Q=block_q, BLOCK_K=block_k, BLOCK_V=_dot_terms(context.dtype), PAD=PAD,
            NVIDIA=NVIDIA, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        return g, g_transposed

    def value_gradient(self, scores, lse, grad_context, first):
        """(B, H, Tk, Dv): what the queries from first on give."""
        out = self.empty(self.B, self.H, self.Tk, self.Dv)
        block_q, block_k = _dot_terms(grad_context.dtype), 32
        block_v = min(64, max(16, triton.next_power_of_2(self.Dv)))
        launch(
            additive_attention_bwd_kernel_value,
            (triton.cdiv(self.Tk, block_k) * self.BH, triton.cdiv(self.Dv, block_v), 1),
            scores, lse, grad_context, self.key_lengths, out, *grad_context.stride()[:2],
            self.H, lse.shape[2], self.Tk, first,
            IS_CAUSAL=self.is_causal, Dv=self.Dv, BLOCK_Q=block_q, BLOCK_K=block_k, BLOCK_V=block_v,
            NVIDIA=NVIDIA, num_warps=4,
        )  # fmt: skip
        return out

    def input_gradient(self, g, first, end, of_query):
        """Gradients (B, H, T, D) of queries first to end and (H, D) of weight; or of keys, and None."""
        tiles = slice(first // PAD, triton.cdiv(end, PAD))
        if of_query:
            held, held_exp, held_bound = self.query[:, :, first:end], self.query_rows, self.query_bound
            passing, passing_exp, passing_bound = self.key, self.key_rows, self.key_bound
            held_exp, held_bound = held_exp[:, :, tiles], held_bound[:, :, tiles]
        else:
            held, held_exp, held_bound = self.key, self.key_rows, self.key_bound
            passing, passing_exp, passing_bound = self.query[:, :, first:end], self.query_rows, self.query_bound
            passing_exp, passing_bound = passing_exp[:, :, tiles], passing_bound[:, :, tiles]
        operands = (held, passing, held_exp, passing_exp, held_bound, passing_bound)
        results = []

        def run(tile):
            results[:] = self._input_gradient(tile, g, first, *operands, of_query)

        self._tiled("inputs", self.D, (held.shape[2], passing.shape[2], self.D), run)
        return tuple(results)

    def _input_gradient(
        self, tile, g, first, held, passing, held_exp, passing_exp, held_bound, passing_bound, of_query
    ):
        T, passing_T, (block_t, block_d) = held.shape[2], passing.shape[2], tile.extents_in(held.dtype)
        tiles, channel_tiles = triton.cdiv(T, block_t), max(1, triton.cdiv(self.D, block_d))
        # A program is one warp: a multiprocessor wants many.
        wanted = 8 * _programs_wanted(held.device) // (tiles * channel_tiles * self.BH)
        split_rows = triton.cdiv(triton.cdiv(passing_T, max(1, min(wanted, 64))), PAD) * PAD
        splits = triton.cdiv(passing_T, split_rows)
        grad = self.empty(splits, self.B, self.H, T, self.D)
        grad_weight = self.empty(splits, self.B, self.H, tiles, self.D) if of_query else None
        launch(
            additive_attention_bwd_kernel_inputs, (tiles * self.BH, channel_tiles, splits),
            held, passing, held_exp, passing_exp, held_bound,
            passing_bound.amax(-1).expand(self.B, self.H).contiguous(),
            self.weight, g, self.key_lengths, grad, grad_weight,
            *held.stride(), *passing.stride(), *_strides(held_bound), *_strides(passing_bound), self.stride_wh,
            self.H, self.BH, T, passing_T, first, split_rows,
            IS_CAUSAL=self.is_causal, D=self.D, CHANNELS=self.channels, BLOCK_T=block_t, BLOCK_D=block_d, PAD=PAD,
            NVIDIA=NVIDIA, num_warps=tile.warps,
        )  # fmt: skip
        grad = grad.sum(0) if splits > 1 else grad[0]
        return grad, (grad_weight.sum((0, 1, 3)) if of_query else None)


def _weights(scores, lse, dtype):
    """exp(scores - lse), 0 for masked keys."""
    p = scores - lse.masked_fill(lse.isinf(), float("nan")).unsqueeze(-1)
    return p.exp_().masked_fill_(scores == float("-inf"), 0.0).to(dtype)


def additive_attention_fwd(
    query, key, value, weight, mask, key_lengths, key_exp, key_bound, is_causal, scale, softcap, return_weights,
    keep_scores, allow_tf32=False,
):  # fmt: skip
    """``fusedattn::additive_attention_fwd_triton``; key_exp and key_bound are not used."""
    rows, (Tk, Dv) = query.shape[:-1], value.shape[-2:]
    context = query.new_zeros if Tk == 0 else query.new_empty
    context = context((*rows, Dv))
    empty = functools.partial(torch.empty, dtype=_arithmetic(query.dtype), device=query.device)
    lse, scores = empty(rows), empty((*rows, Tk) if keep_scores or return_weights else 0)
    if Tk == 0:
        lse.fill_(float("-inf"))
    elif lse.numel():
        with on_device_of(query):
            problem = _Problem(query, key, value, weight, mask, key_lengths, is_causal, scale, softcap)
            heads = (problem.B, problem.H, problem.Tq)
            c, row_lse = context.view(*heads, Dv), lse.view(heads)
            for first, end in problem.chunks(keep_scores or return_weights):
                kept = scores if scores.numel() else lse.new_empty(problem.BH * (end - first) * Tk)
                problem.scores(kept, first, end)
                problem.attend(kept, c[:, :, first:end], row_lse[:, :, first:end], first, allow_tf32)
    weights = _weights(scores, lse, query.dtype) if return_weights else query.new_empty(0)
    return context, lse, weights, (scores if keep_scores else lse.new_empty(0))


register(
    "additive_attention_fwd_triton(Tensor query, Tensor key, Tensor value, Tensor weight, Tensor? mask, "
    "Tensor? key_lengths, Tensor? key_exp, float key_bound, bool is_causal, float scale, float? softcap, "
    "bool return_weights, bool keep_scores, bool allow_tf32=False) "
    "-> (Tensor context, Tensor lse, Tensor weights, Tensor scores)",
    additive_attention_fwd,
)


def additive_attention_bwd(
    grad_context, grad_lse, grad_weights, query, key, value, weight, mask, key_lengths, key_exp, key_bound,
    is_causal, scale, softcap, context, lse, scores,
):  # fmt: skip
    """``fusedattn::additive_attention_bwd_triton``: gradients of query, key, value and weight."""
    inputs = (query, key, value, weight)
    if not (lse.numel() and key.shape[-2]):
        return tuple(t.new_zeros(t.shape) for t in inputs)
    with on_device_of(query):
        problem = _Problem(*inputs, mask, key_lengths, is_causal, scale, softcap)
        B, H, Tq, Tk, Dv = problem.B, problem.H, problem.Tq, problem.Tk, problem.Dv
        problem.pack_rows()
        kept = scores.numel() > 0
        lse, context = lse.view(B, H, Tq), context.view(B, H, Tq, Dv)
        if grad_context is not None:
            grad_context = grad_context.contiguous().view(B, H, Tq, Dv)
        if grad_weights is not None:
            grad_weights = grad_weights.contiguous()
        if grad_lse is not None:
            grad_lse = grad_lse.reshape(B, H, Tq).to(lse.dtype)
        grad_query = torch.empty(B, H, Tq, problem.D, dtype=query.dtype, device=query.device)
        totals = None
        for first, end in problem.chunks(kept or grad_weights is not None):
            part = slice(first, end)
            s, row_lse = scores, lse[:, :, part].contiguous()
            if not kept:
                s = row_lse.new_empty(B, H, end - first, Tk)
                problem.scores(s, first, end)
            shift = None
            if grad_weights is not None:
                p = _weights(s.view(B, H, Tq, Tk), lse, lse.dtype)
                shift = (p * grad_weights.view(p.shape)).sum(-1)
            if grad_lse is not None:
                shift = -grad_lse[:, :, part] if shift is None else shift - grad_lse
            shift = None if shift is None else shift.contiguous()
            dc = None if grad_context is None else grad_context[:, :, part]
            g, g_transposed = problem.gradient(s, row_lse, context[:, :, part], dc, grad_weights, shift)
            dq, dw = problem.input_gradient(g_transposed, first, end, of_query=True)
            grad_query[:, :, part] = dq
            sums = [problem.input_gradient(g, first, end, of_query=False)[0], dw]
            if dc is not None:
                sums.append(problem.value_gradient(s, row_lse, dc, first))
            totals = sums if totals is None else [total.add_(x) for total, x in zip(totals, sums, strict=True)]
    grad_key, grad_weight, *grad_value = totals
    grads = (grad_query, grad_key, grad_value[0] if grad_value else value.new_zeros(value.shape), grad_weight)
    return tuple(grad.to(t.dtype).view(t.shape) for grad, t in zip(grads, inputs, strict=True))


register(
    "additive_attention_bwd_triton(Tensor? grad_context, Tensor? grad_lse, Tensor? grad_weights, Tensor query, "
    "Tensor key, Tensor value, Tensor weight, Tensor? mask, Tensor? key_lengths, Tensor? key_exp, "
    "float key_bound, bool is_causal, float scale, float? softcap, Tensor context, Tensor lse, "
    "Tensor scores) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_weight)",
    additive_attention_bwd,
)


# For tools


def kernels(dtypes=(torch.float32, torch.bfloat16, torch.float64), target=("cuda", 90)) -> list[Kernel]:
    """Every kernel in the specialisations of typical calls: recorded from the launchers, so none is made up."""
    calls = (
        ((4, 512, 512, 256), False),
        ((64, 1, 1024, 512), False),
        ((128, 10, 128, 1024), True),
        ((128, 64, 128, 1024), True),
    )
    found = {}
    for dtype, (shape, masked) in itertools.product(dtypes, calls):
        if dtype == torch.float64 and shape == calls[0][0]:
            continue  # the others have its kernels, too, and compiling takes its time
        for kernel in recorded(lambda: _typical_call(*shape, dtype, masked), target):  # noqa: B023, called at once
            found.setdefault(kernel.specialisation, kernel)
    return list(found.values())


def _typical_call(B, Tq, Tk, D, dtype, masked):
    empty = functools.partial(torch.empty, dtype=dtype, device="meta")
    inputs = [empty(B, T, D) for T in (Tq, Tk, Tk)] + [empty(D)]
    mask = torch.empty(B, Tq, Tk, dtype=torch.bool, device="meta") if masked else None
    lengths = torch.empty(B, dtype=torch.int64, device="meta") if masked else None
    options = (mask, lengths, None, 0.0, masked, 1.0, 5.0 if masked else None)
    context, lse, weights, scores = additive_attention_fwd(*inputs, *options, masked, False)
    grads = (context, lse, weights if masked else None)
    additive_attention_bwd(*grads, *inputs, *options, context, lse, scores)
