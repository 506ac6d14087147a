"""Exported programs for other runtimes."""

from collections.abc import Callable

from torch._ops import OpOverload

from fusedattn.ops.additive_attention import ATTENTION
from fusedattn.ops.additive_attention_varlen import ATTENTION_VARLEN
from fusedattn.ops.additive_scores import SCORES
from fusedattn.ops.attention_pool import ATTENTION_POOL
from fusedattn.ops.film import FILM
from fusedattn.ops.gated_film import GATED_FILM
from fusedattn.ops.hard_additive_attention import HARD_ATTENTION
from fusedattn.ops.norm_film import NORM_FILM


def decompositions() -> dict[OpOverload, Callable]:
    """What turns the operators of an exported program into ATen's, for runtimes that have no kernels of fusedattn.

    ``torch.export.export(model, inputs).run_decompositions(fusedattn.decompositions())`` has the memory and the
    speed of plain PyTorch. ``torch.onnx.export(model, inputs, dynamo=True)`` needs no call of it.
    """
    found: dict[OpOverload, Callable] = {}
    for op in (ATTENTION, ATTENTION_VARLEN, ATTENTION_POOL, SCORES, FILM, GATED_FILM, HARD_ATTENTION, NORM_FILM):
        found |= op.decompositions()
    return found
