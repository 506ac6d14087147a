"""Additive attention in Triton: what forward and backward share. See ``additive_attention.py``."""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fusedattn import _philox
from fusedattn._dtypes import accumulation_dtype
from fusedattn._options import SCORE_ACTIVATIONS
from fusedattn._options import AdditiveAttentionOptions as Options
from fusedattn.triton import _tiles
from fusedattn.triton._common import argument, fast_reciprocal, launch, load_wide, number, recording_for, require
from fusedattn.triton._philox import random_word

_require = functools.partial(require, "additive_attention")

# Largest |q| + |k| for which the product of two denominators, each at most 1 + exp(2 (|q| + |k|)), and its
# reciprocal are normal float32 numbers; tanh is 1 to rounding from there on.
PAIR_RANGE = tl.constexpr(21.0)
LOG2E = tl.constexpr(1.4426950408889634)

RELU, LEAKY_RELU = (tl.constexpr(SCORE_ACTIVATIONS[name]) for name in ("relu", "leaky_relu"))
# phi(z) = 1 - RATE r, r = 1 / (1 + exp(RATE z)), by the number of the activation; 0 takes no exponentials.
_RATES = (2.0, 1.0, 0.0, 0.0)

# Integers, or bits of float64, that change from call to call: else compiled anew for 1 and multiples of 16.
UNSPECIALISED = [
    *(f"stride_{t}{dim}" for t in "qkvclhp" for dim in "bh"),
    *(f"stride_{t}{dim}" for t in "bm" for dim in "bhqk"),
    "stride_b", "stride_h", "stride_cs", "stride_ls", "stride_wh",
    "q_tiles_b", "q_tiles_h", "k_tiles_b", "k_tiles_h", "held_tiles_b", "held_tiles_h", "passing_tiles_b",
    "passing_tiles_h", "H", "BH", "passing_T", "split_rows", "T", "Tq", "Tk", "rows", "tiles", "first_query",
    "split_keys", "splits", "keys_end", "stride_sb", "stride_sh", "left", "right", "stride_n", "tiles_seen",
    "rows_q", "rows_k", "first_row", "packed_tiles",
    *Options._fields, "heads_of_seed", "drop_below", "drop_factor", "drop_query", "drop_key",
]  # fmt: skip


# From any key: centers beyond are as far, and sums with a window's side fit 64 bits.
FAR = 1 << 61
# Scores held between two kernels: 32 MiB stay in the second-level cache of a large GPU.
CHUNK = 1 << 23
# Up to here reading the keys once per query costs less than packing them.
FEW_QUERIES = 4


@triton.jit
def reciprocal_of_sum(z, NVIDIA: tl.constexpr):
    """r = 1 / (1 + exp(2z)) for any z, NaN included."""
    return fast_reciprocal(1.0 + tl.exp2(at_most(z, PAIR_RANGE) * (2.0 * LOG2E)), NVIDIA)


@triton.jit
def reciprocal_beyond_range(z, RATE: tl.constexpr, NVIDIA: tl.constexpr):
    """r = 1 / (1 + exp(RATE z)) for any z."""
    if RATE == 1.0:
        z *= 0.5
    return reciprocal_of_sum(z, NVIDIA)


