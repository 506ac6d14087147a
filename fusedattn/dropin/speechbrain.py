"""SpeechBrain's content-based attention.

Conventions: biases in both projections, none at the score vector; keys are projected in the first step and kept
until ``reset()``, with a mask that is 0 at padding, filled with -inf; lengths are absolute and may be fractions.
The values are those of each call; the context is projected.
"""

import torch

from fusedattn.dropin._adapter import Adapter
from fusedattn.dropin._scores import KEPT, NAN_ROWS, STEPS, kept_keys, step


def _forward(self, enc_states, enc_len, dec_states):
    if self.precomputed_enc_h is None:
        self.precomputed_enc_h = self.mlp_enc(enc_states)
        places = torch.arange(enc_states.size(1), device=enc_states.device, dtype=enc_len.dtype)
        self.mask = (places < enc_len.to(enc_states.device).unsqueeze(1)).to(enc_len.dtype)
    query = self.mlp_dec(dec_states.unsqueeze(1))
    key, mask = self.precomputed_enc_h, self.mask
    keys = kept_keys(self, (key, enc_states, mask), lambda: (key, enc_states, (mask != 0).unsqueeze(1)))
    context, weights = step(query, keys, [self.mlp_attn], scale=self.scaling)
    return self.mlp_out(context.squeeze(1)), weights.squeeze(1)


def _probe(module, sizes, draw):
    """Two steps and what is kept of the lengths."""
    states, lengths = draw(2, 4, sizes["K"]), torch.tensor([4.0, 1.5])
    module.reset()
    return [(module(states, lengths, draw(2, sizes["Q"])), module.mask) for _ in range(2)]


ADAPTERS = (
    Adapter(
        name="speechbrain.ContentBasedAttention",
        source="speechbrain/speechbrain, speechbrain/nnet/attention.py",
        fuses=STEPS,
        shapes={
            "mlp_enc.weight": ("D", "K"),
            "mlp_enc.bias": ("D",),
            "mlp_dec.weight": ("D", "Q"),
            "mlp_dec.bias": ("D",),
            "mlp_attn.weight": (1, "D"),
            "mlp_out.weight": ("O", "K"),
            "mlp_out.bias": ("O",),
        },
        fused=_forward,
        probe=_probe,
        inside=("mlp_attn", "softmax"),
        limits=NAN_ROWS,
        state=(KEPT,),
    ),
)
