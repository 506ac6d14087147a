"""Adaptive norms of diffusers, and the norms of its ResNet blocks.

Conventions: the affine is (1 + scale), shift. ``AdaLayerNorm`` with ``chunk_dim=1`` and the ``Zero`` layers make
shift before scale, the others scale before shift; ``chunk_dim=0`` divides a condition of one dimension. A ResNet
block adds its time embedding before the second norm, or scales and shifts after it.
"""

import torch
from torch import nn

from fusedattn.dropin._adapter import Adapter, original
from fusedattn.dropin._modulate import FUSES, in_result_dtype, modulated
from fusedattn.ops.norm_film import norm_film

_SOURCE = "huggingface/diffusers 0.42, src/diffusers/models/normalization.py"
_NORM = {"norm.weight?": ("C",), "norm.bias?": ("C",)}


def _linear(parts: str, condition: str = "E") -> dict:
    return {"linear.weight": (f"{parts}C", condition), "linear.bias?": (f"{parts}C",)}


# AdaLayerNorm


def _ada_layer_norm(self, x, timestep=None, temb=None):
    if self.emb is not None:
        temb = self.emb(timestep)
    made = self.linear(self.silu(temb))
    if self.chunk_dim == 1:
        shift, scale = made.chunk(2, 1)
    else:
        scale, shift = made.chunk(2, 0)
    return modulated(self.norm, x, scale, shift, gamma_offset=1.0)


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
    return modulated(self.norm, x, scale, shift, gamma_offset=1.0), *rest


def _probe_zero(module, sizes, draw):
    x = draw(2, 3, sizes["C"])
    if module.emb is not None:
        steps, labels = torch.tensor([3, 50]), torch.tensor([0, 0])
        return module(x, steps, labels, hidden_dtype=torch.float64)
    return module(x, emb=draw(2, sizes["E"]))


def _zero_single(self, x, emb=None):
    shift, scale, gate = self.linear(self.silu(emb)).chunk(3, 1)
    return modulated(self.norm, x, scale, shift, gamma_offset=1.0), gate


def _zero_x(self, x, emb=None):
    shift, scale, *gates, again_shift, again_scale, again_gate = self.linear(self.silu(emb)).chunk(9, 1)
    first = modulated(self.norm, x, scale, shift, gamma_offset=1.0)
    return first, *gates, modulated(self.norm, x, again_scale, again_shift, gamma_offset=1.0), again_gate


def _probe_two(module, sizes, draw):
    return module(draw(2, 3, sizes["C"]), draw(2, sizes["E"]))


# AdaLayerNormContinuous


def _continuous(self, x, conditioning_embedding):
    scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, 1)
    return modulated(self.norm, x, scale, shift, gamma_offset=1.0)


# AdaGroupNorm


def _ada_group_norm(self, x, emb):
    made = self.linear(self.act(emb) if self.act else emb)
    x, made = in_result_dtype(x, made)
    scale, shift = made.chunk(2, 1)
    return norm_film(x, scale, shift, norm="group", num_groups=self.num_groups, eps=self.eps, gamma_offset=1.0)


def _probe_group(module, sizes, draw):
    return module(draw(2, sizes["C"], 2, 3), draw(2, sizes["E"]))


# ResnetBlock2D

_ACTIVATIONS = {nn.SiLU: "silu", nn.ReLU: "relu"}


def _activation(module):
    """The name of the block's activation in norm_film, or None."""
    kind, gelu = type(module.nonlinearity), module.nonlinearity
    return f"gelu{'_tanh' * (gelu.approximate == 'tanh')}" if kind is nn.GELU else _ACTIVATIONS.get(kind)


