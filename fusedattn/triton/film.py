"""FiLM in Triton: ``y = activation((gamma + gamma_offset) x + beta) + residual`` and its gradients.

This file has the raw operators and the kernels for gamma and beta with one value per channel, of each batch
element or all; those for other shapes and for pairs are in ``film_broadcast.py``, what both share in
``film_problem.py``.

In memory order x is (B, M, C, N): B batch, M positions before and N positions after the channel (NCHW has M = 1,
channels_last and (B, T, C) have N = 1). Two kernels in each direction differ in where the channel lies:

- runs (N > 1): a tile is BLOCK_R runs x BLOCK_N neighbouring elements; scale and shift are one per run;
- rows (N = 1): a tile is BLOCK_R rows x BLOCK_C channels of a batch element; scale and shift are one per channel.

Costs. FiLM is bound by memory: forward reads x (and the residual) and writes y, backward reads x and dy and
writes dx, each once. Index arithmetic is per run or row, never per element; an activation costs some 10 to 40
instructions an element, which hide behind memory.

dgamma and dbeta come out of the pass that writes dx. A program keeps its sums in registers over all tiles of its
runs or columns. Where that covers a gradient it is final; else programs write partial sums and
``film_bwd_kernel_sum`` adds them in a fixed order. The cut depends on the shape alone and no atomics are used:
results are bitwise reproducible.

What decides: Triton knows by itself of multiples of 16 alone, which it loads by 16 bytes a thread; ``ALIGN``
tells it of N, or C in rows, that are multiples of 4, such as 14 x 14. Others are loaded element by element. A flat
index, aligned for every N, would cost two integer divisions an element; it was left out for that reason.

Symbols: B, M, C, N as above; R runs; BLOCK_R, BLOCK_N, BLOCK_C extents of a tile. Definition and reference:
``fusedattn/ops/film.py``. Tests: ``tests/test_triton_film.py``, ``tests/test_triton_compile.py``, ``make gates``.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedattn._dtypes import accumulation_dtype
from fusedattn._options import FilmOptions as Options
from fusedattn._options import schema
from fusedattn.triton import _tiles, film_broadcast, film_problem
from fusedattn.triton._common import (
    Kernel,
    asked_for,
    distinct,
    launch,
    load_wide,
    number,
    recorded,
    register,
    require,
)
from fusedattn.triton.film_problem import (
    GELU,
    SILU,
    TANH,
    View,
    activate,
    affine,
    aligned,
    alignment,
    grad_z,
    kernel_options,
    power_of_2,
)


@triton.jit
def _parameter(P, b, c, stride_b, stride_c, mask, offset=None):
    """gamma or beta of channels c of batch elements b, in the dtype of the arithmetic."""
    p = load_wide(P + b * stride_b + c * stride_c, mask)
    return p if offset is None else p + number(offset, p.dtype)


@triton.jit
def _runs(block, R, MC, C, BLOCK_R: tl.constexpr):
    """Runs of a block, their batch elements and channels, and whether there are such runs; all [BLOCK_R].

    Divides in the type of R, 32 bits unless there are more runs: a division of 64 bits is a call, and spills.
    """
    first = block.to(R.dtype) * BLOCK_R
    row = tl.arange(0, BLOCK_R)
    run = first + row
    return run.to(tl.int64), (run // MC).to(tl.int64), (run % C).to(tl.int64), row < R - first


@triton.jit
def _bwd_step(DY, X, DX, at, mask, scale, shift, ACTIVATION: tl.constexpr):
    """Writes a tile of dx; returns dz x and dz, terms of dgamma and dbeta: 0 where masked, for dy is."""
    x = load_wide(X + at, mask)
    dz = grad_z(load_wide(DY + at, mask), affine(x, scale, shift), ACTIVATION)
    tl.store(DX + at, dz if scale is None else dz * scale, mask=mask)
    return dz * x, dz


# Kernels. Integers that change from call to call are not specialised, which would compile anew for 1 and for
# multiples of 16; those that decide how wide a load may be are.


@triton.jit(do_not_specialize=[*Options._fields, "gamma_b", "beta_b", "R", "MC", "C"])
def film_fwd_kernel_runs(
    X, GAMMA, BETA, RESIDUAL, Y,
    gamma_b, gamma_c, beta_b, beta_c,  # strides
    R, MC, C, N,  # R = B M C runs, MC = M C of a batch element
    gamma_offset, ACTIVATION: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    N = aligned(N, ALIGN)
    chunks = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    run, b, c, within = _runs(program // chunks, R, MC, C, BLOCK_R)
    n = (program % chunks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    scale = None
    shift = None
    if GAMMA is not None:
        scale = _parameter(GAMMA, b, c, gamma_b, gamma_c, within, gamma_offset)[:, None]
    if BETA is not None:
        shift = _parameter(BETA, b, c, beta_b, beta_c, within)[:, None]
    at = run[:, None] * N + n[None, :]  # [BLOCK_R, BLOCK_N]
    mask = within[:, None] & (n < N)[None, :]
    y = activate(affine(load_wide(X + at, mask), scale, shift), ACTIVATION)
    if RESIDUAL is not None:
        y += load_wide(RESIDUAL + at, mask)
    tl.store(Y + at, y, mask=mask)


@triton.jit(do_not_specialize=[*Options._fields, "gamma_b", "beta_b", "M"])
def film_fwd_kernel_rows(
    X, GAMMA, BETA, RESIDUAL, Y,
    gamma_b, gamma_c, beta_b, beta_c,
    M, C,
    gamma_offset, ACTIVATION: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C = aligned(C, ALIGN)
    tiles_c, tiles_m = tl.cdiv(C, BLOCK_C), tl.cdiv(M, BLOCK_R)
    program = tl.program_id(0)
    b = (program // tiles_c // tiles_m).to(tl.int64)
    m = (program // tiles_c % tiles_m).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    c = (program % tiles_c).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    scale = None
    shift = None
    if GAMMA is not None:
        scale = _parameter(GAMMA, b, c, gamma_b, gamma_c, c < C, gamma_offset)[None, :]
    if BETA is not None:
        shift = _parameter(BETA, b, c, beta_b, beta_c, c < C)[None, :]
    at = (b * M + m)[:, None] * C + c[None, :]  # [BLOCK_R, BLOCK_C]
    mask = (m < M)[:, None] & (c < C)[None, :]
    y = activate(affine(load_wide(X + at, mask), scale, shift), ACTIVATION)
    if RESIDUAL is not None:
        y += load_wide(RESIDUAL + at, mask)
    tl.store(Y + at, y, mask=mask)


@triton.jit(do_not_specialize=[*Options._fields, "gamma_b", "beta_b", "R", "MC", "C", "pieces", "steps"])
def film_bwd_kernel_runs(
    DY, X, GAMMA, BETA, DX, DGAMMA, DBETA,  # DGAMMA and DBETA (R, pieces): sums over a piece
    gamma_b, gamma_c, beta_b, beta_c,
    R, MC, C, N, pieces, steps,  # a program walks a piece, steps tiles of its runs
    gamma_offset, ACTIVATION: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    N = aligned(N, ALIGN)
    program = tl.program_id(0)
    run, b, c, within = _runs(program // pieces, R, MC, C, BLOCK_R)
    piece = program % pieces
    scale = None
    shift = None
    if GAMMA is not None:
        scale = _parameter(GAMMA, b, c, gamma_b, gamma_c, within, gamma_offset)[:, None]
    if BETA is not None:
        shift = _parameter(BETA, b, c, beta_b, beta_c, within)[:, None]
    ARITHMETIC: tl.constexpr = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    sum_dz_x = tl.zeros((BLOCK_R, BLOCK_N), ARITHMETIC)
    sum_dz = tl.zeros((BLOCK_R, BLOCK_N), ARITHMETIC)
    for step in range(steps):
        n = (piece.to(tl.int64) * steps + step) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        at = run[:, None] * N + n[None, :]  # [BLOCK_R, BLOCK_N]
        mask = within[:, None] & (n < N)[None, :]
        dz_x, dz = _bwd_step(DY, X, DX, at, mask, scale, shift, ACTIVATION)
        sum_dz_x += dz_x
        sum_dz += dz
    if DGAMMA is not None:
        tl.store(DGAMMA + run * pieces + piece, tl.sum(sum_dz_x, 1), mask=within)
    if DBETA is not None:
        tl.store(DBETA + run * pieces + piece, tl.sum(sum_dz, 1), mask=within)


@triton.jit(do_not_specialize=[*Options._fields, "gamma_b", "beta_b", "M", "pieces", "steps"])
def film_bwd_kernel_rows(
    DY, X, GAMMA, BETA, DX, DGAMMA, DBETA,  # DGAMMA and DBETA (B, pieces, C)
    gamma_b, gamma_c, beta_b, beta_c,
    M, C, pieces, steps,
    gamma_offset, ACTIVATION: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C = aligned(C, ALIGN)
    tiles_c = tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0)
    part = (program // tiles_c).to(tl.int64)  # counts b, then pieces
    b, piece = part // pieces, part % pieces
    c = (program % tiles_c).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    scale = None
    shift = None
    if GAMMA is not None:
        scale = _parameter(GAMMA, b, c, gamma_b, gamma_c, c < C, gamma_offset)[None, :]
    if BETA is not None:
        shift = _parameter(BETA, b, c, beta_b, beta_c, c < C)[None, :]
    ARITHMETIC: tl.constexpr = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    sum_dz_x = tl.zeros((BLOCK_R, BLOCK_C), ARITHMETIC)
    sum_dz = tl.zeros((BLOCK_R, BLOCK_C), ARITHMETIC)
    for step in range(steps):
        m = (piece * steps + step) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
        at = (b * M + m)[:, None] * C + c[None, :]  # [BLOCK_R, BLOCK_C]
        mask = (m < M)[:, None] & (c < C)[None, :]
        dz_x, dz = _bwd_step(DY, X, DX, at, mask, scale, shift, ACTIVATION)
        sum_dz_x += dz_x
        sum_dz += dz
    if DGAMMA is not None:
        tl.store(DGAMMA + part * C + c, tl.sum(sum_dz_x, 0), mask=c < C)
    if DBETA is not None:
        tl.store(DBETA + part * C + c, tl.sum(sum_dz, 0), mask=c < C)


@triton.jit(do_not_specialize=["outputs", "terms", "P", "C", "Q"])
def film_bwd_kernel_sum(
    PARTIAL, OUT,  # PARTIAL (B, P, C, Q)
    outputs, terms,  # OUT (B, C) sums P Q terms, or (C,) sums B P Q
    P, C, Q,
    BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    o, b, c, within = _runs(tl.program_id(0), outputs, C, C, BLOCK_O)  # [BLOCK_O]
    total = tl.zeros((BLOCK_O, BLOCK_T), PARTIAL.dtype.element_ty)
    for start in range(0, terms, BLOCK_T):
        n = tl.arange(0, BLOCK_T)
        t = start + n  # [BLOCK_T], counts (B,) P, then Q
        row = b[:, None] * P + (t // Q).to(tl.int64)[None, :]
        at = (row * C + c[:, None]) * Q + (t % Q).to(tl.int64)[None, :]  # [BLOCK_O, BLOCK_T]
        total += tl.load(PARTIAL + at, mask=within[:, None] & (n < terms - start)[None, :], other=0.0)
    tl.store(OUT + o, tl.sum(total, 1), mask=within)


# Launchers


def _strides(*parameters: Tensor | None):
    """(stride_b, stride_c) of each."""
    for p in parameters:
        yield from (0, 0) if p is None else (p.stride(0) if p.dim() == 2 else 0, p.stride(-1))


def _blocks(view: View, tile: _tiles.Tile) -> dict[str, int]:
    """Extents of a tile: long enough along memory to coalesce, then as many runs or rows as fill it."""
    (elements,) = tile.extents_in(view.x.dtype)
    if view.N > 1:
        along = power_of_2(view.N, elements // 2)
        if along < 256:
            elements //= 2  # each of many runs has its scale, shift and addresses in registers
        rows = power_of_2(view.B * view.M * view.C, elements // along)
        return {"ALIGN": alignment(view.N), "BLOCK_R": rows, "BLOCK_N": along}
    rows = power_of_2(view.M, elements // power_of_2(view.C, elements // 8))
    return {"ALIGN": alignment(view.C), "BLOCK_R": rows, "BLOCK_C": power_of_2(view.C, elements // rows)}


def _check(x, parameters, options: Options, **like_x: Tensor | None) -> None:
    """Raises where kernels would read what is not there; parameters in the order of ``film_broadcast.NAMES``."""
    if not 0 < options.channel_dim < x.dim():
        raise RuntimeError(f"film: channel_dim: expected 1 to {x.dim() - 1}, got {options.channel_dim}")
    B, C, wide = x.shape[0], x.shape[options.channel_dim], accumulation_dtype(x.dtype)
    for name, t in zip(film_broadcast.NAMES, parameters, strict=True):
        if t is not None:
            full = x.shape if t.dim() == x.dim() else (B, C)[2 - t.dim() :] if t.dim() <= 2 else ()
            shape = tuple(1 if n == 1 else m for n, m in zip(t.shape, full, strict=False))
            require("film", name, t, shape, wide if t.dtype == wide else x.dtype, x.device)
    for name, t in like_x.items():
        if t is not None:
            require("film", name, t, x.shape, x.dtype, x.device)


def _has_one_per_channel(x, parameters, channel_dim: int) -> bool:
    """Whether gamma and beta are one tensor each, (C,) or (B, C)."""
    gamma, gamma_added, beta, beta_added = parameters
    shapes = (x.shape[channel_dim],), (x.shape[0], x.shape[channel_dim])
    return gamma_added is beta_added is None and all(t is None or t.shape in shapes for t in (gamma, beta))


def forward(x, gamma, beta, gamma_added, beta_added, residual, *options):
    """film_fwd, see csrc/library.cpp."""
    options, parameters = Options(*options), (gamma, gamma_added, beta, beta_added)
    _check(x, parameters, options, residual=residual)
    view = View(x, options.channel_dim, (gamma, beta))
    y = torch.empty_like(view.x)
    if x.numel() == 0:
        return view.restored(y, x)
    residual, numbers = view.like(residual), kernel_options(options, x.dtype)
    if _has_one_per_channel(x, parameters, options.channel_dim):
        view.tiled("film_fwd", lambda tile: _forward(tile, view, gamma, beta, residual, y, numbers))
    else:
        film_broadcast.forward(view, parameters, options.channel_dim, residual, y, numbers)
    return view.restored(y, x)


def _forward(tile, view, gamma, beta, residual, y, options):
    B, M, C, N, blocks = view.B, view.M, view.C, view.N, _blocks(view, tile)
    if N > 1:
        kernel, sizes = film_fwd_kernel_runs, (B * M * C, M * C, C, N)
        programs = triton.cdiv(B * M * C, blocks["BLOCK_R"]) * triton.cdiv(N, blocks["BLOCK_N"])
    else:
        kernel, sizes = film_fwd_kernel_rows, (M, C)
        programs = B * triton.cdiv(M, blocks["BLOCK_R"]) * triton.cdiv(C, blocks["BLOCK_C"])
    arguments = (view.x, gamma, beta, residual, y, *_strides(gamma, beta), *sizes)
    launch(kernel, (programs,), *arguments, options=options, **blocks, num_warps=tile.warps)


def _cut(tiles: int, blocks: int) -> tuple[int, int]:
    """Pieces, and blocks per piece: one piece where there are enough tiles, else about PROGRAMS of them."""
    steps = triton.cdiv(blocks, min(blocks, triton.cdiv(film_problem.PROGRAMS, tiles)))
    return triton.cdiv(blocks, steps), steps


def backward(grad_output, x, gamma, beta, gamma_added, beta_added, *rest):
    """film_bwd, see csrc/library.cpp."""
    *options, output_mask = rest
    options, parameters = Options(*options), (gamma, gamma_added, beta, beta_added)
    _check(x, parameters, options, grad_output=grad_output)
    view = View(x, options.channel_dim, (gamma, beta))
    dx = torch.empty_like(view.x)
    of_x, of_gamma, of_beta, *of_added = asked_for(output_mask, 5)
    asked = (of_gamma, of_added[0], of_beta, of_added[1])
    grads = [t.new_empty(t.shape) if a and t is not None else None for a, t in zip(asked, parameters, strict=True)]
    dy, numbers = view.like(grad_output), kernel_options(options, x.dtype)
    if x.numel() == 0:
        grads = [None if grad is None else grad.zero_() for grad in grads]
    elif _has_one_per_channel(x, parameters, options.channel_dim):
        view.tiled("film_bwd", lambda tile: _backward(tile, view, dy, gamma, beta, dx, grads[::2], numbers))
    else:
        grads = film_broadcast.backward(view, dy, parameters, asked, options.channel_dim, dx, numbers)
    dgamma, dgamma_added, dbeta, dbeta_added = grads
    found = (view.restored(dx, x) if of_x else None, dgamma, dbeta, dgamma_added, dbeta_added)
    return tuple(x.new_empty(0) if grad is None else grad for grad in found)


def _backward(tile, view, grad_output, gamma, beta, dx, grads, options):
    B, M, C, N, blocks = view.B, view.M, view.C, view.N, _blocks(view, tile)
    if N > 1:
        tiles = triton.cdiv(B * M * C, blocks["BLOCK_R"])
        pieces, steps = _cut(tiles, triton.cdiv(N, blocks["BLOCK_N"]))
        kernel, sizes = film_bwd_kernel_runs, (B * M * C, M * C, C, N, pieces, steps)
        partial_shape = (B, M, C, pieces)
    else:
        tiles = B * triton.cdiv(C, blocks["BLOCK_C"])
        pieces, steps = _cut(tiles, triton.cdiv(M, blocks["BLOCK_R"]))
        kernel, sizes = film_bwd_kernel_rows, (M, C, pieces, steps)
        partial_shape = (B, pieces, C, 1)
    sums = []  # the gradient itself where one program holds all of a sum
    for grad in grads:
        if grad is None or grad.numel() == math.prod(partial_shape):
            sums.append(grad)
        else:
            sums.append(torch.empty(partial_shape, dtype=accumulation_dtype(dx.dtype), device=dx.device))
    pointers = grad_output, view.x, gamma, beta, dx, *sums
    arguments = (*pointers, *_strides(gamma, beta), *sizes)
    launch(kernel, (tiles * pieces,), *arguments, options=options, **blocks, num_warps=tile.warps)
    for partial, grad in zip(sums, grads, strict=True):
        if partial is not None and partial is not grad:
            _add_up(partial, grad)


def _add_up(partial: Tensor, out: Tensor) -> None:
    """out (B, C) or (C,) = the sum of partial (B, P, C, Q) over everything else."""
    B, P, C, Q = partial.shape
    outputs = out.numel()
    terms = partial.numel() // outputs
    block_t = power_of_2(terms, 256)
    block_o = power_of_2(outputs, 1024 // block_t)
    grid = (triton.cdiv(outputs, block_o),)
    launch(film_bwd_kernel_sum, grid, partial, out, outputs, terms, P, C, Q, BLOCK_O=block_o, BLOCK_T=block_t)


_PARAMETERS = "Tensor? gamma, Tensor? beta, Tensor? gamma_added, Tensor? beta_added"
register(f"film_fwd_triton(Tensor x, {_PARAMETERS}, Tensor? residual, {schema(Options)}) -> Tensor", forward)
register(
    f"film_bwd_triton(Tensor grad_output, Tensor x, {_PARAMETERS}, {schema(Options)}, int output_mask) "
    "-> (Tensor grad_x, Tensor grad_gamma, Tensor grad_beta, Tensor grad_gamma_added, Tensor grad_beta_added)",
    backward,
)


def kernels(dtypes=(torch.float32, torch.bfloat16), target=("cuda", 90)) -> list[Kernel]:
    """Every kernel as typical calls launch it: feature maps, channels last with shared parameters, short runs,
    aligned and not; parameters and pairs of them for each element, with float32 beside half precision, and a gate
    for each place."""

    def call(dtype, shape, channel_dim, activation, gamma, added=None):
        x = torch.empty(shape, dtype=dtype, device="meta")
        gamma = x.new_empty(gamma)
        added = None if added is None else x.new_empty(added, dtype=torch.float32)
        parameters, options = (gamma, gamma, added, added), (channel_dim, 1.0, activation)
        forward(x, *parameters, x, *options)
        backward(x, x, *parameters, *options, 0b11111)

    maps, tokens = (8, 256, 56, 56), (8, 1024, 768)
    cases = (
        (maps, 1, GELU, (8, 256)),
        (tokens, 2, SILU, (768,)),
        ((8, 1024, 7, 7), 1, TANH, (8, 1024)),
        ((8, 1024, 14, 14), 1, TANH, (8, 1024)),
        (tokens, 2, SILU, tokens),
        (tokens, 2, SILU, tokens, (768,)),
        (maps, 1, GELU, (8, 1, 56, 56)),
        ((8, 1024, 7, 7), 1, TANH, (8, 1, 7, 7), (1024,)),
    )
    calls = (functools.partial(call, dtype, *case) for dtype in dtypes for case in cases)
    return distinct(kernel for of in calls for kernel in recorded(of, target))
