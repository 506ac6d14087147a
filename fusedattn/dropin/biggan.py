"""The class-conditional norm of BigGAN.

Conventions: a linear layer or an embedding each makes gain and bias, the affine is (1 + gain), bias. Batch norm
alone; its instance norm takes stored statistics in evaluation, and its own norms are over several processes.
"""

import torch
from torch import nn

from fusedattn.dropin._adapter import Adapter
from fusedattn.dropin._modulate import FUSES, in_result_dtype
from fusedattn.ops.norm_film import norm_film


def _forward(self, x, y):
    x, gain, bias = in_result_dtype(x, self.gain(y), self.bias(y))
    return norm_film(
        x,
        gain,
        bias,
        norm="batch",
        eps=self.eps,
        gamma_offset=1.0,
        running_mean=self.stored_mean,
        running_var=self.stored_var,
        training=self.training,
    )


def _probe(module, sizes, draw):
    if isinstance(module.gain, nn.Embedding):
        y = torch.tensor([module.input_size - 1, 0])
    else:
        y = draw(2, module.input_size)
    return module(draw(2, sizes["C"], 3, 4), y)


def _reasons(module):
    if module.norm_style == "bn" and not module.cross_replica:
        return []
    return [f"has norm_style={module.norm_style!r} and cross_replica={module.cross_replica}"]


ADAPTERS = (
    Adapter(
        name="biggan.ccbn",
        source="ajbrock/BigGAN-PyTorch, layers.py",
        fuses=FUSES,
        shapes={"gain.*": None, "bias.*": None, "stored_mean": ("C",), "stored_var": ("C",)},
        fused=_forward,
        probe=_probe,
        reasons=_reasons,
    ),
)
