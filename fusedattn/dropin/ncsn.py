"""The conditional norms of NCSN, which other generators share.

Conventions: an embedding of a class makes gamma, or gamma and beta; no offset.
"""

import torch

from fusedattn.dropin._adapter import Adapter
from fusedattn.dropin._modulate import FUSES, modulated

_SOURCE = "ermongroup/ncsn, models/cond_refinenet_dilated.py"


def _parts(self, y):
    made = self.embed(y)
    return made.chunk(2, -1) if self.bias else (made, None)


def _instance(self, x, y):
    return modulated(self.instance_norm, x, *_parts(self, y))


def _batch(self, x, y):
    return modulated(self.bn, x, *_parts(self, y))


def _probe(module, sizes, draw):
    return module(draw(2, module.num_features, 3, 4), torch.tensor([sizes["N"] - 1, 0]))


def _reasons(module):
    width = module.embed.weight.shape[1]
    expected = module.num_features * (2 if module.bias else 1)
    return [] if width == expected else [f"its embedding is {width} wide, expected {expected}"]


ADAPTERS = (
    Adapter(
        name="ncsn.ConditionalInstanceNorm2d",
        source=_SOURCE,
        fuses=FUSES,
        shapes={"embed.weight": ("N", "W")},
        fused=_instance,
        probe=_probe,
        inside=("instance_norm",),
        reasons=_reasons,
    ),
    Adapter(
        name="ncsn.ConditionalBatchNorm2d",
        source=_SOURCE,
        fuses=FUSES,
        shapes={
            "embed.weight": ("N", "W"),
            "bn.running_mean": ("C",),
            "bn.running_var": ("C",),
            "bn.num_batches_tracked": (),
        },
        fused=_batch,
        probe=_probe,
        inside=("bn",),
        reasons=_reasons,
    ),
)