def _resnet_block(self, input_tensor, temb, *args, **kwargs):
    activation = _activation(self)
    if args or kwargs.get("scale") is not None or activation is None:
        return original(self)(input_tensor, temb, *args, **kwargs)
    x, h = input_tensor, modulated(self.norm1, input_tensor, None, None, activation=activation)
    resample = self.upsample or self.downsample
    if resample is not None:
        if self.upsample is not None and h.shape[0] >= 64:  # as the original, for an operator of PyTorch
            x, h = x.contiguous(), h.contiguous()
        x, h = resample(x), resample(h)
    h = self.conv1(h)
    if self.time_emb_proj is not None:
        temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
    scale = shift = None
    if self.time_embedding_norm == "scale_shift":
        scale, shift = temb.chunk(2, 1)
    elif temb is not None:
        h = h + temb[:, :, None, None]
    h = modulated(self.norm2, h, scale, shift, gamma_offset=1.0, activation=activation)
    h = self.conv2(self.dropout(h))
    if self.conv_shortcut is not None:
        x = self.conv_shortcut(x.contiguous() if self.training else x)
    return (x + h) / self.output_scale_factor


def _probe_resnet_block(module, sizes, draw):
    temb = None if module.time_emb_proj is None else draw(2, sizes["E"])
    return module(draw(2, sizes["I"], 4, 6), temb)


def _reasons_of_resnet_block(module):
    reasons = [] if _activation(module) is not None else [f"its activation is {module.nonlinearity}"]
    if module.time_embedding_norm not in ("default", "scale_shift"):
        reasons.append(f"has time_embedding_norm={module.time_embedding_norm!r}")
    return reasons


ADAPTERS = (
    Adapter(
        name="diffusers.AdaLayerNorm",
        source=_SOURCE,
        fuses=FUSES,
        shapes={**_linear("2"), **_NORM, "emb.weight?": ("N", "E")},
        fused=_ada_layer_norm,
        probe=_probe_ada_layer_norm,
        inside=("norm",),
    ),
    Adapter(
        name="diffusers.AdaLayerNormZero",
        source=_SOURCE,
        fuses=FUSES,
        shapes={**_linear("6"), **_NORM, "emb.*": None},
        fused=_zero,
        probe=_probe_zero,
        inside=("norm",),
        tolerance=1e-6,  # FP32LayerNorm
    ),
    Adapter(
        name="diffusers.AdaLayerNormZeroSingle",
        source=_SOURCE,
        fuses=FUSES,
        shapes={**_linear("3"), **_NORM},
        fused=_zero_single,
        probe=_probe_two,
        inside=("norm",),
    ),
    Adapter(
        name="diffusers.SD35AdaLayerNormZeroX",
        source=_SOURCE,
        fuses=FUSES,
        shapes={**_linear("9"), **_NORM},
        fused=_zero_x,
        probe=_probe_two,
        inside=("norm",),
    ),
    Adapter(
        name="diffusers.AdaLayerNormContinuous",
        source=_SOURCE,
        fuses=FUSES,
        shapes={**_linear("2"), **_NORM},
        fused=_continuous,
        probe=_probe_two,
        inside=("norm",),
        tolerance=1e-6,  # its RMSNorm takes the variance in float32
    ),
    Adapter(
        name="diffusers.AdaGroupNorm",
        source=_SOURCE,
        fuses=FUSES,
        shapes=_linear("2"),
        fused=_ada_group_norm,
        probe=_probe_group,
    ),
    Adapter(
        name="diffusers.ResnetBlock2D",
        source="huggingface/diffusers 0.42, src/diffusers/models/resnet.py",
        fuses="both norms with scale, shift and activation, each in one pass",
        shapes={
            "norm1.weight": ("I",),
            "norm1.bias": ("I",),
            "norm2.weight": ("C",),
            "norm2.bias": ("C",),
            "conv1.weight": ("C", "I", 3, 3),
            "conv1.bias": ("C",),
            "conv2.weight": ("O", "C", 3, 3),
            "conv2.bias": ("O",),
            "conv_shortcut.weight?": ("O", "I", 1, 1),
            "conv_shortcut.bias?": ("O",),
            "time_emb_proj.weight?": ("T", "E"),
            "time_emb_proj.bias?": ("T",),
            "upsample.*": None,
            "downsample.*": None,
        },
        fused=_resnet_block,
        probe=_probe_resnet_block,
        inside=("norm1", "norm2", "nonlinearity"),
        reasons=_reasons_of_resnet_block,
    ),
)
