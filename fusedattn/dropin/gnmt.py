"""The attention of NVIDIA's GNMT, which others copied.

Conventions: projections without biases; with ``normalize`` the score vector is g v / |v|, and a bias stands inside
the tanh. The rest is the original's: time first unless ``batch_first``, the mask that ``set_mask`` keeps on the
module (True at padding, filled with -65504), the softmax and the context.
"""

from fusedattn.dropin._adapter import Adapter
from fusedattn.dropin._scores import LEAST, SCORES, pairs, scores


def _calc_score(self, att_query, att_keys):
    weight = self.linear_att
    if self.normalize:
        att_query = att_query + self.normalize_bias
        weight = weight / weight.norm() * self.normalize_scalar
    return scores(att_query, att_keys, weight)


def _probe(module, sizes, draw):
    D = sizes["D"]
    return module.calc_score(draw(2, 3, D), draw(2, 4, D))


ADAPTERS = (
    Adapter(
        name="gnmt.BahdanauAttention",
        source="NVIDIA/DeepLearningExamples, PyTorch/Translation/GNMT/seq2seq/models/attention.py",
        fuses=SCORES,
        work=pairs,
        least=LEAST,
        shapes={
            "linear_q.weight": ("D", "Q"),
            "linear_k.weight": ("D", "K"),
            "linear_att": ("D",),
            "normalize_scalar?": (1,),
            "normalize_bias?": ("D",),
        },
        method="calc_score",
        fused=_calc_score,
        probe=_probe,
    ),
)
