"""The dtype rule of every op, for all that cannot import each other."""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the inner arithmetic, of sums, of ``lse`` and of kept scores: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
