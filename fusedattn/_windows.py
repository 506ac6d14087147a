"""Windows of attention: query i sees keys c_i - left <= j <= c_i + right, -1 for no bound, c_i = i by default."""

import torch
from torch import Tensor

from fusedattn._dispatch import fail
from fusedattn._scores import check_integers, shape_text

ALL = (-1, -1)  # the window without bounds
_FAR = 2**61  # from any key; what is added to it stays a number of 64 bits


def sides(op: str, window_size, window_center: Tensor | None, is_causal: bool) -> tuple[int, int]:
    """(left, right) of ``window_size`` and of ``is_causal``, the window (-1, 0), together."""
    left, right = ALL
    if window_size is not None:
        is_pair = isinstance(window_size, tuple | list) and len(window_size) == 2
        if not is_pair or any(isinstance(n, bool) or not isinstance(n, int) or n < -1 for n in window_size):
            fail(op, "window_size", "a pair of integers (left, right), each -1 or more", repr(window_size))
        left, right = (min(n, _FAR) for n in window_size)
    elif window_center is not None and not is_causal:
        fail(op, "window_center", "None without window_size and is_causal", "a Tensor")
    return left, (0 if is_causal else right)


def centers(op: str, window_center: Tensor, rows: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 of shape ``rows``, (B, [H,] Tq)."""
    check_integers(op, "window_center", window_center)
    sizes = zip(reversed(window_center.shape), reversed(rows), strict=False)
    broadcasts = window_center.dim() <= len(rows) and all(m == 1 or m == n for m, n in sizes)
    if not broadcasts or window_center.device != device:
        received = f"{tuple(window_center.shape)} on {window_center.device}"
        fail(op, "window_center", f"a shape broadcastable to {shape_text(*rows)} on {device}", received)
    return window_center.to(torch.int64).expand(rows)


def within(window: tuple[int, int], center: Tensor | None, Tq: int, Tk: int, device: torch.device) -> Tensor:
    """bool ([B, [H,]] Tq, Tk): True where a key is in a query's window."""
    center = torch.arange(Tq, device=device) if center is None else center.clamp(-_FAR, _FAR)
    offset = torch.arange(Tk, device=device) - center.unsqueeze(-1)
    left, right = window
    inside = offset >= -left if left >= 0 else torch.ones_like(offset, dtype=torch.bool)
    return inside & (offset <= right) if right >= 0 else inside
