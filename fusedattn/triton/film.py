"""FiLM in Triton: ``y = activation((gamma + gamma_offset) x + beta) + residual`` and its gradients.

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

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from fusedattn._options import FilmOptions as Options
from fusedattn._options import schema
from fusedattn.triton import _tiles
from fusedattn.triton._common import (
    Kernel,
    argument,
    launch,
    load_wide,
    number,
    on_device_of,
    recorded,
    register,
    require,
)

# As in csrc/film/options.h, whose activations are numbered so. In products the tensor comes first: the interpreter
# takes a constexpr times a tensor for a constexpr.
RELU = tl.constexpr(1)
LEAKY_RELU = tl.constexpr(2)
SILU = tl.constexpr(3)
GELU = tl.constexpr(4)
GELU_TANH = tl.constexpr(5)
TANH = tl.constexpr(6)
SIGMOID = tl.constexpr(7)
ACTIVATIONS = 8

LEAKY_SLOPE = tl.constexpr(0.01)
SQRT_HALF = tl.constexpr(math.sqrt(0.5))
INV_SQRT_2PI = tl.constexpr(1 / math.sqrt(2 * math.pi))
GELU_TANH_SCALE = tl.constexpr(math.sqrt(2 / math.pi))
GELU_TANH_CUBIC = tl.constexpr(0.044715)

PROGRAMS = 1024  # a backward pass is cut into about this many where whole runs or columns give fewer: some 8 an SM


@triton.jit
def _logistic(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _normal_cdf(z):
    return 0.5 * libdevice.erfc(z * -SQRT_HALF)


@triton.jit
def _gelu_tanh_argument(z):
    # 1 + tanh(u) = 2 logistic(2u)
    return z * (2.0 * GELU_TANH_SCALE) * (1.0 + z * z * GELU_TANH_CUBIC)


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == RELU:
        z = tl.where(z < 0.0, 0.0, z)  # NaN stays
    elif ACTIVATION == LEAKY_RELU:
        z = tl.where(z > 0.0, z, z * LEAKY_SLOPE)
    elif ACTIVATION == SILU:
        z = z * _logistic(z)
    elif ACTIVATION == GELU:
        z = z * _normal_cdf(z)
    elif ACTIVATION == GELU_TANH:
        z = z * _logistic(_gelu_tanh_argument(z))
    elif ACTIVATION == TANH:
        z = libdevice.tanh(z)
    elif ACTIVATION == SIGMOID:
        z = _logistic(z)
    return z


@triton.jit
def _grad_z(dy, z, ACTIVATION: tl.constexpr):
    """dy activation'(z)"""
    if ACTIVATION == RELU:
        dy = tl.where(z <= 0.0, 0.0, dy)  # NaN has slope 1, as in PyTorch
    elif ACTIVATION == LEAKY_RELU:
        dy = tl.where(z > 0.0, dy, dy * LEAKY_SLOPE)
    elif ACTIVATION == SILU:
        s = _logistic(z)
        dy = dy * s * (1.0 + z * (1.0 - s))
    elif ACTIVATION == GELU:
        dy = dy * (_normal_cdf(z) + z * tl.exp(-0.5 * z * z) * INV_SQRT_2PI)
    elif ACTIVATION == GELU_TANH:
        s = _logistic(_gelu_tanh_argument(z))
        decay = s * (1.0 - s)
        growth = (1.0 + z * z * (3.0 * GELU_TANH_CUBIC)) * (2.0 * GELU_TANH_SCALE)  # overflows before z does
        dy = dy * (s + z * tl.where(decay == 0.0, 0.0, decay * growth))
    elif ACTIVATION == TANH:
        t = libdevice.tanh(z)
        dy = dy * (1.0 - t * t)
    elif ACTIVATION == SIGMOID:
        s = _logistic(z)
        dy = dy * s * (1.0 - s)
    return dy


@triton.jit
def _affine(x, scale, shift):
    """scale x + shift, where scale and shift are tiles that broadcast, or None."""
    if scale is None:
        z = x if shift is None else x + shift
    else:
        z = x * scale if shift is None else tl.fma(x, scale, shift)
    return z


@triton.jit
def _parameter(P, b, c, stride_b, stride_c, mask, offset=None):
    """gamma or beta of channels c of batch elements b, in the dtype of the arithmetic."""
    p = load_wide(P + b * stride_b + c * stride_c, mask)
    return p if offset is None else p + number(offset, p.dtype)


