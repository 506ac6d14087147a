"""FiLM and the residual block of ethanjperez/film.

Conventions: gamma x + beta without an offset, (B, C) each. The block normalises its convolution, most often
without an affine of its own, modulates, takes relu and adds what came in; other orders (``condition_method``) and
dropout are left to it, its FiLM is then fused by itself.
"""

import torch
import torch.nn.functional as F
from torch import nn

from fusedattn.dropin._adapter import Adapter
from fusedattn.dropin._modulate import LEAST_OF_FILM, in_result_dtype, modulated
from fusedattn.ops.film import film

_SOURCE = "ethanjperez/film, vr/models/filmed_net.py"


def _film(self, x, gammas, betas):
    return film(*in_result_dtype(x, gammas, betas))


def _probe(module, sizes, draw):
    return module(draw(2, 3, 4, 5), draw(2, 3), draw(2, 3))


def _block(self, x, gammas=None, betas=None, extra_channels=None, cond_maps=None):
    if self.with_input_proj:
        if extra_channels is not None and self.extra_channel_freq >= 1:
            x = torch.cat([x, extra_channels], 1)
        x = F.relu(self.input_proj(x))
    maps = [x, cond_maps, extra_channels if self.extra_channel_freq >= 2 else None]
    maps = [t for t in maps if t is not None]
    y = self.conv1(maps[0] if len(maps) == 1 else torch.cat(maps, 1))
    return modulated(self.bn1, y, gammas, betas, activation="relu", residual=x if self.with_residual else None)


def _probe_block(module, sizes, draw):
    B, C, coordinates = 2, sizes["C"], None
    taken, came = module.conv1.in_channels, sizes["C"]
    if module.with_input_proj:
        came = module.input_proj.in_channels
    extra = taken - C - module.num_cond_maps if module.extra_channel_freq >= 2 else 2
    if module.extra_channel_freq >= 1:
        coordinates = draw(B, extra, 4, 5)
        came -= extra if module.with_input_proj else 0
    maps = draw(B, module.num_cond_maps, 4, 5) if module.num_cond_maps else None
    return module(draw(B, came, 4, 5), draw(B, C), draw(B, C), coordinates, maps)


def _reasons(module):
    if module.condition_method != "bn-film" or not module.with_cond[0] or not module.with_batchnorm:
        return ["conditions elsewhere than after a batch norm; its FiLM is an entry of its own"]
    reasons = [] if not module.dropout else ["has dropout between FiLM and relu; its FiLM is an entry of its own"]
    return reasons + ([] if type(module.bn1) is nn.BatchNorm2d else [f"has a {type(module.bn1).__name__}"])


ADAPTERS = (
    Adapter(
        name="film.FiLM",
        source=_SOURCE,
        fuses="scale and shift in one pass",
        least=LEAST_OF_FILM,
        shapes={},
        fused=_film,
        probe=_probe,
    ),
    Adapter(
        name="film.FiLMedResBlock",
        source=_SOURCE,
        fuses="batch norm, FiLM, relu and the residual in one pass",
        shapes={
            "input_proj.*": None,
            "conv1.weight": ("C", "I", "K", "K"),
            "conv1.bias": ("C",),
            "bn1.weight?": ("C",),
            "bn1.bias?": ("C",),
            "bn1.running_mean?": ("C",),
            "bn1.running_var?": ("C",),
            "bn1.num_batches_tracked?": (),
        },
        fused=_block,
        probe=_probe_block,
        inside=("bn1", "film"),
        reasons=_reasons,
    ),
)
