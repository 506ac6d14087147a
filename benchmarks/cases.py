"""What is measured: shapes, the inputs made for them, and how much work each does.

Symbols: B batch, Tq / Tk query / key length, D score and value width, C channels, N positions per channel.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, sqrt

import torch
from torch import Tensor

MODES = ("forward", "training")
LAYOUTS = ("NCHW", "channels_last", "BTC")  # of FiLM's x
SIZES = ("cache", "memory")  # of FiLM's x: in the last-level cache and beyond it

# Multiply-type vector instructions of the CPU kernels per tanh (csrc/additive_attention/cpu_kernel_*.cpp):
# forward one multiply-add and a quarter of the 13 operations that four channels share; backward 8.
FORWARD_SLOTS = 4.25
BACKWARD_SLOTS = 8.0


@dataclass(frozen=True)
class AttentionCase:
    """Additive attention in float32 with Dv = D, no mask, as in PyTorch's own Bahdanau benchmark."""

    B: int
    Tq: int
    Tk: int
    D: int
    unit = "G tanh/s"

    @property
    def name(self) -> str:
        return f"attention ({self.B}, {self.Tq}, {self.Tk}, {self.D})"

    def inputs(self) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        B, Tq, Tk, D = self.B, self.Tq, self.Tk, self.D
        return normal(B, Tq, D), normal(B, Tk, D), normal(B, Tk, D), normal(D) / sqrt(D)

    def grad_output(self) -> Tensor:
        return torch.randn(self.B, self.Tq, self.D, generator=torch.Generator().manual_seed(1))

    def work(self, mode: str) -> float:
        """Scored elements; a training step is counted once, so that the rates of both modes compare."""
        return self.B * self.Tq * self.Tk * self.D

    def bytes_read(self, mode: str) -> int:
        """Every input once, and again by the backward pass, which reads the output's gradient too."""
        inputs, output = self._elements()
        return 4 * (inputs if mode == "forward" else 2 * inputs + output)

    def bytes_written(self, mode: str) -> int:
        """The output, and a gradient of every input."""
        inputs, output = self._elements()
        return 4 * (output if mode == "forward" else output + inputs)

    def bytes_moved(self, mode: str) -> int:
        return self.bytes_read(mode) + self.bytes_written(mode)

    def _elements(self) -> tuple[int, int]:
        return self.B * (self.Tq + 2 * self.Tk) * self.D + self.D, self.B * self.Tq * self.D

    @property
    def recomputes_scores(self) -> bool:
        """Whether backward computes the scores anew: keeping them would outgrow query and key."""
        return self.Tq * self.Tk > (self.Tq + self.Tk) * self.D

    def vector_operations(self, mode: str) -> float:
        """Multiply-type operations of the algorithm used; with Dv = D each product with the values adds one
        per tanh, and backward computes the scores anew where keeping them would outgrow query and key."""
        slots = FORWARD_SLOTS + 1
        if mode == "training":
            slots += BACKWARD_SLOTS + 2 + (FORWARD_SLOTS if self.recomputes_scores else 0)
        return slots * self.work(mode)

    def eager_bytes(self, mode: str) -> int:
        """What the (B, Tq, Tk, D) tensors of the eager form take: the sum and its tanh, then a gradient."""
        return 4 * self.B * self.Tq * self.Tk * self.D * (2 if mode == "forward" else 3)

    def blocks(self) -> Iterator[tuple]:
        """Parts that can be computed one by one, as an index into each input, of which the first is the output's,
        too: queries of one element of the batch, with some 2^20 scored elements."""
        rows = max(1, (1 << 20) // (self.Tk * self.D))
        for b in range(self.B):
            element = slice(b, b + 1)
            for i in range(0, self.Tq, rows):
                yield (element, slice(i, i + rows)), element, element, ...

    def summed_terms(self) -> dict[str, int]:
        """How many terms each result adds up."""
        B, Tq, Tk = self.B, self.Tq, self.Tk
        terms = {
            "context": Tk,
            "grad query": Tk,
            "grad key": Tq,
            "grad value": Tq,
            "grad weight": B * Tq * Tk,
        }
        return {name: max(n, self.D) for name, n in terms.items()}  # each also rests on sums over D


@dataclass(frozen=True)
class FilmCase:
    """y = gamma x + beta in float32; gamma, beta (B, C); x (B, C, N, N), or (B, N, C) for layout BTC."""

    layout: str  # one of LAYOUTS
    size: str  # one of SIZES
    B: int
    C: int
    N: int
    unit = "GB/s"

    @property
    def name(self) -> str:
        shape = (self.B, self.N, self.C) if self.layout == "BTC" else (self.B, self.C, self.N, self.N)
        return f"film {self.layout} {shape}"

    @property
    def channel_dim(self) -> int:
        return 2 if self.layout == "BTC" else 1

    def _normal(self, seed: int) -> Tensor:
        shape = (self.B, self.N, self.C) if self.layout == "BTC" else (self.B, self.C, self.N, self.N)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return x.contiguous(memory_format=torch.channels_last) if self.layout == "channels_last" else x

    def inputs(self) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(2)
        gamma, beta = torch.randn(2, self.B, self.C, generator=generator)
        return self._normal(0), gamma, beta

    def grad_output(self) -> Tensor:
        return self._normal(1)

    def x_bytes(self) -> int:
        return 4 * self.B * self.C * (self.N if self.layout == "BTC" else self.N * self.N)

    def work(self, mode: str) -> float:
        return self.bytes_moved(mode)

    def bytes_moved(self, mode: str) -> int:
        return self.bytes_read(mode) + self.bytes_written(mode)

    def bytes_read(self, mode: str) -> int:
        """Forward reads x; backward reads x and dy."""
        return self.x_bytes() * (1 if mode == "forward" else 3)

    def bytes_written(self, mode: str) -> int:
        """Forward writes y; backward writes dx."""
        return self.x_bytes() * (1 if mode == "forward" else 2)

    def blocks(self) -> Iterator[tuple]:
        for b in range(self.B):
            yield (slice(b, b + 1),) * 3

    def eager_bytes(self, mode: str) -> int:
        return 3 * self.x_bytes()

    def summed_terms(self) -> dict[str, int]:
        n = self.x_bytes() // (4 * self.B * self.C)
        return {"y": 1, "grad x": 1, "grad gamma": n, "grad beta": n}


Case = AttentionCase | FilmCase

ATTENTION = (
    AttentionCase(4, 512, 512, 256),
    AttentionCase(128, 10, 128, 1024),
    AttentionCase(1280, 1, 66, 1024),
    AttentionCase(64, 1, 1024, 512),
    AttentionCase(1, 1, 100_000, 256),
)

SMALL = AttentionCase(1, 1, 32, 64)  # overhead of a call, not work


def sweep(lengths: tuple[int, ...]) -> list[AttentionCase]:
    """Growing Tq = Tk, for time and peak memory against sequence length."""
    return [AttentionCase(1, length, length, 256) for length in lengths]


def film(sizes: dict[str, int]) -> list[FilmCase]:
    """Every layout at every size, given in bytes of x."""
    B, C = 16, 256
    positions = {size: x_bytes / (4 * B * C) for size, x_bytes in sizes.items()}
    return [
        FilmCase(layout, size, B, C, ceil(positions[size] if layout == "BTC" else sqrt(positions[size])))
        for size in SIZES
        for layout in LAYOUTS
    ]
