"""What the ops that condition features share: activations, and gamma and beta in every shape.

A parameter of such an op is a tensor, or a pair of them that stands for their broadcast sum. Its rank alone tells
its dimensions: (), (C,), (B, C), or those of x, any size of which may be 1.
"""

import numbers

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedattn import _autograd
from fusedattn._dispatch import autocast, check_layout, fail

Parameter = Tensor | tuple[Tensor, Tensor] | None
HALF = (torch.float16, torch.bfloat16)

# In the order of csrc/common/activation.h.
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
NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}
FUNCTIONS = list(ACTIVATIONS.values())


def along(parameter: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    """The parameter in x's rank."""
    rank = parameter.dim()
    if rank in (0, x.dim()):
        return parameter
    shape = [1] * x.dim()
    shape[channel_dim] = parameter.shape[-1]
    if rank == 2:
        shape[0] = parameter.shape[0]
    return parameter.view(shape)


def total(parameter: Tensor, added: Tensor | None, x: Tensor, channel_dim: int) -> Tensor:
    """The broadcast sum of a pair in x's rank."""
    t = along(parameter, x, channel_dim)
    return t if added is None else t + along(added, x, channel_dim)


def is_wider(x: Tensor, parameters: tuple[Tensor | None, ...]) -> bool:
    """Whether one of them has another dtype than x: float32 beside half precision."""
    return any([t is not None and t.dtype is not x.dtype for t in parameters])


def parts(op: str, name: str, parameter: Parameter) -> tuple[Tensor | None, Tensor | None]:
    """The two of a pair; of what is none, that and None."""
    if not isinstance(parameter, (tuple, list)):
        return parameter, None
    if len(parameter) != 2:
        fail(op, name, "a Tensor or a pair of them", f"{len(parameter)} of them")
    for n, part in enumerate(parameter):
        if not isinstance(part, Tensor):
            raise TypeError(f"{op}: {name}[{n}]: expected a Tensor, got {type(part).__name__}")
    return parameter[0], parameter[1]


def in_dtype(parameter, dtype: torch.dtype):
    """A parameter in a dtype under autocast."""
    if isinstance(parameter, (tuple, list)):
        return tuple(in_dtype(t, dtype) for t in parameter)
    return autocast(parameter, dtype) if isinstance(parameter, Tensor) else parameter


def gradient_fakes(x: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:
    """Of an operator's backward, by shape and dtype: (0,) for a parameter that is None."""
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in parameters)


# One value per channel, of each batch element or all


def have_one_per_channel(parameters: tuple[Tensor | None, ...], channel_dim: int) -> bool:
    """Whether they have at most one value per channel and batch element."""
    for t in parameters:
        if t is None or t.dim() <= 2:
            continue
        if any(n != 1 for d, n in enumerate(t.shape) if d not in (0, channel_dim)):
            return False
    return True


def per_channel(t: Tensor | None, added: Tensor | None, x: Tensor, channel_dim: int) -> Tensor | None:
    """What has one value per channel as (C,) or (B, C); a pair as its sum, which is small.

    Sums of values and of gradients are made in float32 at least.
    """
    if t is None:
        return None
    B, C = x.shape[0], x.shape[channel_dim]
    if t.dim() > 2:
        t = t.movedim(channel_dim, 1).flatten(1)
    if t.dim() == 2 and t.shape[0] == 1:
        t = t[0]
    if added is not None or t.dim() == 0 or t.shape[-1] != C:
        t = t.to(torch.promote_types(t.dtype, torch.float32))
    t = t.expand(B, C) if t.dim() == 2 else t.expand(C)
    other = per_channel(added, None, x, channel_dim)
    return t if other is None else t + other


# Checks


def check_dense(op: str, name: str, t: Tensor | None, wanted: str) -> None:
    """``wanted``: what else the argument may be, in words."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name}: expected {wanted}, got {type(t).__name__}")
    check_layout(op, name, t)


def check_like(op: str, name: str, t: Tensor, x: Tensor, wanted: str, wider: bool = False) -> None:
    """``wider``: float32 will do beside half precision."""
    check_dense(op, name, t, wanted)
    fits = t.dtype is x.dtype or (wider and t.dtype is torch.float32 and x.dtype in HALF)
    if not fits or t.device != x.device:
        dtypes = f"{x.dtype} or torch.float32" if wider and x.dtype in HALF else f"{x.dtype}"
        fail(op, name, f"dtype {dtypes} on {x.device} like x", f"{t.dtype} on {t.device}")


def check_parameter(
    op: str, name: str, t: Tensor | None, added: Tensor | None, x: Tensor, channel_dim: int
) -> None:
    """A parameter as :func:`parts` has it."""
    if t is None:
        return
    if added is not None:
        check_parameter(op, f"{name}[0]", t, None, x, channel_dim)
        check_parameter(op, f"{name}[1]", added, None, x, channel_dim)
        return
    check_like(op, name, t, x, "a Tensor, a pair of them or None", wider=True)
    # By rank, so that no size is compared with one of another meaning: exported programs would depend on it.
    B, C, rank, shape = x.shape[0], x.shape[channel_dim], t.dim(), t.shape
    if rank <= 2 and (rank == 0 or shape[-1] == C) and (rank < 2 or shape[0] == B):
        return
    wanted = tuple(x.shape) if rank == x.dim() else (B, C)[2 - rank :] if rank <= 2 else None
    if wanted is None or any(n != w and n != 1 for n, w in zip(shape, wanted, strict=True)):
        shapes = {(C,), (B, C), tuple(x.shape)}
        listed = " or ".join(map(str, sorted(shapes, key=len)))
        fail(op, name, f"shape {listed}, with 1 in place of any size", tuple(shape))


def check_features(op: str, x: Tensor, channel_dim: int) -> None:
    """x (B, ...) with its channels at ``channel_dim``."""
    check_dense(op, "x", x, "a Tensor")
    if not x.dtype.is_floating_point:
        fail(op, "x", "a floating-point dtype", x.dtype)
    rank = x.dim()
    if rank < 2:
        fail(op, "x", "shape (B, ..., C, ...) of rank 2 or more", tuple(x.shape))
    if not isinstance(channel_dim, int) and not isinstance(channel_dim, numbers.Integral):  # numpy's
        raise TypeError(f"{op}: channel_dim: expected an int, got {type(channel_dim).__name__}")
    if not -rank < channel_dim < rank or channel_dim == 0:
        dimension = "a dimension of x other than the batch's (0)"
        fail(op, "channel_dim", dimension, f"{channel_dim} for shape {tuple(x.shape)}")


def check_affine(op: str, x, parameters, channel_dim: int, gamma_offset, activation, residual) -> None:
    """What every op with gamma, beta, an activation and a residual takes, once x is known to be sound.

    ``parameters``: gamma, beta and what is added to each.
    """
    gamma, beta, gamma_added, beta_added = parameters
    if isinstance(gamma_offset, Tensor):
        fail(op, "gamma_offset", "a number", "a Tensor")
    check_parameter(op, "gamma", gamma, gamma_added, x, channel_dim)
    check_parameter(op, "beta", beta, beta_added, x, channel_dim)
    if residual is not None:
        check_same(op, "residual", residual, x)
    if activation not in ACTIVATIONS:
        fail(op, "activation", f"one of {', '.join(map(repr, ACTIVATIONS))}", repr(activation))


def check_same(op: str, name: str, t: Tensor, x: Tensor) -> None:
    """Something of the shape and dtype of x."""
    check_like(op, name, t, x, "a Tensor or None")
    if t.shape != x.shape:
        fail(op, name, f"shape {tuple(x.shape)}", tuple(t.shape))


class Fold(_autograd.Fold):
    """Into the batch: N of (B, ...) become (N B, ...); parameters without a batch get one.

    Tensors are x, then ``parameters`` parameters, then others like x.
    """

    parameters: int

    def folded(self):
        (x, *others), (dim, *dims) = self.tensors, self.dims
        self.B = (x if dim is None else x.movedim(dim, 0)[0]).shape[0]
        n = self.parameters
        return (
            self.output(x, dim),
            *map(self._parameter, others[:n], dims[:n]),
            *(self.output(t, d) for t, d in zip(others[n:], dims[n:], strict=True)),
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
        results, dims = [], []
        for grad, t, dim in zip(grads, self.tensors, self.dims, strict=False):
            asked = _autograd.asked_for(grad)
            if asked and t is self.tensors[0]:
                grad = self._apart(grad)
            elif asked:
                shape = list(t.shape if dim is None else t.movedim(dim, 0).shape[1:])
                grad = self._apart(grad)
                if len(shape) < 2 or shape[0] == 1:  # one for the whole batch
                    grad = grad.sum(1)
                grad = grad.reshape(self.N, *shape)
            results.append(grad)
            dims.append(0 if asked else None)
        return tuple(results), tuple(dims)
