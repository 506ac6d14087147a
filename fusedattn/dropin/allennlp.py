"""AllenNLP's additive attention.

Conventions: matrices multiply from the right, x @ W, and are no layers; the vector is (D, 1). The masked softmax
stays the original's, whose rows without a valid key are 0.
"""

from fusedattn.dropin._adapter import Adapter
from fusedattn.dropin._scores import LEAST, SCORES, scores


def _forward_internal(self, vector, matrix):
    query = vector.matmul(self._w_matrix).unsqueeze(1)
    return scores(query, matrix.matmul(self._u_matrix), self._v_vector.view(-1)).squeeze(1)


def _probe(module, sizes, draw):
    return module._forward_internal(draw(2, sizes["D"]), draw(2, 4, sizes["K"]))


ADAPTERS = (
    Adapter(
        name="allennlp.AdditiveAttention",
        source="allenai/allennlp, allennlp/modules/attention/additive_attention.py",
        fuses=SCORES,
        least=LEAST,
        shapes={"_w_matrix": ("D", "D"), "_u_matrix": ("K", "D"), "_v_vector": ("D", 1)},
        method="_forward_internal",
        fused=_forward_internal,
        probe=_probe,
    ),
)
