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


class AttLoc(_Step):
    kept = AttAdd.kept

    def __init__(self, eprojs, dunits, att_dim, aconv_chans, aconv_filts, han_mode=False):
        super().__init__(dunits, han_mode)
        self.mlp_enc = nn.Linear(eprojs, att_dim)
        self.mlp_dec = nn.Linear(dunits, att_dim, bias=False)
        self.mlp_att = nn.Linear(aconv_chans, att_dim, bias=False)
        width = 2 * aconv_filts + 1
        self.loc_conv = nn.Conv2d(1, aconv_chans, (1, width), padding=(0, aconv_filts), bias=False)
        self.gvec = nn.Linear(att_dim, 1)

    def forward(self, enc_hs_pad, enc_hs_len, dec_z, att_prev, scaling=2.0, last_attended_idx=None, *window):
        if self.pre_compute_enc_h is None or self.han_mode:
            self.enc_h, self.h_length = enc_hs_pad, enc_hs_pad.shape[1]
            self.pre_compute_enc_h = self.mlp_enc(enc_hs_pad)
        query = self.mlp_dec(self.state(dec_z, enc_hs_pad))
        padding = self.padding(enc_hs_pad, enc_hs_len)
        if att_prev is None:
            att_prev = (~padding).to(query.dtype) / torch.as_tensor(enc_hs_len)[:, None]
        u = self.mlp_att(self.loc_conv(att_prev[:, None, None]).squeeze(2).mT)
        e = self.gvec((u + self.pre_compute_enc_h + query[:, None]).tanh()).squeeze(2)
        w = (scaling * e.masked_fill(padding, -torch.inf)).softmax(1)
        return (self.enc_h * w[..., None]).sum(1), w


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

    def forward(self, enc_hs_pad, enc_hs_len, dec_z, att_prev, **kwargs):
        if self.pre_compute_k is None or self.pre_compute_v is None or self.han_mode:
            self.enc_h, self.h_length = enc_hs_pad, enc_hs_pad.shape[1]
            self.pre_compute_k = [f(enc_hs_pad) for f in self.mlp_k]
            self.pre_compute_v = [f(enc_hs_pad) for f in self.mlp_v]
        state, padding, c, w = self.state(dec_z, enc_hs_pad), self.padding(enc_hs_pad, enc_hs_len), [], []
        for q, k, v, g in zip(self.mlp_q, self.pre_compute_k, self.pre_compute_v, self.gvec, strict=True):
            e = g((k + q(state)[:, None]).tanh()).squeeze(2).masked_fill(padding, -torch.inf)
            w.append((self.scaling * e).softmax(1))
            c.append((v * w[-1][..., None]).sum(1))
        return self.mlp_o(torch.cat(c, 1)), w
