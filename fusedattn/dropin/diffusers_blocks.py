"""The transformer blocks of diffusers whose norms are conditioned.

Conventions: as those of its norms (``diffusers.py``). ``ada_norm_single`` adds a table of six rows to a condition
of six times the width, and has no norm before its second attention. A residual is added, gated, normalised and
modulated in one pass.
"""

import torch

from fusedattn.dropin._adapter import Adapter, original
from fusedattn.dropin._modulate import FUSES_BLOCK, feed_forward, gated, modulated

_SOURCE = "huggingface/diffusers 0.42, src/diffusers/models/attention.py"
_FLUX = "huggingface/diffusers 0.42, src/diffusers/models/transformers/transformer_flux.py"
_HALF_MAX = torch.finfo(torch.float16).max


# BasicTransformerBlock


def _basic(
    self,
    hidden_states,
    attention_mask=None,
    encoder_hidden_states=None,
    encoder_attention_mask=None,
    timestep=None,
    cross_attention_kwargs=None,
    class_labels=None,
    added_cond_kwargs=None,
):
    if cross_attention_kwargs or self._chunk_size is not None or hidden_states.dim() != 3:
        arguments = (encoder_hidden_states, encoder_attention_mask, timestep, cross_attention_kwargs, class_labels)
        return original(self)(hidden_states, attention_mask, *arguments, added_cond_kwargs)
    x, is_single = hidden_states, self.norm_type == "ada_norm_single"
    if is_single:
        made = (self.scale_shift_table + timestep.reshape(x.shape[0], 6, -1)).unbind(1)
        first_shift, first_scale, gate, shift, scale, gate_after = made
        y = modulated(self.norm1, x, first_scale, first_shift, gamma_offset=1.0)
    else:
        made = self.norm1(x, timestep, class_labels, hidden_dtype=x.dtype)
        y, gate, shift, scale, gate_after = made
    if self.pos_embed is not None:
        y = self.pos_embed(y)
    context = encoder_hidden_states if self.only_cross_attention else None
    y = self.attn1(y, encoder_hidden_states=context, attention_mask=attention_mask)
    if self.attn2 is not None:
        if is_single:
            y = x = gated(y, gate, x)
        else:
            y, x = modulated(self.norm2, y, None, None, pre_residual=x, pre_gate=gate)
            if self.pos_embed is not None:
                y = self.pos_embed(y)
        y = self.attn2(y, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask)
        gate = None
    last = self.norm2 if is_single else self.norm3
    return feed_forward(last, self.ff, y, x, gate, shift, scale, gate_after)


def _probe_basic(module, sizes, draw):
    C = module.attn1.to_q.in_features
    x, width = draw(2, 3, C), module.cross_attention_dim
    options = {"encoder_hidden_states": None if width is None else draw(2, 4, width)}
    if module.norm_type == "ada_norm_single":
        return module(x, timestep=draw(2, 6 * C), **options)
    return module(x, timestep=torch.tensor([3, 50]), class_labels=torch.tensor([0, 0]), **options)


def _reasons_of_basic(module):
    if module.norm_type in ("ada_norm_zero", "ada_norm_single"):
        return []
    return [f"norm_type={module.norm_type!r}: it gates and modulates nothing itself"]


# JointTransformerBlock


def _joint(self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs=None):
    if self._chunk_size is not None:
        return original(self)(hidden_states, encoder_hidden_states, temb, joint_attention_kwargs)
    x, context, options = hidden_states, encoder_hidden_states, joint_attention_kwargs or {}
    y, gate, shift, scale, gate_after, *second = self.norm1(x, emb=temb)
    if self.context_pre_only:
        z = self.norm1_context(context, temb)
    else:
        z, *of_context = self.norm1_context(context, emb=temb)
    y, z = self.attn(hidden_states=y, encoder_hidden_states=z, **options)
    if self.use_dual_attention:
        x, (again, next_gate) = gated(y, gate, x), second
        y, gate = self.attn2(hidden_states=again, **options), next_gate
    x = feed_forward(self.norm2, self.ff, y, x, gate, shift, scale, gate_after)
    if self.context_pre_only:
        return None, x
    return feed_forward(self.norm2_context, self.ff_context, z, context, *of_context), x


# Flux


def _in_range(x):
    return x.clip(-_HALF_MAX, _HALF_MAX) if x.dtype is torch.float16 else x


def _flux(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):
    x, context, options = hidden_states, encoder_hidden_states, joint_attention_kwargs or {}
    y, *of_image = self.norm1(x, emb=temb)
    z, *of_context = self.norm1_context(context, emb=temb)
    y, z, *of_adapter = self.attn(
        hidden_states=y, encoder_hidden_states=z, image_rotary_emb=image_rotary_emb, **options
    )
    x = feed_forward(self.norm2, self.ff, y, x, *of_image)
    for added in of_adapter:
        x = x + added
    return _in_range(feed_forward(self.norm2_context, self.ff_context, z, context, *of_context)), x


def _flux_single(
    self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None
):
    length, options = encoder_hidden_states.shape[1], joint_attention_kwargs or {}
    x = torch.cat([encoder_hidden_states, hidden_states], 1)
    y, gate = self.norm(x, emb=temb)
    inner = self.act_mlp(self.proj_mlp(y))
    y = self.attn(hidden_states=y, image_rotary_emb=image_rotary_emb, **options)
    x = _in_range(gated(self.proj_out(torch.cat([y, inner], 2)), gate, x))
    return x[:, :length], x[:, length:]


def _probe_of_two(module, sizes, draw):
    C = module.attn.to_q.in_features
    return module(draw(2, 3, C), draw(2, 4, C), draw(2, C))


def _adapter_of_two(name, source, fused, inside):
    return Adapter(
        name=f"diffusers.{name}",
        source=source,
        fuses=FUSES_BLOCK,
        shapes={f"{child}.*": None for child in ("norm1*", "norm2*", "attn", "attn2", "ff", "ff_context")},
        fused=fused,
        probe=_probe_of_two,
        inside=inside,
        tolerance=1e-6,  # its attention may normalise queries and keys in float32
    )


ADAPTERS = (
    Adapter(
        name="diffusers.BasicTransformerBlock",
        source=_SOURCE,
        fuses=FUSES_BLOCK,
        shapes={
            "scale_shift_table?": (6, "C"),
            **{f"{child}.*": None for child in ("norm?", "attn?", "ff", "fuser", "pos_embed")},
        },
        fused=_basic,
        probe=_probe_basic,
        inside=("norm1", "norm2", "norm3"),
        reasons=_reasons_of_basic,
    ),
    _adapter_of_two("JointTransformerBlock", _SOURCE, _joint, ("norm2", "norm2_context")),
    _adapter_of_two("FluxTransformerBlock", _FLUX, _flux, ("norm2", "norm2_context")),
    Adapter(
        name="diffusers.FluxSingleTransformerBlock",
        source=_FLUX,
        fuses="gate and residual in one pass",
        shapes={f"{child}.*": None for child in ("norm", "proj_mlp", "proj_out", "attn")},
        fused=_flux_single,
        probe=_probe_of_two,
        tolerance=1e-6,
    ),
)
