"""Adaptive norms of diffusers.

Conventions: the affine is (1 + scale), shift. ``AdaLayerNorm`` with ``chunk_dim=1`` and the ``Zero`` layers make
shift before scale, the others scale before shift; ``chunk_dim=0`` divides a condition of one dimension.
"""

import torch

from fusedattn.dropin._adapter import Adapter
from fusedattn.dropin._modulate import in_result_dtype, modulated
from fusedattn.ops.norm_film import norm_film

_SOURCE = "huggingface/diffusers 0.42, src/diffusers/models/normalization.py"
_NORM = {"norm.weight?": ("C",), "norm.bias?": ("C",)}
_FUSES = "norm, 1 + scale and shift in one pass"


def _linear(parts: str, condition: str = "E") -> dict:
    return {"linear.weight": (f"{parts}C", condition), "linear.bias?": (f"{parts}C",)}


# AdaLayerNorm


def _ada_layer_norm(self, x, timestep=None, temb=None):
    if self.emb is not None:
        temb = self.emb(timestep)
    made = self.linear(self.silu(temb))
    if self.chunk_dim == 1:
        shift, scale = (t.unsqueeze(1) for t in made.chunk(2, 1))
    else:
        scale, shift = made.chunk(2, 0)
    return modulated(self.norm, x, scale, shift)


def _probe_ada_layer_norm(module, sizes, draw):
    x = draw(2, 3, sizes["C"])
    lead = (2,) if module.chunk_dim == 1 else ()
    if module.emb is not None:
        return module(x, timestep=torch.zeros(lead, dtype=torch.int64))
    return module(x, temb=draw(*lead, sizes["E"]))


# The layers with gates


def _zero(self, x, timestep=None, class_labels=None, hidden_dtype=None, emb=None):
    if self.emb is not None:
        emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
    shift, scale, *rest = self.linear(self.silu(emb)).chunk(6, 1)
    return modulated(self.norm, x, scale.unsqueeze(1), shift.unsqueeze(1)), *rest


def _probe_zero(module, sizes, draw):
    x = draw(2, 3, sizes["C"])
    if module.emb is not None:
        steps, labels = torch.tensor([3, 50]), torch.tensor([0, 0])
        return module(x, steps, labels, hidden_dtype=torch.float64)
    return module(x, emb=draw(2, sizes["E"]))


def _zero_single(self, x, emb=None):
    shift, scale, gate = self.linear(self.silu(emb)).chunk(3, 1)
    return modulated(self.norm, x, scale.unsqueeze(1), shift.unsqueeze(1)), gate


def _probe_two(module, sizes, draw):
    return module(draw(2, 3, sizes["C"]), draw(2, sizes["E"]))


# AdaLayerNormContinuous


def _continuous(self, x, conditioning_embedding):
    scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, 1)
    return modulated(self.norm, x, scale.unsqueeze(1), shift.unsqueeze(1))


# AdaGroupNorm


def _ada_group_norm(self, x, emb):
    made = self.linear(self.act(emb) if self.act else emb)
    x, made = in_result_dtype(x, made)
    scale, shift = made.chunk(2, 1)
    return norm_film(x, scale, shift, norm="group", num_groups=self.num_groups, eps=self.eps, gamma_offset=1.0)


def _probe_group(module, sizes, draw):
    return module(draw(2, sizes["C"], 2, 3), draw(2, sizes["E"]))


ADAPTERS = (
    Adapter(
        name="diffusers.AdaLayerNorm",
        source=_SOURCE,
        fuses=_FUSES,
        shapes={**_linear("2"), **_NORM, "emb.weight?": ("N", "E")},
        fused=_ada_layer_norm,
        probe=_probe_ada_layer_norm,
        inside=("norm",),
    ),
    Adapter(
        name="diffusers.AdaLayerNormZero",
        source=_SOURCE,
        fuses=_FUSES,
        shapes={**_linear("6"), **_NORM, "emb.*": None},
        fused=_zero,
        probe=_probe_zero,
        inside=("norm",),
        tolerance=1e-6,  # FP32LayerNorm
    ),
    Adapter(
        name="diffusers.AdaLayerNormZeroSingle",
        source=_SOURCE,
        fuses=_FUSES,
        shapes={**_linear("3"), **_NORM},
        fused=_zero_single,
        probe=_probe_two,
        inside=("norm",),
    ),
    Adapter(
        name="diffusers.AdaLayerNormContinuous",
        source=_SOURCE,
        fuses=_FUSES,
        shapes={**_linear("2"), **_NORM},
        fused=_continuous,
        probe=_probe_two,
        inside=("norm",),
        tolerance=1e-6,  # its RMSNorm takes the variance in float32
    ),
    Adapter(
        name="diffusers.AdaGroupNorm",
        source=_SOURCE,
        fuses=_FUSES,
        shapes=_linear("2"),
        fused=_ada_group_norm,
        probe=_probe_group,
    ),
)
