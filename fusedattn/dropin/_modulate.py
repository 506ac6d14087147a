"""What adapters of conditional norms share: a norm, (1 + scale) and shift in one pass."""

from typing import Any

import torch
from torch import Tensor, nn

from fusedattn._dispatch import autocast_enabled
from fusedattn.ops.norm_film import norm_film


def in_result_dtype(x: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
    """All of them in the dtype that PyTorch's operators give to what is made of them; None is left out."""
    tensors = [x, *(t for t in others if t is not None)]
    dtype = x.dtype
    for t in tensors:
        dtype = torch.promote_types(dtype, t.dtype)
    if x.device.type == "cuda" and autocast_enabled(x.device):  # which computes norms in float32
        dtype = torch.promote_types(dtype, torch.float32)
    return tuple(t if t.dtype is dtype else t.to(dtype) for t in tensors)


def modulated(norm: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Any:
    """``norm(x) * (1 + scale) + shift`` of a layer or RMS norm; scale and shift (C,) or in the rank of x."""
    is_layer = isinstance(norm, nn.LayerNorm)
    weight, bias = norm.weight, norm.bias
    x, scale, shift, *_ = in_result_dtype(x, scale, shift, None if is_layer else weight)
    return norm_film(
        x,
        scale,
        shift,
        norm="layer" if is_layer else "rms",
        weight=None if weight is None else weight.to(x.dtype),
        bias=None if bias is None else bias.to(x.dtype),
        eps=norm.eps,
        gamma_offset=1.0,
    )
