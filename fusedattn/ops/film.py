"""Feature-wise linear modulation, FiLM (Perez et al. 2018, arXiv:1709.07871).

Mathematics, per batch element b and channel c, everything else broadcast::

    z = (gamma_bc + gamma_offset) x + beta_bc          y = activation(z) + residual

    dz = dy activation'(z)      dx = (gamma_bc + gamma_offset) dz      dresidual = dy
    dgamma_bc = sum dz x        dbeta_bc = sum dz                      over everything that shares b and c

Forward reads x once and writes y once; backward reads x and dy once and yields all gradients in that pass.

Symbols: B batch, C channels, N positions per channel. Kernels: ``csrc/film/`` (C++, CUDA),
``fusedattn/triton/film.py``. Tests: ``tests/test_film.py``, ``tests/test_cuda_film.py``,
``tests/test_triton_film.py``. Benchmark: ``benchmarks/``.
"""

from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedattn import _autograd
from fusedattn._dispatch import autocast, autocast_enabled, choose, overridable
from fusedattn._options import FilmOptions as Options

# In the order of csrc/film/options.h.
ACTIVATIONS = {
    None: lambda z: z,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}
_FUNCTIONS = list(ACTIVATIONS.values())


# Reference


def _along_channels(parameter: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    shape = [1] * x.dim()
    shape[channel_dim] = x.shape[channel_dim]
    if parameter.dim() == 2:
        shape[0] = parameter.shape[0]
    return parameter.view(shape)


def _reference(x, gamma, beta, residual, options: Options):
    z = x
    if gamma is not None:
        z = (_along_channels(gamma, x, options.channel_dim) + options.gamma_offset) * z
    if beta is not None:
        z = z + _along_channels(beta, x, options.channel_dim)
    y = _FUNCTIONS[options.activation](z)
    return y if residual is None else y + residual


@overridable
def film_ref(
    x: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
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


def _fwd_fake(x, gamma, beta, residual, *options):
    return torch.empty_like(x)


def _bwd_fake(grad_output, x, gamma, beta, *options):
    def like(parameter):
        return x.new_empty(0) if parameter is None else parameter.new_empty(parameter.shape)

    return torch.empty_like(x), like(gamma), like(beta)


class _Fold(_autograd.Fold):
    """Into the batch: N of (B, ...) become (N B, ...); parameters (B, C) or (C,) become (N B, C)."""

    def folded(self):
        (x, gamma, beta, *residual), (dim, *_) = self.tensors, self.dims
        self.B = (x if dim is None else x.movedim(dim, 0)[0]).shape[0]
        return (
            self.output(x, dim),
            self._parameter(gamma, self.dims[1]),
            self._parameter(beta, self.dims[2]),
            *(self.output(t, self.dims[3]) for t in residual),
        )

    def _first(self, t, dim):
        return t.expand(self.N, *t.shape) if dim is None else t.movedim(dim, 0)

    def output(self, t, dim):
        return None if t is None else self._first(t, dim).flatten(0, 1)

    def _parameter(self, t, dim):
        if t is None:
            return None
        t = self._first(t, dim)
        if t.dim() == 2:
            t = t.unsqueeze(1).expand(-1, self.B, -1)
        return t.flatten(0, 1)

    def _apart(self, t):
        return t.unflatten(0, (self.N, -1))

    def outputs_apart(self, outputs):
        return tuple(map(self._apart, outputs)), (0,) * len(outputs)

    def gradients_apart(self, grads):
        dx, *found = grads
        results, dims = [self._apart(dx)], [0]
        for grad, t, dim in zip(found, self.tensors[1:], self.dims[1:], strict=False):
            if t is not None:
                shared = t.dim() - (dim is not None) == 1  # (C,): one for the whole batch
                grad = self._apart(grad).sum(1) if shared else self._apart(grad)
            results.append(grad)
            dims.append(None if t is None else 0)
        return tuple(results), tuple(dims)


FILM = _autograd.Op(
    "film",
    inputs=("x", "gamma", "beta"),
    added=("residual",),
    options=Options,
    outputs=("y",),
    reference=_reference,
    fwd_fake=_fwd_fake,
    bwd_fake=_bwd_fake,
    fold=_Fold,
)


# Public function


def _fail(argument: str, expected: str, received) -> NoReturn:
    raise ValueError(f"film: {argument}: expected {expected}, got {received}")


def _check_dense(name: str, t: Tensor | None) -> None:
    if not isinstance(t, Tensor):
        wanted = "a Tensor" if name == "x" else "a Tensor or None"
        raise TypeError(f"film: {name}: expected {wanted}, got {type(t).__name__}")
    if t.layout is not torch.strided or t.is_nested:
        _fail(name, "a dense Tensor", f"a nested one of layout {t.layout}" if t.is_nested else t.layout)


def _check_like(name: str, t: Tensor, x: Tensor) -> None:
    _check_dense(name, t)
    if t.dtype is not x.dtype or t.device != x.device:
        _fail(name, f"dtype {x.dtype} on {x.device} like x", f"{t.dtype} on {t.device}")


def _check_parameter(name: str, t: Tensor, x: Tensor, channel_dim: int) -> None:
    _check_like(name, t, x)
    # By rank, so that no size is compared with one of another meaning: exported programs would depend on it.
    B, C, rank = x.shape[0], x.shape[channel_dim], t.dim()
    if not 1 <= rank <= 2 or t.shape[-1] != C or (rank == 2 and t.shape[0] != B):
        _fail(name, f"shape {(C,)} or {(B, C)}", tuple(t.shape))


def _check_inputs(x, gamma, beta, channel_dim, gamma_offset, activation, residual):
    _check_dense("x", x)
    if not x.dtype.is_floating_point:
        _fail("x", "a floating-point dtype", x.dtype)
    rank = x.dim()
    if rank < 2:
        _fail("x", "shape (B, ..., C, ...) of rank 2 or more", tuple(x.shape))
    if not isinstance(channel_dim, int):
        raise TypeError(f"film: channel_dim: expected an int, got {type(channel_dim).__name__}")
    if not -rank < channel_dim < rank or channel_dim == 0:
        dimension = "a dimension of x other than the batch's (0)"
        _fail("channel_dim", dimension, f"{channel_dim} for shape {tuple(x.shape)}")
    if isinstance(gamma_offset, Tensor):
        _fail("gamma_offset", "a number", "a Tensor")
    if gamma is not None:
        _check_parameter("gamma", gamma, x, channel_dim)
    if beta is not None:
        _check_parameter("beta", beta, x, channel_dim)
    if residual is not None:
        _check_like("residual", residual, x)
        if residual.shape != x.shape:
            _fail("residual", f"shape {tuple(x.shape)}", tuple(residual.shape))
    if activation not in ACTIVATIONS:
        _fail("activation", f"one of {', '.join(map(repr, ACTIVATIONS))}", repr(activation))


@overridable
def film(
    x: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
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
        gamma: (B, C) or (C,), or None for a factor of 1 (``gamma_offset`` is then not applied).
        beta: (B, C) or (C,), or None for 0.
        channel_dim: any dimension but 0, negative ones count from the end. Default: 1.
        gamma_offset: 1.0 gives the (1 + gamma) form. Default: 0.0.
        activation: None, ``"relu"``, ``"leaky_relu"`` (slope 0.01), ``"silu"``, ``"gelu"`` (erf),
            ``"gelu_tanh"``, ``"tanh"`` or ``"sigmoid"``. Default: None.
        residual: like x, added after the activation. Default: None.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``.

    Returns:
        y with the shape and dtype of x.

    Under autocast x and residual keep their precision, as for any multiplication and addition of PyTorch's; gamma
    and beta, which come from a layer in half precision there, are cast to the dtype of x, except float64 ones.
    Second derivatives and forward-mode ones are computed through the reference formula.

    Raises:
        TypeError: x is not a Tensor, another input neither that nor None, channel_dim not an int.
        ValueError: an input with the wrong shape, dtype, device or value.
        UnsupportedError: no backend, or not the one asked for, can run these inputs.
    """
    if isinstance(x, Tensor) and autocast_enabled(x.device):
        gamma, beta = (autocast(t, x.dtype) if isinstance(t, Tensor) else t for t in (gamma, beta))
    _check_inputs(x, gamma, beta, channel_dim, gamma_offset, activation, residual)
    backend = choose("film", backend, x.device, x.dtype, lambda: f"x {tuple(x.shape)}")
    options = Options(channel_dim % x.dim(), gamma_offset, _NUMBERS[activation])
    return FILM(backend, (x, gamma, beta, residual), options)
