"""SpeechBrain's content-based and location-aware attention.

Conventions: biases in both projections, none at the score vector; keys are projected in the first step and kept
until ``reset()``, with a mask that is 0 at padding, filled with -inf; lengths are absolute and may be fractions.
The values are those of each call; the context is projected. What is aware of locations sees the last weights,
without their gradient, and at first uniform ones, through a convolution and a projection with a bias.
"""

import torch

from fusedattn.dropin._adapter import Adapter
from fusedattn.dropin._scores import KEPT, LOCATED, NAN_ROWS, STEPS, Seeing, kept_keys, locate, step


def _project(self, enc_states, enc_len):
    """Whether this is the first step, which projects the keys."""
    if self.precomputed_enc_h is not None:
        return False
    self.precomputed_enc_h = self.mlp_enc(enc_states)
    places = torch.arange(enc_states.size(1), device=enc_states.device, dtype=enc_len.dtype)
    self.mask = (places < enc_len.to(enc_states.device).unsqueeze(1)).to(enc_len.dtype)
    return True


def _keys(self, enc_states, **options):
    key, mask = self.precomputed_enc_h, self.mask
    made = (key, enc_states, mask), lambda: (key, enc_states, (mask != 0).unsqueeze(1))
    return kept_keys(self, *made, **options)


def _forward(self, enc_states, enc_len, dec_states):
    _project(self, enc_states, enc_len)
    query, keys = self.mlp_dec(dec_states.unsqueeze(1)), _keys(self, enc_states)
    context, weights = step(query, keys, [self.mlp_attn], scale=self.scaling)
    return self.mlp_out(context.squeeze(1)), weights.squeeze(1)


def _forward_located(self, enc_states, enc_len, dec_states):
    if _project(self, enc_states, enc_len):
        self.prev_attn = self.mask * (1 / enc_len.float()).unsqueeze(1)
    query, keys = self.mlp_dec(dec_states) + self.mlp_loc.bias, _keys(self, enc_states, exponentials=False)
    seeing = Seeing(self.mlp_attn, self.conv_loc, self.mlp_loc)
    context, weights = locate(query, keys, self.prev_attn.unsqueeze(1), seeing, scale=self.scaling)
    self.prev_attn = weights.detach()
    return self.mlp_out(context), weights


def _probe(module, sizes, draw):
    """Two steps and what is kept of the lengths."""
    states, lengths = draw(2, 4, sizes["K"]), torch.tensor([4.0, 1.5], dtype=torch.float64)
    module.reset()
    return [(module(states, lengths, draw(2, sizes["Q"])), module.mask) for _ in range(2)]


_SHAPES = {
    "mlp_enc.weight": ("D", "K"),
    "mlp_enc.bias": ("D",),
    "mlp_dec.weight": ("D", "Q"),
    "mlp_dec.bias": ("D",),
    "mlp_attn.weight": (1, "D"),
    "mlp_out.weight": ("O", "K"),
    "mlp_out.bias": ("O",),
}


def _adapter(class_name, fused, shapes, fuses, inside):
    return Adapter(
        name=f"speechbrain.{class_name}",
        source="speechbrain/speechbrain, speechbrain/nnet/attention.py",
        fuses=fuses,
        shapes=shapes,
        fused=fused,
        probe=_probe,
        inside=("mlp_attn", "softmax", *inside),
        limits=NAN_ROWS,
        state=(KEPT,),
    )


ADAPTERS = (
    _adapter("ContentBasedAttention", _forward, _SHAPES, STEPS, ()),
    _adapter(
        "LocationAwareAttention",
        _forward_located,
        _SHAPES | {"conv_loc.weight": ("F", 1, "W"), "mlp_loc.weight": ("D", "F"), "mlp_loc.bias": ("D",)},
        LOCATED,
        ("conv_loc", "mlp_loc"),
    ),
)
