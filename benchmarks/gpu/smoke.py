"""Every op of a backend in every surrounding that users put it into, on small inputs, against the reference.

    python -m benchmarks.gpu.smoke cuda|triton

It asks whether kernels run and roughly agree, in seconds; how accurate they are is asked by the tests. Status 1 if
something failed; a check that fails leaves the others to run.
"""

import functools
import sys
import threading
import time
import traceback
from collections.abc import Callable

import torch
from torch import Tensor

import fusedattn

from .device import DEVICE, brief, synchronize
from .stages import record, rehearsing

Function = Callable[..., list[Tensor]]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def attention_inputs(Tq: int) -> list[Tensor]:
    return [normal(2, Tq, 64), normal(2, 70, 64), normal(2, 70, 48), normal(64)]


def film_inputs() -> list[Tensor]:
    return [normal(2, 8, 33, 5), normal(2, 8), normal(2, 8)]


def attention_options() -> dict:
    return {"key_lengths": torch.tensor([70, 9], device=DEVICE), "return_weights": True, "softcap": 3.0}


def trained(function: Callable, inputs: list[Tensor]) -> list[Tensor]:
    """Results of the function, and the gradients of its inputs."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    results = function(*leaves)
    results = list(results) if isinstance(results, tuple) else [results]
    return results + list(torch.autograd.grad([t.float().sin().sum() for t in results], leaves))


def checks(backend: str) -> dict[str, tuple[Callable, Callable, list[Tensor]]]:
    """By name: a function of the backend, its reference, and inputs."""
    found = {}
    for name, Tq in (("one query", 1), ("few queries", 3), ("many queries", 70)):
        options = attention_options()
        kernel = functools.partial(fusedattn.additive_attention, **options, backend=backend)
        reference = functools.partial(fusedattn.additive_attention_ref, **options)
        found[f"additive_attention, {name}"] = kernel, reference, attention_inputs(Tq)
    kernel = functools.partial(fusedattn.film, activation="silu", backend=backend)
    found["film"] = kernel, functools.partial(fusedattn.film_ref, activation="silu"), film_inputs()
    return found


def expect(actual: list[Tensor], expected: list[Tensor], rtol: float = 2e-3, atol: float = 2e-3) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.float(), e.float(), rtol=rtol, atol=atol)


def by_default(kernel, reference, inputs):
    expect(trained(kernel, inputs), trained(reference, inputs))


def on_another_stream(kernel, reference, inputs):
    expected = trained(reference, inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        actual = trained(kernel, inputs)
    stream.synchronize()
    expect(actual, expected)


def in_a_graph(kernel, reference, inputs):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        trained(kernel, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = trained(kernel, inputs)
    for t in inputs:
        t.mul_(0.5)
    graph.replay()
    expect(actual, trained(reference, inputs))


def under_autocast(kernel, reference, inputs):
    with torch.autocast(DEVICE.type, torch.bfloat16):
        actual = trained(kernel, inputs)
    expect(actual, trained(reference, inputs), rtol=0.1, atol=0.1)


def in_two_threads(kernel, reference, inputs):
    expected, wrong = trained(kernel, inputs), []

    def work():
        for _ in range(10):
            try:
                again = trained(kernel, inputs)
                if not all(torch.equal(a, e) for a, e in zip(again, expected, strict=True)):
                    wrong.append("other results than alone")
            except Exception as error:  # of a thread: reported below
                wrong.append(repr(error))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise AssertionError(wrong[0])


def compiled(kernel, reference, inputs):
    expect(trained(torch.compile(kernel, fullgraph=True), inputs), trained(reference, inputs))


# Cheapest first: compiling is last.
SURROUNDINGS = (by_default, on_another_stream, in_a_graph, under_autocast, in_two_threads, compiled)
NEEDS_A_GPU = (on_another_stream, in_a_graph)


def attempt(surrounding: Callable, kernel, reference, inputs) -> str | None:
    """What went wrong, or None."""
    try:
        surrounding(kernel, reference, [t.clone() for t in inputs])
        synchronize()
    except Exception as error:  # whatever a kernel does: the next check is to run
        traceback.print_exc()
        return brief(error)
    return None


def main() -> int:
    backend = "cpu" if rehearsing() else sys.argv[1]
    torch.manual_seed(0)
    found = checks(backend)
    failed = 0
    for surrounding in SURROUNDINGS:
        if rehearsing() and surrounding in NEEDS_A_GPU:
            continue
        for name, check in found.items():
            start = time.perf_counter()
            error = attempt(surrounding, *check)
            seconds, where = time.perf_counter() - start, surrounding.__name__
            record(kind="smoke", backend=backend, op=name, where=where, seconds=seconds, error=error)
            print(f"{backend:7}{name:34}{where:20}{seconds:6.2f} s  {error or 'agrees'}".rstrip(), flush=True)
            failed += error is not None
    print(f"{failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
