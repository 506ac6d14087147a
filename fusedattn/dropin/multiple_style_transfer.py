"""Conditional instance norms of networks for several styles, after Dumoulin et al. 2017 (arXiv:1610.07629).

Conventions: a style has gamma and beta, without an offset. It has a norm of its own, which is called for one image
after the other, or rows of two parameters or of an embedding, beside a norm without parameters.
"""

import torch
from torch import nn

from fusedattn.dropin._adapter import Adapter, original
from fusedattn.dropin._modulate import FUSES, modulated

_SOURCE = "kewellcjj/pytorch-multiple-style-transfer, transformer_net.py"


def _norm_of_each(self, x, style_id):
    norms = [self.inns[style] for style in style_id]
    if any(type(norm) is not nn.InstanceNorm2d or norm.eps != norms[0].eps for norm in norms):
        return original(self)(x, style_id)
    gamma, beta = (torch.stack([getattr(norm, name) for norm in norms]) for name in ("weight", "bias"))
    without_affine = nn.InstanceNorm2d(x.shape[1], norms[0].eps)
    return modulated(without_affine, x[: len(norms)], gamma, beta)


def _probe_norms(module, sizes, draw):
    return module(draw(3, sizes["C"], 3, 4), [len(module.inns) - 1, 0, 0])


def _rows(self, input, style_idx):
    gamma, beta = (t.index_select(0, style_idx) for t in (self.gamma, self.beta))
    return modulated(self.norm, input, gamma, beta)


def _embedded(self, x, style_index):
    return modulated(self.inst_norm, x, *self.embed(style_index).chunk(2, 1))


def _probe_rows(module, sizes, draw):
    return module(draw(2, sizes["C"], 3, 4), torch.tensor([sizes["N"] - 1, 0]))


ADAPTERS = (
    Adapter(
        name="multiple_style_transfer.batch_InstanceNorm2d",
        source=_SOURCE,
        fuses="the norms of all images, with scale and shift, in one pass",
        shapes={"inns.*.weight": ("C",), "inns.*.bias": ("C",)},
        fused=_norm_of_each,
        probe=_probe_norms,
        inside=("inns",),
    ),
    Adapter(
        name="multiple_style_transfer.ConditionInstanceNorm2d",
        source="mistake0316/pytorch-conditional-instance-normalization-style-transfer, transformer_net.py",
        fuses=FUSES,
        shapes={"gamma": ("N", "C", 1, 1), "beta": ("N", "C", 1, 1)},
        fused=_rows,
        probe=_probe_rows,
        inside=("norm",),
    ),
    Adapter(
        name="multiple_style_transfer.ConditionalInstanceNorm2d",
        source=f"copies of {_SOURCE}",
        fuses=FUSES,
        shapes={"embed.weight": ("N", "2C")},
        fused=_embedded,
        probe=_probe_rows,
        inside=("inst_norm",),
    ),
)
