"""Feature-wise linear modulation, FiLM (Perez et al. 2018, arXiv:1709.07871).

Mathematics, with gamma and beta broadcast along x, most often from one value per batch element and channel::

    z = (gamma + gamma_offset) x + beta                y = activation(z) + residual

    dz = dy activation'(z)      dx = (gamma + gamma_offset) dz         dresidual = dy
    dgamma = sum dz x           dbeta = sum dz                         over everything that shares a value

A pair stands for its broadcast sum, (gamma + gamma_added) and (beta + beta_added), each with the gradient above,
summed over what shares its own values. Forward reads x once and writes y once; backward reads x and dy once and
yields all gradients in that pass. The rank of a parameter alone tells its dimensions: (), (C,), (B, C), or x's.

Symbols: B batch, C channels, N positions per channel. Kernels: ``csrc/film/`` (C++, CUDA),
``fusedattn/triton/film.py``. Tests: ``tests/test_film.py``, ``tests/test_cuda_film.py``,
``tests/test_triton_film.py``. Benchmark: ``benchmarks/``.
"""

from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedattn import _autograd
from fusedattn._dispatch import NO_REASONS, autocast, autocast_enabled, choose, overridable
from fusedattn._options import FilmOptions as Options

Parameter = Tensor | tuple[Tensor, Tensor] | None
HALF = (torch.float16, torch.bfloat16)

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


def _along(parameter: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    """The parameter in x's rank."""
    rank = parameter.dim()
    if rank in (0, x.dim()):
        return parameter
    shape = [1] * x.dim()
    shape[channel_dim] = parameter.shape[-1]
    if rank == 2:
        shape[0] = parameter.shape[0]
    return parameter.view(shape)


def _is_wider(x: Tensor, parameters: tuple[Tensor | None, ...]) -> bool:
    """Whether one of them has another dtype than x: float32 beside half precision."""
    return any([t is not None and t.dtype is not x.dtype for t in parameters])


def _reference(x, gamma, beta, gamma_added, beta_added, residual, options: Options):
    wide = _is_wider(x, (gamma, beta, gamma_added, beta_added))

    def total(parameter, added):
        t = _along(parameter, x, options.channel_dim)
        t = t if added is None else t + _along(added, x, options.channel_dim)
        return t.float() if wide else t

    z = x.float() if wide else x
    if gamma is not None:
        z = (total(gamma, gamma_added) + options.gamma_offset) * z
    if beta is not None:
        z = z + total(beta, beta_added)
    y = _FUNCTIONS[options.activation](z)
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
    def like(parameter):
        return x.new_empty(0) if parameter is None else parameter.new_empty(parameter.shape)

    return torch.empty_like(x), *map(like, (gamma, beta, gamma_added, beta_added))


class _Fold(_autograd.Fold):
    """Into the batch: N of (B, ...) become (N B, ...); parameters without a batch get one."""

    def folded(self):
        (x, *parameters), (dim, *dims) = self.tensors[:5], self.dims[:5]
        self.B = (x if dim is None else x.movedim(dim, 0)[0]).shape[0]
        return (
            self.output(x, dim),
            *map(self._parameter, parameters, dims),
            *(self.output(t, d) for t, d in zip(self.tensors[5:], self.dims[5:], strict=True)),
        )

    def _first(self, t, dim):
        return t.expand(self.N, *t.shape) if dim is None else t.movedim(dim, 0)

    def output(self, t, dim):
        return None if t is None else self._first(t, dim).flatten(0, 1)

    def _parameter(self, t, dim):
        if t is None:
            return None
        t = self._first(t, dim)
        if t.dim() <= 2:  # () or (C,)
            t = t[:, None, None] if t.dim() == 1 else t[:, None]
        return t.expand(-1, self.B, *t.shape[2:]).flatten(0, 1)

    def _apart(self, t):
        return t.unflatten(0, (self.N, -1))

    def outputs_apart(self, outputs):
        return tuple(map(self._apart, outputs)), (0,) * len(outputs)

    def gradients_apart(self, grads):
        dx, *found = grads
        results, dims = [self._apart(dx)], [0]
        for grad, t, dim in zip(found, self.tensors[1:], self.dims[1:], strict=False):
            if t is not None:
                shape = list(t.shape if dim is None else t.movedim(dim, 0).shape[1:])
                grad = self._apart(grad)
                if len(shape) < 2 or shape[0] == 1:  # one for the whole batch
                    grad = grad.sum(1)
                grad = grad.reshape(self.N, *shape)
            results.append(grad)
            dims.append(None if t is None else 0)
        return tuple(results), tuple(dims)


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
)


# Public function


def _fail(argument: str, expected: str, received) -> NoReturn:
    raise ValueError(f"film: {argument}: expected {expected}, got {received}")


def _check_dense(name: str, t: Tensor | None) -> None:
    if not isinstance(t, Tensor):
        wanted = {"x": "a Tensor", "residual": "a Tensor or None"}.get(name, "a Tensor, a pair of them or None")
        raise TypeError(f"film: {name}: expected {wanted}, got {type(t).__name__}")
    if t.layout is not torch.strided or t.is_nested:
        _fail(name, "a dense Tensor", f"a nested one of layout {t.layout}" if t.is_nested else t.layout)


