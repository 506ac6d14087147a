"""What adapters of conditional norms share: a norm with what scales and shifts it, gates and residuals."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fusedattn._dispatch import autocast_enabled
from fusedattn.ops.film import film
from fusedattn.ops.norm_film import norm_film

FUSES = "norm, scale and shift in one pass"
FUSES_BLOCK = "norms, modulation, gates and residuals, each group in one pass"
LEAST_OF_FILM = 1 << 17  # elements; without a norm there is less to save (_small.py)


def in_result_dtype(x: Tensor, *others: Tensor | None) -> Any:
    """All of them in the dtype that PyTorch's operators give to what is made of them; None stays None."""
    dtype = x.dtype
    for t in others:
        if t is not None and t.dtype is not dtype:
            dtype = torch.promote_types(dtype, t.dtype)
    if x.device.type == "cuda" and autocast_enabled(x.device):  # which computes norms in float32
        dtype = torch.promote_types(dtype, torch.float32)
    return [t if t is None or t.dtype is dtype else t.to(dtype) for t in (x, *others)]


def _kind(norm: nn.Module) -> tuple[str, dict[str, Any]]:
    """The name that norm_film has for a norm's kind, and what it takes beside."""
    if isinstance(norm, nn.LayerNorm):
        return "layer", {}
    if isinstance(norm, nn.GroupNorm):
        return "group", {"num_groups": norm.num_groups}
    if isinstance(norm, (nn.InstanceNorm1d, nn.InstanceNorm2d)):
        return "instance", {}
    if type(norm) is nn.BatchNorm2d:  # not a SyncBatchNorm
        running = {name: getattr(norm, name) for name in ("running_mean", "running_var", "num_batches_tracked")}
        training = norm.training or norm.running_mean is None
        return "batch", {**running, "training": training, "momentum": norm.momentum}
    if "RMSNorm" in type(norm).__name__:
        return "rms", {}
    raise TypeError(f"no norm that is known: {type(norm).__name__}")


def modulated(norm: Any, x: Tensor, gamma: Tensor | None, beta: Tensor | None, **options: Any) -> Any:
    """``gamma * norm(x) + beta``; gamma and beta (C,) or (B, C), options as of :func:`fusedattn.norm_film`."""
    kind, settings = _kind(norm)
    weight, bias = norm.weight, getattr(norm, "bias", None)
    tensors = {name: t for name, t in options.items() if isinstance(t, Tensor)}
    rms_weight = weight if kind == "rms" else None
    x, gamma, beta, _, *same = in_result_dtype(x, gamma, beta, rms_weight, *tensors.values())
    options.update(zip(tensors, same, strict=True))
    return norm_film(
        x,
        gamma,
        beta,
        norm=kind,
        weight=None if weight is None else weight.to(x.dtype),
        bias=None if bias is None else bias.to(x.dtype),
        eps=norm.eps,
        **settings,
        **options,
    )


def gated(y: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    """``residual + gate * y``, the gate (B, C)."""
    y, gate, residual = in_result_dtype(y, gate, residual)
    return film(y, gate, residual=residual, channel_dim=-1)


def feed_forward(
    norm: Any,
    layer: Callable[[Tensor], Tensor],
    y: Tensor,
    residual: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    gate_after: Tensor,
) -> Tensor:
    """The last part of a transformer block under adaLN, from what its attention answered on.

    ``h = residual + gate * y``, then ``h + gate_after * layer((1 + scale) * norm(h) + shift)``; conditions (B, C).
    """
    y, h = modulated(norm, y, scale, shift, gamma_offset=1.0, pre_residual=residual, pre_gate=gate)
    return gated(layer(y), gate_after, h)
