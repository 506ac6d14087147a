"""From which size on replaced modules are as fast as their originals: `python -m benchmarks.crossover [NAME ...]`.

How many times faster small ones are on one thread of the CPU, forward and in training, by the size that an
adapter's ``work`` gives. Where that is below 1 the original runs (``least``).
"""

import copy
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from fusedattn import dropin
from fusedattn.dropin._small import always_fused

from .dropin import originals

SIZES = [1 << n for n in range(11, 19, 2)]
C = 64
REPETITIONS = 30


def _tokens(n: int) -> Tensor:
    return torch.randn(1, n // C, C)


def _maps(n: int, B: int = 1) -> Tensor:
    return torch.randn(B, C, 4, n // (4 * B * C))


def _row(B: int = 1) -> Tensor:
    return torch.randn(B, C)


# By the name of the adapter: makes a module and its inputs, of n elements.
CASES: dict[str, Callable[[int], tuple]] = {
    "diffusers.AdaLayerNormContinuous": lambda n: (
        originals("diffusers").AdaLayerNormContinuous(C, C),
        _tokens(n),
        _row(),
    ),
    "diffusers.AdaGroupNorm": lambda n: (originals("diffusers").AdaGroupNorm(C, C, 8), _maps(n), _row()),
    "dit.DiTBlock": lambda n: (originals("dit").DiTBlock(C), _tokens(n), _row()),
    "guided_diffusion.ResBlock": lambda n: (
        originals("guided_diffusion").ResBlock(C, C, 0.0, C, use_scale_shift_norm=True),
        _maps(n),
        _row(),
    ),
    "film.FiLM": lambda n: (originals("film").FiLM(), _maps(n), _row(), _row()),
    "biggan.ccbn": lambda n: (originals("biggan").ccbn(C, C, nn.Linear), _maps(n, 2), _row(2)),
    "stargan_v2.AdaIN": lambda n: (originals("stargan_v2").AdaIN(C, C), _maps(n), _row()),
    "pixelcnn.GatedActivation": lambda n: (originals("pixelcnn").GatedActivation(), _maps(n)),
    "gnmt.BahdanauAttention": lambda n: (
        originals("gnmt").BahdanauAttention(C, C, C, batch_first=True),
        torch.randn(1, 4, C),
        _tokens(n // 4),
    ),
    "captioning.Attention": lambda n: (originals("captioning").Attention(C, C, C), _tokens(n), _row()),
    "attention_learn_to_route.Attention": lambda n: (
        originals("attention_learn_to_route").Attention(C, True),
        _row(),
        torch.randn(n // C, 1, C),
    ),
    "torchmil.AttentionPool": lambda n: (originals("torchmil").AttentionPool(C, C), _tokens(n)),
}


def best_times(functions: list[Callable[[], object]]) -> list[float]:
    """The best of many calls of each, in alternation."""
    best = [float("inf")] * len(functions)
    for _ in range(REPETITIONS):
        for n, function in enumerate(functions):
            start = time.thread_time()
            function()
            best[n] = min(best[n], time.thread_time() - start)
    return best


def recorded(model: Callable, inputs: list[Tensor], training: bool) -> Callable[[], object]:
    """A call of a model, forward alone or a step with the gradients of all that has some."""

    def run() -> None:
        with torch.set_grad_enabled(training):
            answers = [t for t in _pytree.tree_leaves(model(*inputs)) if isinstance(t, Tensor)]
            if training:
                torch.autograd.backward(answers, [torch.ones_like(t) for t in answers])

    run()
    return run


def ratios(name: str, n: int) -> tuple[float, float]:
    """Forward and training: the original's time divided by the replaced one's."""
    module, *inputs = CASES[name](n)
    fused = copy.deepcopy(module)
    dropin.replace(fused, only=name, strict=True)
    inputs = [t.requires_grad_() for t in inputs]

    found = []
    for training in (False, True):
        with always_fused():
            original, replaced = best_times([recorded(model, inputs, training) for model in (module, fused)])
        found.append(original / replaced)
    return found[0], found[1]


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    print(f"{'forward / training':34}" + "".join(f"{n:>14,}" for n in SIZES))
    for name in names or CASES:
        cells = "".join(f"{'{:.2f} / {:.2f}'.format(*ratios(name, n)):>14}" for n in SIZES)
        print(f"{name:34}{cells}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
