"""Feature-wise linear modulation, FiLM (Perez et al. 2018, arXiv:1709.07871).

Mathematics, with gamma and beta broadcast along x, most often from one value per batch element and channel::

    z = (gamma + gamma_offset) x + beta                y = activation(z) + residual

    dz = dy activation'(z)      dx = (gamma + gamma_offset) dz         dresidual = dy
    dgamma = sum dz x           dbeta = sum dz                         over everything that shares a value

A pair stands for its broadcast sum, (gamma + gamma_added) and (beta + beta_added), each with the gradient above,
summed over what shares its own values. Forward reads x once and writes y once; backward reads x and dy once and
yields all gradients in that pass. The rank of a parameter alone tells its dimensions: (), (C,), (B, C), or x's.

Symbols: B batch, C channels, N positions per channel. Kernels: ``csrc/film/`` (C++, CUDA),
``fusedattn/triton/film.py`` and ``film_broadcast.py``. Tests: ``tests/test_film.py``, ``tests/test_cuda_film.py``,
``tests/test_triton_film.py``. Benchmark: ``benchmarks/``.
"""

import torch
from torch import Tensor

from fusedattn import _autograd, _conditioning
from fusedattn._conditioning import (
    FUNCTIONS,
    HALF,
    NUMBERS,
    Parameter,
    check_affine,
    check_features,
    gradient_fakes,
    have_one_per_channel,
    in_dtype,
    is_wider,
    parts,
    per_channel,
    total,
)
from fusedattn._dispatch import NO_REASONS, autocast_enabled, choose, once_per_signature, overridable
from fusedattn._options import FilmOptions as Options

# Reference


def _reference(x, gamma, beta, gamma_added, beta_added, residual, options: Options):
    wide = is_wider(x, (gamma, beta, gamma_added, beta_added))

    def factor(parameter, added):
        t = total(parameter, added, x, options.channel_dim)
        return t.float() if wide else t

    z = x.float() if wide else x
    if gamma is not None:
        z = (factor(gamma, gamma_added) + options.gamma_offset) * z
    if beta is not None:
        z = z + factor(beta, beta_added)
    y = FUNCTIONS[options.activation](z)
    y = y if residual is None else y + residual
    return y.to(x.dtype) if wide else y


@overridable
def film_ref(
    x: Tensor,
    gamma: Parameter = None,
    beta: Parameter = None,
    *,
    channel_dim: int = 1,
    gamma_offset: float = 0.0,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str = "reference",
) -> Tensor:
    """:func:`film` in plain PyTorch, on any device: the definition that kernels are tested against.

    Same arguments, shapes, result and errors; one pass over memory per arithmetic operation.
    """
    return film(
        x,
        gamma,
        beta,
        channel_dim=channel_dim,
        gamma_offset=gamma_offset,
        activation=activation,
        residual=residual,
        backend=backend,
    )


# Declaration


def _fwd_fake(x, gamma, beta, gamma_added, beta_added, residual, *options):
    return torch.empty_like(x)


def _bwd_fake(grad_output, x, gamma, beta, gamma_added, beta_added, *options):
    return torch.empty_like(x), *gradient_fakes(x, gamma, beta, gamma_added, beta_added)


class _Fold(_conditioning.Fold):
    parameters = 4


_TINY = 2**17  # elements, up to which a Function costs more than kernels save


def _tiny(x, gamma, beta, gamma_added, beta_added, residual, options: Options):
    """What is two operators of PyTorch's: one gamma and one beta for each element."""
    if (
        gamma is None
        or beta is None
        or residual is not None
        or gamma.dim() != x.dim()
        or options.activation
        or options.gamma_offset
        or x.dtype in HALF
        or not x.shape == gamma.shape == beta.shape
        or x.numel() > _TINY
        or not (x.is_contiguous() and gamma.is_contiguous() and beta.is_contiguous())
    ):
        return None
    return (x * gamma).add_(beta) if torch.is_grad_enabled() else torch.addcmul(beta, x, gamma)


FILM = _autograd.Op(
    "film",
    inputs=("x", "gamma", "beta", "gamma_added", "beta_added"),
    added=("residual",),
    options=Options,
    outputs=("y",),
    reference=_reference,
    fwd_fake=_fwd_fake,
    bwd_fake=_bwd_fake,
    fold=_Fold,
    any_strides=True,
    tiny=_tiny,
)


# Public function


