"""Exported programs for other runtimes."""

from collections.abc import Callable

from torch._ops import OpOverload

from fusedattn import _autograd


def decompositions() -> dict[OpOverload, Callable]:
    """What turns the operators of an exported program into ATen's, for runtimes that have no kernels of fusedattn.

    ``torch.export.export(model, inputs).run_decompositions(fusedattn.decompositions())`` has the memory and the
    speed of plain PyTorch. ``torch.onnx.export(model, inputs, dynamo=True)`` needs no call of it.
    """
    found: dict[OpOverload, Callable] = {}
    for op in _autograd.DECLARED:
        found |= op.decompositions()
    return found
