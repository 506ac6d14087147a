"""Cases of attention within sequences of different lengths."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import fusedattn

from .contenders import Function
from .models import ModelCase


@dataclass(frozen=True)
class Sequences(ModelCase):
    """Each attends to itself; lengths are uniform from 1 to the longest. Packed, or padded with key_lengths: the
    same work by a user who has packed sequences, and by one who has not."""

    B: int
    longest: int
    D: int
    padded: bool = False

    @property
    def name(self) -> str:
        kind = "padded" if self.padded else "packed"
        return f"attention {kind} ({self.B}, 1..{self.longest}, {self.D}) {self.dtype}"

    def lengths(self) -> Tensor:
        return torch.randint(1, self.longest + 1, (self.B,), generator=torch.Generator().manual_seed(0))

    def visible(self) -> Tensor:
        return torch.arange(self.longest) < self.lengths()[:, None]

    def offsets(self) -> Tensor:
        return torch.nn.functional.pad(self.lengths().cumsum(0), (1, 0)).int()

    def _rows(self, seed: int) -> Tensor:
        rows = self.normal(int(self.lengths().sum()), self.D, seed=seed)
        return self._in_batch(rows, self._places()) if self.padded else rows

    def _places(self) -> Tensor:
        """Where packed rows are in a padded batch."""
        return self.visible().flatten().nonzero().squeeze(1)

    def _in_batch(self, rows: Tensor, places: Tensor) -> Tensor:
        batch = rows.new_zeros(self.B * self.longest, self.D)
        return batch.index_copy(0, places, rows).view(self.B, self.longest, self.D)

    def inputs(self) -> tuple[Tensor, ...]:
        return self._rows(0), self._rows(1), self._rows(2), self.normal(self.D, seed=3, scale=self.D**-0.5)

    def grad_output(self) -> Tensor:
        return self._rows(4)

    def eager_bytes(self, mode: str) -> int:
        scored = self.B * self.longest**2 * self.D
        return self.itemsize * scored * (2 if mode == "forward" else 3)

    def reduced(self) -> "Sequences":
        return replace(self, B=3, longest=20)

    def eager(self) -> dict[str, Function]:
        visible, places = self.visible(), self._places()

        def padded(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> Tensor:
            scores = torch.tanh(query[:, :, None] + key[:, None]) @ weight
            return scores.masked_fill(~visible[:, None], float("-inf")).softmax(-1) @ value

        def packed(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> Tensor:
            rows = (self._in_batch(t, places) for t in (query, key, value))
            return padded(*rows, weight).flatten(0, 1)[places]

        return {"eager": padded if self.padded else packed}

    def fused(self) -> Function:
        lengths, offsets = self.lengths(), self.offsets()

        def padded(*inputs: Tensor) -> Tensor:
            return fusedattn.additive_attention(*inputs, key_lengths=lengths)

        def packed(*inputs: Tensor) -> Tensor:
            longest = {"max_seqlen_q": self.longest, "max_seqlen_k": self.longest}
            return fusedattn.additive_attention_varlen(*inputs, offsets, offsets, **longest)

        return padded if self.padded else packed
