"""Calls of the CUDA C++ kernels for other tools to watch: ``small`` for compute-sanitizer, ``large`` for ncu."""

import sys

import torch

import fusedattn

from .device import DEVICE, synchronize
from .stages import rehearsing

BACKEND = "cpu" if rehearsing() else "cuda"
# B, Tq, Tk, D, Dv: one query, few, tiles with ragged ends, kept scores and scores made again.
SMALL = ((2, 1, 300, 33, 17), (2, 3, 70, 64, 64), (1, 5, 64, 40, 8), (2, 70, 83, 17, 70), (1, 130, 129, 8, 5))
LARGE = ((64, 512, 512, 256, 256), (64, 1, 1024, 512, 512))


def normal(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()


def attention(sizes: tuple[int, ...], dtype: torch.dtype, **options) -> None:
    B, Tq, Tk, D, Dv = sizes
    inputs = [normal(*shape, dtype=dtype) for shape in ((B, Tq, D), (B, Tk, D), (B, Tk, Dv), (D,))]
    context = fusedattn.additive_attention(*inputs, backend=BACKEND, **options)
    torch.autograd.grad(context.sum(), inputs)


def film(shape: tuple[int, ...], channel_dim: int, dtype: torch.dtype) -> None:
    B, C = shape[0], shape[channel_dim]
    x, gamma, beta = (normal(*s, dtype=dtype) for s in (shape, (B, C), (B, C)))
    y = fusedattn.film(x, gamma, beta, channel_dim=channel_dim, activation="silu", residual=x, backend=BACKEND)
    torch.autograd.grad(y.sum(), (x, gamma, beta))


def small() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for sizes in SMALL:
            B, Tq, Tk, *_ = sizes
            attention(sizes, dtype)
            lengths = torch.tensor([Tk // 2, 0][:B], device=DEVICE)
            mask = torch.rand(Tq, Tk, device=DEVICE) > 0.4
            attention(sizes, dtype, mask=mask, key_lengths=lengths, is_causal=True, softcap=2.0)
        for shape, channel_dim in (((2, 5, 67), 1), ((2, 129, 63), 2), ((1, 2, 5000), 1)):
            film(shape, channel_dim, dtype)
        synchronize()
        print(dtype, flush=True)


def large() -> None:
    for sizes in LARGE[1:] if rehearsing() else LARGE:
        for _ in range(2):
            attention(sizes, torch.float32)
    synchronize()


if __name__ == "__main__":
    {"small": small, "large": large}[sys.argv[1]]()
