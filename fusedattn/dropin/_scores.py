"""What adapters of attention share."""

import torch
from torch import Tensor, nn

from fusedattn._dispatch import beside
from fusedattn.ops.additive_scores import additive_scores

FUSES = "scores without the (B, Tq, Tk, D) tensor"
NAN_ROWS = "a row without a valid key gets context 0 and weights 0, the original gives NaN"


def scores(query: Tensor, key: Tensor, weight: Tensor, **options) -> Tensor:
    """(B, Tq, Tk) of query (B, Tq, D), key (B, Tk, D) and weight (D,)."""
    return additive_scores(query, key, beside(query, weight), **options)


def score_weight(linear: nn.Linear) -> Tensor:
    """(D,) of the linear layer to one score, whose bias the softmax cancels: its gradient is zero, but there."""
    weight = linear.weight.view(-1)
    return weight if linear.bias is None else torch.add(weight, linear.bias, alpha=0)
