"""ESPnet's additive attentions of one decoder step.

Conventions: keys are projected in the first step and kept until ``reset()``, or in every step with ``han_mode``;
padding comes as lengths and is filled with -inf; the score vector's bias the softmax cancels. Scores are scaled by
2, unless told otherwise, in ``AttForward`` and ``AttForwardTA`` by 1, in ``AttMultiHeadAdd`` by 1 / sqrt(d).
Values are the encoder's states; of several heads they are projections of these, and the weights are a list.

What the scores see beside query and key: ``AttLoc``, and each head of ``AttMultiHeadLoc``, a convolution of the
last weights; ``AttLoc2D`` one of the last ``att_win``; ``AttCovLoc`` one of the sum of all, and ``AttCov`` that
sum itself, both in a list to which each step adds its own. The first step sees uniform weights, 0 at padding.
``AttForward`` also multiplies with what the last weights reach, the same place and the next, and
``AttForwardTA`` has a probability to stay; both give each place, padding too, at least 1e-6 before they normalise.

A constraint to places near the last one, which only decoding of one sentence has, is left to the original.
"""

import torch
import torch.nn.functional as F

from fusedattn.dropin._adapter import Adapter, original
from fusedattn.dropin._scores import (
    KEPT,
    LOCATED,
    LOCATED_SCORES,
    NAN_ROWS,
    STEPS,
    Seeing,
    kept_keys,
    locate,
    step,
    summed,
)


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
    if self.pre_compute_enc_h is None or getattr(self, "han_mode", False):
        self.enc_h, self.h_length = states, states.size(1)
        self.pre_compute_enc_h = self.mlp_enc(states)


def _keys(self, states, lengths, exponentials=True):
    """What every step of one head attends to."""
    _project(self, states)
    key, value, padding = self.pre_compute_enc_h, self.enc_h, _padding(self, states, lengths)
    sources = key, value, padding
    return kept_keys(self, sources, lambda: (key, value, ~padding.unsqueeze(1)), exponentials)


# AttAdd


def _add(self, enc_hs_pad, enc_hs_len, dec_z, att_prev, scaling=2.0):
    keys = _keys(self, enc_hs_pad, enc_hs_len)
    query = self.mlp_dec(_state(self, dec_z, enc_hs_pad)).unsqueeze(1)
    context, weights = step(query, keys, [self.gvec], scale=scaling)
    return summed(context, self.enc_h, weights).squeeze(1), weights.squeeze(1)


# Attentions that see weights of steps before


def _uniform(self, states, lengths):
    """The weights (B, T) that the first step sees."""
    padding = _padding(self, states, lengths)
    return (~padding).float() / torch.as_tensor(lengths, device=padding.device).unsqueeze(1)


def _seeing(self, states, lengths, dec_z, previous, scaling, conv, dense):
    """Context and weights of a step that sees ``previous`` (B, C, T), through ``conv`` if there is one."""
    keys = _keys(self, states, lengths, exponentials=False)
    query = self.mlp_dec(_state(self, dec_z, states))
    query = query if dense.bias is None else query + dense.bias
    context, weights = locate(query, keys, previous, Seeing(self.gvec, conv, dense), scale=scaling)
    return summed(context, self.enc_h, weights), weights


def _locate(
    self,
    enc_hs_pad,
    enc_hs_len,
    dec_z,
    att_prev,
    scaling=2.0,
    last_attended_idx=None,
    backward_window=1,
    forward_window=3,
):
    given = enc_hs_pad, enc_hs_len, dec_z
    if last_attended_idx is not None:
        window = last_attended_idx, backward_window, forward_window
        return original(self)(*given, att_prev, scaling, *window)
    if att_prev is None:
        att_prev = _uniform(self, enc_hs_pad, enc_hs_len)
    previous = att_prev.view(len(enc_hs_pad), 1, -1)
    return _seeing(self, *given, previous, scaling, self.loc_conv, self.mlp_att)


def _locate_2d(self, enc_hs_pad, enc_hs_len, dec_z, att_prev, scaling=2.0):
    if att_prev is None:
        att_prev = _uniform(self, enc_hs_pad, enc_hs_len).unsqueeze(1).expand(-1, self.att_win, -1)
    given = enc_hs_pad, enc_hs_len, dec_z, att_prev, scaling
    context, weights = _seeing(self, *given, self.loc_conv, self.mlp_att)
    return context, torch.cat([att_prev[:, 1:], weights.unsqueeze(1)], 1)


def _cover(self, states, lengths, dec_z, att_prev_list, scaling, conv, dense):
    if att_prev_list is None:
        att_prev_list = [_uniform(self, states, lengths)]
    covered = sum(att_prev_list).unsqueeze(1)
    context, weights = _seeing(self, states, lengths, dec_z, covered, scaling, conv, dense)
    att_prev_list += [weights]  # the caller's own list, as the original does
    return context, att_prev_list


