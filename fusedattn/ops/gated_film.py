"""The conditional gated activation of PixelCNN (van den Oord et al. 2016, arXiv:1606.05328) and WaveNet.

Mathematics, with a and b the halves of x's channels and h_a, h_b those of the condition, broadcast along x::

    t = tanh(a + h_a)           s = sigmoid(b + h_b)            y = t s

    da = dy s (1 - t^2)         db = dy t s (1 - s)             dcondition = sum (da, db)

The sums are over everything that shares a value. In half precision arithmetic is float32, and y alone is rounded.

Symbols: B batch, C channels of y. Tests: ``tests/test_gated_film.py``.
"""

import torch
from torch import Tensor

from fusedattn._conditioning import HALF, Parameter, check_features, check_parameter, in_dtype, parts, total
from fusedattn._dispatch import BACKENDS, autocast_enabled, choose, fail, overridable

# Reference


def _reference(x: Tensor, condition: Tensor | None, condition_added: Tensor | None, channel_dim: int) -> Tensor:
    z = x.to(torch.float32 if x.dtype in HALF else x.dtype)
    if condition is not None:
        z = z + total(condition, condition_added, x, channel_dim)
    a, b = z.chunk(2, channel_dim)
    return (torch.tanh(a) * torch.sigmoid(b)).to(x.dtype)


@overridable
def gated_film_ref(
    x: Tensor, condition: Parameter = None, *, channel_dim: int = 1, backend: str = "reference"
) -> Tensor:
    """:func:`gated_film` in plain PyTorch, on any device: the definition that kernels are tested against.

    Same arguments, shapes, result and errors.
    """
    return gated_film(x, condition, channel_dim=channel_dim, backend=backend)


# Public function

# No backend has kernels of it so far.
_UNABLE = dict.fromkeys(BACKENDS, "it has no kernels of gated_film")


@overridable
def gated_film(x: Tensor, condition: Parameter = None, *, channel_dim: int = 1, backend: str = "auto") -> Tensor:
    """Gated activation under a condition: ``tanh(a + h_a) * sigmoid(b + h_b)``.

    a and b are the first and the second half of the channels of x, h_a and h_b those of the condition: the layers
    of PixelCNN (van den Oord et al. 2016, arXiv:1606.05328) and WaveNet (2016, arXiv:1609.03499); without a
    condition, their unconditional ones.

    Args:
        x: (B, ...) of rank 2 or more with 2C channels at ``channel_dim``; float32, float64, float16 or bfloat16.
            Arithmetic is at least float32.
        condition: in any of the shapes of :func:`fusedattn.film`'s beta for these 2C channels, pairs included: one
            for each batch element, (B, 2C), or place, as (B, 2C, H, W). In the dtype of x, or float32 beside half
            precision. Default: None, for 0.
        channel_dim: any dimension but 0, negative ones count from the end. Default: 1.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``.

    Returns:
        y in the dtype of x, with its shape but for C channels.

    Under autocast x keeps its precision, and the condition is cast to it, except a float64 one.

    Raises:
        TypeError: x is not a Tensor, the condition neither that nor None nor a pair; channel_dim not an int.
        ValueError: an input with the wrong shape, dtype, device or value; an odd number of channels.
        UnsupportedError: no backend, or not the one asked for, can run these inputs.
    """
    if isinstance(x, Tensor) and autocast_enabled(x.device):
        condition = in_dtype(condition, x.dtype)
    check_features("gated_film", x, channel_dim)
    if x.shape[channel_dim] % 2:
        fail(
            "gated_film", "x", f"an even number of channels at dimension {channel_dim}", f"shape {tuple(x.shape)}"
        )
    if condition is not None:
        check_parameter("gated_film", "condition", condition, x, channel_dim)
    choose("gated_film", backend, x.device, x.dtype, lambda: f"x {tuple(x.shape)}", _UNABLE)
    return _reference(x, *parts(condition), channel_dim % x.dim())
