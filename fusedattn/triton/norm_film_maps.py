"""Group, instance and batch norm with FiLM in Triton: groups reach over positions.

A tile is BLOCK_C channels x BLOCK_N positions of batch elements, whether positions are neighbours in memory
(planes, NCHW) or channels are (COLUMNS, channels_last). The positions are cut into pieces, so that there are
enough programs for a GPU also where there are few groups. Two passes in each direction:

- moments of h over each piece of a channel, which ``norm_film_fwd_kernel_statistics`` joins to those of groups;
  then y. Moments are those of h minus the mean of the piece's first tile: the error of a variance grows with the
  tiles of a piece, not with the mean.
- sums of dz n and dz over each piece of a channel, of which ``norm_film_bwd_kernel_means`` makes the means of dn n
  and dn over groups, and ``torch.sum`` the gradients of parameters; then dx, dr and sums of dh x.

How work is cut depends on shapes alone and no atomics are used: results are bitwise reproducible.

Symbols: B batch, C channels, N positions, R = B C channels of all batch elements, dz, du, dn as in
``fusedattn/ops/norm_film.py``. Tests: ``tests/test_triton_norm_film.py``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedattn._dtypes import accumulation_dtype
from fusedattn._options import NormFilmOptions as Options
from fusedattn.triton import _tiles
from fusedattn.triton._common import launch, load_wide, on_device_of
from fusedattn.triton.film_broadcast import factor
from fusedattn.triton.film_problem import aligned, power_of_2
from fusedattn.triton.norm_film_problem import (
    BATCH,
    SUMS,
    Layout,
    conditioned,
    cut,
    formed,
    grad_normalised,
    gradient_of,
    read_or_zero,
    read_statistics,
    scaled,
    statistics_of,
    sum_where,
)

LEAST_STEPS = 4  # tiles of a piece, so that its parts stay few


# Kernels


@triton.jit
def _channels(block, R, C, N, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Batch elements and channels of a block, whether there are such, where their positions begin: [BLOCK_C].

    Of COLUMNS a block has neighbouring channels of one batch element.
    """
    if COLUMNS:
        tiles = tl.cdiv(C, BLOCK_C)
        b = (block // tiles).to(tl.int64)
        c = (block % tiles).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
        within = c < C
        base = b * N * C + c
    else:
        # In the type of R, 32 bits unless there are more: a division of 64 bits is a call, and spills.
        first = block.to(R.dtype) * BLOCK_C
        run = first + tl.arange(0, BLOCK_C)
        b = (run // C).to(tl.int64)
        c = (run % C).to(tl.int64)
        within = tl.arange(0, BLOCK_C) < R - first
        base = run.to(tl.int64) * N
    return b, c, within, base


@triton.jit
def _sizes(C, N, COLUMNS: tl.constexpr, ALIGN: tl.constexpr):
    """C and N, of which that of neighbours in memory is known to be aligned."""
    if COLUMNS:
        C = aligned(C, ALIGN)
    else:
        N = aligned(N, ALIGN)
    return C, N


@triton.jit
def _tile(base, within, n, N, C, COLUMNS: tl.constexpr):
    """Places of positions n, [BLOCK_C, BLOCK_N], and which of them exist."""
    at = base[:, None] + (n * C if COLUMNS else n)[None, :]
    return at, within[:, None] & (n < N)[None, :]


@triton.jit
def _parameter(P, b, c, stride_b, within):
    """[BLOCK_C, 1], None where absent."""
    v = None
    if P is not None:
        v = load_wide(P + b * stride_b + c, within)[:, None]
    return v


@triton.jit
def _group(b, c, stride_b, width):
    """Of which group the statistics are; divides in 32 bits."""
    return b * stride_b + (c.to(tl.int32) // width).to(tl.int64)


# Integers that change from call to call are not specialised, which would compile anew for 1 and multiples of 16.
UNSPECIALISED = [
    *Options._fields, "R", "C", "N", "pieces", "steps", "width", "group_b",
    *(f"{name}_b" for name in ("gamma", "beta", "weight", "bias", "pre_gate")),
]  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALISED)
def norm_film_fwd_kernel_moments(
    X, PRE_RESIDUAL, PRE_GATE, H, MEANS, SQUARES,  # (B, C, pieces): means, squares around them
    pre_gate_b,  # its step
    R, C, N, pieces, steps,  # a program walks a piece, steps tiles of its channels
    COLUMNS: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    C, N = _sizes(C, N, COLUMNS, ALIGN)
    program = tl.program_id(0)
    b, c, within, base = _channels(program // pieces, R, C, N, COLUMNS, BLOCK_C)
    piece = program % pieces
    gate = _parameter(PRE_GATE, b, c, pre_gate_b, within)
    first = piece.to(tl.int64) * steps * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    at, mask = _tile(base, within, n, N, C, COLUMNS)  # [BLOCK_C, BLOCK_N]
    near = sum_where(mask, formed(X, PRE_RESIDUAL, gate, at, mask)) / tl.minimum(N - first, BLOCK_N)
    total = tl.zeros((BLOCK_C, BLOCK_N), near.dtype)
    squares = tl.zeros((BLOCK_C, BLOCK_N), near.dtype)
    for step in range(steps):
        at, mask = _tile(base, within, n + step * BLOCK_N, N, C, COLUMNS)
        h = formed(X, PRE_RESIDUAL, gate, at, mask)
        if H is not None:
            tl.store(H + at, h, mask=mask)
        apart = tl.where(mask, h - near[:, None], 0.0)
        total += apart
        squares += apart * apart
    count = tl.minimum(N - first, steps.to(tl.int64) * BLOCK_N)
    off = tl.sum(total, 1) / count
    around = tl.sum(squares, 1) - off * off * count
    part = (b * C + c) * pieces + piece
    tl.store(MEANS + part, near.to(tl.float64) + off.to(tl.float64), mask=within)
    tl.store(SQUARES + part, tl.where(around < 0.0, 0.0, around), mask=within)  # NaN stays


@triton.jit
def _parts(group, k, outer, inner):
    """Where the parts of groups lie: inner neighbours, then as many outer places further on."""
    return group[:, None] * inner + ((k // inner).to(tl.int64) * outer + k % inner)[None, :]


@triton.jit(do_not_specialize=["groups", "terms", "outer", "inner", "pieces", "N", "size", "elements"])
def norm_film_fwd_kernel_statistics(
    MEANS, SQUARES, MEAN, VAR,
    groups, terms, outer, inner,  # of each group, and how they lie
    pieces, N, size, elements,  # a channel's N positions are pieces of size; elements of a group
    BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)  # [BLOCK_G]
    lanes = tl.arange(0, BLOCK_T)  # [BLOCK_T]
    within = group < groups
    total = tl.zeros((BLOCK_G, BLOCK_T), tl.float64)
    for start in range(0, terms, BLOCK_T):
        k = start + lanes
        mask = within[:, None] & (k < terms)[None, :]
        count = tl.minimum(N - (k % pieces).to(tl.int64) * size, size).to(tl.float64)
        means = tl.load(MEANS + _parts(group, k, outer, inner), mask=mask, other=0.0)
        total += means * count[None, :]
    mean = tl.sum(total, 1) / elements
    squares = tl.zeros((BLOCK_G, BLOCK_T), tl.float64)
    for start in range(0, terms, BLOCK_T):
        k = start + lanes
        mask = within[:, None] & (k < terms)[None, :]
        count = tl.minimum(N - (k % pieces).to(tl.int64) * size, size).to(tl.float64)
        at = _parts(group, k, outer, inner)
        apart = tl.load(MEANS + at, mask=mask, other=0.0) - mean[:, None]
        around = tl.load(SQUARES + at, mask=mask, other=0.0) + apart * apart * count[None, :]
        squares += tl.where(mask, around, 0.0)
    tl.store(MEAN + group, mean, mask=within)
    tl.store(VAR + group, tl.sum(squares, 1) / elements, mask=within)


@triton.jit(do_not_specialize=UNSPECIALISED)
def norm_film_fwd_kernel_maps(
    X, PRE_RESIDUAL, PRE_GATE, GAMMA, BETA, WEIGHT, BIAS, RESIDUAL, H, Y, MEAN, VAR,  # X is h where H is None
    pre_gate_b, gamma_b, beta_b, weight_b, bias_b,
    group_b, width,  # groups of a batch element, channels of a group
    R, C, N, pieces, steps,
    eps, gamma_offset, ACTIVATION: tl.constexpr,
    COLUMNS: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    C, N = _sizes(C, N, COLUMNS, ALIGN)
    program = tl.program_id(0)
    b, c, within, base = _channels(program // pieces, R, C, N, COLUMNS, BLOCK_C)
    ARITHMETIC: tl.constexpr = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    near, off, rstd = read_statistics(MEAN, VAR, _group(b, c, group_b, width), within, eps, ARITHMETIC)
    gate = _parameter(PRE_GATE, b, c, pre_gate_b, within)
    gamma = _parameter(GAMMA, b, c, gamma_b, within)
    beta = _parameter(BETA, b, c, beta_b, within)
    weight = _parameter(WEIGHT, b, c, weight_b, within)
    bias = _parameter(BIAS, b, c, bias_b, within)
    first = (program % pieces).to(tl.int64) * steps * BLOCK_N
    for step in range(steps):
        n = first + step * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        at, mask = _tile(base, within, n, N, C, COLUMNS)  # [BLOCK_C, BLOCK_N]
        h = formed(X, PRE_RESIDUAL, gate, at, mask)
        if H is not None:
            tl.store(H + at, h, mask=mask)
        normalised = (h - near[:, None] - off[:, None]) * rstd[:, None]
        y = conditioned(normalised, gamma, beta, weight, bias, gamma_offset, ACTIVATION)
        if RESIDUAL is not None:
            y += load_wide(RESIDUAL + at, mask)
        tl.store(Y + at, y, mask=mask)


@triton.jit(do_not_specialize=UNSPECIALISED)
def norm_film_bwd_kernel_sums(
    DY, H, GAMMA, BETA, WEIGHT, BIAS, MEAN, VAR, DZ_N, DZ,  # (B, C, pieces)
    gamma_b, beta_b, weight_b, bias_b, group_b, width, R, C, N, pieces, steps,
    eps, gamma_offset, ACTIVATION: tl.constexpr,
    COLUMNS: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    C, N = _sizes(C, N, COLUMNS, ALIGN)
    program = tl.program_id(0)
    b, c, within, base = _channels(program // pieces, R, C, N, COLUMNS, BLOCK_C)
    piece = program % pieces
    ARITHMETIC: tl.constexpr = tl.float64 if H.dtype.element_ty == tl.float64 else tl.float32
    near, off, rstd = read_statistics(MEAN, VAR, _group(b, c, group_b, width), within, eps, ARITHMETIC)
    gamma = _parameter(GAMMA, b, c, gamma_b, within)
    beta = _parameter(BETA, b, c, beta_b, within)
    weight = _parameter(WEIGHT, b, c, weight_b, within)
    bias = _parameter(BIAS, b, c, bias_b, within)
    sum_dz_n = tl.zeros((BLOCK_C, BLOCK_N), ARITHMETIC)
    sum_dz = tl.zeros((BLOCK_C, BLOCK_N), ARITHMETIC)
    for step in range(steps):
        n = (piece.to(tl.int64) * steps + step) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        at, mask = _tile(base, within, n, N, C, COLUMNS)  # [BLOCK_C, BLOCK_N]
        h = load_wide(H + at, mask)
        normalised = tl.where(mask, (h - near[:, None] - off[:, None]) * rstd[:, None], 0.0)
        dy = load_wide(DY + at, mask)
        _, dz, _, _ = grad_normalised(dy, normalised, gamma, beta, weight, bias, gamma_offset, ACTIVATION)
        sum_dz_n += dz * normalised
        sum_dz += dz
    part = (b * C + c) * pieces + piece
    tl.store(DZ_N + part, tl.sum(sum_dz_n, 1), mask=within)
    tl.store(DZ + part, tl.sum(sum_dz, 1), mask=within)


@triton.jit(do_not_specialize=[*UNSPECIALISED, "groups", "terms", "outer", "inner", "elements"])
def norm_film_bwd_kernel_means(
    DZ_N, DZ, GAMMA, WEIGHT, MEAN_DN_N, MEAN_DN,
    gamma_b, weight_b, groups, terms, outer, inner, C, pieces, elements, gamma_offset,
    BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)  # [BLOCK_G]
    total_n = tl.zeros((BLOCK_G, BLOCK_T), tl.float64)
    total = tl.zeros((BLOCK_G, BLOCK_T), tl.float64)
    within = group < groups
    for start in range(0, terms, BLOCK_T):
        k = start + tl.arange(0, BLOCK_T)  # [BLOCK_T]
        mask = within[:, None] & (k < terms)[None, :]  # [BLOCK_G, BLOCK_T]
        at = _parts(group, k, outer, inner)
        run = at // pieces
        dz_n = load_wide(DZ_N + at, mask)
        dz = load_wide(DZ + at, mask)
        if GAMMA is not None:
            scale = factor(load_wide(GAMMA + run // C * gamma_b + run % C, mask), gamma_offset)
            dz_n *= scale
            dz *= scale
        if WEIGHT is not None:
            weight = load_wide(WEIGHT + run // C * weight_b + run % C, mask)
            dz_n *= weight
            dz *= weight
        total_n += dz_n.to(tl.float64)
        total += dz.to(tl.float64)
    tl.store(MEAN_DN_N + group, tl.sum(total_n, 1) / elements, mask=within)
    tl.store(MEAN_DN + group, tl.sum(total, 1) / elements, mask=within)


@triton.jit(do_not_specialize=UNSPECIALISED)
def norm_film_bwd_kernel_maps(
    DY, DH, X, H, GAMMA, BETA, WEIGHT, BIAS, PRE_GATE, MEAN, VAR, MEAN_DN_N, MEAN_DN,  # None: given statistics
    DX, DR, SUM_PRE_GATE,  # (B, C, pieces)
    gamma_b, beta_b, weight_b, bias_b, pre_gate_b, group_b, width, R, C, N, pieces, steps,
    eps, gamma_offset, ACTIVATION: tl.constexpr,
    COLUMNS: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    C, N = _sizes(C, N, COLUMNS, ALIGN)
    program = tl.program_id(0)
    b, c, within, base = _channels(program // pieces, R, C, N, COLUMNS, BLOCK_C)
    piece = program % pieces
    group = _group(b, c, group_b, width)
    ARITHMETIC: tl.constexpr = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    near, off, rstd = read_statistics(MEAN, VAR, group, within, eps, ARITHMETIC)
    gate = _parameter(PRE_GATE, b, c, pre_gate_b, within)
    gamma = _parameter(GAMMA, b, c, gamma_b, within)
    beta = _parameter(BETA, b, c, beta_b, within)
    weight = _parameter(WEIGHT, b, c, weight_b, within)
    bias = _parameter(BIAS, b, c, bias_b, within)
    if MEAN_DN is not None:
        mean_dn_n = tl.load(MEAN_DN_N + group, mask=within, other=0.0).to(ARITHMETIC)[:, None]
        mean_dn = tl.load(MEAN_DN + group, mask=within, other=0.0).to(ARITHMETIC)[:, None]
    sum_gate = tl.zeros((BLOCK_C, BLOCK_N), ARITHMETIC)
    for step in range(steps):
        n = (piece.to(tl.int64) * steps + step) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        at, mask = _tile(base, within, n, N, C, COLUMNS)  # [BLOCK_C, BLOCK_N]
        h = load_wide(H + at, mask)
        normalised = tl.where(mask, (h - near[:, None] - off[:, None]) * rstd[:, None], 0.0)
        dy = read_or_zero(DY, at, mask, normalised)
        _, _, _, dh = grad_normalised(dy, normalised, gamma, beta, weight, bias, gamma_offset, ACTIVATION)
        if MEAN_DN is not None:
            dh -= normalised * mean_dn_n + mean_dn
        dh *= rstd[:, None]
        if DH is not None:
            dh += load_wide(DH + at, mask)
        if DR is not None:
            tl.store(DR + at, dh, mask=mask)
        if DX is not None:
            tl.store(DX + at, scaled(dh, gate), mask=mask)
        if SUM_PRE_GATE is not None:
            sum_gate += tl.where(mask, dh, 0.0) * load_wide(X + at, mask)
    if SUM_PRE_GATE is not None:
        tl.store(SUM_PRE_GATE + (b * C + c) * pieces + piece, tl.sum(sum_gate, 1), mask=within)


# Launchers


def _total(first: Tensor | None, added: Tensor | None) -> Tensor | None:
    """A pair, which is small, as its sum; channels are neighbours."""
    if first is not None and added is not None:
        first = first.to(accumulation_dtype(first.dtype)) + added
    t = added if first is None else first
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


class Maps:
    """x, its parameters and groups, and how they are cut."""

    def __init__(self, layout: Layout, parameters, options: Options):
        gamma, gamma_added, beta, beta_added, weight, bias, gate, gate_added = parameters
        self.layout, self.options = layout, options
        self.gamma, self.beta = _total(gamma, gamma_added), _total(beta, beta_added)
        self.weight, self.bias, self.gate = _total(weight, None), _total(bias, None), _total(gate, gate_added)
        self.B, self.C, self.N = layout.B, layout.C, layout.T
        groups = statistics_of(layout.x, options)
        self.is_batch, self.groups = options.norm == BATCH, groups
        # Where batch elements share everything their positions are those of one.
        if self.is_batch and not layout.planes and all(t is None or t.dim() == 1 for t in parameters):
            self.B, self.N = 1, self.B * self.N
        self.width = 1 if self.is_batch else self.B * self.C // groups
        self.group_b = 0 if self.is_batch else groups // self.B
        self.elements = layout.x.numel() // groups

    def steps(self, *parameters: Tensor | None) -> list[int]:
        return [t.stride(0) if t is not None and t.dim() == 2 else 0 for t in parameters]

    def tiled(self, name: str, run):
        """run(geometry) with that of the tile that the table, or tuning, has for these sizes."""
        x, sizes = self.layout.x, (self.B, self.C, self.N)
        with on_device_of(x):
            return run(_Cut(self, _tiles.choose("film", self.N, x, sizes, lambda t: run(_Cut(self, t)), name)))

    def statistic(self) -> Tensor:
        return torch.empty(self.groups, dtype=torch.float64, device=self.layout.x.device)


class _Cut:
    """The programs of a pass with a tile, and where the parts that they write lie."""

    def __init__(self, maps: Maps, tile: _tiles.Tile):
        (elements,) = tile.extents_in(maps.layout.x.dtype)
        self.maps, self.warps, R = maps, tile.warps, maps.B * maps.C
        columns = not maps.layout.planes
        if columns:
            block_n = power_of_2(maps.N, elements // power_of_2(maps.C, elements // 8))
            block_c = power_of_2(maps.C, elements // block_n)
            tiles = maps.B * triton.cdiv(maps.C, block_c)
        else:
            block_n = power_of_2(maps.N, elements // 2)
            if block_n < 256:
                elements //= 4  # each of many channels has its numbers and addresses in registers
            block_c = power_of_2(R, elements // block_n)
            tiles = triton.cdiv(R, block_c)
        self.pieces, self.of_piece = cut(tiles, triton.cdiv(maps.N, block_n), LEAST_STEPS)
        self.size = self.of_piece * block_n
        self.grid = (tiles * self.pieces,)
        self.sizes = R, maps.C, maps.N, self.pieces, self.of_piece
        self.blocks = {
            "COLUMNS": columns,
            "ALIGN": next(n for n in (16, 4, 1) if (maps.C if columns else maps.N) % n == 0),
            "BLOCK_C": block_c,
            "BLOCK_N": block_n,
        }

    def launch(self, kernel, *arguments, options=()) -> None:
        launch(kernel, self.grid, *arguments, options=dict(options), **self.blocks, num_warps=self.warps)

    def parts(self, n: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        shape = n, self.maps.B, self.maps.C, self.pieces
        return torch.empty(shape, dtype=dtype, device=self.maps.layout.x.device).unbind()

    def join(self, kernel, arguments, *others, options=()) -> None:
        """Launches a kernel over groups, each with its parts."""
        maps = self.maps
        inner = maps.width * self.pieces
        terms = maps.B * self.pieces if maps.is_batch else inner
        block_t = power_of_2(terms, 256)
        block_g = power_of_2(maps.groups, 1024 // block_t)
        sizes = maps.groups, terms, maps.C * self.pieces, inner
        grid = (triton.cdiv(maps.groups, block_g),)
        launch(kernel, grid, *arguments, *sizes, *others, options=dict(options), BLOCK_G=block_g, BLOCK_T=block_t)


def forward(
    layout: Layout, parameters, pre_residual, residual, h, y, mean, var, running, options: Options, numbers: dict
) -> None:
    """Fills y, h (None where it is x), mean and var."""
    maps = Maps(layout, parameters, options)
    affine = maps.gamma, maps.beta, maps.weight, maps.bias

    def run(geometry):
        x, formed_of = layout.x, (pre_residual, maps.gate)
        of_h = h
        if options.training:
            means, squares = geometry.parts(2, torch.float64)
            geometry.launch(
                norm_film_fwd_kernel_moments,
                x,
                *formed_of,
                h,
                means,
                squares,
                *maps.steps(maps.gate),
                *geometry.sizes,
            )
            geometry.join(
                norm_film_fwd_kernel_statistics, (means, squares, mean, var),
                geometry.pieces, maps.N, geometry.size, maps.elements,
            )  # fmt: skip
            if h is not None:
                x, formed_of, of_h = h, (None, None), None
        geometry.launch(
            norm_film_fwd_kernel_maps, x, *formed_of, *affine, residual, of_h, y, mean, var,
            *maps.steps(formed_of[1], *affine), maps.group_b, maps.width, *geometry.sizes, options=numbers,
        )  # fmt: skip

    if not options.training:
        for statistic, given in zip((mean, var), running, strict=True):
            statistic.copy_(given)
    maps.tiled("norm_film_fwd", run)


def backward(
    layout: Layout,
    grad_y,
    grad_h,
    h,
    parameters,
    mean,
    var,
    asked: list[bool],
    dx,
    dr,
    options: Options,
    numbers: dict,
) -> list[Tensor | None]:
    """Fills dx and dr; returns the gradients of parameters in the order of NAMES, of those that are asked for."""
    maps = Maps(layout, parameters, options)
    affine = maps.gamma, maps.beta, maps.weight, maps.bias
    asked = [a and t is not None for a, t in zip(asked, parameters, strict=True)]
    of_gate = any(asked[6:])
    reads_sums = grad_y is not None and (options.training or any(asked[:6]))
    dtype = accumulation_dtype(layout.x.dtype)

    def run(geometry):
        sums, means = (None, None), (None, None)
        if reads_sums:
            sums = geometry.parts(2, dtype)
            geometry.launch(
                norm_film_bwd_kernel_sums, grad_y, h, *affine, mean, var, *sums,
                *maps.steps(*affine), maps.group_b, maps.width, *geometry.sizes, options=numbers,
            )  # fmt: skip
        if reads_sums and options.training:
            means = maps.statistic(), maps.statistic()
            geometry.join(
                norm_film_bwd_kernel_means,
                (*sums, maps.gamma, maps.weight, *means, *maps.steps(maps.gamma, maps.weight)),
                maps.C, geometry.pieces, maps.elements, options=numbers,
            )  # fmt: skip
        (of_each,) = geometry.parts(1, dtype) if of_gate else (None,)
        if dx is not None or dr is not None or of_gate:
            geometry.launch(
                norm_film_bwd_kernel_maps, grad_y, grad_h, layout.x, h, *affine, maps.gate, mean, var, *means,
                dx, dr, of_each, *maps.steps(*affine, maps.gate), maps.group_b, maps.width, *geometry.sizes,
                options=numbers,
            )  # fmt: skip
        return *sums, of_each

    dz_n, dz, dh_x = (None if t is None else t.sum(-1) for t in maps.tiled("norm_film_bwd", run))  # (B, C)
    if dz is None:
        dz_n = dz = torch.zeros((maps.B, maps.C), dtype=dtype, device=layout.x.device)

    def times(t, by):
        return t if by is None else t * by

    def plus_times(t, other, by):
        return t if by is None else t + other * by

    scale = None if maps.gamma is None else maps.gamma.to(dtype) + options.gamma_offset
    terms = {
        "gamma": lambda: plus_times(times(dz_n, maps.weight), dz, maps.bias),
        "beta": lambda: dz,
        "weight": lambda: times(dz_n, scale),
        "bias": lambda: times(dz, scale),
        "pre_gate": lambda: dh_x,
    }
    found = []
    for t, wanted, name in zip(parameters, asked, SUMS, strict=True):
        found.append(gradient_of(t, terms[name]()) if wanted else None)
    return found
