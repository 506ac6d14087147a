"""ESPnet's additive attentions of one decoder step, ``AttAdd`` and ``AttMultiHeadAdd``.

Conventions: keys are projected in the first step and kept until ``reset()``, or in every step with ``han_mode``;
padding comes as lengths and is filled with -inf; the score vector's bias the softmax cancels. ``AttAdd`` scales
scores by 2, unless told otherwise, and attends to the encoder's states as they are; ``AttMultiHeadAdd`` scales by
1 / sqrt(d), projects the values of each head, and returns a list with the weights of each.
"""

import torch

from fusedattn.dropin._adapter import Adapter
from fusedattn.dropin._scores import KEPT, NAN_ROWS, STEPS, kept_keys, step, summed

_SOURCE = "espnet/espnet, espnet/nets/pytorch_backend/rnn/attentions.py"


def _padding(self, states, lengths):
    """bool (B, T), True at padding; lengths are a list or a tensor."""
    if self.mask is None:
        lengths = torch.as_tensor(lengths, device=states.device)
        self.mask = torch.arange(states.shape[1], device=states.device) >= lengths.unsqueeze(1)
    return self.mask


def _state(self, dec_z, states):
    batch = len(states)
    return states.new_zeros(batch, self.dunits) if dec_z is None else dec_z.view(batch, self.dunits)


# AttAdd


def _add(self, enc_hs_pad, enc_hs_len, dec_z, att_prev, scaling=2.0):
    if self.pre_compute_enc_h is None or self.han_mode:
        self.enc_h, self.h_length = enc_hs_pad, enc_hs_pad.size(1)
        self.pre_compute_enc_h = self.mlp_enc(enc_hs_pad)
    query = self.mlp_dec(_state(self, dec_z, enc_hs_pad)).unsqueeze(1)
    key, value, padding = self.pre_compute_enc_h, self.enc_h, _padding(self, enc_hs_pad, enc_hs_len)
    keys = kept_keys(self, (key, value, padding), lambda: (key, value, ~padding.unsqueeze(1)))
    context, weights = step(query, keys, [self.gvec], scale=scaling)
    return summed(context, value, weights).squeeze(1), weights.squeeze(1)


def _probe(module, sizes, draw):
    """Two steps and what is kept of the padding, then a step without a state after reset()."""
    states, lengths = draw(2, 4, sizes["K"]), [4, 2]
    module.reset()
    steps = [module(states, lengths, draw(2, sizes["Q"]), None) for _ in range(2)]
    mask = module.mask
    module.reset()
    return steps, mask, module(states[:1], lengths[:1], None, None)


# AttMultiHeadAdd


def _multi_head_add(self, enc_hs_pad, enc_hs_len, dec_z, att_prev, **kwargs):
    for name in ("k", "v"):
        if getattr(self, f"pre_compute_{name}") is None or self.han_mode:
            self.enc_h, self.h_length = enc_hs_pad, enc_hs_pad.size(1)
            setattr(self, f"pre_compute_{name}", [layer(enc_hs_pad) for layer in getattr(self, f"mlp_{name}")])
    state = _state(self, dec_z, enc_hs_pad)
    query = torch.stack([layer(state) for layer in self.mlp_q], 1).unsqueeze(2)
    key, value, padding = self.pre_compute_k, self.pre_compute_v, _padding(self, enc_hs_pad, enc_hs_len)
    keys = kept_keys(
        self,
        (key, value, padding),
        lambda: (torch.stack(key, 1), torch.stack(value, 1), ~padding[:, None, None]),
    )
    context, weights = step(query, keys, list(self.gvec), scale=self.scaling)
    return self.mlp_o(context.flatten(1)), [w.squeeze(1) for w in weights.unbind(1)]


ADAPTERS = (
    Adapter(
        name="espnet.AttAdd",
        source=_SOURCE,
        fuses=STEPS,
        shapes={
            "mlp_enc.weight": ("D", "K"),
            "mlp_enc.bias": ("D",),
            "mlp_dec.weight": ("D", "Q"),
            "gvec.weight": (1, "D"),
            "gvec.bias": (1,),
        },
        fused=_add,
        probe=_probe,
        inside=("gvec",),
        limits=NAN_ROWS,
        state=(KEPT,),
    ),
    Adapter(
        name="espnet.AttMultiHeadAdd",
        source=_SOURCE,
        fuses=STEPS,
        shapes={
            "mlp_q.*.weight": ("D", "Q"),
            "mlp_q.*.bias": ("D",),
            "mlp_k.*.weight": ("D", "K"),
            "mlp_v.*.weight": ("V", "K"),
            "gvec.*.weight": (1, "D"),
            "gvec.*.bias": (1,),
            "mlp_o.weight": ("K", "O"),
        },
        fused=_multi_head_add,
        probe=_probe,
        inside=("gvec",),
        limits=NAN_ROWS,
        state=(KEPT,),
    ),
)