def _coverage(self, enc_hs_pad, enc_hs_len, dec_z, att_prev_list, scaling=2.0):
    return _cover(self, enc_hs_pad, enc_hs_len, dec_z, att_prev_list, scaling, None, self.wvec)


def _coverage_location(self, enc_hs_pad, enc_hs_len, dec_z, att_prev_list, scaling=2.0):
    return _cover(self, enc_hs_pad, enc_hs_len, dec_z, att_prev_list, scaling, self.loc_conv, self.mlp_att)


# Forward attention


def _shifted(weights):
    return F.pad(weights, (1, 0))[:, :-1]


def _forward_step(self, states, lengths, dec_z, att_prev, scaling, reach):
    """Context and weights, of the softmax times ``reach`` of the last weights."""
    _project(self, states)
    key, value, padding = self.pre_compute_enc_h, self.enc_h, _padding(self, states, lengths).unsqueeze(1)
    if att_prev is None:
        att_prev = F.pad(states.new_ones(len(states), 1), (0, states.shape[1] - 1))
    reached = reach(att_prev).unsqueeze(1)

    def normalize(scores):
        weights = torch.softmax(scores.masked_fill(padding, -torch.inf), -1) * reached
        return F.normalize(torch.clamp(weights, 1e-6), p=1, dim=-1)

    keys = kept_keys(self, (key, value), lambda: (key, value, None), exponentials=False)
    context, weights = locate(
        self.mlp_dec(_state(self, dec_z, states)),
        keys,
        att_prev.view(len(states), 1, -1),
        Seeing(self.gvec, self.loc_conv, self.mlp_att),
        scale=scaling,
        normalizer=normalize,
    )
    weights = weights.to(torch.promote_types(weights.dtype, reached.dtype))
    return summed(context, value, weights), weights


def _forward(
    self,
    enc_hs_pad,
    enc_hs_len,
    dec_z,
    att_prev,
    scaling=1.0,
    last_attended_idx=None,
    backward_window=1,
    forward_window=3,
):
    given = enc_hs_pad, enc_hs_len, dec_z, att_prev
    if last_attended_idx is not None:
        return original(self)(*given, scaling, last_attended_idx, backward_window, forward_window)
    return _forward_step(self, *given, scaling, lambda weights: weights + _shifted(weights))


def _forward_with_agent(
    self,
    enc_hs_pad,
    enc_hs_len,
    dec_z,
    att_prev,
    out_prev,
    scaling=1.0,
    last_attended_idx=None,
    backward_window=1,
    forward_window=3,
):
    given = enc_hs_pad, enc_hs_len, dec_z, att_prev
    if last_attended_idx is not None:
        window = last_attended_idx, backward_window, forward_window
        return original(self)(*given, out_prev, scaling, *window)
    stays = self.trans_agent_prob
    context, weights = _forward_step(
        self, *given, scaling, lambda weights: stays * weights + (1 - stays) * _shifted(weights)
    )
    seen = torch.cat([context, out_prev, _state(self, dec_z, enc_hs_pad)], 1)
    self.trans_agent_prob = torch.sigmoid(self.mlp_ta(seen))
    return context, weights


# Several heads


def _project_heads(self, states):
    for name in ("k", "v"):
        if getattr(self, f"pre_compute_{name}") is None or self.han_mode:
            self.enc_h, self.h_length = states, states.size(1)
            setattr(self, f"pre_compute_{name}", [layer(states) for layer in getattr(self, f"mlp_{name}")])
    return self.pre_compute_k, self.pre_compute_v


def _multi_head_add(self, enc_hs_pad, enc_hs_len, dec_z, att_prev, **kwargs):
    key, value = _project_heads(self, enc_hs_pad)
    state = _state(self, dec_z, enc_hs_pad)
    query = torch.stack([layer(state) for layer in self.mlp_q], 1).unsqueeze(2)
    padding = _padding(self, enc_hs_pad, enc_hs_len)
    keys = kept_keys(
        self,
        (key, value, padding),
        lambda: (torch.stack(key, 1), torch.stack(value, 1), ~padding[:, None, None]),
    )
    context, weights = step(query, keys, list(self.gvec), scale=self.scaling)
    return self.mlp_o(context.flatten(1)), [w.squeeze(1) for w in weights.unbind(1)]


def _multi_head_locate(self, enc_hs_pad, enc_hs_len, dec_z, att_prev, scaling=2.0, **kwargs):
    key, value = _project_heads(self, enc_hs_pad)
    state, padding = _state(self, dec_z, enc_hs_pad), _padding(self, enc_hs_pad, enc_hs_len)
    heads = len(self.gvec)
    if att_prev is None:
        att_prev = [_uniform(self, enc_hs_pad, enc_hs_len)] * heads
    keys = kept_keys(
        self,
        (key, value, padding),
        lambda: (torch.cat(key), torch.cat(value), ~padding.repeat(heads, 1).unsqueeze(1)),
        exponentials=False,
    )
    query = torch.cat([layer(state) for layer in self.mlp_q])
    layers = map(Seeing, self.gvec, self.loc_conv, self.mlp_att)
    context, weights = locate(query, keys, torch.cat(list(att_prev)).unsqueeze(1), *layers, scale=scaling)
    return self.mlp_o(torch.cat(context.chunk(heads), 1)), list(weights.chunk(heads))


