"""What patterns in graphs save before a compiler: `python -m benchmarks.compiled [NAME ...]`.

Inductor's time divided by that of `fusedattn.dropin.backend(always=True)`, on one thread of the CPU, forward and
in training. Where small sizes are below 1, `dropin.inductor` leaves them to Inductor (`_COMPILED` of
`fusedattn/dropin/_rewrite.py`), as it leaves layers without a norm.
"""

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedattn import dropin

from .crossover import best_times, recorded


def attention(q, k, w):
    """All queries and keys."""
    return torch.softmax(torch.tanh(q[:, :, None] + k[:, None]) @ w, -1) @ k


def step(q, k, w):
    return torch.bmm(torch.softmax((torch.tanh(q[:, None] + k) * w).sum(-1), -1)[:, None], k)


def block(x, r, scale, shift, gate):
    """What is between two layers of a transformer block: gated residual, norm, scale and shift."""
    h = r + gate[:, None] * x
    return F.layer_norm(h, h.shape[-1:]) * (1 + scale[:, None]) + shift[:, None], h


def group(x, scale, shift):
    return F.silu(F.group_norm(x, 32) * (1 + scale[:, :, None, None]) + shift[:, :, None, None])


def convolution(x, kernel, scale, shift):
    return F.relu(F.conv2d(x, kernel) * scale[:, :, None, None] + shift[:, :, None, None])


def _tokens(n: int) -> list[Tensor]:
    return [torch.randn(4, n, 384), torch.randn(4, n, 384), *torch.randn(3, 4, 384)]


def _maps(n: int) -> list[Tensor]:
    return [torch.randn(4, 128, n, n), *torch.randn(2, 4, 128)]


CASES: dict[str, tuple[Callable, Callable[[int], list[Tensor]], tuple[int, ...]]] = {
    "attention": (attention, lambda n: [*torch.randn(2, 4, n, 256), torch.randn(256)], (64, 256)),
    "step": (step, lambda n: [torch.randn(4, 128), torch.randn(4, n, 128), torch.randn(128)], (32, 64, 256)),
    "block": (block, _tokens, (64, 256, 1024)),
    "group": (group, _maps, (16, 32, 64)),
    "convolution": (convolution, lambda n: [*_maps(n)[:1], torch.randn(128, 128, 1, 1), *_maps(1)[1:]], (16, 64)),
}


def ratios(function: Callable, inputs: list[Tensor]) -> tuple[float, float]:
    """Forward and training: Inductor's time divided by that with the patterns."""
    torch.compiler.reset()
    backends = "inductor", dropin.backend(always=True)
    compiled = [torch.compile(function, backend=backend, fullgraph=True, dynamic=False) for backend in backends]
    torch.testing.assert_close(compiled[1](*inputs), compiled[0](*inputs), rtol=1e-3, atol=1e-3)
    found = []
    for training in (False, True):
        alone, rewritten = best_times([recorded(f, inputs, training) for f in compiled])
        found.append(alone / rewritten)
    return found[0], found[1]


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    for name in names or CASES:
        function, make, sizes = CASES[name]
        for n in sizes:
            torch.manual_seed(0)
            inputs = [t.requires_grad_() for t in make(n)]
            forward, training = ratios(function, inputs)
            shape = str(tuple(max(inputs, key=Tensor.numel).shape))
            print(f"{name:12} {shape:20} forward {forward:5.2f}  training {training:5.2f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