def _check_like(name: str, t: Tensor, x: Tensor, wider: bool = False) -> None:
    """``wider``: float32 will do beside half precision."""
    _check_dense(name, t)
    fits = t.dtype is x.dtype or (wider and t.dtype is torch.float32 and x.dtype in HALF)
    if not fits or t.device != x.device:
        dtypes = f"{x.dtype} or torch.float32" if wider and x.dtype in HALF else f"{x.dtype}"
        _fail(name, f"dtype {dtypes} on {x.device} like x", f"{t.dtype} on {t.device}")


def _check_parameter(name: str, t: Tensor | tuple[Tensor, Tensor], x: Tensor, channel_dim: int) -> None:
    if isinstance(t, (tuple, list)):
        if len(t) != 2:
            _fail(name, "a Tensor or a pair of them", f"{len(t)} of them")
        for n, part in enumerate(t):
            if not isinstance(part, Tensor):
                raise TypeError(f"film: {name}[{n}]: expected a Tensor, got {type(part).__name__}")
            _check_parameter(f"{name}[{n}]", part, x, channel_dim)
        return
    _check_like(name, t, x, wider=True)
    # By rank, so that no size is compared with one of another meaning: exported programs would depend on it.
    B, C, rank, shape = x.shape[0], x.shape[channel_dim], t.dim(), t.shape
    if rank <= 2 and (rank == 0 or shape[-1] == C) and (rank < 2 or shape[0] == B):
        return
    wanted = tuple(x.shape) if rank == x.dim() else (B, C)[2 - rank :] if rank <= 2 else None
    if wanted is None or any(n != w and n != 1 for n, w in zip(shape, wanted, strict=True)):
        shapes = {(C,), (B, C), tuple(x.shape)}
        listed = " or ".join(map(str, sorted(shapes, key=len)))
        _fail(name, f"shape {listed}, with 1 in place of any size", tuple(shape))


def _have_one_per_channel(parameters: tuple[Tensor | None, ...], channel_dim: int) -> bool:
    """Whether they have at most one value per channel and batch element."""
    for t in parameters:
        if t is None or t.dim() <= 2:
            continue
        if any(n != 1 for d, n in enumerate(t.shape) if d not in (0, channel_dim)):
            return False
    return True


def _per_channel(t: Tensor | None, added: Tensor | None, x: Tensor, channel_dim: int) -> Tensor | None:
    """What has one value per channel as (C,) or (B, C); a pair as its sum, which is small."""
    if t is None:
        return None
    if t.dim() > 2:
        t = t.movedim(channel_dim, 1).flatten(1)
    if t.dim() == 2 and t.shape[0] == 1:
        t = t[0]
    B, C = x.shape[0], x.shape[channel_dim]
    t = t.expand(B, C) if t.dim() == 2 else t.expand(C)
    other = _per_channel(added, None, x, channel_dim)
    return t if other is None else t + other


# What GPU kernels take is (C,) or (B, C), in the dtype of x.
_ON_GPUS = ("cuda", "triton")
_NOT_PER_CHANNEL = dict.fromkeys(
    _ON_GPUS, "gamma or beta has one value a place, its kernels of film take one per channel, (C,) or (B, C)"
)
_OF_ANOTHER_DTYPE = dict.fromkeys(
    _ON_GPUS, "gamma or beta is float32 beside half-precision x, its kernels of film take them in the dtype of x"
)


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
            not rounded. Kernels on GPUs take what has one value per channel, of each batch element or all, in the
            dtype of x.
        beta: in the shapes of gamma, not necessarily that of gamma; None for 0.
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
        TypeError: x is not a Tensor, another input neither that nor None nor, for gamma and beta, a pair;
            channel_dim not an int.
        ValueError: an input with the wrong shape, dtype, device or value.
        UnsupportedError: no backend, or not the one asked for, can run these inputs.
    """
    if isinstance(x, Tensor) and autocast_enabled(x.device):
        gamma, beta = _in_dtype(gamma, x.dtype), _in_dtype(beta, x.dtype)
    _check_inputs(x, gamma, beta, channel_dim, gamma_offset, activation, residual)
    channel_dim %= x.dim()
    gamma_added = beta_added = None
    if isinstance(gamma, (tuple, list)):
        gamma, gamma_added = gamma
    if isinstance(beta, (tuple, list)):
        beta, beta_added = beta
    parameters = gamma, beta, gamma_added, beta_added
    unable = NO_REASONS if _have_one_per_channel(parameters, channel_dim) else _NOT_PER_CHANNEL
    if _is_wider(x, parameters):
        unable = {**unable, **_OF_ANOTHER_DTYPE}
    backend = choose("film", backend, x.device, x.dtype, lambda: f"x {tuple(x.shape)}", unable)
    if backend in _ON_GPUS:
        gamma = _per_channel(gamma, gamma_added, x, channel_dim)
        beta = _per_channel(beta, beta_added, x, channel_dim)
        parameters = gamma, beta, None, None
    options = Options(channel_dim, gamma_offset, _NUMBERS[activation])
    return FILM(backend, (x, *parameters, residual), options)


def _in_dtype(parameter, dtype: torch.dtype):
    """gamma or beta in a dtype under autocast."""
    if isinstance(parameter, (tuple, list)):
        return tuple(_in_dtype(t, dtype) for t in parameter)
    return autocast(parameter, dtype) if isinstance(parameter, Tensor) else parameter
