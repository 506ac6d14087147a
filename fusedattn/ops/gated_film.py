"""The conditional gated activation of PixelCNN (van den Oord et al. 2016, arXiv:1606.05328) and WaveNet.

Mathematics, with a and b the halves of x's channels and h_a, h_b those of the condition, broadcast along x::

    t = tanh(a + h_a)           s = sigmoid(b + h_b)            y = t s

    da = dy s (1 - t^2)         db = dy t s (1 - s)             dcondition = sum (da, db)

The sums are over everything that shares a value. In half precision arithmetic is float32, and y alone is rounded.

A pair of conditions stands for their broadcast sum, each with the gradient above, summed over what shares its own
values. Forward reads x once and writes y once; backward reads x and dy once and yields all gradients in that pass.

Symbols: B batch, C channels of y. Kernels: ``csrc/gated_film/`` (C++), ``fusedattn/triton/gated_film.py``. Tests:
``tests/test_gated_film.py``, ``tests/test_triton_gated_film.py``. Benchmark: ``benchmarks/``.
"""

import torch
from torch import Tensor

from fusedattn import _autograd, _conditioning
from fusedattn._conditioning import (
    HALF,
    Parameter,
    check_features,
    check_parameter,
    gradient_fakes,
    in_dtype,
    parts,
    total,
)
from fusedattn._dispatch import autocast_enabled, choose, fail, once_per_signature, overridable
from fusedattn._options import GatedFilmOptions as Options

# Reference


def _reference(x, condition, condition_added, options: Options):
    z = x.to(torch.float32 if x.dtype in HALF else x.dtype)
    if condition is not None:
        z = z + total(condition, condition_added, x, options.channel_dim)
    a, b = z.chunk(2, options.channel_dim)
    return (torch.tanh(a) * torch.sigmoid(b)).to(x.dtype)


@overridable
def gated_film_ref(
    x: Tensor, condition: Parameter = None, *, channel_dim: int = 1, backend: str = "reference"
) -> Tensor:
    """:func:`gated_film` in plain PyTorch, on any device: the definition that kernels are tested against.

    Same arguments, shapes, result and errors.
    """
    return gated_film(x, condition, channel_dim=channel_dim, backend=backend)


# Declaration


def _fwd_fake(x, condition, condition_added, channel_dim):
    return torch.empty_like(x.narrow(channel_dim, 0, x.shape[channel_dim] // 2))


def _bwd_fake(grad_output, x, condition, condition_added, channel_dim):
    return torch.empty_like(x), *gradient_fakes(x, condition, condition_added)


class _Fold(_conditioning.Fold):
    parameters = 2


GATED_FILM = _autograd.Op(
    "gated_film",
    inputs=("x", "condition", "condition_added"),
    options=Options,
    outputs=("y",),
    reference=_reference,
    fwd_fake=_fwd_fake,
    bwd_fake=_bwd_fake,
    fold=_Fold,
    any_strides=True,
)


# Public function

_UNABLE = {"cuda": "it has no kernels of gated_film"}


@once_per_signature
def _plan(tensors, channel_dim, backend) -> tuple[str, Options]:
    """The backend and the options; raises for what cannot be computed."""
    x, condition, condition_added = tensors
    check_features("gated_film", x, channel_dim)
    if x.shape[channel_dim] % 2:
        fail(
            "gated_film", "x", f"an even number of channels at dimension {channel_dim}", f"shape {tuple(x.shape)}"
        )
    check_parameter("gated_film", "condition", condition, condition_added, x, channel_dim)
    backend = choose("gated_film", backend, x.device, x.dtype, lambda: f"x {tuple(x.shape)}", _UNABLE)
    return backend, Options(int(channel_dim) % x.dim())


@overridable
def gated_film(x: Tensor, condition: Parameter = None, *, channel_dim: int = 1, backend: str = "auto") -> Tensor:
    """Gated activation under a condition: ``tanh(a + h_a) * sigmoid(b + h_b)``.

    a and b are the first and the second half of the channels of x, h_a and h_b those of the condition: the layers
    of PixelCNN (van den Oord et al. 2016, arXiv:1606.05328) and WaveNet (2016, arXiv:1609.03499); without a
    condition, their unconditional ones.

    Args:
        x: (B, ...) of rank 2 or more with 2C channels at ``channel_dim``; float32, float64, float16 or bfloat16.
            Arithmetic is at least float32. Contiguous, channels_last and other dense layouts with the batch
            outermost are used as they are, and the result has the same order in memory.
        condition: in any of the shapes of :func:`fusedattn.film`'s beta for these 2C channels, pairs included: one
            for each batch element, (B, 2C), or place, as (B, 2C, H, W). In the dtype of x, or float32 beside half
            precision. Default: None, for 0.
        channel_dim: any dimension but 0, negative ones count from the end. Default: 1.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``.

    Returns:
        y in the dtype of x, with its shape but for C channels.

    Under autocast x keeps its precision, and the condition is cast to it, except a float64 one. Second derivatives
    and forward-mode ones are computed through the reference formula.

    Raises:
        TypeError: x is not a Tensor, the condition neither that nor None nor a pair; channel_dim not an int.
        ValueError: an input with the wrong shape, dtype, device or value; an odd number of channels.
        UnsupportedError: no backend, or not the one asked for, can run these inputs.
    """
    settings = channel_dim, type(channel_dim), backend  # 1 == 1.0 == True
    if backend == "auto":
        y = GATED_FILM.at_once((x, condition, None), settings)
        if y is not None:
            return y
    if isinstance(x, Tensor) and autocast_enabled(x.device):
        condition = in_dtype(condition, x.dtype)
    tensors = x, *parts("gated_film", "condition", condition)
    backend, options = _plan(tensors, channel_dim, backend)
    GATED_FILM.is_sound(backend, tensors, settings, options)
    return GATED_FILM(backend, tensors, options)
