"""espnet/espnet, espnet/nets/pytorch_backend/rnn/attentions.py: additive attentions of a step as formulas."""

import torch
from torch import nn


class _Step(nn.Module):
    def __init__(self, dunits, han_mode):
        super().__init__()
        self.dunits, self.han_mode = dunits, han_mode
        self.reset()

    def reset(self):
        for name in self.kept:
            setattr(self, name, None)

    def padding(self, states, lengths):
        if self.mask is None:
            self.mask = torch.arange(states.shape[1]) >= torch.as_tensor(lengths)[:, None]
        return self.mask

    def state(self, dec_z, states):
        return states.new_zeros(len(states), self.dunits) if dec_z is None else dec_z.view(len(states), -1)


class AttAdd(_Step):
    kept = "h_length", "enc_h", "pre_compute_enc_h", "mask"

    def __init__(self, eprojs, dunits, att_dim, han_mode=False):
        super().__init__(dunits, han_mode)
        self.mlp_enc = nn.Linear(eprojs, att_dim)
        self.mlp_dec = nn.Linear(dunits, att_dim, bias=False)
        self.gvec = nn.Linear(att_dim, 1)

    def forward(self, enc_hs_pad, enc_hs_len, dec_z, att_prev, scaling=2.0):
        if self.pre_compute_enc_h is None or self.han_mode:
            self.enc_h, self.h_length = enc_hs_pad, enc_hs_pad.shape[1]
            self.pre_compute_enc_h = self.mlp_enc(enc_hs_pad)
        query = self.mlp_dec(self.state(dec_z, enc_hs_pad))
        e = self.gvec((self.pre_compute_enc_h + query[:, None]).tanh()).squeeze(2)
        w = (scaling * e.masked_fill(self.padding(enc_hs_pad, enc_hs_len), -torch.inf)).softmax(1)
        return (self.enc_h * w[..., None]).sum(1), w


class _Seeing(_Step):
    """Scores that see ``previous`` (B, 1, C, T) through a convolution over the C last weights."""

    kept = AttAdd.kept

    def __init__(self, eprojs, dunits, att_dim, channels, aconv_chans, aconv_filts, han_mode=False):
        super().__init__(dunits, han_mode)
        self.mlp_enc = nn.Linear(eprojs, att_dim)
        self.mlp_dec = nn.Linear(dunits, att_dim, bias=False)
        self.mlp_att = nn.Linear(aconv_chans, att_dim, bias=False)
        self.loc_conv = convolution(aconv_chans, channels, aconv_filts)
        self.gvec = nn.Linear(att_dim, 1)

    def features(self, previous):
        return self.mlp_att(self.loc_conv(previous).squeeze(2).mT)

    def softmax(self, states, lengths, dec_z, previous, scaling):
        if self.pre_compute_enc_h is None or self.han_mode:
            self.enc_h, self.h_length = states, states.shape[1]
            self.pre_compute_enc_h = self.mlp_enc(states)
        query = self.mlp_dec(self.state(dec_z, states))
        e = self.gvec((self.features(previous) + self.pre_compute_enc_h + query[:, None]).tanh()).squeeze(2)
        return (scaling * e.masked_fill(self.padding(states, lengths), -torch.inf)).softmax(1)

    def summed(self, w):
        return (self.enc_h * w[..., None]).sum(1)


def convolution(aconv_chans, channels, aconv_filts):
    width = 2 * aconv_filts + 1
    return nn.Conv2d(1, aconv_chans, (channels, width), padding=(0, aconv_filts), bias=False)


def uniform(module, states, lengths):
    return (~module.padding(states, lengths)).to(states.dtype) / torch.as_tensor(lengths)[:, None]


