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

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from fusedattn import _library
from fusedattn._dispatch import (
    autocast,
    autocast_enabled,
    choose,
    cpu_reasons,
    cuda_reasons,
    needs_function,
    signature_kept,
    traced,
    triton_reasons,
)

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
_NAMES = list(ACTIVATIONS)


# Reference


def _along_channels(parameter: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    shape = [1] * x.dim()
    shape[channel_dim] = x.shape[channel_dim]
    if parameter.dim() == 2:
        shape[0] = parameter.shape[0]
    return parameter.view(shape)


def _reference(x, gamma, beta, channel_dim, gamma_offset, activation, residual=None):
    z = x
    if gamma is not None:
        z = (_along_channels(gamma, x, channel_dim) + gamma_offset) * z
    if beta is not None:
        z = z + _along_channels(beta, x, channel_dim)
    y = ACTIVATIONS[activation](z)
    return y if residual is None else y + residual


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


# Raw ops and their fakes


def _raw_ops(backend):
    """(film_fwd, film_bwd) of a backend. Triton's have names of their own: a dispatch key holds one kernel."""
    ops = torch.ops.fusedattn
    if backend == "triton":
        return ops.film_fwd_triton, ops.film_bwd_triton
    return ops.film_fwd, ops.film_bwd


def _fwd_fake(x, gamma, beta, residual, channel_dim, gamma_offset, activation):
    return torch.empty_like(x)


def _bwd_fake(grad_output, x, gamma, beta, channel_dim, gamma_offset, activation):
    def like(parameter):
        return x.new_empty(0) if parameter is None else parameter.new_empty(parameter.shape)

    return torch.empty_like(x), like(gamma), like(beta)


for _missing, _suffix in ((_library.EXTENSION_ERROR, ""), (_library.TRITON_ERROR, "_triton")):
    if _missing is None:
        torch.library.register_fake(f"fusedattn::film_fwd{_suffix}", _fwd_fake)
        torch.library.register_fake(f"fusedattn::film_bwd{_suffix}", _bwd_fake)


# Functions


@signature_kept
class _FiLM(Function):
    @staticmethod
    def forward(x, gamma, beta, residual, channel_dim, gamma_offset, activation, backend):
        film_fwd, _ = _raw_ops(backend)
        return film_fwd(x, gamma, beta, residual, channel_dim, gamma_offset, activation)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, gamma, beta, residual, *ctx.options, ctx.backend = inputs
        ctx.save_for_backward(x, gamma, beta)
        ctx.has_residual = residual is not None

    @staticmethod
    def backward(ctx, grad_output):
        x, gamma, beta = ctx.saved_tensors
        twice = needs_function([t for t in (grad_output, x, gamma, beta) if t is not None])
        if twice:
            grads = _FiLMBackward.apply(grad_output, x, gamma, beta, *ctx.options, ctx.backend)
        else:
            _, film_bwd = _raw_ops(ctx.backend)
            grads = film_bwd(grad_output, x, gamma, beta, *ctx.options)
        dx, dgamma, dbeta = grads
        return (
            dx,
            None if gamma is None else dgamma,
            None if beta is None else dbeta,
            grad_output if ctx.has_residual else None,
            None,
            None,
            None,
            None,
        )

    @staticmethod
    def vmap(info, in_dims, x, gamma, beta, residual, channel_dim, *options):
        fold = _Fold(info.batch_size, x, in_dims[0])
        y = _FiLM.apply(
            fold(x, in_dims[0]),
            fold.parameter(gamma, in_dims[1]),
            fold.parameter(beta, in_dims[2]),
            fold(residual, in_dims[3]),
            channel_dim,
            *options,
        )
        return fold.unfold(y), 0


class _FiLMBackward(Function):
    """Gradients by the kernel; their own derivatives through the reference formula."""

    @staticmethod
    def forward(grad_output, x, gamma, beta, channel_dim, gamma_offset, activation, backend):
        _, film_bwd = _raw_ops(backend)
        return film_bwd(grad_output, x, gamma, beta, channel_dim, gamma_offset, activation)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, channel_dim, gamma_offset, activation, _ = inputs
        ctx.save_for_backward(*tensors)
        ctx.options = (channel_dim, gamma_offset, _NAMES[activation])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grad_grads):
        grad_output, *tensors = ctx.saved_tensors
        given = [n for n, t in enumerate(tensors) if t is not None]

        def gradients(grad_output, *primals):
            def output(*primals):
                inputs = [None, None, None]
                for n, t in zip(given, primals, strict=True):
                    inputs[n] = t
                return _reference(*inputs, *ctx.options)

            return torch.func.vjp(output, *primals)[1](grad_output)

        results, pullback = torch.func.vjp(gradients, grad_output, *(tensors[n] for n in given))
        cotangents = tuple(
            torch.zeros_like(result) if grad_grads[n] is None else grad_grads[n]
            for n, result in zip(given, results, strict=True)
        )
        second = pullback(cotangents)
        grads = [second[0], None, None, None]
        for n, grad in zip(given, second[1:], strict=True):
            grads[n + 1] = grad
        return (*grads, None, None, None, None)

    @staticmethod
    def vmap(info, in_dims, grad_output, x, gamma, beta, channel_dim, *options):
        fold = _Fold(info.batch_size, x, in_dims[1])
        dx, dgamma, dbeta = _FiLMBackward.apply(
            fold(grad_output, in_dims[0]),
            fold(x, in_dims[1]),
            fold.parameter(gamma, in_dims[2]),
            fold.parameter(beta, in_dims[3]),
            channel_dim,
            *options,
        )
        dgamma, dbeta = (
            grad if like is None else fold.unfold_parameter(grad, like, dim)
            for grad, like, dim in ((dgamma, gamma, in_dims[2]), (dbeta, beta, in_dims[3]))
        )
        return (fold.unfold(dx), dgamma, dbeta), (
            0,
            None if gamma is None else 0,
            None if beta is None else 0,
        )


