"""location_attention in Triton: scores, and gradients of what goes into them. Context is additive attention's.

Location features are projected from M numbers of a key: its C K taps of the previous weights, where filters and
projection are folded into one, else what N filters make of them, a product that sums over few taps at a time. They
are made where they are used, [BLOCK_M, BLOCK_K], and stay on the chip.

Forward: a program has one query and BLOCK_K keys, makes these numbers once and walks over channels. Softmax and
context are ``attend`` of ``additive_attention_fwd.py``. Backward: g, (B, Tq, Tk), is PyTorch's. From it make::

    shared    dk_j, dw, dU    a program has BLOCK_D channels and walks over queries: all steps of a loop at once
    own       dq_i, df_j      one query and BLOCK_K keys, all channels; without D, dW and da are PyTorch's

Sums that several programs have a part of are added up by PyTorch: no atomics, results are bitwise reproducible.

Costs. A step at Tacotron 2's sizes (64, 400, 128, values 512) is bound by memory: keys and values are 65 MB, 20 us
on an H100. The products, 6,080 multiply-adds a key in three TF32 terms, ask for 2 us of its tensor cores, and 3.3
million tanh, each an exponential and a reciprocal, for another 2: nothing is gained by sharing reciprocals.

Symbols: as in ``fusedattn/ops/location_attention.py``, definition and reference; width is D in whole tiles. Tests:
``make gates``, ``tests/test_location_attention.py``, ``tests/test_ptx_kernels.py``.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import fold, pad, unfold

from fusedattn import _dispatch
from fusedattn._dtypes import accumulation_dtype
from fusedattn._options import AdditiveAttentionOptions, schema
from fusedattn._options import AdditiveScoresOptions as Options
from fusedattn.triton import _tiles
from fusedattn.triton._common import (
    NVIDIA,
    Kernel,
    asked_for,
    distinct,
    launch,
    load_wide,
    on_device_of,
    recorded,
    register,
    require,
)
from fusedattn.triton.additive_attention import _weights
from fusedattn.triton.additive_attention_fwd import _capped, _stored, attend
from fusedattn.triton.additive_attention_problem import (
    CHUNK,
    UNSPECIALISED,
    Problem,
    _kernel_options,
    check,
    linear,
    linear_gradient,
    programs_wanted,
    reciprocal_beyond_range,
)

OP = "location_attention"
UNSPECIALISED = [*UNSPECIALISED, "B", "of_group", "steps"]

# Kernels


@triton.jit
def _product(a, b, acc, NVIDIA: tl.constexpr):
    """acc + a b."""
    return tl.dot(a, b, acc, input_precision="tf32x3" if NVIDIA else "ieee", out_dtype=acc.dtype)


@triton.jit
def _taps(previous, j0, t, Tk, C, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The taps t = c K + k of keys from j0 on, [taps, BLOCK_K], of previous (C, Tk); zeros at either end."""
    place = j0 + tl.arange(0, BLOCK_K)[None, :] + (t % K - (K - 1) // 2)[:, None]
    inside = (place >= 0) & (place < Tk) & (t < C * K)[:, None]
    return tl.load(previous + (t // K).to(tl.int64)[:, None] * Tk + place, mask=inside, other=0.0)


@triton.jit
def _projected(
    previous, filters, j0, Tk, C, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """What is projected to the features of keys from j0 on, [BLOCK_M, BLOCK_K]: taps, or filters' sums of them."""
    m = tl.arange(0, BLOCK_M)
    if filters is None:
        x = _taps(previous, j0, m, Tk, C, K, BLOCK_K)
    else:
        taps = tl.cdiv(C * K, BLOCK_T) * BLOCK_T
        x = tl.zeros((BLOCK_M, BLOCK_K), previous.dtype.element_ty)
        for start in tl.range(0, taps, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            f = tl.load(filters + m[:, None] * taps + t[None, :])  # [BLOCK_M, BLOCK_T]
            x = _product(f, _taps(previous, j0, t, Tk, C, K, BLOCK_K), x, NVIDIA)
    return x


@triton.jit
def _gradients(z, g, negative_slope, ACTIVATION: tl.constexpr, RATE: tl.constexpr, NVIDIA: tl.constexpr):
    """(phi(z), g phi'(z)), of g [1, BLOCK_K]; finite where that is 0: such a key may be NaN."""
    z = tl.where(g == 0.0, 0.0, z)
    if RATE > 0.0:
        r = reciprocal_beyond_range(z, RATE, NVIDIA)
        y = tl.fma(r, -RATE, 1.0)
        h = (RATE * RATE * g) * tl.fma(-r, r, r)
    else:
        y = linear(z, negative_slope, ACTIVATION)
        h = linear_gradient(z, g, negative_slope, ACTIVATION)
    return y, h


@triton.jit(do_not_specialize=UNSPECIALISED)
def location_attention_fwd_kernel(
    query, key, weight, previous, filters, projection, mask, scores,
    stride_kb, stride_kt, stride_kd, stride_mb, stride_mq, stride_mk, of_group, Tq, Tk,
    C, D, scale, softcap, negative_slope, ACTIVATION: tl.constexpr, RATE: tl.constexpr, K: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    NVIDIA: tl.constexpr,
):  # fmt: skip
    """Scores (B, Tq, Tk) of one query and BLOCK_K keys, -inf for keys not visible. Grid: (key tiles * Tq * B,)."""
    k_tiles = tl.cdiv(Tk, BLOCK_K)
    j0 = tl.program_id(0) % k_tiles * BLOCK_K
    row = (tl.program_id(0) // k_tiles).to(tl.int64)  # b Tq + i
    i, element = tl.program_id(0) // k_tiles % Tq, tl.program_id(0) // k_tiles // Tq
    b, group = element.to(tl.int64), (element // of_group).to(tl.int64)
    j = j0 + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    j64, in_k = j.to(tl.int64), j < Tk
    visible = in_k
    if mask is not None:
        at = mask + b * stride_mb + i.to(tl.int64) * stride_mq + j64 * stride_mk
        visible = visible & (tl.load(at, mask=in_k, other=0) != 0)
    out = scores + row * Tk + j
    if tl.max(visible.to(tl.int32), 0) == 0:
        tl.store(out, tl.full((BLOCK_K,), float("-inf"), scores.dtype.element_ty), mask=in_k)
        return

    previous += row * C * Tk
    if filters is not None:
        filters += group * BLOCK_M * (tl.cdiv(C * K, BLOCK_T) * BLOCK_T)
    x = _projected(previous, filters, j0, Tk, C, K, BLOCK_K, BLOCK_T, BLOCK_M, NVIDIA)
    sums = tl.zeros((BLOCK_D, BLOCK_K), scores.dtype.element_ty)
    width, m = tl.cdiv(D, BLOCK_D) * BLOCK_D, tl.arange(0, BLOCK_M)
    keys = key + b * stride_kb + tl.minimum(j64, Tk - 1)[None, :] * stride_kt
    for start in tl.range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)  # [BLOCK_D]
        q = tl.load(query + row * width + d).to(scores.dtype.element_ty)
        k = load_wide(keys + d.to(tl.int64)[:, None] * stride_kd, (d < D)[:, None])
        p = tl.load(projection + (group * width + d)[:, None] * BLOCK_M + m[None, :])  # [BLOCK_D, BLOCK_M]
        z = _product(p, x, q[:, None] + k, NVIDIA)  # [BLOCK_D, BLOCK_K]
        w = tl.load(weight + group * width + d)
        if RATE > 0.0:
            y = tl.fma(reciprocal_beyond_range(z, RATE, NVIDIA), -RATE, 1.0)
        else:
            y = linear(z, negative_slope, ACTIVATION)
        sums = tl.fma(y, w[:, None], sums)
    tl.store(out, _stored(_capped(tl.sum(sums, 0), scale, softcap, NVIDIA), visible), mask=in_k)


@triton.jit(do_not_specialize=UNSPECIALISED)
def location_attention_bwd_kernel_shared(
    query, key, weight, previous, filters, projection, g, grad_key, grad_weight, grad_projection,
    stride_kb, stride_kt, stride_kd, of_group, B, Tq, Tk, steps, split_rows,
    C, D, negative_slope, ACTIVATION: tl.constexpr, RATE: tl.constexpr, K: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    NVIDIA: tl.constexpr,
):  # fmt: skip
    """grad_key (splits, B, Tk, D), grad_weight (splits, B, pieces, width), and grad_projection with BLOCK_M more.

    A program has a piece of the keys, `steps` tiles, a split of the queries and BLOCK_D channels. Grid:
    (pieces * B, channel tiles, splits).
    """
    pieces = tl.cdiv(tl.cdiv(Tk, BLOCK_K), steps)
    piece, element = tl.program_id(0) % pieces, tl.program_id(0) // pieces
    b, group, split = element.to(tl.int64), (element // of_group).to(tl.int64), tl.program_id(2).to(tl.int64)
    d, m = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M)
    width, first = tl.cdiv(D, BLOCK_D) * BLOCK_D, tl.program_id(2) * split_rows
    if filters is not None:
        filters += group * BLOCK_M * (tl.cdiv(C * K, BLOCK_T) * BLOCK_T)
    p = tl.load(projection + (group * width + d)[:, None] * BLOCK_M + m[None, :])  # [BLOCK_D, BLOCK_M]
    w = tl.load(weight + group * width + d)
    keys = key + b * stride_kb + d.to(tl.int64)[:, None] * stride_kd
    dweight = tl.zeros((BLOCK_D, BLOCK_K), g.dtype.element_ty)
    dprojection = tl.zeros((BLOCK_D, BLOCK_M), g.dtype.element_ty)
    for step in tl.range(0, steps):
        j0 = (piece * steps + step) * BLOCK_K
        j = j0 + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        in_k = j < Tk
        k = load_wide(keys + tl.minimum(j, Tk - 1).to(tl.int64)[None, :] * stride_kt, (d < D)[:, None])
        dkey = tl.zeros((BLOCK_D, BLOCK_K), g.dtype.element_ty)
        for i in tl.range(first, tl.minimum(first + split_rows, Tq)):
            row = b * Tq + i
            of_keys = tl.load(g + row * Tk + j, mask=in_k, other=0.0)
            if tl.max((of_keys != 0.0).to(tl.int32), 0) > 0:
                q = tl.load(query + row * width + d).to(g.dtype.element_ty)
                x = _projected(previous + row * C * Tk, filters, j0, Tk, C, K, BLOCK_K, BLOCK_T, BLOCK_M, NVIDIA)
                z = _product(p, x, q[:, None] + k, NVIDIA)
                y, h = _gradients(z, of_keys[None, :], negative_slope, ACTIVATION, RATE, NVIDIA)
                if grad_weight is not None:
                    dweight = tl.fma(of_keys[None, :], y, dweight)
                if grad_key is not None:
                    dkey += h
                if grad_projection is not None:
                    dprojection = _product(h, tl.trans(x), dprojection, NVIDIA)
        if grad_key is not None:
            out = grad_key + ((split * B + b) * Tk + j)[None, :] * D + d[:, None]
            tl.store(out, dkey * w[:, None], mask=(d < D)[:, None] & in_k[None, :])
    part = (split * B + b) * pieces + piece
    if grad_weight is not None:
        tl.store(grad_weight + part * width + d, tl.sum(dweight, 1))
    if grad_projection is not None:
        out = grad_projection + (part * width + d)[:, None] * BLOCK_M + m[None, :]
        tl.store(out, dprojection * w[:, None])


@triton.jit(do_not_specialize=UNSPECIALISED)
def location_attention_bwd_kernel_own(
    query, key, weight, previous, filters, projection, g, grad_query, grad_projected,
    stride_kb, stride_kt, stride_kd, of_group, B, Tq, Tk, first_query, rows,
    C, D, negative_slope, ACTIVATION: tl.constexpr, RATE: tl.constexpr, K: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    NVIDIA: tl.constexpr,
):  # fmt: skip
    """grad_query (tiles, B, Tq, width), grad_projected (B, rows, BLOCK_M, Tk), of queries from first_query on.

    Both are 0 before. A program has one query and BLOCK_K keys. Grid: (key tiles * rows * B,).
    """
    k_tiles = tl.cdiv(Tk, BLOCK_K)
    tile = tl.program_id(0) % k_tiles
    i, element = tl.program_id(0) // k_tiles % rows, tl.program_id(0) // k_tiles // rows
    b, group = element.to(tl.int64), (element // of_group).to(tl.int64)
    row = b * Tq + first_query + i
    j = tile * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    in_k = j < Tk
    of_keys = tl.load(g + row * Tk + j, mask=in_k, other=0.0)
    if tl.max((of_keys != 0.0).to(tl.int32), 0) == 0:
        return

    if filters is not None:
        filters += group * BLOCK_M * (tl.cdiv(C * K, BLOCK_T) * BLOCK_T)
    x = _projected(previous + row * C * Tk, filters, tile * BLOCK_K, Tk, C, K, BLOCK_K, BLOCK_T, BLOCK_M, NVIDIA)
    dx = tl.zeros((BLOCK_M, BLOCK_K), g.dtype.element_ty)
    width, m = tl.cdiv(D, BLOCK_D) * BLOCK_D, tl.arange(0, BLOCK_M)
    keys = key + b * stride_kb + tl.minimum(j, Tk - 1).to(tl.int64)[None, :] * stride_kt
    for start in tl.range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)  # [BLOCK_D]
        q = tl.load(query + row * width + d).to(g.dtype.element_ty)
        k = load_wide(keys + d.to(tl.int64)[:, None] * stride_kd, (d < D)[:, None])
        p = tl.load(projection + (group * width + d)[:, None] * BLOCK_M + m[None, :])  # [BLOCK_D, BLOCK_M]
        z = _product(p, x, q[:, None] + k, NVIDIA)  # [BLOCK_D, BLOCK_K]
        _, h = _gradients(z, of_keys[None, :], negative_slope, ACTIVATION, RATE, NVIDIA)
        h *= tl.load(weight + group * width + d)[:, None]
        if grad_query is not None:
            out = grad_query + ((tile.to(tl.int64) * B + b) * Tq + first_query + i) * width + d
            tl.store(out, tl.sum(h, 1))
        if grad_projected is not None:
            dx = _product(tl.trans(p), h, dx, NVIDIA)
    if grad_projected is not None:
        out = grad_projected + ((b * rows + i) * BLOCK_M + m)[:, None] * Tk + j[None, :]
        tl.store(out, dx, mask=in_k[None, :])


# Launchers

# Channels of a tile, taps that a product sums over, and numbers of a key that are projected: MOST_PROJECTED of
# fusedattn/ops/location_attention.py. With 64 of these the sums of a tile spill on sm_80 and sm_120.
BLOCK_D, BLOCK_T, BLOCK_M = 16, 16, 32


def _padded(t: Tensor, *sizes: int) -> Tensor:
    """Contiguous, the last sizes padded with 0 to multiples of these."""
    missing = [-n % size for n, size in zip(t.shape[::-1], sizes[::-1], strict=False)]
    return pad(t, [x for n in missing for x in (0, n)]) if any(missing) else t.contiguous()


class Location:
    """The inputs of a call as kernels take them, and their sizes."""

    def __init__(self, query, key, weight, previous, conv_weight, location_weight, options):
        (self.B, self.Tq, self.D), self.Tk = query.shape, key.shape[1]
        self.G, N, self.C, self.K = conv_weight.shape
        filters, projection = conv_weight.flatten(2), location_weight
        if location_weight is None:
            filters, projection = None, filters
        self.M = projection.shape[2]
        self.tensors = (
            _padded(query, BLOCK_D),
            key,
            _padded(weight, BLOCK_D),
            previous.contiguous(),
            None if filters is None else _padded(filters, BLOCK_M, BLOCK_T),
            _padded(projection, BLOCK_D, BLOCK_M),
        )
        # On NVIDIA each warp has keys of its own, if a tile has more of them than a product sums over; on AMD
        # every warp has all channels, and would take each tanh again.
        self.block_k, self.warps = 32 if query.dtype == torch.float64 else 64, 8
        if _tiles.gpu_of(query.device) == _tiles.AMD:
            self.block_k, self.warps = 16, 1
        self.options = _kernel_options(options, query.dtype)
        self.empty = partial(torch.empty, dtype=accumulation_dtype(query.dtype), device=query.device)

    def launch(self, kernel, grid, *arguments):
        launch(
            kernel, grid, *self.tensors, *arguments,
            options=self.options, K=self.K, BLOCK_K=self.block_k, BLOCK_T=BLOCK_T, BLOCK_M=BLOCK_M,
            BLOCK_D=BLOCK_D, NVIDIA=NVIDIA, num_warps=self.warps, num_stages=1,
        )  # fmt: skip

    def cut(self, others):
        """(pieces of the keys, tiles of each, splits of the queries, rows of each): times others and B enough
        programs for a GPU, no more, for each has sums of its own."""
        tiles = triton.cdiv(self.Tk, self.block_k)
        wanted = max(1, 2 * programs_wanted(self.tensors[0].device) // (self.B * others))
        steps = triton.cdiv(tiles, wanted)
        pieces = triton.cdiv(tiles, steps)
        rows = triton.cdiv(self.Tq, max(1, wanted // pieces))
        return pieces, steps, triton.cdiv(self.Tq, rows), rows

    def shared_gradients(self, g, of_key, of_weight, of_projection):
        """(B, Tk, D), (G, D) and (G, D, M) or None, those asked for."""
        query, key, *_ = self.tensors
        B, D, tiles, width = self.B, self.D, query.shape[2] // BLOCK_D, query.shape[2]
        pieces, steps, splits, rows = self.cut(tiles)
        dkey = self.empty(splits, B, self.Tk, D, dtype=key.dtype if splits == 1 else g.dtype) if of_key else None
        dweight = self.empty(splits, B, pieces, width) if of_weight else None
        dprojection = self.empty(splits, B, pieces, width, BLOCK_M) if of_projection else None
        self.launch(
            location_attention_bwd_kernel_shared, (pieces * B, tiles, splits), g, dkey, dweight, dprojection,
            *key.stride(), B // self.G, B, self.Tq, self.Tk, steps, rows, self.C, D,
        )  # fmt: skip
        if dkey is not None:
            dkey = dkey[0] if splits == 1 else dkey.sum(0).to(key.dtype)
        parts = (t if t is None else t.unflatten(1, (self.G, -1)).sum((0, 2, 3)) for t in (dweight, dprojection))
        dweight, dprojection = (t if t is None else t[:, :D, ...] for t in parts)
        return dkey, dweight, None if dprojection is None else dprojection[..., : self.M]

    def own_gradients(self, g, of_query, of_previous, of_filters):
        """(B, Tq, D), (B, Tq, C, Tk) and (G, N, C K) or None, those asked for; by as many queries at a time as
        keep what is held of their taps small."""
        query, key, _, previous, filters, _ = self.tensors
        G, (B, Tq, C, Tk) = self.G, previous.shape
        taps, tiles, size, padding = C * self.K, triton.cdiv(Tk, self.block_k), (1, self.K), (0, (self.K - 1) // 2)
        zeros = partial(torch.zeros, dtype=g.dtype, device=g.device)
        dquery = zeros(tiles, *query.shape) if of_query else None
        dprevious = torch.empty_like(previous) if of_previous else None
        dfilters = zeros(G, BLOCK_M, taps) if of_filters else None
        most = max(1, CHUNK // (B * Tk * max(taps, BLOCK_M)))
        for first in range(0, Tq, most):
            n = min(most, Tq - first)
            dx = zeros(G, B // G * n, BLOCK_M, Tk) if of_previous or of_filters else None
            self.launch(
                location_attention_bwd_kernel_own, (tiles * n * B,), g, dquery, dx,
                *key.stride(), B // G, B, Tq, Tk, first, n, C, self.D,
            )  # fmt: skip
            part = slice(first, first + n)
            if dprevious is not None:
                dtaps = dx if filters is None else filters.mT.unsqueeze(1) @ dx
                found = fold(dtaps[:, :, :taps].flatten(0, 1), (1, Tk), size, padding=padding)
                dprevious[:, part] = found.view(B, n, C, Tk)
            if dfilters is not None:
                found = unfold(previous[:, part].reshape(B * n, C, 1, Tk), size, padding=padding)
                dfilters += (dx @ found.view(G, -1, taps, Tk).mT).sum(1)
        if dquery is not None:
            dquery = dquery.sum(0)[..., : self.D].to(query.dtype)
        return dquery, dprevious, None if dfilters is None else dfilters[:, : self.M]


def _check(query, key, value, weight, previous, conv_weight, location_weight, mask) -> None:
    """Raises where kernels would read what is not there."""
    check(query, key, key if value is None else value, weight[0], None, mask, None)
    (B, Tq, D), Tk, (G, N, C, K) = query.shape, key.shape[1], conv_weight.shape
    folded = location_weight is None
    if B % G or K % 2 == 0 or (folded and N != D) or (C * K if folded else N) > BLOCK_M:
        raise RuntimeError(
            f"{OP}: conv_weight: expected shape (groups of {B}, N, C, K), K odd, at most {BLOCK_M} filters, "
            f"or taps of N = {D} filters without location_weight, got {tuple(conv_weight.shape)}"
        )
    wide = accumulation_dtype(query.dtype)
    require(OP, "weight", weight, (G, D), wide, query.device)
    require(OP, "previous", previous, (B, Tq, C, Tk), wide, query.device)
    require(OP, "conv_weight", conv_weight, (G, N, C, K), wide, query.device)
    if not folded:
        require(OP, "location_weight", location_weight, (G, D, N), wide, query.device)


def forward(query, key, value, weight, previous, conv_weight, location_weight, mask, *numbers):
    """location_attention_fwd, see csrc/library.cpp."""
    _check(query, key, value, weight, previous, conv_weight, location_weight, mask)
    options = AdditiveAttentionOptions(-1, -1, *numbers)
    (B, Tq, _), Tk, wide = query.shape, key.shape[1], accumulation_dtype(query.dtype)
    scores = query.new_empty((B, Tq, Tk), dtype=wide)
    with on_device_of(query):
        if scores.numel():
            location = Location(query, key, weight, previous, conv_weight, location_weight, options)
            bits, strides = (None, (0, 0, 0)) if mask is None else (mask.view(torch.uint8), mask.stride())
            location.launch(
                location_attention_fwd_kernel, (triton.cdiv(Tk, location.block_k) * Tq * B,), bits, scores,
                *key.stride(), *strides, B // location.G, Tq, Tk, location.C, location.D,
            )  # fmt: skip
        if value is None:
            return query.new_empty(0), query.new_empty(0), scores, scores.new_empty(0)
        context, lse = query.new_zeros((B, Tq, value.shape[2])), scores.new_full((B, Tq), float("-inf"))
        if scores.numel():
            problem = Problem(query, key, value, weight[0], None, mask, None, None, options)
            attend(problem, scores, context.unsqueeze(1), lse.unsqueeze(1), 0, _dispatch.tf32_allowed())
    return context, _weights(scores, lse, query.dtype), scores, lse


def _score_gradients(grad_context, grad_weights, grad_scores, value, scores, weights, options):
    """g (B, Tq, Tk), that of scores before scale and cap; weights are None where nothing goes through them."""
    hidden, g = scores == float("-inf"), torch.zeros_like(scores)
    if weights is not None:
        if grad_context is not None:
            g += grad_context @ value.mT
        if grad_weights is not None:
            g += grad_weights
        g = (weights * g).masked_fill_(hidden, 0.0)  # what nobody sees may be NaN
        g = g - weights * g.sum(-1, keepdim=True)
    if grad_scores is not None:
        g += grad_scores
    g *= options.scale
    if options.softcap:
        g *= 1.0 - (scores / options.softcap).square_()
    return g.masked_fill_(hidden, 0.0).contiguous()


def backward(grad_context, grad_weights, grad_scores, *rest):
    """location_attention_bwd, see csrc/library.cpp."""
    query, key, value, weight, previous, conv_weight, location_weight, mask, *rest = rest
    *numbers, scores, lse, output_mask = rest
    _check(query, key, value, weight, previous, conv_weight, location_weight, mask)
    options, of = Options(*numbers), asked_for(output_mask, 7)
    of_query, of_key, of_value, of_weight, of_previous, of_conv, of_location = of
    found = [None] * 7
    weights = None
    if value is not None and (grad_context is not None or grad_weights is not None):
        weights = _weights(scores, lse, scores.dtype)
        if of_value and grad_context is not None:
            found[2] = weights.to(value.dtype).mT @ grad_context
    if scores.numel() and query.shape[2]:
        g = _score_gradients(grad_context, grad_weights, grad_scores, value, scores, weights, options)
        of_filters, of_projection = (False, of_conv) if location_weight is None else (of_conv, of_location)
        with on_device_of(query):
            inputs = query, key, weight, previous, conv_weight, location_weight
            location = Location(*inputs, AdditiveAttentionOptions(-1, -1, *options))
            if of_key or of_weight or of_projection:
                found[1], found[3], projection = location.shared_gradients(g, of_key, of_weight, of_projection)
                found[5 if location_weight is None else 6] = projection
            if of_query or of_previous or of_filters:
                found[0], found[4], filters = location.own_gradients(g, of_query, of_previous, of_filters)
                found[5] = filters if of_filters else found[5]
    for n, t in enumerate((query, key, value, weight, previous, conv_weight, location_weight)):
        if not of[n] or t is None:
            found[n] = query.new_empty(0)
        else:
            found[n] = t.new_zeros(t.shape) if found[n] is None else found[n].reshape(t.shape).contiguous()
    return tuple(found)


_INPUTS = (
    "Tensor query, Tensor key, Tensor? value, Tensor weight, Tensor previous, Tensor conv_weight, "
    f"Tensor? location_weight, Tensor? mask, {schema(Options)}"
)
register(f"{OP}_fwd_triton({_INPUTS}) -> (Tensor context, Tensor weights, Tensor scores, Tensor lse)", forward)
register(
    f"{OP}_bwd_triton(Tensor? grad_context, Tensor? grad_weights, Tensor? grad_scores, {_INPUTS}, Tensor scores, "
    "Tensor lse, int output_mask) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_weight, "
    "Tensor grad_previous, Tensor grad_conv_weight, Tensor grad_location_weight)",
    backward,
)


def kernels(target=("cuda", 90)) -> list[Kernel]:
    """Every kernel as typical calls launch it: Tacotron 2's and ESPnet's sizes, and filters that are folded.

    Not in float64, whose gradients spill a few registers on sm_120 and AMD.
    """

    def call(dtype, T, D, C, N, K, folded, masked):
        empty = partial(torch.empty, device="meta", dtype=accumulation_dtype(dtype))
        query, key = empty(4, 1, D, dtype=dtype), empty(4, T, D, dtype=dtype)
        filters, projection = (empty(1, D, C, K), None) if folded else (empty(1, N, C, K), empty(1, D, N))
        mask = empty(4, 1, T, dtype=torch.bool) if masked else None
        given = query, key, None, empty(1, D), empty(4, 1, C, T), filters, projection, mask, 1.0, 0.0, 0, 0.2
        *_, scores, lse = forward(*given)
        backward(None, None, scores, *given, scores, lse, 0b1111111)

    calls = (
        partial(call, torch.float32, 400, 128, 2, 32, 31, False, True),
        partial(call, torch.bfloat16, 400, 128, 2, 32, 31, False, False),
        partial(call, torch.float32, 200, 320, 1, 10, 201, False, True),
        partial(call, torch.float32, 400, 64, 1, 64, 31, True, True),
    )
    return distinct(kernel for of in calls for kernel in recorded(of, target))
