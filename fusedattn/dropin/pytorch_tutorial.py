"""The attention of PyTorch's tutorial "NLP From Scratch: Translation with a Sequence to Sequence Network".

Conventions: three linear layers with biases; the query is one step (B, 1, H). Longer queries, which the original
adds to the keys place by place, are left to it.
"""

from fusedattn.dropin._adapter import Adapter, original
from fusedattn.dropin._scores import ATTENTION, score_weight
from fusedattn.ops.additive_attention import additive_attention


def _forward(self, query, keys):
    if query.dim() != 3 or query.shape[1] != 1:
        return original(self)(query, keys)
    return additive_attention(self.Wa(query), self.Ua(keys), keys, score_weight(self.Va), return_weights=True)


def _probe(module, sizes, draw):
    return module(draw(2, 1, sizes["Q"]), draw(2, 4, sizes["K"]))


ADAPTERS = (
    Adapter(
        name="pytorch_tutorial.BahdanauAttention",
        source="pytorch/tutorials, intermediate_source/seq2seq_translation_tutorial.py",
        fuses=ATTENTION,
        shapes={
            "Wa.weight": ("D", "Q"),
            "Wa.bias": ("D",),
            "Ua.weight": ("D", "K"),
            "Ua.bias": ("D",),
            "Va.weight": (1, "D"),
            "Va.bias": (1,),
        },
        fused=_forward,
        probe=_probe,
        inside=("Va",),
    ),
)