# What they are known by


def _probe(module, sizes, draw):
    """Two steps and what is kept of the padding, then a step without a state after reset()."""
    states, lengths = draw(2, 4, sizes["K"]), [4, 2]
    module.reset()
    steps = [module(states, lengths, draw(2, sizes["Q"]), None) for _ in range(2)]
    mask = module.mask
    module.reset()
    return steps, mask, module(states[:1], lengths[:1], None, None)


def _probe_with(first):
    """The same of a module whose first weights, ``first(module, draw)``, the original makes in float32."""

    def probe(module, sizes, draw):
        states, lengths = draw(2, 4, sizes["K"]), [4, 2]
        module.reset()
        previous, found = first(module, draw), []
        for state in (draw(2, sizes["Q"]), None):
            found.append(module(states, lengths, state, previous))
            previous = found[-1][1]
        return found, module.mask

    return probe


def _probe_forward(module, sizes, draw):
    """Two steps, with an agent where there is one."""
    states, lengths = draw(2, 4, sizes["K"]), [4, 2]
    module.reset()
    weights, found = None, []
    outputs = (draw(2, module.mlp_ta.in_features - sizes["K"] - sizes["Q"]),) if hasattr(module, "mlp_ta") else ()
    for _ in range(2):
        found.append(module(states, lengths, draw(2, sizes["Q"]), weights, *outputs))
        weights = found[-1][1]
    return found, module.mask


_SHAPES = {
    "mlp_enc.weight": ("D", "K"),
    "mlp_enc.bias": ("D",),
    "mlp_dec.weight": ("D", "Q"),
    "gvec.weight": (1, "D"),
    "gvec.bias": (1,),
}
_CONVOLVED = _SHAPES | {"mlp_att.weight": ("D", "F"), "loc_conv.weight": ("F", 1, 1, "W")}
_HEADS = {
    "mlp_q.*.weight": ("D", "Q"),
    "mlp_q.*.bias": ("D",),
    "mlp_k.*.weight": ("D", "K"),
    "mlp_v.*.weight": ("V", "K"),
    "gvec.*.weight": (1, "D"),
    "gvec.*.bias": (1,),
    "mlp_o.weight": ("K", "O"),
}
_LOCATING = ("mlp_att", "loc_conv", "gvec")


def _adapter(class_name, fused, shapes, probe, fuses=LOCATED, inside=_LOCATING, limits=NAN_ROWS):
    return Adapter(
        name=f"espnet.{class_name}",
        source="espnet/espnet, espnet/nets/pytorch_backend/rnn/attentions.py",
        fuses=fuses,
        shapes=shapes,
        fused=fused,
        probe=probe,
        inside=inside,
        limits=limits,
        state=(KEPT,),
    )


ADAPTERS = (
    _adapter("AttAdd", _add, _SHAPES, _probe, STEPS, ("gvec",)),
    _adapter("AttLoc", _locate, _CONVOLVED, _probe),
    _adapter(
        "AttLoc2D",
        _locate_2d,
        _CONVOLVED | {"loc_conv.weight": ("F", 1, "N", "W")},
        _probe_with(lambda module, draw: draw(2, module.att_win, 4).softmax(-1)),
    ),
    _adapter(
        "AttCov",
        _coverage,
        _SHAPES | {"wvec.weight": ("D", 1), "wvec.bias": ("D",)},
        _probe_with(lambda module, draw: [draw(2, 4).softmax(-1)]),
        inside=("wvec", "gvec"),
    ),
    _adapter(
        "AttCovLoc",
        _coverage_location,
        _CONVOLVED,
        _probe_with(lambda module, draw: [draw(2, 4).softmax(-1)]),
    ),
    _adapter("AttForward", _forward, _CONVOLVED, _probe_forward, LOCATED_SCORES, limits=""),
    _adapter(
        "AttForwardTA",
        _forward_with_agent,
        _CONVOLVED | {"mlp_ta.weight": (1, "A"), "mlp_ta.bias": (1,)},
        _probe_forward,
        LOCATED_SCORES,
        limits="",
    ),
    _adapter("AttMultiHeadAdd", _multi_head_add, _HEADS, _probe, STEPS, ("gvec",)),
    _adapter(
        "AttMultiHeadLoc",
        _multi_head_locate,
        _HEADS | {"loc_conv.*.weight": ("F", 1, 1, "W"), "mlp_att.*.weight": ("D", "F")},
        _probe_with(lambda module, draw: [draw(2, 4).softmax(-1) for _ in module.gvec]),
    ),
)
