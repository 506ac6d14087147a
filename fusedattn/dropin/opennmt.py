"""OpenNMT-py's global attention with ``attn_type="mlp"``.

Conventions: the query's projection has the bias. Lengths, coverage, softmax or sparsemax and the projection of the
context stay the original's.
"""

from fusedattn.dropin._adapter import Adapter
from fusedattn.dropin._scores import LEAST, SCORES, pairs, score_weight, scores


def _score(self, h_t, h_s):
    return scores(self.linear_query(h_t), self.linear_context(h_s), score_weight(self.v))


def _probe(module, sizes, draw):
    return module.score(draw(2, 3, sizes["D"]), draw(2, 4, sizes["D"]))


def _reasons(module):
    kind = getattr(module, "attn_type", None)
    return [] if kind == "mlp" else [f"has attn_type={kind!r}, expected 'mlp'"]


ADAPTERS = (
    Adapter(
        name="opennmt.GlobalAttention",
        source="OpenNMT/OpenNMT-py, onmt/modules/global_attention.py",
        fuses=SCORES,
        work=pairs,
        least=LEAST,
        shapes={
            "linear_context.weight": ("D", "D"),
            "linear_query.weight": ("D", "D"),
            "linear_query.bias": ("D",),
            "v.weight": (1, "D"),
            "linear_out.weight": ("D", "2D"),
            "linear_out.bias": ("D",),
            "linear_cover.weight?": ("D", 1),
        },
        method="score",
        fused=_score,
        probe=_probe,
        inside=("v",),
        reasons=_reasons,
    ),
)
