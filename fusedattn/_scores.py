"""What the ops over additive scores share: the scores themselves, checks of their inputs, vmap into the heads."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu

from fusedattn import _autograd
from fusedattn._dispatch import check_layout, fail
from fusedattn._dtypes import accumulation_dtype
from fusedattn._options import SCORE_ACTIVATIONS

INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

# By the numbers of SCORE_ACTIVATIONS, of q + k and the negative slope.
_ACTIVATIONS = (
    lambda z, _: torch.tanh(z),
    lambda z, _: torch.sigmoid(z),
    lambda z, _: torch.relu(z),
    leaky_relu,
)


def reference(query: Tensor, key: Tensor, weight: Tensor, options) -> Tensor:
    """Scores (B, [H,] Tq, Tk) in plain PyTorch; weight (D,), or (H, D) with heads."""
    return of_sum(query.unsqueeze(-2) + key.unsqueeze(-3), weight, options)


def of_sum(z: Tensor, weight: Tensor, options) -> Tensor:
    """The same of what the activation takes, (B, [H,] Tq, Tk, D)."""
    activated = _ACTIVATIONS[options.activation](z, options.negative_slope)
    scores = (activated * weight[..., None, None, :]).sum(-1) * options.scale
    return options.softcap * torch.tanh(scores / options.softcap) if options.softcap else scores


def numbers(
    scale: float, softcap: float | None, activation: str, negative_slope: float
) -> tuple[float, float, int, float]:
    """The options of raw operators that a score has."""
    return (
        scale,
        0.0 if softcap is None or softcap == math.inf else softcap,
        SCORE_ACTIVATIONS[activation],
        negative_slope,
    )


def without_unseen(visible: Tensor, *rows: Tensor) -> list[Tensor]:
    """Rows of keys (B, [H,] Tk, width), zero where no query sees the key: it is absent, whatever it holds."""
    seen = visible.any(-2).unsqueeze(-1)
    return [torch.where(seen, t, 0.0) for t in rows]  # masked_fill takes twice the time for such a mask


def of_visible(visible: Tensor, scores: Tensor) -> Tensor:
    """Scores, -inf at invisible keys, but 0 in a row that sees none.

    Such a row is computed over zeros and masked afterwards: no NaN in any derivative.
    """
    hidden, empty = ~visible, ~visible.any(-1, keepdim=True)
    return scores.masked_fill(hidden, float("-inf")).masked_fill(empty, 0.0)


def biased(scores: Tensor, bias: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores with their bias, and which keys each query sees: none with a bias of -inf."""
    seen = bias != float("-inf")
    return scores + bias, seen if visible is None else visible & seen


class Fold(_autograd.Fold):
    """Into the heads: N of (B, H, ...) become (B, N H, ...), or N of (B, ...) become (B, N, ...).

    Heads, because each of them has its own weight, and because without heads a tensor that is not vmapped is
    expanded with stride 0, not copied.
    """

    def __init__(self, N, tensors, dims, options):
        super().__init__(N, tensors, dims, options)
        self.heads = tensors[0].dim() - (dims[0] is not None) == 4

    def _joined(self, t, dim):
        return t.flatten(dim, dim + 1) if self.heads else t

    def output(self, t, dim):
        if t is None or t.dim() == 1:  # absent, or not asked for
            return t
        return self._joined(self.spread(t, dim), 1)

    def spread(self, t, dim):
        """With N after the batch."""
        return t.unsqueeze(1).expand(-1, self.N, *t.shape[1:]) if dim is None else t.movedim(dim, 1)

    def rows(self, n: int) -> list[Tensor]:
        """The first n tensors, of rows."""
        return [self.output(t, dim) for t, dim in zip(self.tensors[:n], self.dims, strict=False)]

    def weight(self, n: int) -> Tensor:
        """Tensor n, of a row for each head."""
        weight: Any = self.tensors[n]
        dim = self.dims[n]
        return self._joined(weight.expand(self.N, *weight.shape) if dim is None else weight.movedim(dim, 0), 0)

    def folded(self):
        return (*self.rows(2), self.weight(2))

    def outputs_apart(self, outputs):
        dims = tuple(None if t.dim() == 1 else 0 if t.dim() == 2 else 1 for t in outputs)
        if not self.heads:
            return tuple(outputs), dims
        split = (t if d is None else t.unflatten(d, (self.N, -1)) for t, d in zip(outputs, dims, strict=True))
        return tuple(split), dims

    gradients_apart = outputs_apart  # a gradient of weight, (N H, D), is told by its rank


# Checks


def require_tensors(op: str, **tensors) -> None:
    for argument, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {argument}: expected a Tensor, got {type(t).__name__}")


def require_dense(op: str, **tensors) -> None:
    require_tensors(op, **tensors)
    for argument, t in tensors.items():
        check_layout(op, argument, t)


def check_integers(op: str, argument: str, t) -> None:
    if not isinstance(t, Tensor) or t.dtype not in INTEGER_DTYPES:
        fail(op, argument, "a Tensor of integers", getattr(t, "dtype", type(t).__name__))


def check_parameter(op: str, argument: str, t: Tensor, query: Tensor) -> None:
    """Of the query's dtype, or of that of its arithmetic, and on its device."""
    dtypes = query.dtype, accumulation_dtype(query.dtype)
    if t.dtype not in dtypes or t.device != query.device:
        expected = " or ".join(dict.fromkeys(map(str, dtypes)))
        fail(op, argument, f"{expected} on {query.device} like query", f"{t.dtype} on {t.device}")


