"""The additive pooling of NRMS, NAML and other models in yusanshi/news-recommendation.

Conventions: there is no query; the bias stands in the projection. A module that writes its weights to TensorBoard
is left alone.
"""

from fusedattn.dropin._adapter import Adapter
from fusedattn.dropin._scores import ATTENTION
from fusedattn.ops.additive_attention import additive_attention


def _forward(self, candidate_vector):
    key = self.linear(candidate_vector)
    nothing = key.new_zeros(1, 1, key.shape[-1])
    return additive_attention(nothing, key, candidate_vector, self.attention_query_vector).squeeze(1)


def _probe(module, sizes, draw):
    return module(draw(2, 4, sizes["K"]))


def _reasons(module):
    return [] if getattr(module, "writer", None) is None else ["writes its weights to TensorBoard"]


ADAPTERS = (
    Adapter(
        name="news_recommendation.AdditiveAttention",
        source="yusanshi/news-recommendation, src/model/general/attention/additive.py",
        fuses=ATTENTION,
        shapes={"linear.weight": ("D", "K"), "linear.bias": ("D",), "attention_query_vector": ("D",)},
        fused=_forward,
        probe=_probe,
        reasons=_reasons,
    ),
)
