"""ESPnet's additive attentions of one decoder step, ``AttAdd``, ``AttLoc`` and ``AttMultiHeadAdd``.

Conventions: keys are projected in the first step and kept until ``reset()``, or in every step with ``han_mode``;
padding comes as lengths and is filled with -inf; the score vector's bias the softmax cancels. ``AttAdd`` scales
scores by 2, unless told otherwise, and attends to the encoder's states as they are; ``AttMultiHeadAdd`` scales by
1 / sqrt(d), projects the values of each head, and returns a list with the weights of each. ``AttLoc`` is AttAdd
with a convolution of the last weights, which are uniform where there is no padding in the first step; a constraint
to places near the last one, which only decoding of one sentence has, is left to the original.
"""

import torch

from fusedattn._dispatch import beside
from fusedattn.dropin._adapter import Adapter, original
from fusedattn.dropin._scores import KEPT, NAN_ROWS, STEPS, kept_keys, score_weight, step, summed
from fusedattn.ops.location_attention import location_attention

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


def _project(self, states):
    if self.pre_compute_enc_h is None or self.han_mode:
        self.enc_h, self.h_length = states, states.size(1)
        self.pre_compute_enc_h = self.mlp_enc(states)


# AttAdd


def _add(self, enc_hs_pad, enc_hs_len, dec_z, att_prev, scaling=2.0):
    _project(self, enc_hs_pad)
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


# AttLoc


def _locate(
    self, enc_hs_pad, enc_hs_len, dec_z, att_prev, scaling=2.0, last_attended_idx=None, *window, **windows
):
    if last_attended_idx is not None:
        given = (enc_hs_pad, enc_hs_len, dec_z, att_prev, scaling, last_attended_idx)
        return original(self)(*given, *window, **windows)
    _project(self, enc_hs_pad)
    query = self.mlp_dec(_state(self, dec_z, enc_hs_pad))
    value, padding = self.enc_h, _padding(self, enc_hs_pad, enc_hs_len)
    if att_prev is None:
        lengths = torch.as_tensor(enc_hs_len, device=padding.device).unsqueeze(1)
        att_prev = (~padding).to(query.dtype) / lengths
    context, weights = location_attention(
        query,
        self.pre_compute_enc_h,
        value,
        beside(query, score_weight(self.gvec)),
        beside(query, att_prev.view(len(value), 1, self.h_length)),
        beside(query, self.loc_conv.weight.squeeze(2)),
        beside(query, self.mlp_att.weight),
        mask=~padding,
        scale=scaling,
    )
    return summed(context, value, weights), weights


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
        name="espnet.AttLoc",
        source=_SOURCE,
        fuses="location features, scores, softmax and context in one pass over the states",
        shapes={
            "mlp_enc.weight": ("D", "K"),
            "mlp_enc.bias": ("D",),
            "mlp_dec.weight": ("D", "Q"),
            "mlp_att.weight": ("D", "F"),
            "loc_conv.weight": ("F", 1, 1, "W"),
            "gvec.weight": (1, "D"),
            "gvec.bias": (1,),
        },
        fused=_locate,
        probe=_probe,
        inside=("mlp_att", "loc_conv", "gvec"),
        limits=NAN_ROWS,
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