def broadcast(
    op: str, query: Tensor, key: Tensor, weight: Tensor, value: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Any]:
    """(query, key, weight, value) with all their batch and heads; raises for what cannot be computed."""
    if _agree(query, key, weight, value):
        return query, key, weight, value
    lead = _check_inputs(op, query, key, weight, value)
    if query.dim() == 4:
        weight = weight.expand(lead[1], -1)
    elif weight.dim() == 2:
        weight = weight[0]
    value = None if value is None else _expanded(value, lead)
    return _expanded(query, lead), _expanded(key, lead), weight, value


def _agree(query, key, weight, value) -> bool:
    """Whether these are inputs without heads that agree in everything: most calls need no further look."""
    if query.is_nested or key.is_nested or weight.is_nested:  # some have no shape
        return False
    q, k = query.shape, key.shape
    return (
        len(q) == 3
        and len(k) == 3
        and q[0] == k[0]
        and q[2] == k[2]
        and weight.shape == q[2:]
        and query.dtype is key.dtype is weight.dtype
        and query.dtype.is_floating_point
        and query.device == key.device == weight.device
        and query.layout is key.layout is weight.layout is torch.strided
        and (
            value is None
            or (
                not value.is_nested
                and value.dim() == 3
                and value.shape[:2] == k[:2]
                and value.dtype is query.dtype
                and value.device == query.device
                and value.layout is torch.strided
            )
        )
    )


def _check_inputs(op, query, key, weight, value) -> tuple:
    """Returns (B,) or (B, H), to which query, key and value broadcast."""
    device, dtype = query.device, query.dtype
    rows = [("query", query), ("key", key)] + ([] if value is None else [("value", value)])
    for argument, t in (*rows, ("weight", weight)):
        check_layout(op, argument, t)
    if not dtype.is_floating_point:
        fail(op, "query", "a floating-point dtype", dtype)
    for argument, t in rows[1:]:
        if t.dtype != dtype or t.device != device:
            fail(op, argument, f"{dtype} on {device} like query", f"{t.dtype} on {t.device}")
    check_parameter(op, "weight", weight, query)
    rank = query.dim()
    if rank != 3 and rank != 4:
        fail(op, "query", "shape (B, Tq, D) or (B, H, Tq, D)", tuple(query.shape))
    lead = query.shape[:-2]
    for _, t in rows[1:]:
        if t.dim() == rank:
            lead = tuple(n if m == 1 else m for m, n in zip(lead, t.shape[:-2], strict=True))
    (_, D), H = query.shape[-2:], lead[1] if rank == 4 else 1
    if not _broadcasts(query, lead):
        fail(op, "query", f"shape {shape_text(*lead, 'Tq', 'D')}", tuple(query.shape))
    if key.dim() != rank or not _broadcasts(key, lead) or key.shape[-1] != D:
        fail(op, "key", f"shape {shape_text(*lead, 'Tk', D)}", tuple(key.shape))
    Tk = key.shape[-2]
    if value is not None and (value.dim() != rank or not _broadcasts(value, lead) or value.shape[-2] != Tk):
        fail(op, "value", f"shape {shape_text(*lead, Tk, 'Dv')}", tuple(value.shape))
    if (
        weight.dim() not in (1, 2)
        or weight.shape[-1] != D
        or (weight.dim() == 2 and weight.shape[0] not in (1, H))
    ):
        fail(op, "weight", f"shape {shape_text(D)} or {shape_text(H, D)}", tuple(weight.shape))
    return lead


def check_numbers(op: str, scale: float, softcap: float | None, activation: str, negative_slope: float) -> None:
    if activation not in SCORE_ACTIVATIONS:
        fail(op, "activation", f"one of {', '.join(map(repr, SCORE_ACTIVATIONS))}", repr(activation))
    for argument, number in (("scale", scale), ("softcap", softcap), ("negative_slope", negative_slope)):
        if isinstance(number, Tensor):
            fail(op, argument, "a number", "a Tensor")
    for argument, number in (("scale", scale), ("negative_slope", negative_slope)):
        if number != number:
            fail(op, argument, "a number", number)
    if softcap is not None and not softcap > 0:
        fail(op, "softcap", "a positive number or None", softcap)


def check_generator(op: str, generator: torch.Generator | None, device: torch.device) -> None:
    if generator is None or (isinstance(generator, torch.Generator) and generator.device.type == device.type):
        return
    got = f"one on {generator.device}" if isinstance(generator, torch.Generator) else type(generator).__name__
    fail(op, "generator", f"a torch.Generator on {device} like query, or None", got)


def check_dropout(op: str, argument: str, p: float) -> None:
    if isinstance(p, Tensor) or not 0 <= p < 1:
        fail(op, argument, "a number in [0, 1)", "a Tensor" if isinstance(p, Tensor) else p)


def _broadcasts(t: Tensor, lead: tuple) -> bool:
    return all(m == 1 or m == n for m, n in zip(t.shape[:-2], lead, strict=True))


def _expanded(t: Tensor, lead: tuple) -> Tensor:
    return t if t.shape[:-2] == lead else t.expand(*lead, -1, -1)


def shape_text(*sizes) -> str:
    return f"({', '.join(map(str, sizes))}{',' if len(sizes) == 1 else ''})"
