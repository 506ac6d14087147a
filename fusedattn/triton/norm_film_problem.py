"""A norm and FiLM in Triton: what kernels of rows and of maps share."""

import triton
import triton.language as tl
from torch import Tensor

from fusedattn._dtypes import accumulation_dtype
from fusedattn._options import NormFilmOptions as Options
from fusedattn.triton import film_problem
from fusedattn.triton._common import argument, load_wide, number, require
from fusedattn.triton.film_broadcast import factor
from fusedattn.triton.film_problem import activate, affine, grad_z

# Of NORMS in fusedattn/ops/norm_film.py.
LAYER, RMS, GROUP, INSTANCE, BATCH = range(5)
# The parameters; the gradients of a pair are terms of one sum.
NAMES = ("gamma", "gamma_added", "beta", "beta_added", "weight", "bias", "pre_gate", "pre_gate_added")
SUMS = ("gamma", "gamma", "beta", "beta", "weight", "bias", "pre_gate", "pre_gate")


@triton.jit
def scaled(x, scale):
    """x scale; None stands for 1."""
    return x if scale is None else x * scale


@triton.jit
def formed(X, PRE_RESIDUAL, gate, at, mask):
    """h = pre_residual + gate x, as it is stored: rounded in half precision; 0 where masked."""
    h = scaled(load_wide(X + at, mask), gate)
    if PRE_RESIDUAL is not None:
        h = load_wide(PRE_RESIDUAL + at, mask) + h
    return h.to(X.dtype.element_ty).to(h.dtype)


@triton.jit
def sum_where(mask, terms):
    """Along the last axis.

    Without the selection a term that is a product may go into an FMA on one side of a shuffle, and rounded on the
    other: threads that share a sum would differ in its last bit.
    """
    return tl.sum(tl.where(mask, terms, 0.0), 1)


@triton.jit
def inverse_root(x):
    # In float64 rsqrt is an approximation.
    return 1.0 / tl.sqrt(x) if x.dtype == tl.float64 else tl.rsqrt(x)


@triton.jit
def read_statistics(MEAN, VAR, at, within, eps, ARITHMETIC: tl.constexpr):
    """A number near the mean, how far from it the mean is, and 1 / sqrt(var + eps).

    Together the first two have more digits than the arithmetic, for means far beyond the deviation.
    """
    mean = tl.load(MEAN + at, mask=within, other=0.0)
    near = mean.to(ARITHMETIC)
    var = tl.load(VAR + at, mask=within, other=1.0).to(ARITHMETIC)
    return near, (mean - near.to(tl.float64)).to(ARITHMETIC), inverse_root(var + number(eps, ARITHMETIC))


@triton.jit
def read_or_zero(P, at, mask, like):
    return tl.zeros_like(like) if P is None else load_wide(P + at, mask)


@triton.jit
def conditioned(n, gamma, beta, weight, bias, gamma_offset, ACTIVATION: tl.constexpr):
    """activation((gamma + gamma_offset) (n weight + bias) + beta)"""
    return activate(affine(affine(n, weight, bias), factor(gamma, gamma_offset), beta), ACTIVATION)


@triton.jit
def grad_normalised(dy, n, gamma, beta, weight, bias, gamma_offset, ACTIVATION: tl.constexpr):
    """u, dz, du and dn."""
    u = affine(n, weight, bias)
    scale = factor(gamma, gamma_offset)
    dz = grad_z(dy, affine(u, scale, beta), ACTIVATION)
    du = scaled(dz, scale)
    return u, dz, du, scaled(du, weight)


# Launchers


class Layout(film_problem.View):
    """x in memory as (B, T, C), or, where groups may be planes of channels, as (B, C, T); copied if it is not."""

    def __init__(self, x: Tensor, options: Options):
        channel_dim = options.channel_dim
        self.B, self.C = x.shape[0], x.shape[channel_dim]
        self.T = x.numel() // (self.B * self.C)
        before = x.shape[1:channel_dim].numel()
        self.planes = options.norm >= GROUP and before == 1 and self.T > 1 and x.is_contiguous()
        self.x, self.channel_dim = x, channel_dim
        rows = x.movedim(channel_dim, -1)
        if not self.planes and not rows.is_contiguous():
            self.x = rows.contiguous().movedim(-1, channel_dim)


def statistics_of(x: Tensor, options: Options) -> int:
    """The number of groups."""
    B, C = x.shape[0], x.shape[options.channel_dim]
    if options.norm in (LAYER, RMS):
        return x.shape[: options.channel_dim].numel() * x.shape[options.channel_dim + 1 :].numel()
    return {GROUP: B * options.num_groups, INSTANCE: B * C, BATCH: C}[options.norm]


def check(x: Tensor, parameters, options: Options, **like_x: Tensor | None) -> None:
    """Raises where kernels would read what is not there; parameters in the order of NAMES."""
    if not 0 < options.channel_dim < x.dim():
        raise RuntimeError(f"norm_film: channel_dim: expected 1 to {x.dim() - 1}, got {options.channel_dim}")
    B, C, wide = x.shape[0], x.shape[options.channel_dim], accumulation_dtype(x.dtype)
    if options.norm == GROUP and (options.num_groups < 1 or C % options.num_groups):
        raise RuntimeError(f"norm_film: num_groups: expected a divisor of {C}, got {options.num_groups}")
    of_rows = options.norm in (LAYER, RMS)
    for name, t in zip(NAMES, parameters, strict=True):
        if t is not None:
            each = t.dim() > 2 and of_rows and name not in ("weight", "bias")
            shape = x.shape if each else (C,) if t.dim() == 1 else (B, C)
            require("norm_film", name, t, shape, wide if t.dtype == wide else x.dtype, x.device)
    for name, t in like_x.items():
        if t is not None:
            require("norm_film", name, t, x.shape, x.dtype, x.device)


def kernel_options(options: Options, x: Tensor) -> dict:
    """What kernels take of the options, by name."""
    of_film = film_problem.kernel_options(options, x.dtype)
    return {"eps": argument(options.eps, x.dtype), **of_film, "IS_RMS": options.norm == RMS}


def cut(walks: int, tiles: int, least: int) -> tuple[int, int]:
    """Pieces of a walk, and tiles of a piece: enough programs for a GPU, then parts of ``least`` tiles."""
    enough = triton.cdiv(film_problem.PROGRAMS // 8, walks)
    most = triton.cdiv(film_problem.PROGRAMS, walks)
    pieces = min(tiles, most, max(triton.cdiv(tiles, least), enough))
    steps = triton.cdiv(tiles, pieces)
    return triton.cdiv(tiles, steps), steps


def gradient_of(t: Tensor, total: Tensor) -> Tensor:
    """The gradient of t, (C,) or (B, C), from its sums over the positions of each batch element, or of all.

    In memory of its own, which results of an operator have to have.
    """
    return total.sum(0).to(t.dtype) if t.dim() == 1 else total.to(t.dtype, copy=True)