class AttLoc(_Seeing):
    def __init__(self, eprojs, dunits, att_dim, aconv_chans, aconv_filts, han_mode=False):
        super().__init__(eprojs, dunits, att_dim, 1, aconv_chans, aconv_filts, han_mode)

    def forward(
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
        previous = uniform(self, enc_hs_pad, enc_hs_len) if att_prev is None else att_prev
        w = self.softmax(enc_hs_pad, enc_hs_len, dec_z, previous[:, None, None], scaling)
        return self.summed(w), w


class AttLoc2D(_Seeing):
    def __init__(self, eprojs, dunits, att_dim, att_win, aconv_chans, aconv_filts, han_mode=False):
        super().__init__(eprojs, dunits, att_dim, att_win, aconv_chans, aconv_filts, han_mode)
        self.att_win = att_win

    def forward(self, enc_hs_pad, enc_hs_len, dec_z, att_prev, scaling=2.0):
        if att_prev is None:
            att_prev = uniform(self, enc_hs_pad, enc_hs_len)[:, None].expand(-1, self.att_win, -1)
        w = self.softmax(enc_hs_pad, enc_hs_len, dec_z, att_prev[:, None], scaling)
        return self.summed(w), torch.cat([att_prev, w[:, None]], 1)[:, 1:]


class AttCovLoc(AttLoc):
    def forward(self, enc_hs_pad, enc_hs_len, dec_z, att_prev_list, scaling=2.0):
        if att_prev_list is None:
            att_prev_list = [uniform(self, enc_hs_pad, enc_hs_len)]
        covered = sum(att_prev_list)[:, None, None]
        w = self.softmax(enc_hs_pad, enc_hs_len, dec_z, covered, scaling)
        att_prev_list += [w]
        return self.summed(w), att_prev_list


class AttCov(AttCovLoc):
    def __init__(self, eprojs, dunits, att_dim, han_mode=False):
        super().__init__(eprojs, dunits, att_dim, 1, 0, han_mode)
        del self.mlp_att, self.loc_conv
        self.wvec = nn.Linear(1, att_dim)

    def features(self, previous):
        return self.wvec(previous.flatten(1)[..., None])


class AttForward(AttLoc):
    def __init__(self, eprojs, dunits, att_dim, aconv_chans, aconv_filts):
        super().__init__(eprojs, dunits, att_dim, aconv_chans, aconv_filts)

    def reached(self, previous, moved):
        return previous + moved

    def forward(
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
        if att_prev is None:
            att_prev = torch.zeros_like(enc_hs_pad[..., 0])
            att_prev[:, 0] = 1.0
        w = self.softmax(enc_hs_pad, enc_hs_len, dec_z, att_prev[:, None, None], scaling)
        w = w * self.reached(att_prev, torch.cat([torch.zeros_like(w[:, :1]), att_prev[:, :-1]], 1))
        w = w.clamp(1e-6)
        w = w / w.sum(1, keepdim=True)
        return self.summed(w), w


class AttForwardTA(AttForward):
    def __init__(self, eunits, dunits, att_dim, aconv_chans, aconv_filts, odim):
        super().__init__(eunits, dunits, att_dim, aconv_chans, aconv_filts)
        self.mlp_ta = nn.Linear(eunits + dunits + odim, 1)

    def reset(self):
        super().reset()
        self.trans_agent_prob = 0.5

    def reached(self, previous, moved):
        return self.trans_agent_prob * previous + (1 - self.trans_agent_prob) * moved

    def forward(
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
        c, w = super().forward(enc_hs_pad, enc_hs_len, dec_z, att_prev, scaling)
        seen = torch.cat([c, out_prev, self.state(dec_z, enc_hs_pad)], 1)
        self.trans_agent_prob = self.mlp_ta(seen).sigmoid()
        return c, w


class AttMultiHeadAdd(_Step):
    kept = "h_length", "enc_h", "pre_compute_k", "pre_compute_v", "mask"

    def __init__(self, eprojs, dunits, aheads, att_dim_k, att_dim_v, han_mode=False):
        super().__init__(dunits, han_mode)
        self.mlp_q = nn.ModuleList(nn.Linear(dunits, att_dim_k) for _ in range(aheads))
        self.mlp_k = nn.ModuleList(nn.Linear(eprojs, att_dim_k, bias=False) for _ in range(aheads))
        self.mlp_v = nn.ModuleList(nn.Linear(eprojs, att_dim_v, bias=False) for _ in range(aheads))
        self.gvec = nn.ModuleList(nn.Linear(att_dim_k, 1) for _ in range(aheads))
        self.mlp_o = nn.Linear(aheads * att_dim_v, eprojs, bias=False)
        self.scaling = att_dim_k**-0.5

    def features(self, head, att_prev):
        return 0.0

    def heads(self, states, lengths, dec_z, att_prev, scaling):
        if self.pre_compute_k is None or self.pre_compute_v is None or self.han_mode:
            self.enc_h, self.h_length = states, states.shape[1]
            self.pre_compute_k = [f(states) for f in self.mlp_k]
            self.pre_compute_v = [f(states) for f in self.mlp_v]
        state, padding, c, w = self.state(dec_z, states), self.padding(states, lengths), [], []
        parts = zip(self.mlp_q, self.pre_compute_k, self.pre_compute_v, self.gvec, strict=True)
        for head, (q, k, v, g) in enumerate(parts):
            e = g((k + q(state)[:, None] + self.features(head, att_prev)).tanh()).squeeze(2)
            w.append((scaling * e.masked_fill(padding, -torch.inf)).softmax(1))
            c.append((v * w[-1][..., None]).sum(1))
        return self.mlp_o(torch.cat(c, 1)), w

    def forward(self, enc_hs_pad, enc_hs_len, dec_z, att_prev, **kwargs):
        return self.heads(enc_hs_pad, enc_hs_len, dec_z, att_prev, self.scaling)


class AttMultiHeadLoc(AttMultiHeadAdd):
    def __init__(self, eprojs, dunits, aheads, att_dim_k, att_dim_v, aconv_chans, aconv_filts, han_mode=False):
        super().__init__(eprojs, dunits, aheads, att_dim_k, att_dim_v, han_mode)
        self.loc_conv = nn.ModuleList(convolution(aconv_chans, 1, aconv_filts) for _ in range(aheads))
        self.mlp_att = nn.ModuleList(nn.Linear(aconv_chans, att_dim_k, bias=False) for _ in range(aheads))

    def features(self, head, att_prev):
        return self.mlp_att[head](self.loc_conv[head](att_prev[head][:, None, None]).squeeze(2).mT)

    def forward(self, enc_hs_pad, enc_hs_len, dec_z, att_prev, scaling=2.0, **kwargs):
        if att_prev is None:
            att_prev = [uniform(self, enc_hs_pad, enc_hs_len) for _ in self.mlp_q]
        return self.heads(enc_hs_pad, enc_hs_len, dec_z, att_prev, scaling)