_ON_GPUS = ("cuda", "triton")  # where a pair of one value per channel each is added first: that is small
_NOT_PER_CHANNEL = {
    "cuda": "gamma or beta has one value a place, its kernels of film take one per channel, (C,) or (B, C)"
}


@once_per_signature
def _plan(tensors, channel_dim, gamma_offset, activation, backend) -> tuple[str, Options, bool]:
    """The backend, the options, and whether pairs are added up first; raises for what cannot be computed."""
    x, *parameters, residual = tensors
    check_features("film", x, channel_dim)
    check_affine("film", x, parameters, channel_dim, gamma_offset, activation, residual)
    channel_dim = int(channel_dim) % x.dim()
    one_per_channel = have_one_per_channel(parameters, channel_dim)
    unable = NO_REASONS if one_per_channel else _NOT_PER_CHANNEL
    backend = choose("film", backend, x.device, x.dtype, lambda: f"x {tuple(x.shape)}", unable)
    options = Options(channel_dim, gamma_offset, NUMBERS[activation])
    return backend, options, one_per_channel and backend in _ON_GPUS


@overridable
def film(
    x: Tensor,
    gamma: Parameter = None,
    beta: Parameter = None,
    *,
    channel_dim: int = 1,
    gamma_offset: float = 0.0,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Feature-wise affine: ``activation((gamma + gamma_offset) * x + beta) + residual``, fused.

    Args:
        x: (B, ...) of rank 2 or more with C channels at ``channel_dim``; float32, float64, float16 or
            bfloat16. Inner arithmetic is at least float32. Contiguous, channels_last and other dense layouts
            with the batch outermost are used as they are, and the result has the same strides.
        gamma: by its rank (), (C,) or (B, C), or of x's rank with x's sizes, as (B, T, C). Any size may be 1:
            (1, C), (B, C, 1, 1), (B, 1, C), (B, 1, H, W), one gate per place over all channels. A pair of them
            stands for their broadcast sum, which is not made: ``(table[d], time_embedding)``. None is a factor of
            1 (``gamma_offset`` is then not applied). In the dtype of x, or float32 beside half precision: it is
            not rounded. ``backend="cuda"`` takes what has one value per channel, of each batch element or all.
        beta: in the shapes of gamma, not necessarily that of gamma; None for 0.
        channel_dim: any dimension but 0, negative ones count from the end. Default: 1.
        gamma_offset: 1.0 gives the (1 + gamma) form. Default: 0.0.
        activation: None, ``"relu"``, ``"leaky_relu"`` (slope 0.01), ``"silu"``, ``"gelu"`` (erf),
            ``"gelu_tanh"``, ``"tanh"`` or ``"sigmoid"``. Default: None.
        residual: like x, added after the activation. Default: None.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``. On the CPU ``"auto"`` has
            PyTorch's own operators compute ``gamma * x + beta`` where each of up to 131,072 elements of x has a
            gamma and a beta of its own, in float32 or float64: they are faster there.

    Returns:
        y with the shape and dtype of x.

    Under autocast x and residual keep their precision, as for any multiplication and addition of PyTorch's; gamma
    and beta, which come from a layer in half precision there, are cast to the dtype of x, except float64 ones.
    Second derivatives and forward-mode ones are computed through the reference formula.

    Raises:
        TypeError: x is not a Tensor, another input neither that nor None nor, for gamma and beta, a pair;
            channel_dim not an int.
        ValueError: an input with the wrong shape, dtype, device or value.
        UnsupportedError: no backend, or not the one asked for, can run these inputs.
    """
    settings = channel_dim, gamma_offset, activation, backend
    kinds = type(channel_dim), type(gamma_offset)  # 1 == 1.0 == True
    if backend == "auto":
        y = FILM.at_once((x, gamma, beta, None, None, residual), (settings, kinds))
        if y is not None:
            return y
    if isinstance(x, Tensor) and autocast_enabled(x.device):
        gamma, beta = in_dtype(gamma, x.dtype), in_dtype(beta, x.dtype)
    gamma, gamma_added = parts("film", "gamma", gamma)
    beta, beta_added = parts("film", "beta", beta)
    tensors = x, gamma, beta, gamma_added, beta_added, residual
    backend, options, adds_up = _plan(tensors, *settings)
    FILM.is_sound(backend, tensors, (settings, kinds), options)
    if adds_up:
        gamma = per_channel(gamma, gamma_added, x, options.channel_dim)
        beta = per_channel(beta, beta_added, x, options.channel_dim)
        tensors = x, gamma, beta, None, None, residual
    return FILM(backend, tensors, options)
