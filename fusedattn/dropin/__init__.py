"""Makes the attention and conditioning modules that a model already has fused, in place.

    report = fusedattn.dropin.replace(model)
    print(report)  # what is fused now, and what not with the reason

An adapter (``fusedattn/dropin/<package>.py``) knows one module of one source: its parameters, its conventions, and
how it answers. A module is recognised by the name of its class, by all its parameters and their shapes, and by its
answers to a small probe, never by its name alone. Nothing is imported that the user has not imported.
"""

import functools
import importlib

from torch import nn

from fusedattn._dispatch import UnsupportedError
from fusedattn.dropin._adapter import Adapter
from fusedattn.dropin._replace import Selection, plan, restore
from fusedattn.dropin._report import Entry, GraphReport, Report, Rewrite
from fusedattn.dropin._rewrite import backend, inductor, rewrite

__all__ = [
    "Adapter",
    "Entry",
    "GraphReport",
    "Report",
    "Rewrite",
    "backend",
    "inductor",
    "replace",
    "restore",
    "rewrite",
    "supported",
]

# The files that hold adapters, each in a tuple ADAPTERS.
_FILES = (
    "abmil",
    "allennlp",
    "attention_learn_to_route",
    "bentrevett",
    "biggan",
    "captioning",
    "clam",
    "coqui",
    "d2l",
    "diffusers",
    "diffusers_blocks",
    "diffusion_policy",
    "dit",
    "espnet",
    "fairseq",
    "film",
    "gnmt",
    "guided_diffusion",
    "han",
    "keras",
    "multiple_style_transfer",
    "ncsn",
    "news_recommendation",
    "opennmt",
    "pixelcnn",
    "pytorch_tutorial",
    "speechbrain",
    "stargan_v2",
    "tacotron2",
    "torch_geometric",
    "torchmil",
)


@functools.cache
def supported() -> tuple[Adapter, ...]:
    """Every module that :func:`replace` knows: its name, its source, what runs fused, and its limits."""
    files = (importlib.import_module(f"{__name__}.{file}") for file in _FILES)
    return tuple(adapter for file in files for adapter in file.ADAPTERS)


def replace(model: nn.Module, only: Selection = None, exclude: Selection = None, strict: bool = False) -> Report:
    """Makes every module of ``model`` that is known fused, in place, and reports.

    Parameters, ``state_dict`` keys, signatures, returned values, hooks, buffers, training mode and ``isinstance``
    stay as they are; ``type(module)`` becomes a subclass of what it was, of the same name. Copies and pickles of a
    replaced model are fused. A module that is known by name but differs from the known source is left alone.

    Args:
        model: a module, or one that contains some.
        only: replace these alone: paths in the model, as patterns (``"decoder.*"``), names that :func:`supported`
            lists (``"diffusers.AdaLayerNorm"``, ``"diffusers"``, ``"AdaLayerNorm"``), or classes; one of them or
            several. Default: None, for all.
        exclude: leave these alone, in the same terms. Default: None.
        strict: raise, and change nothing, unless all that is known and chosen can be replaced, and at least one
            is. Default: False.

    Returns:
        The report; ``print`` shows it.

    Raises:
        TypeError: ``model`` is no module; ``only`` or ``exclude`` holds something else than names and classes.
        ValueError: a name in ``only`` or ``exclude`` that is neither that of an adapter nor of a module known.
        UnsupportedError: with ``strict``; the message is the report.
    """
    report, changes = plan(model, supported(), only, exclude)
    if strict and not all(entry.replaced or not entry.is_chosen for entry in report):
        raise UnsupportedError(f"replace: strict: nothing was changed, since not all can be replaced\n{report}")
    if strict and not report.replaced:
        raise UnsupportedError(f"replace: strict: nothing to replace\n{report}")
    for change in changes:
        change()
    return report