@triton.jit
def at_most(z, limit):
    return tl.minimum(z, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def linear(z, negative_slope, ACTIVATION: tl.constexpr):
    """phi(z) where that is linear on either side of zero; NaN stays NaN."""
    if ACTIVATION == RELU:
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        z = tl.where(z > 0.0, z, z * number(negative_slope, z.dtype))
    return z


@triton.jit
def linear_gradient(z, g, negative_slope, ACTIVATION: tl.constexpr):
    """g phi'(z), of g that has fewer dimensions than z, or NaN as PyTorch's."""
    if ACTIVATION == RELU:
        h = tl.where(z <= 0.0, 0.0, g)
    else:
        h = tl.where(z > 0.0, g, g * number(negative_slope, g.dtype))
    return h


@triton.jit
def batch_and_head(bh, H):
    """bh = b H + h, b and h in 64 bits, divided in 32: a division of 64 bits is a call, and spills."""
    return bh.to(tl.int64), (bh // H).to(tl.int64), (bh % H).to(tl.int64)


@triton.jit
def rows_of_segment(offsets, b, first, rows):
    """Of `rows` packed rows, from `first` on, those of segment b: (the first, how many, how many came before)."""
    start = tl.load(offsets + b) - first
    row = tl.maximum(start, 0)
    n = tl.maximum(tl.minimum(tl.load(offsets + b + 1) - first, rows) - row, 0)
    return row.to(tl.int64), n, row - start


@triton.jit
def segment(offsets_q, offsets_k, b, first_query, rows_q, rows_k):
    """(First row of queries, how many, how many came before; first row of keys, how many) of segment b."""
    row_q, Tq, before = rows_of_segment(offsets_q, b, first_query, rows_q)
    row_k, Tk, _ = rows_of_segment(offsets_k, b, 0, rows_k)
    return row_q, Tq, before, row_k, Tk


@triton.jit
def pairs_of_segment(b, h, H, row_q, Tq, most_keys, PAD: tl.constexpr):
    """Where the gradients of a segment's pairs begin, in rows of PAD numbers; their transpose, too."""
    return ((row_q // PAD + b) * H + h * tl.cdiv(Tq, PAD)) * PAD * (tl.cdiv(most_keys, PAD) * PAD)


@triton.jit
def dropped(
    x, b, h, i, j, seed, heads_of_seed, first_head, heads, drop_query, drop_key, drop_below, drop_factor,
):  # fmt: skip
    """What dropout makes of numbers x of queries i and keys j, which count from drop_query and drop_key.

    Volatile, the seed is loaded where it is used: before a loop, the keys of all ten rounds would be made there,
    too, in scalar registers that AMD lacks.
    """
    sample = h.to(tl.int32) // heads_of_seed
    head = first_head + b * heads + h - sample * heads_of_seed
    word = random_word(tl.load(seed + sample, volatile=True), head, drop_query + i, drop_key + j)
    is_kept = (word ^ 0x80000000).to(tl.int32, bitcast=True) >= drop_below
    return tl.where(is_kept, x * number(drop_factor, x.dtype), 0.0)


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


# Keys that share an entry of the table of queries that see them.
SEEING_KEYS = tl.constexpr(8)


@triton.jit
def keys_in_windows(first, last, i0, rows, center, stride_n, left, right, bh, BLOCK: tl.constexpr):
    """first and last, narrowed to the keys in the window of some of the BLOCK queries from i0 on, of which `rows`
    exist; i0 counts from the first of all."""
    if left is not None or right is not None:
        lowest, highest = i0, i0 + (BLOCK - 1)
        if center is not None:
            row = tl.arange(0, BLOCK)
            c = tl.load(center + (bh * stride_n + i0) + tl.minimum(row, rows - 1))
            lowest, highest = tl.min(c, 0), tl.max(c, 0)
        if left is not None:
            first = tl.maximum(first, lowest - left)
        if right is not None:
            last = tl.minimum(last, highest + right + 1)
    return first, last


@triton.jit
def queries_in_sight(
    first, last, j0, first_query, seeing, center, tiles_seen, left, right, bh,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """first and last, narrowed to the queries, from first_query on, that see some of the BLOCK keys from j0 on;
    first stays a multiple of STEP."""
    if center is not None:
        tile = j0 // SEEING_KEYS + tl.arange(0, BLOCK // SEEING_KEYS)
        at = seeing + (bh * tiles_seen + tile) * 2
        lowest = tl.min(tl.load(at, mask=tile < tiles_seen, other=1 << 30), 0).to(tl.int64)
        end = tl.max(tl.load(at + 1, mask=tile < tiles_seen, other=0), 0).to(tl.int64)
        first = tl.maximum(first, tl.maximum(lowest - first_query, 0) // STEP * STEP)
        last = tl.minimum(last, end - first_query)
    else:
        if right is not None:
            first = tl.maximum(first, tl.maximum(j0 - right - first_query, 0) // STEP * STEP)
        if left is not None:
            last = tl.minimum(last, j0 + BLOCK + left - first_query)
    return first, last


@triton.jit
def in_window(
    visible, row, column, i0, j0, rows, center, stride_n, left, right, bh, BLOCK_K: tl.constexpr
):  # fmt: skip
    """visible, and within the windows: queries i0 + row, of which `rows` exist, and BLOCK_K keys j0 + column."""
    if center is not None:
        c = tl.load(center + bh * stride_n + i0 + row, mask=row < rows, other=0) - j0
        if left is not None:
            low = tl.minimum(tl.maximum(c - left, 0), BLOCK_K).to(tl.int32)
            visible = visible & (column[None, :] >= low[:, None])
        if right is not None:
            high = tl.minimum(tl.maximum(c + right, -1), BLOCK_K).to(tl.int32)
            visible = visible & (column[None, :] <= high[:, None])
    else:
        if left is not None:
            visible = visible & (column[None, :] - row[:, None] >= i0 - j0 - left)
        if right is not None:
            visible = visible & (column[None, :] - row[:, None] <= i0 - j0 + right)
    return visible


@triton.jit
def in_sight(seen, key_lengths, t, b, h, stride_sb, stride_sh, keys_end):
    """Which of the keys t some query sees: what the others hold is not looked at, it may be NaN."""
    visible = t < keys_end
    if key_lengths is not None:
        visible = visible & (t < tl.load(key_lengths + b))
    if seen is not None:
        at = seen + b * stride_sb + h * stride_sh + t
        visible = visible & (tl.load(at, mask=visible, other=0) != 0)
    return visible


@triton.jit(do_not_specialize=UNSPECIALISED)
def additive_attention_seen_kernel(
    mask, seen, stride_mb, stride_mh, stride_mq, stride_mk, H, Tq, Tk, center, stride_n, left, right,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Whether mask and windows let some query see each key, (B, H, Tk). Grid: (key tiles * B * H,)."""
    tiles = tl.cdiv(Tk, BLOCK_K)
    bh, b, h = batch_and_head(tl.program_id(0) // tiles, H)
    row, column = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    j0 = tl.program_id(0) % tiles * BLOCK_K
    j = j0 + column
    found = tl.zeros((BLOCK_Q, BLOCK_K), tl.int32)
    for start in tl.range(0, Tq, BLOCK_Q):
        inside = (row < Tq - start)[:, None] & (j < Tk)[None, :]
        i0 = tl.cast(start, tl.int64)
        inside = in_window(inside, row, column, i0, j0, Tq - start, center, stride_n, left, right, bh, BLOCK_K)
        if mask is not None:
            i64, j64 = (start + row).to(tl.int64), j.to(tl.int64)
            at = mask + b * stride_mb + h * stride_mh + i64[:, None] * stride_mq + j64[None, :] * stride_mk
            found |= tl.load(at, mask=inside, other=0).to(tl.int32)
        else:
            found |= inside.to(tl.int32)
    tl.store(seen + bh * Tk + j, tl.max(found, 0).to(tl.uint8), mask=j < Tk)


@triton.jit(do_not_specialize=UNSPECIALISED)
def additive_attention_seeing_kernel(
    table, tiles, Tq, center, stride_n, left, right,
    BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The first query that sees some of SEEING_KEYS keys, and the end of those that do: (B, H, tiles, 2).

    Grid: (blocks of tiles * B * H,).
    """
    blocks = tl.cdiv(tiles, BLOCK_T)
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    tile = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    j = tile.to(tl.int64) * SEEING_KEYS
    lowest = tl.full((BLOCK_Q, BLOCK_T), 1 << 30, tl.int32)
    end = tl.zeros((BLOCK_Q, BLOCK_T), tl.int32)
    for start in tl.range(0, Tq, BLOCK_Q):
        i = start + tl.arange(0, BLOCK_Q)
        c = tl.load(center + bh * stride_n + i, mask=i < Tq, other=0)
        sees = (i < Tq)[:, None] & (j >= 0)[None, :]
        if left is not None:
            sees = sees & (j[None, :] + (SEEING_KEYS - 1) >= (c - left)[:, None])
        if right is not None:
            sees = sees & (j[None, :] <= (c + right)[:, None])
        lowest = tl.minimum(lowest, tl.where(sees, i[:, None], 1 << 30))
        end = tl.maximum(end, tl.where(sees, i[:, None] + 1, 0))
    out = table + (bh * tiles + tile) * 2
    tl.store(out, tl.min(lowest, 0), mask=tile < tiles)
    tl.store(out + 1, tl.max(end, 0), mask=tile < tiles)


@triton.jit(do_not_specialize=UNSPECIALISED)
def additive_attention_pack_kernel(
    source, packed, bounds, key_lengths, stride_b, stride_h, stride_t, stride_d, H, T, tiles,
    seen, stride_sb, stride_sh, keys_end, offsets, first_row, rows, packed_tiles, RATE: tl.constexpr,
    D: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    """exp(RATE x), or x for RATE 0, as [tile, channel, row], or [row, channel], padded with 0; the largest
    |RATE x / 2| of every tile.

    Keys that no query sees are padding, too. Those of segment b begin with tile (its first row) / BLOCK_T + b.
    Grid: (tiles * B * H,).
    """
    tile = tl.program_id(0) % tiles
    bh, b, h = batch_and_head(tl.program_id(0) // tiles, H)
    to = bh * tiles + tile
    if offsets is not None:
        first, keys_end, _ = rows_of_segment(offsets, b, first_row, rows)
        if tile * BLOCK_T >= keys_end:
            return
        source += first * stride_t
        to = h * packed_tiles + first // BLOCK_T + b + tile
    row = tl.arange(0, BLOCK_T)
    t = tile * BLOCK_T + row
    at = source + b * stride_b + h * stride_h + t.to(tl.int64)[:, None] * stride_t
    packed += to * (CHANNELS * BLOCK_T)
    exists = in_sight(seen, key_lengths, t, b, h, stride_sb, stride_sh, keys_end)
    bound = tl.zeros((BLOCK_T,), bounds.dtype.element_ty)
    for start in range(0, CHANNELS, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = exists[:, None] & (d[None, :] < D)
        x = load_wide(at + d.to(tl.int64)[None, :] * stride_d, inside)
        if RATE == 1.0:
            x *= 0.5
        bound = tl.maximum(bound, tl.max(tl.where(x == x, tl.abs(x), float("inf")), 1))
        e = x  # [BLOCK_T, BLOCK_D]
        if RATE > 0.0:
            e = tl.where(inside, _exp_twice(x), 0.0)
        if BY_ROW:
            tl.store(packed + row[:, None] * CHANNELS + d[None, :], e, mask=d[None, :] < CHANNELS)
        else:
            tl.store(packed + d[:, None] * BLOCK_T + row[None, :], tl.trans(e), mask=d[:, None] < CHANNELS)
    tl.store(bounds + to, tl.max(bound, 0))


def _expanded(t, dim):
    return t.shape[dim] == 1 or t.stride(dim) == 0


def _unexpanded(t, dims=(0, 1)):
    """t with the expanded (stride 0) ones of its first two dimensions reduced to one element."""
    for dim in dims:
        if _expanded(t, dim):
            t = t.narrow(dim, 0, min(1, t.shape[dim]))
    return t


def strides(t, block=1):
    """Strides of the first two dimensions in units of rows of blocks, 0 where a dimension has one element."""
    return tuple(0 if t.shape[dim] == 1 else t.stride(dim) // block for dim in (0, 1))


class Segments(NamedTuple):
    """Packed sequences: a batch whose elements have their rows one after the other, in dimension 2 of tensors."""

    cu_seqlens_q: torch.Tensor  # int32 (B + 1,)
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int

    def seen_keys(self, right: int) -> torch.Tensor | None:
        """How many keys of each segment some query sees, if that depends on how many queries it has."""
        if right < 0:
            return None
        return torch.minimum(self.cu_seqlens_q.diff() + right, self.cu_seqlens_k.diff()).long()


def pack(t, channels, block, rate, by_row=False, key_lengths=None, sight=None, part=None):
    """Packed exponentials and bounds (B, H, tiles) of rows (B, H, T, D); B and H are 1 where t is expanded.

    They are exp(rate t), or t for rate 0. Of keys, ``key_lengths`` and ``sight`` of a Problem say which are seen:
    so that a batch or heads are not one where that differs. Of packed rows, ``part`` is (their offsets, the first
    row, the most of a segment); tiles are then of one segment each, (1, H, tiles).
    """
    seen = None if sight is None else sight["seen"]
    same = [dim for dim in (0, 1) if seen is None or _expanded(seen, dim)]
    t = _unexpanded(t, [dim for dim in same if dim > 0 or key_lengths is None])
    sight = sight or {"seen": None, "stride_sb": 0, "stride_sh": 0, "keys_end": t.shape[2]}
    (B, H, T, D), tiles = t.shape, triton.cdiv(t.shape[2], block)
    stored, segments = (B, H, tiles), dict.fromkeys(("offsets", "first_row", "rows", "packed_tiles"))
    if part is not None:
        offsets, first, longest = part
        B, tiles = offsets.shape[0] - 1, triton.cdiv(longest, block)
        stored = (1, H, T // block + B)
        segments = {"offsets": offsets, "first_row": first, "rows": T, "packed_tiles": stored[2]}
    empty = functools.partial(torch.empty, dtype=accumulation_dtype(t.dtype), device=t.device)
    packed, bounds = empty(*stored, channels * block), empty(stored)
    block_d = min(128, 8192 // block) // packed.itemsize  # whole sectors of a row; 16 numbers of float32 a thread
    launch(
        additive_attention_pack_kernel, (tiles * B * H,),
        t, packed, bounds, key_lengths, *t.stride(), H, T, tiles,
        options=sight | segments, RATE=rate, D=D, CHANNELS=channels, BLOCK_T=block, BLOCK_D=block_d, BY_ROW=by_row,
        num_warps=8 if block == 128 and t.itemsize == 2 else 4,  # four spill on sm_100 under Triton 3.6
    )  # fmt: skip
    return packed, bounds


def programs_wanted(device: torch.device) -> int:
    """Enough programs to fill the device twice: for tools a large GPU, else few, for the interpreter's sake."""
    if recording_for() is not None:
        return 2 * 132
    return 2 * _multiprocessors(device) if device.type == "cuda" else 8


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _packed_weight(weight, channels):
    """(H or 1, channels) in the dtype of the arithmetic, padded with 0."""
    if weight.shape[0] > 1 and weight.stride(0) == 0:
        weight = weight[:1]
    weight = weight.to(accumulation_dtype(weight.dtype))
    if weight.shape[1] < channels:
        weight = torch.nn.functional.pad(weight, (0, channels - weight.shape[1]))
    return weight.contiguous(), (channels if weight.shape[0] > 1 else 0)


def _kernel_options(options: Options, dtype: torch.dtype) -> dict:
    """What kernels take of the options, by name."""
    return {
        "left": None if options.window_left < 0 else options.window_left,
        "right": None if options.window_right < 0 else options.window_right,
        "scale": argument(options.scale, dtype),
        "softcap": argument(options.softcap, dtype) if options.softcap else None,
        "ACTIVATION": options.activation,
        "RATE": _RATES[options.activation],
        "negative_slope": argument(options.negative_slope, dtype)
        if options.activation == LEAKY_RELU.value
        else None,
    }


def _dropout_options(seed, options: Options, H: int, dtype: torch.dtype) -> dict:
    """What ``dropped`` takes, by name; all None without a seed."""
    if seed is None:
        names = "heads_of_seed", "first_head", "heads", "drop_query", "drop_key", "drop_below", "drop_factor"
        return dict.fromkeys(("seed", *names))
    of_seed, place = H // seed.shape[0], _philox.place_of(options)
    return {
        "seed": seed,
        "heads_of_seed": of_seed,
        "first_head": place.first_head,
        "heads": place.heads or of_seed,
        "drop_query": place.first_query,
        "drop_key": place.first_key,
        "drop_below": _philox.threshold(options.dropout_p) - 2**31,  # as words less 2^31: always 32 bits
        "drop_factor": argument(1 / (1 - options.dropout_p), dtype),
    }


def check(query, key, value, weight, bias, mask, key_lengths, window_center=None, seed=None, **others) -> None:
    """Raises for what kernels would read beyond; others are named (tensor or None, their last sizes, dtype)."""
    rank = query.dim()
    if rank not in (3, 4) or key.dim() != rank or value.dim() != rank:
        got = ", ".join(str(t.dim()) for t in (query, key, value))
        raise RuntimeError(f"additive_attention: query, key and value: expected 3 or 4 dimensions each, got {got}")
    *lead, Tq, D = query.shape
    B, H, Tk, Dv = lead[0], lead[-1] if rank == 4 else 1, key.shape[-2], value.shape[-1]
    if (B or 1) * (H or 1) * (Tq or 1) * (Tk or 1) * (
        max(D, Dv) or 1
    ) >= 1 << 56:  # expanded, it may have any size
        raise RuntimeError(
            "additive_attention: query, key and value: expected sizes with B H Tq Tk max(D, Dv) below 2^56, "
            f"got B = {B}, H = {H}, Tq = {Tq}, Tk = {Tk}, D = {D}, Dv = {Dv}"
        )
    dtype, device = query.dtype, query.device
    _require("key", key, (*lead, Tk, D), dtype, device)
    _require("value", value, (*lead, Tk, Dv), dtype, device)
    wide = accumulation_dtype(dtype)
    _require("weight", weight, (D,) if rank == 3 else (H, D), wide if weight.dtype == wide else dtype, device)
    if bias is not None:
        # Any size of it may be 1.
        full = (*lead, Tq, Tk)
        sizes = tuple(1 if m == 1 else n for m, n in zip(bias.shape, full, strict=bias.dim() == len(full)))
        _require("bias", bias, sizes, wide if bias.dtype == wide else dtype, device)
    if mask is not None:
        _require("mask", mask, (*lead, Tq, Tk), torch.bool, device)
    if key_lengths is not None:
        _require("key_lengths", key_lengths, (B,), torch.int64, device)
    if window_center is not None:
        _require("window_center", window_center, (*lead, Tq), torch.int64, device)
    if seed is not None and (
        seed.dim() != 1 or not seed.numel() or H % seed.numel() or seed.dtype != torch.int64
        or seed.device != device or not seed.is_contiguous()
    ):  # fmt: skip
        raise RuntimeError(
            f"additive_attention: dropout_seed: expected an int64 Tensor (S,), contiguous, S dividing the {H} "
            f"heads, on {device}, got shape {tuple(seed.shape)}, {seed.dtype}, on {seed.device}"
        )
    for name, (t, sizes, its_dtype) in others.items():
        if t is not None:
            _require(name, t, (*lead, *sizes), its_dtype, device)


NO_BIAS = None, (None,) * 4


class Problem:
    """The inputs of a call with heads, and what its kernels share."""

    def __init__(
        self, query, key, value, weight, bias, mask, key_lengths, window_center, options: Options, seed=None,
        segments: Segments | None = None,
    ):  # fmt: skip
        if query.dim() == 3:
            bias, mask = (None if t is None else t.unsqueeze(1) for t in (bias, mask))
            query, key, value = (t.unsqueeze(1) for t in (query, key, value))
            weight = weight.expand(1, -1)
        (self.B, self.H, self.Tq, self.D), (self.Tk, self.Dv) = query.shape, value.shape[-2:]
        # Of tensors with a row for each query or key: packed ones have one batch element, of all segments.
        self.batch, self.rows_q, self.rows_k = self.B, self.Tq, self.Tk
        self.segments = segments
        if segments is not None:
            self.B = segments.cu_seqlens_q.shape[0] - 1
            self.Tq, self.Tk = segments.max_seqlen_q, segments.max_seqlen_k
            query, key, value = (t.expand(self.B, -1, -1, -1) for t in (query, key, value))
            key_lengths = segments.seen_keys(options.window_right)
        self.query, self.key, self.value = query, key, value
        self.bias = bias  # any size of it may be 1
        self.mask = None if mask is None else mask.view(torch.uint8)
        self.key_lengths = None if key_lengths is None else key_lengths.contiguous()
        self.options = _kernel_options(options, query.dtype)
        self.options |= _dropout_options(seed, options, self.H, query.dtype)
        # Whether a score is not what is summed over channels: its gradient then has a factor more.
        self.is_sloped = options.scale != 1 or options.softcap != 0
        self.empty = functools.partial(torch.empty, dtype=accumulation_dtype(query.dtype), device=query.device)
        self.BH = self.B * self.H
        self.channels = max(4, triton.cdiv(self.D, 4) * 4)
        self.weight, self.stride_wh = _packed_weight(weight, self.channels)
        self.few = self.Tq <= FEW_QUERIES
        self.key_packed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by BLOCK_K
        center, keys_end = window_center if options.has_window else None, self.Tk
        if center is not None:
            center = center.reshape(self.B, self.H, self.Tq).clamp(-FAR, FAR).contiguous()
        elif options.window_right >= 0:
            keys_end = min(self.Tq + options.window_right, self.Tk)
        self.options |= {"center": center, "stride_n": None if center is None else self.Tq}
        self.options |= {"seeing": None, "tiles_seen": None}
        offsets = (None, None) if segments is None else segments[:2]
        self.options |= {"offsets_q": offsets[0], "offsets_k": offsets[1]}
        self.options |= {"rows_q": None, "rows_k": None if segments is None else self.rows_k}
        seen = None if self.mask is None and center is None else self._seen_keys()
        b, h = (0, 0) if seen is None else seen.stride()[:2]
        self.sight = {"seen": seen, "stride_sb": b, "stride_sh": h, "keys_end": keys_end}
        self.options |= self.sight

    def _seen_keys(self):
        """Integers (B, H, Tk), the last contiguous: whether mask and windows let some query see a key."""
        center = self.options["center"]
        mask = self.mask if self.mask is None or center is not None else _unexpanded(self.mask)
        if center is None and (self.Tq == 1 or mask.stride(2) == 0):
            seen = mask[:, :, 0]
            seen = seen if seen.stride(2) == 1 else seen.contiguous()
        else:
            (B, H), block_k = (self.B, self.H) if mask is None else mask.shape[:2], 64
            seen = torch.empty(B, H, self.Tk, dtype=torch.uint8, device=self.query.device)
            launch(
                additive_attention_seen_kernel, (triton.cdiv(self.Tk, block_k) * B * H,),
                mask, seen, *((0, 0, 0, 0) if mask is None else mask.stride()), H, self.Tq, self.Tk,
                options=self.options, BLOCK_Q=32, BLOCK_K=block_k, num_warps=4,
            )  # fmt: skip
        if self.query.dtype == torch.float64:
            # Triton 3.6 takes values that a narrow integer masks for narrow factors: such products refuse those.
            seen = seen.to(torch.int64)
        return seen.expand(self.B, self.H, self.Tk)

    def options_of(self, first, end):
        """Those of kernels that take these queries."""
        options = self.options
        if options["seed"] is not None:
            options = options | {"drop_query": options["drop_query"] + first}
        return options if self.segments is None else options | {"rows_q": end - first}

    def find_queries_in_sight(self):
        """For backward: a table of which queries see which keys, where their centers say so."""
        if self.options["center"] is None:
            return
        tiles, block_t = triton.cdiv(self.Tk, SEEING_KEYS.value), 32
        seeing = torch.empty(self.BH, tiles, 2, dtype=torch.int32, device=self.query.device)
        launch(
            additive_attention_seeing_kernel, (triton.cdiv(tiles, block_t) * self.BH,),
            seeing, tiles, self.Tq, options=self.options, BLOCK_Q=32, BLOCK_T=block_t, num_warps=4,
        )  # fmt: skip
        self.options |= {"seeing": seeing, "tiles_seen": tiles}

    def bias_of(self, first, end):
        """(the bias of queries first to end, its strides); kernels without one have no such arguments."""
        if self.bias is None:
            return NO_BIAS
        bias = self.bias if self.bias.shape[2] == 1 else self.bias[:, :, first:end]
        return bias, tuple(0 if size == 1 else step for size, step in zip(bias.shape, bias.stride(), strict=True))

    def most_queries(self, n):
        """Those of a batch element among n rows."""
        return min(self.Tq, n)

    def pack_queries(self, first, end, block, by_row=False):
        query, part = self.query[:, :, first:end], None
        if self.segments is not None:
            part = self.segments.cu_seqlens_q, first, self.most_queries(end - first)
        return pack(query, self.channels, block, self.options["RATE"], by_row, part=part)

    def pack_keys(self, block, by_row=False):
        part = None if self.segments is None else (self.segments.cu_seqlens_k, 0, self.Tk)
        rate = self.options["RATE"]
        return pack(self.key, self.channels, block, rate, by_row, self.key_lengths, self.sight, part)

    def chunks(self, all_at_once):
        """(first, end) of the queries whose scores are held at the same time."""
        most = CHUNK // (self.batch * self.H)
        if self.segments is not None:  # a launch goes over all of them: few launches, no larger than query and key
            most = max(most, (self.rows_q + self.rows_k) * self.D)
        rows = self.rows_q if all_at_once else max(32, most // self.Tk // 32 * 32)
        return [(first, min(first + rows, self.rows_q)) for first in range(0, self.rows_q, rows)]

    def tiled(self, kernel, size, sizes, run):
        """Runs with the tile that the table, or tuning, has for these sizes."""
        run(_tiles.choose(kernel, size, self.query, (self.BH, *sizes), run))
