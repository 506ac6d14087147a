"""FiLM in Triton: what kernels of one value per channel (``film.py``) and of any (``film_broadcast.py``) share."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from fusedattn._options import FilmOptions, NormFilmOptions
from fusedattn.triton import _tiles
from fusedattn.triton._common import argument, on_device_of

PROGRAMS = 1024  # a backward pass is cut into about this many where runs, rows or columns give fewer: some 8 an SM

# Numbered as in csrc/common/activation.h. In products the tensor comes first: the interpreter takes a constexpr
# times a tensor for a constexpr.
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
def activate(z, ACTIVATION: tl.constexpr):
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
def grad_z(dy, z, ACTIVATION: tl.constexpr):
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
def plus(a, b):
    """a + b, either of which may be None."""
    if a is None:
        total = b
    elif b is None:
        total = a
    else:
        total = a + b
    return total


@triton.jit
def affine(x, scale, shift):
    """scale x + shift, where scale and shift are tiles that broadcast, or None."""
    if scale is None:
        z = x if shift is None else x + shift
    else:
        z = x * scale if shift is None else tl.fma(x, scale, shift)
    return z


@triton.jit
def aligned(n, ALIGN: tl.constexpr):
    """n, of which the compiler now knows that it is a multiple of ALIGN."""
    return n // ALIGN * ALIGN if ALIGN > 1 else n


# Launchers


def _dense(x: Tensor, order) -> bool:
    """Whether x fills its memory with dimensions in this order, outermost first."""
    expected = 1
    for d in reversed(order):
        if x.shape[d] != 1 and x.stride(d) != expected:
            return False
        expected *= x.shape[d]
    return True


class View:
    """x as (B, M, C, N) in memory order, copied only where it is not dense with the batch outermost.

    ``order`` is that of x's dimensions, outermost first.
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
        self.x, self.order, self.B, self.C = x, order, shape[0], shape[channel_dim]
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

    def tiled(self, name: str, run):
        """The result of run with the tile that the table, or tuning, has for these sizes."""
        sizes = (self.B, self.M, self.C, self.N)
        with on_device_of(self.x):
            return run(_tiles.choose("film", self.N, self.x, sizes, run, name))


def power_of_2(n: int, most: int) -> int:
    return min(triton.next_power_of_2(n), most)


def alignment(n: int) -> int:
    """4 for its multiples, but 1 for those of 16, which Triton knows: few forms of a kernel for all sizes."""
    return 4 if n % 4 == 0 and n % 16 else 1


def kernel_options(options: FilmOptions | NormFilmOptions, dtype: torch.dtype) -> dict:
    """What kernels take of the options, by name."""
    return {"gamma_offset": argument(options.gamma_offset, dtype), "ACTIVATION": options.activation}