@triton.jit
def _aligned(n, ALIGN: tl.constexpr):
    """n, of which the compiler now knows that it is a multiple of ALIGN."""
    return n // ALIGN * ALIGN if ALIGN > 1 else n


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
    dz = _grad_z(load_wide(DY + at, mask), _affine(x, scale, shift), ACTIVATION)
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
    N = _aligned(N, ALIGN)
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
    y = _activate(_affine(load_wide(X + at, mask), scale, shift), ACTIVATION)
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
    C = _aligned(C, ALIGN)
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
    y = _activate(_affine(load_wide(X + at, mask), scale, shift), ACTIVATION)
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
    N = _aligned(N, ALIGN)
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
    C = _aligned(C, ALIGN)
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


def _dense(x: Tensor, order) -> bool:
    """Whether x fills its memory with dimensions in this order, outermost first."""
    expected = 1
    for d in reversed(order):
        if x.shape[d] != 1 and x.stride(d) != expected:
            return False
        expected *= x.shape[d]
    return True


class _View:
    """x as (B, M, C, N) in memory order, copied only where it is not dense with the batch outermost.

    Parameters that the whole batch shares make it (1, B M, C, N): their gradients then sum over M alone.
    """

    def __init__(self, x: Tensor, channel_dim: int, parameters):
        shape, order = x.shape, [*range(x.dim())]
        if not x.is_contiguous():
            order[1:] = sorted(order[1:], key=lambda d: -x.stride()[d])
            if not _dense(x, order):
                x = x.contiguous()
                order.sort()
        place = order.index(channel_dim)
        self.x, self.B, self.C = x, shape[0], shape[channel_dim]
        self.M = math.prod(shape[d] for d in order[1:place])
        self.N = math.prod(shape[d] for d in order[place + 1 :])
        if all(p is None or p.dim() == 1 for p in parameters):
            self.B, self.M = 1, self.B * self.M

    def like(self, t: Tensor | None) -> Tensor | None:
        """t with the strides of x, where they say anything."""
        if t is None or all(
            n == 1 or a == b for n, a, b in zip(t.shape, t.stride(), self.x.stride(), strict=True)
        ):
            return t
        return torch.empty_like(self.x).copy_(t)

    def restored(self, y: Tensor, x: Tensor) -> Tensor:
        """y with the strides of ``empty_like(x)``, which is what the operator's fake promises."""
        if self.x is x:
            return y
        out = torch.empty_like(x)
        return y if out.stride() == y.stride() else out.copy_(y)


def _power_of_2(n: int, most: int) -> int:
    return min(triton.next_power_of_2(n), most)


def _strides(*parameters: Tensor | None):
    """(stride_b, stride_c) of each."""
    for p in parameters:
        yield from (0, 0) if p is None else (p.stride(0) if p.dim() == 2 else 0, p.stride(-1))


def _alignment(n: int) -> int:
    """4 for its multiples, but 1 for those of 16, which Triton knows: few forms of a kernel for all sizes."""
    return 4 if n % 4 == 0 and n % 16 else 1


