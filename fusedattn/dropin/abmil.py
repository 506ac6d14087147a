"""Attention-based multiple-instance learning by its authors, ``Attention`` and ``GatedAttention``.

Conventions: a bag (1, N, 1, 28, 28) of MNIST's digits, whose features two networks of the module make; biases
everywhere, of which the score's the softmax cancels; answers are probability, decision and weights (1, N).
"""

import torch

from fusedattn._dispatch import beside
from fusedattn.dropin._adapter import Adapter
from fusedattn.dropin._scores import score_weight
from fusedattn.ops.attention_pool import attention_pool


def _features(self, x):
    """(N, M)."""
    found = self.feature_extractor_part1(x.squeeze(0))
    return self.feature_extractor_part2(found.view(-1, self.feature_extractor_part2[0].in_features))


def _answers(self, features, score, hidden, gate=None):
    pooled, weights = attention_pool(
        hidden.unsqueeze(0),
        features.unsqueeze(0),
        beside(hidden, score_weight(score)),
        None if gate is None else gate.unsqueeze(0),
        return_weights=True,
    )
    probability = self.classifier(pooled)
    return probability, torch.ge(probability, 0.5).float(), weights


def _forward(self, x):
    features = _features(self, x)
    return _answers(self, features, self.attention[2], self.attention[0](features))


def _gated(self, x):
    features = _features(self, x)
    hidden, gate = self.attention_V[0](features), self.attention_U[0](features)
    return _answers(self, features, self.attention_w, hidden, gate)


def _probe(module, sizes, draw):
    return module(draw(1, 3, 1, 28, 28))


def _adapter(class_name, fused, hidden, score, inside):
    return Adapter(
        name=f"abmil.{class_name}",
        source="AMLab-Amsterdam/AttentionDeepMIL, model.py",
        fuses="scores, softmax and context in one pass",
        shapes={
            "feature_extractor_part1.*": None,
            "feature_extractor_part2.*": None,
            **{f"{name}.weight": ("D", "M") for name in hidden},
            **{f"{name}.bias": ("D",) for name in hidden},
            f"{score}.weight": (1, "D"),
            f"{score}.bias": (1,),
            "classifier.0.weight": (1, "M"),
            "classifier.0.bias": (1,),
        },
        fused=fused,
        probe=_probe,
        inside=inside,
        least=1 << 19,  # pixels: some 700 instances
    )


ADAPTERS = (
    _adapter("Attention", _forward, ("attention.0",), "attention.2", ("attention",)),
    _adapter(
        "GatedAttention",
        _gated,
        ("attention_V.0", "attention_U.0"),
        "attention_w",
        ("attention_V", "attention_U", "attention_w"),
    ),
)
