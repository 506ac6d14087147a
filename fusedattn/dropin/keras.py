"""Keras 3's AdditiveAttention on its torch backend.

Conventions: nothing is projected; the score vector ``scale`` is the only parameter, or there is none and all
channels count alike. Masks, causality, dropout and what is returned stay the original's.
"""

from fusedattn.dropin._adapter import Adapter, original
from fusedattn.dropin._scores import LEAST, SCORES, pairs, scores


def _calculate_scores(self, query, key):
    if query.dim() not in (3, 4) or key.dim() != query.dim():
        return original(self, "_calculate_scores")(query, key)
    weight = self.scale.value if self.use_scale else query.new_ones(query.shape[-1])
    return scores(query, key, weight).to(query.dtype)  # not autocast's: there the original's are elementwise


def _probe(module, sizes, draw):
    D = sizes.get("D", 3)
    return module._calculate_scores(draw(2, 3, D), draw(2, 4, D))


ADAPTERS = (
    Adapter(
        name="keras.AdditiveAttention",
        source="keras-team/keras 3, keras/src/layers/attention/additive_attention.py",
        fuses=SCORES,
        work=pairs,
        least=LEAST,
        shapes={"_torch_params.*": ("D",)},
        method="_calculate_scores",
        fused=_calculate_scores,
        probe=_probe,
        reasons=lambda module: [] if hasattr(module, "use_scale") else ["has no use_scale"],
        limits="a layer that is saved by Keras or pickled comes back as the original",
    ),
)
