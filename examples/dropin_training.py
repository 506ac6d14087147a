"""What the examples of fusedattn.dropin share: the same training of a model as it is and replaced."""

import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fusedattn


def train(model: nn.Module, loss_of: Callable[[nn.Module, torch.Generator], Tensor], steps: int, rate: float):
    """(losses, ms a step at best, MiB kept for the backward pass)."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    losses, times, kept = [], [], {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    for _ in range(steps):
        start = time.perf_counter()
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = loss_of(model, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
        losses.append(loss.item())
    return losses, 1e3 * min(times), sum(kept.values()) / 2**20


def compare(
    model: nn.Module, loss_of: Callable[[nn.Module, torch.Generator], Tensor], steps: int, rate: float = 2e-3
) -> None:
    """Prints the report of replacing, and losses, time and memory of both, from the same weights and data."""
    replaced = copy.deepcopy(model)
    print(fusedattn.dropin.replace(replaced))
    for name, made in (("original", model), ("replaced", replaced)):
        losses, ms, mib = train(made, loss_of, steps, rate)
        print(f"{name}: loss {losses[0]:.4f} -> {losses[-1]:.4f}, {ms:.0f} ms a step, {mib:.0f} MiB for backward")