def _blocks(view: _View, tile: _tiles.Tile) -> dict[str, int]:
    """Extents of a tile: long enough along memory to coalesce, then as many runs or rows as fill it."""
    (elements,) = tile.extents_in(view.x.dtype)
    if view.N > 1:
        along = _power_of_2(view.N, elements // 2)
        if along < 256:
            elements //= 2  # each of many runs has its scale, shift and addresses in registers
        rows = _power_of_2(view.B * view.M * view.C, elements // along)
        return {"ALIGN": _alignment(view.N), "BLOCK_R": rows, "BLOCK_N": along}
    rows = _power_of_2(view.M, elements // _power_of_2(view.C, elements // 8))
    return {"ALIGN": _alignment(view.C), "BLOCK_R": rows, "BLOCK_C": _power_of_2(view.C, elements // rows)}


def _kernel_options(options: Options, dtype: torch.dtype) -> dict:
    """What kernels take of the options, by name."""
    return {"gamma_offset": argument(options.gamma_offset, dtype), "ACTIVATION": options.activation}


def _check(x, gamma, beta, gamma_added, beta_added, options: Options, **like_x: Tensor | None) -> None:
    if not 0 < options.channel_dim < x.dim():
        raise RuntimeError(f"film: channel_dim: expected 1 to {x.dim() - 1}, got {options.channel_dim}")
    if gamma_added is not None or beta_added is not None:  # the public function adds them
        raise RuntimeError("film: gamma and beta: expected one tensor each in Triton, got two")
    B, C = x.shape[0], x.shape[options.channel_dim]
    for name, t in (("gamma", gamma), ("beta", beta)):
        if t is not None:
            require("film", name, t, (C,) if t.dim() == 1 else (B, C), x.dtype, x.device)
    for name, t in like_x.items():
        if t is not None:
            require("film", name, t, x.shape, x.dtype, x.device)


def forward(x, gamma, beta, gamma_added, beta_added, residual, *options):
    """film_fwd, see csrc/library.cpp."""
    options = Options(*options)
    _check(x, gamma, beta, gamma_added, beta_added, options, residual=residual)
    view = _View(x, options.channel_dim, (gamma, beta))
    y = torch.empty_like(view.x)
    if x.numel() == 0:
        return view.restored(y, x)
    arguments = (view, gamma, beta, view.like(residual), y, _kernel_options(options, x.dtype))
    _tiled("film_fwd", view, lambda tile: _forward(tile, *arguments))
    return view.restored(y, x)


def _tiled(name: str, view: _View, run) -> None:
    """Runs with the tile that the table, or tuning, has for these sizes."""
    sizes = (view.B, view.M, view.C, view.N)
    with on_device_of(view.x):
        run(_tiles.choose("film", view.N, view.x, sizes, run, name))


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
    """Pieces, and blocks per piece: one piece where there are enough tiles, else about PROGRAMS programs."""
    steps = triton.cdiv(blocks, min(blocks, triton.cdiv(PROGRAMS, tiles)))
    return triton.cdiv(blocks, steps), steps


def backward(grad_output, x, gamma, beta, gamma_added, beta_added, *rest):
    """film_bwd, see csrc/library.cpp."""
    *options, output_mask = rest
    options = Options(*options)
    _check(x, gamma, beta, gamma_added, beta_added, options, grad_output=grad_output)
    view = _View(x, options.channel_dim, (gamma, beta))
    dx = torch.empty_like(view.x)
    of_x, *asked = [bool(output_mask >> n & 1) for n in range(3)]
    grads = [
        torch.empty(p.shape, dtype=p.dtype, device=x.device) if a and p is not None else None
        for p, a in zip((gamma, beta), asked, strict=True)
    ]
    if x.numel():
        arguments = (view, view.like(grad_output), gamma, beta, dx, grads, _kernel_options(options, x.dtype))
        _tiled("film_bwd", view, lambda tile: _backward(tile, *arguments))
    else:
        grads = [None if grad is None else grad.zero_() for grad in grads]
    found = (view.restored(dx, x) if of_x else None, *grads, None, None)
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
    arithmetic = torch.float64 if view.x.dtype == torch.float64 else torch.float32
    sums = []  # the gradient itself where one program holds all of a sum
    for grad in grads:
        if grad is None or grad.numel() == math.prod(partial_shape):
            sums.append(grad)
        else:
            sums.append(torch.empty(partial_shape, dtype=arithmetic, device=dx.device))
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
    block_t = _power_of_2(terms, 256)
    block_o = _power_of_2(outputs, 1024 // block_t)
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
    aligned and not."""

    def call(dtype, shape, channel_dim, shared, activation):
        x = torch.empty(shape, dtype=dtype, device="meta")
        C = shape[channel_dim]
        gamma = torch.empty((C,) if shared else (shape[0], C), dtype=dtype, device="meta")
        forward(x, gamma, gamma, None, None, x, channel_dim, 1.0, activation)
        backward(x, x, gamma, gamma, None, None, channel_dim, 1.0, activation, 0b111)

    cases = (
        ((8, 256, 56, 56), 1, False, GELU),
        ((8, 1024, 768), 2, True, SILU),
        ((8, 1024, 7, 7), 1, False, TANH),
        ((8, 1024, 14, 14), 1, False, TANH),
    )
    found: dict[tuple, Kernel] = {}
    for dtype in dtypes:
        for case in cases:
            for kernel in recorded(lambda: call(dtype, *case), target):  # noqa: B023, called at once
                found.setdefault(kernel.specialisation, kernel)
    return list(found.values())
