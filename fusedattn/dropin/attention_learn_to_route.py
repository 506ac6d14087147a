"""The pointer network's attention of wouterkool/attention-learn-to-route.

Conventions: the references are (S, B, D) and projected by a convolution of width 1, whose result (B, D, S) is
returned beside the scores (B, S). With ``use_tanh`` these are C tanh(u). As a linear layer that convolution leaves
a reference's channels together, as scores want them; what is returned is a transposed view.
"""

import torch.nn.functional as F

from fusedattn.dropin._adapter import Adapter
from fusedattn.dropin._scores import SCORES, scores


def _forward(self, query, ref):
    key = F.linear(ref.transpose(0, 1), self.project_ref.weight.squeeze(-1), self.project_ref.bias)
    query = self.project_query(query).unsqueeze(1)
    clipped = {"scale": self.C, "softcap": self.C} if self.use_tanh else {}
    logits = scores(query, key, self.v, **clipped)
    return key.transpose(1, 2), logits.squeeze(1)


def _probe(module, sizes, draw):
    return module(draw(2, sizes["D"]), draw(3, 2, sizes["D"]))


def _reasons(module):
    C = getattr(module, "C", None)
    if not hasattr(module, "use_tanh") or not isinstance(C, (int, float)) or isinstance(C, bool) or not C > 0:
        return [f"expected use_tanh and a positive number C, got C={C!r}"]
    return []


ADAPTERS = (
    Adapter(
        name="attention_learn_to_route.Attention",
        source="wouterkool/attention-learn-to-route, nets/pointer_network.py",
        fuses=SCORES,
        least=1 << 11,  # the linear layer saves more than the call costs
        shapes={
            "project_query.weight": ("D", "D"),
            "project_query.bias": ("D",),
            "project_ref.weight": ("D", "D", 1),
            "project_ref.bias": ("D",),
            "v": ("D",),
        },
        fused=_forward,
        probe=_probe,
        inside=("project_ref",),
        reasons=_reasons,
    ),
)