class _Fold:
    """Folds a vmapped dimension of size N into the batch: (N, B, ...) becomes (N B, ...)."""

    def __init__(self, N, x, dim):
        self.N, self.B = N, (x if dim is None else x.movedim(dim, 0)[0]).shape[0]

    def __call__(self, t, dim):
        if t is None:
            return None
        t = t.expand(self.N, *t.shape) if dim is None else t.movedim(dim, 0)
        return t.flatten(0, 1)

    def parameter(self, t, dim):
        """(C,) or (B, C), vmapped or not, as (N B, C)."""
        if t is None:
            return None
        t = t.expand(self.N, *t.shape) if dim is None else t.movedim(dim, 0)
        if t.dim() == 2:
            t = t.unsqueeze(1).expand(-1, self.B, -1)
        return t.flatten(0, 1)

    def unfold(self, t):
        return t.unflatten(0, (self.N, self.B))

    def unfold_parameter(self, grad, like, dim):
        rank = like.dim() - (dim is not None)
        grad = self.unfold(grad)
        return grad.sum(1) if rank == 1 else grad


# Public function


def _check_inputs(x, gamma, beta, channel_dim, activation, residual):
    if not isinstance(x, Tensor):
        raise TypeError(f"film: x: expected a Tensor, got {type(x).__name__}")
    if not x.dtype.is_floating_point:
        raise ValueError(f"film: x: expected a floating-point dtype, got {x.dtype}")
    rank = x.dim()
    if rank < 2:
        raise ValueError(f"film: x: expected shape (B, ..., C, ...) of rank 2 or more, got {tuple(x.shape)}")
    if not -rank < channel_dim < rank or channel_dim == 0:
        raise ValueError(
            f"film: channel_dim: expected a dimension of x other than the batch's (0), got {channel_dim} for "
            f"shape {tuple(x.shape)}"
        )
    B, C = x.shape[0], x.shape[channel_dim]
    for name, t in (("gamma", gamma), ("beta", beta), ("residual", residual)):
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"film: {name}: expected a Tensor or None, got {type(t).__name__}")
        if t.dtype != x.dtype or t.device != x.device:
            raise ValueError(
                f"film: {name}: expected dtype {x.dtype} on {x.device} like x, got {t.dtype} on {t.device}"
            )
        shapes = ((*x.shape,),) if name == "residual" else ((C,), (B, C))
        if tuple(t.shape) not in shapes:
            wanted = " or ".join(str(tuple(shape)) for shape in shapes)
            raise ValueError(f"film: {name}: expected shape {wanted}, got {tuple(t.shape)}")
    if activation not in ACTIVATIONS:
        names = ", ".join(repr(name) for name in ACTIVATIONS)
        raise ValueError(f"film: activation: expected one of {names}, got {activation!r}")


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

    Raises:
        ValueError: an input with the wrong shape, dtype, device or value.
        UnsupportedError: no backend, or not the one asked for, can run these inputs.
    """
    if isinstance(x, Tensor) and autocast_enabled(x.device):
        x, gamma, beta, residual = (
            autocast(t) if isinstance(t, Tensor) else t for t in (x, gamma, beta, residual)
        )
    _check_inputs(x, gamma, beta, channel_dim, activation, residual)
    device, dtype = x.device, x.dtype
    channel_dim %= x.dim()
    backend = choose(
        "film",
        backend,
        {
            "cpu": lambda: cpu_reasons(device, dtype),
            "cuda": lambda: cuda_reasons(device, dtype),
            "triton": lambda: triton_reasons(device, dtype),
        },
        lambda: f"x {tuple(x.shape)}, {dtype} on {device}",
    )
    if backend == "reference":
        return _reference(x, gamma, beta, channel_dim, gamma_offset, activation, residual)
    number = _NUMBERS[activation]
    if needs_function([t for t in (x, gamma, beta, residual) if t is not None]):
        tensors = traced((x, gamma, beta, residual))
        return _FiLM.apply(*tensors, channel_dim, gamma_offset, number, backend)
    film_fwd, _ = _raw_ops(backend)
    return film_fwd(x, gamma, beta, residual, channel_dim, gamma_offset, number)
