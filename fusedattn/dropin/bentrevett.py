"""The attention of bentrevett/pytorch-seq2seq, notebook 3, and that of legacy 3 and 4 with its other names.

Conventions: one linear layer over the decoder's state and the encoder's output, concatenated in this order: its
columns are those of a query's and a key's projection, of which the query's has the bias. The output is
(S, B, 2E), the answer the weights (B, S) alone; a mask is 0 at padding and fills with -1e10, so that a row of
nothing but padding attends to all of it alike.
"""

import inspect

import torch
import torch.nn.functional as F

from fusedattn.dropin._adapter import Adapter
from fusedattn.dropin._scores import LEAST, SCORES, score_weight, scores


def _fused(attn, v):
    def forward(self, hidden, encoder_outputs, mask=None):
        linear = getattr(self, attn)
        D = hidden.shape[-1]
        of_query, of_key = linear.weight.split([D, linear.in_features - D], 1)
        query = F.linear(hidden, of_query, linear.bias).unsqueeze(1)
        key = F.linear(encoder_outputs, of_key).transpose(0, 1)
        energies = scores(query, key, score_weight(getattr(self, v))).squeeze(1)
        if mask is not None:
            energies = energies.masked_fill(mask == 0, -1e10)
        return torch.softmax(energies, 1)

    return forward


def _probe(module, sizes, draw):
    width, D = sizes["W"], sizes["D"]
    takes_mask = len(inspect.signature(module.forward).parameters) == 3
    masks = [torch.tensor([[1, 1, 0], [0, 0, 0]])] if takes_mask else []
    return module(draw(2, D), draw(3, 2, width - D), *masks)


def _adapter(name, attn, v):
    return Adapter(
        name=name,
        source="bentrevett/pytorch-seq2seq, notebook 3, legacy 3 and legacy 4",
        fuses=SCORES,
        least=LEAST,
        shapes={f"{attn}.weight": ("D", "W"), f"{attn}.bias": ("D",), f"{v}.weight": (1, "D")},
        fused=_fused(attn, v),
        probe=_probe,
        inside=(attn, v),
    )


ADAPTERS = (
    _adapter("bentrevett.Attention", "attn_fc", "v_fc"),
    _adapter("bentrevett.legacy.Attention", "attn", "v"),
)
