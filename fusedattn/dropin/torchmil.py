"""torchmil's attention pooling.

Conventions: layers with biases, a score vector without; the mask is 0 at padding, filled with -inf, while the
scores that ``return_att`` adds are those before it. Activations other than tanh are left to the original.
"""

import torch

from fusedattn.dropin._adapter import Adapter
from fusedattn.ops.attention_pool import attention_pool


def _forward(self, X, mask=None, return_att=False):
    hidden, weight = self.fc1(X), self.fc2.weight.view(-1)
    gate = self.fc_gated(X) if self.gated else None
    if mask is None:
        return attention_pool(hidden, X, weight, gate, return_scores=return_att)
    f = attention_pool(hidden, None, weight, gate)
    s = torch.softmax(f.masked_fill(mask == 0, -torch.inf), 1)
    z = torch.bmm(s.unsqueeze(1), X).squeeze(1)
    return (z, f) if return_att else z


def _probe(module, sizes, draw):
    X, mask = draw(2, 5, sizes["K"]), torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0]])
    return module(X), module(X, mask, True), module(X, return_att=True)


def _reasons(module):
    act = getattr(module, "act", None)
    return [] if act == "tanh" else [f"has act={act!r}, kernels are for 'tanh'"]


ADAPTERS = (
    Adapter(
        name="torchmil.AttentionPool",
        source="torchmil 1.0, torchmil/nn/attention/attention_pool.py",
        fuses="gate, scores, softmax and context in one pass",
        shapes={
            "fc1.module.weight": ("D", "K"),
            "fc1.module.bias": ("D",),
            "fc_gated.module.weight?": ("D", "K"),
            "fc_gated.module.bias?": ("D",),
            "fc2.weight": (1, "D"),
        },
        fused=_forward,
        probe=_probe,
        inside=("fc2", "act_layer", "act_gated"),
        reasons=_reasons,
    ),
)
