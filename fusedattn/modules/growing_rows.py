"""Rows that grow at their end, in memory with room for more: a row costs no copy of those before it.

Every length is a tensor of its own over the same memory, of which later ones write only what lies beyond it. So it
may be saved for backward, and all T lengths of a loop take the memory of 2 T rows, where ``torch.cat`` would
take T^2 / 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fusedattn._dispatch import is_eager

LEAST = 16  # rows of the first memory


class GrowingRows:
    """Rows (B, ..., t, width) and the memory that they lie in; ``append`` makes those with one row more."""

    def __init__(self, rows: Tensor, memory: _Memory):
        self.rows, self._memory = rows, memory

    @classmethod
    def of(cls, rows: Tensor) -> GrowingRows:
        """In memory of their own, once they grow."""
        return cls(rows, _Memory(rows.detach(), rows.shape[-2]))

    def append(self, row: Tensor) -> GrowingRows:
        """With ``row`` (B, ..., 1, width) after them."""
        t = self.rows.shape[-2]
        if not _may_share(self.rows, row):
            return GrowingRows.of(torch.cat([self.rows, row], -2))
        memory = self._memory
        if not memory.has_room(t, row):
            memory = _Memory.around(self.rows.detach())
        return GrowingRows(_Append.apply(self.rows, row, memory), memory)


def _may_share(rows: Tensor, row: Tensor) -> bool:
    """Whether this is a plain eager call of like tensors: no transform, no trace."""
    return (
        type(rows) is Tensor
        and type(row) is Tensor
        and rows.dtype is row.dtype
        and rows.device == row.device
        and rows.shape[:-2] == row.shape[:-2]
        and is_eager()
        and not torch._C._len_torch_dispatch_stack()
    )


class _Memory:
    """Room for rows, the first ``filled`` of which are taken."""

    def __init__(self, room: Tensor, filled: int):
        self.room, self.filled = room, filled

    @classmethod
    def around(cls, rows: Tensor) -> _Memory:
        """With a copy of the rows, and as much room again."""
        *lead, t, width = rows.shape
        room = rows.new_empty((*lead, max(2 * t, LEAST), width))
        room[..., :t, :] = rows
        return cls(room, t)

    def has_room(self, t: int, row: Tensor) -> bool:
        """Whether row t is free: another loop may have gone on from the same rows."""
        return self.filled == t < self.room.shape[-2] and self.room.is_inference() == row.is_inference()

    def append(self, row: Tensor) -> Tensor:
        # .data has a version of its own: what was saved of the rows before it stays as it is.
        self.room.data[..., self.filled, :] = row.squeeze(-2)
        self.filled += 1
        return self.room.data[..., : self.filled, :]


class _Append(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, row: Tensor, memory: _Memory) -> Tensor:
        return memory.append(row)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad[..., :-1, :], grad[..., -1:, :], None
