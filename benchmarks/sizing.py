"""Sizes by what a machine has: its cache, its free memory, and how fast plain PyTorch is on it.

Speed is measured first, within a second or two. A case of which the slowest contender would need too long or too
much is halved until it fits, and every choice comes with a line that says why. Halving keeps a machine at the same
sizes from run to run, so that results compare.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from . import contenders
from .cases import AttentionCase, film
from .machine import GIB, MIB

EAGER_SECONDS = 4.0  # that an eager training step may take: a case runs some twenty of them
CLONE_SECONDS = 0.2  # that x.clone() may take: a case of FiLM moves as much a few hundred times
PROBE = AttentionCase(1, 128, 512, 256)  # tanh(q + k) has 64 MiB there
PROBES = 4  # the fastest counts, so that a busy moment does not decide


@dataclass(frozen=True)
class Speed:
    """Of plain PyTorch, per second."""

    eager: float  # scored elements in a training step of attention
    clone: float  # bytes of x in x.clone()


def speed() -> Speed:
    inputs, grad = PROBE.inputs(), PROBE.grad_output()
    step = contenders.step(PROBE, "training", "eager", contenders.attention_matmul, inputs, grad)
    x = torch.ones(64 * MIB // 4)
    return Speed(PROBE.work("training") / _fastest(step), 64 * MIB / _fastest(x.clone))


def _fastest(run: Callable) -> float:
    def seconds() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return min(seconds() for _ in range(PROBES))


def fitted(case: AttentionCase, speed: Speed, memory: int) -> tuple[AttentionCase, list[str]]:
    """The case with its batch halved until eager's training step fits into half of the free memory and into
    EAGER_SECONDS, and what to say of it: nothing where nothing changed."""
    smaller, reasons = case, []
    while smaller.B > 1:
        needs, seconds = smaller.eager_bytes("training"), smaller.work("training") / speed.eager
        if needs > memory // 2:
            reasons.append(f"eager would need {needs / GIB:.1f} of {memory / GIB:.1f} GiB")
        elif seconds > EAGER_SECONDS:
            reasons.append(f"an eager step would take {seconds:.1f} s")
        else:
            break
        smaller = replace(smaller, B=smaller.B // 2)
    return smaller, [f"{case.name} became {smaller.name}: {reasons[0]}"] if reasons else []


def film_bytes(cache: int, memory: int, speed: Speed) -> tuple[dict[str, int], list[str]]:
    """Bytes of x in the cache and beyond it, and why: four of the one fit into the last-level cache, the other is
    four times as large, or as much of that as free memory and CLONE_SECONDS allow. For want of time alone it stays
    above half of the cache, so that x and y together do not fit."""
    limits = {
        f"of {memory / GIB:.1f} GiB free memory it may take a sixteenth": memory // 16,
        f"x.clone() of twice as much would take over {CLONE_SECONDS} s": max(
            int(speed.clone * CLONE_SECONDS), cache // 2
        ),
    }
    beyond, reason = 4 * cache, "four times the cache"
    while exceeded := [why for why, limit in limits.items() if beyond > limit]:
        beyond, reason = beyond // 2, exceeded[0]
    sizes = {"cache": cache // 8, "memory": beyond}
    shapes = {case.size: case.name.removeprefix("film BTC ") for case in film(sizes) if case.layout == "BTC"}
    return sizes, [
        f"FiLM, last-level cache {cache / MIB:.3g} MiB: in it {shapes['cache']}, {sizes['cache'] / MIB:.3g} MiB "
        f"(an eighth of it); beyond it {shapes['memory']}, {beyond / MIB:.3g} MiB ({reason})"
    ]
