"""The attention of Coqui's Tacotrons, ``OriginalAttention``.

Conventions: no biases but the score's, which the softmax cancels and the sigmoid does not; the decoder projects
the inputs once and passes them, with a mask that is True where they are valid, filled with -inf. The module keeps
the weights of the last step and, with ``location_attention``, the sum of all as they are before forward attention,
which is its own method. Windows, in evaluation alone, are left to the original.
"""

import torch

from fusedattn import _normalizers
from fusedattn.dropin._adapter import Adapter, original
from fusedattn.dropin._scores import KEPT, NAN_ROWS, Seeing, kept_keys, locate, step


def _attend(self, query, keys, **options):
    """Context and weights (B, T)."""
    query = self.query_layer(query)
    score = self.v.linear_layer
    if self.location_attention:
        layer = self.location_layer
        seeing = Seeing(score, layer.location_conv1d, layer.location_dense.linear_layer)
        previous = torch.stack([self.attention_weights, self.attention_weights_cum], 1)
        return locate(query, keys, previous, seeing, **options)
    context, weights = step(query.unsqueeze(1), keys, [score], **options)
    return context.squeeze(1), weights.squeeze(1)


def _keys(self, inputs, processed_inputs, mask):
    """With the mask, None for none."""
    visible = None if mask is None else mask.unsqueeze(1)
    made = (processed_inputs, inputs, mask), lambda: (processed_inputs, inputs, visible)
    return kept_keys(self, *made, exponentials=not self.location_attention)


def _forward(self, query, inputs, processed_inputs, mask):
    if self.windowing and not self.training:
        return original(self)(query, inputs, processed_inputs, mask)
    if self.norm == "softmax" and not self.forward_attn:
        context, alignment = _attend(self, query, _keys(self, inputs, processed_inputs, mask))
        if self.location_attention:
            self.update_location_attention(alignment)
        self.attention_weights = alignment
        return context

    def normalize(scores):  # (B, 1, T)
        if mask is not None:
            scores = scores.masked_fill(~mask.unsqueeze(1), -torch.inf)
        if self.norm == "softmax":
            alignment = scores.softmax(-1)
        else:
            alignment = _normalizers.smoothed(scores + self.v.linear_layer.bias.to(scores.dtype))
        alignment = alignment.squeeze(1)
        if self.location_attention:
            self.update_location_attention(alignment)
        if self.forward_attn:
            alignment = self.alpha = self.apply_forward_attention(alignment)
        return alignment.unsqueeze(1)

    # Forward attention may give weight to padding.
    keys = _keys(self, inputs, processed_inputs, None)
    context, self.attention_weights = _attend(self, query, keys, normalizer=normalize)
    if self.forward_attn and self.trans_agent:
        self.u = torch.sigmoid(self.ta(torch.cat([context, query.squeeze(1)], -1)))
    return context


def _probe(module, sizes, draw):
    """Two steps and what they keep, from weights that the original makes in float32."""
    inputs, mask = draw(2, 5, sizes["K"]), torch.arange(5) < torch.tensor([[5], [3]])
    module.init_states(inputs)
    for name in ("attention_weights", "attention_weights_cum", "alpha", "u"):
        if hasattr(module, name):
            setattr(module, name, getattr(module, name).double())
    processed = module.preprocess_inputs(inputs)
    found = [(module(draw(2, sizes["Q"]), inputs, processed, mask), module.attention_weights) for _ in range(2)]
    return found, getattr(module, "attention_weights_cum", None), getattr(module, "u", None), module.win_idx


def _reasons(module):
    reasons = []
    if module._mask_value != -float("inf"):
        reasons.append(f"_mask_value is {module._mask_value}, not -inf")
    if module.norm not in ("softmax", "sigmoid"):
        reasons.append(f"has norm={module.norm!r}, expected 'softmax' or 'sigmoid'")
    return reasons


ADAPTERS = (
    Adapter(
        name="coqui.OriginalAttention",
        source="coqui-ai/TTS, TTS/tts/layers/tacotron/attentions.py",
        fuses="scores, with softmax alone softmax and context, in one pass, location features in it",
        shapes={
            "query_layer.linear_layer.weight": ("D", "Q"),
            "inputs_layer.linear_layer.weight": ("D", "K"),
            "v.linear_layer.weight": (1, "D"),
            "v.linear_layer.bias": (1,),
            "ta.weight?": (1, "A"),
            "ta.bias?": (1,),
            "location_layer.location_conv1d.weight?": ("F", 2, "W"),
            "location_layer.location_dense.linear_layer.weight?": ("D", "F"),
        },
        fused=_forward,
        probe=_probe,
        inside=("v", "location_layer"),
        reasons=_reasons,
        limits=NAN_ROWS,
        state=(KEPT,),
    ),
)
