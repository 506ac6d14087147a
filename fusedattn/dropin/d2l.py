"""The additive attention of Dive into Deep Learning.

Conventions: no biases; ``valid_lens`` (B,) or (B, Tq), beyond which scores are -1e6, so that a row of length 0
attends to all keys alike. The weights before dropout stay on the module, the dropped out ones make the context.
"""

import torch

from fusedattn.dropin._adapter import Adapter
from fusedattn.dropin._scores import LEAST, SCORES, pairs, score_weight, scores


def _forward(self, queries, keys, values, valid_lens):
    energies = scores(self.W_q(queries), self.W_k(keys), score_weight(self.w_v))
    if valid_lens is not None:
        lengths = valid_lens[:, None, None] if valid_lens.dim() == 1 else valid_lens.unsqueeze(-1)
        beyond = torch.arange(energies.shape[-1], device=energies.device) >= lengths
        energies = energies.masked_fill(beyond, -1e6)
    self.attention_weights = torch.softmax(energies, -1)
    return torch.bmm(self.dropout(self.attention_weights), values)


def _probe(module, sizes, draw):
    inputs = draw(2, 3, sizes["Q"]), draw(2, 4, sizes["K"]), draw(2, 4, 5)
    lengths = None, torch.tensor([0, 3]), torch.tensor([[1, 2, 3], [4, 0, 1]])
    return [(module(*inputs, valid), module.attention_weights) for valid in lengths]


ADAPTERS = (
    Adapter(
        name="d2l.AdditiveAttention",
        source="d2l-ai/d2l-en, d2l/torch.py",
        fuses=SCORES,
        work=pairs,
        least=LEAST,
        shapes={"W_q.weight": ("D", "Q"), "W_k.weight": ("D", "K"), "w_v.weight": (1, "D")},
        fused=_forward,
        probe=_probe,
        inside=("w_v",),
    ),
)
