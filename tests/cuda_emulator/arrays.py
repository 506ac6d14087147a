"""Tensors as the arrays that the emulator's functions take."""

import numpy as np
import torch
from torch import Tensor


def array(t: Tensor | None) -> np.ndarray | None:
    """t's memory, with its strides; float16 and bfloat16 as uint16, which numpy has."""
    if t is None:
        return None
    return (t.detach().view(torch.uint16) if t.element_size() == 2 else t.detach()).numpy()


def name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def poisoned(shape, dtype: torch.dtype) -> Tensor:
    """An output that shows what a kernel did not write."""
    return torch.full(shape, float("nan"), dtype=dtype, device="cpu")
