"""CLAM's attention networks, whose raw scores others normalise.

Conventions: instances (N, L), scores (N, K) of K heads with their bias, before any softmax, and the input again.
Dropout of hidden units, in training, is left to the original.
"""

from torch import nn

from fusedattn.dropin._adapter import Adapter, original
from fusedattn.ops.attention_pool import attention_pool


def _drops(*branches):
    return any(isinstance(layer, nn.Dropout) and layer.training and layer.p > 0 for b in branches for layer in b)


def _scores(x, last, hidden, gate=None):
    gate = None if gate is None else gate(x).unsqueeze(0)
    found = attention_pool(hidden(x).unsqueeze(0), None, last.weight, gate).squeeze(0).t()
    return found if last.bias is None else found + last.bias.to(found.dtype)


def _net(self, x):
    if x.dim() != 2 or _drops(self.module):
        return original(self)(x)
    return _scores(x, self.module[-1], self.module[0]), x


def _gated(self, x):
    if x.dim() != 2 or _drops(self.attention_a, self.attention_b):
        return original(self)(x)
    return _scores(x, self.attention_c, self.attention_a[0], self.attention_b[0]), x


def _probe(module, sizes, draw):
    return module(draw(5, sizes["L"]))


def _adapter(class_name, shapes, fused, inside):
    return Adapter(
        name=f"clam.{class_name}",
        source="mahmoodlab/CLAM, models/model_clam.py",
        fuses="gate and scores in one pass",
        shapes=shapes,
        fused=fused,
        probe=_probe,
        inside=inside,
    )


_FIRST = {"weight": ("D", "L"), "bias": ("D",)}

ADAPTERS = (
    _adapter(
        "Attn_Net",
        {
            **{f"module.0.{name}": shape for name, shape in _FIRST.items()},
            "module.2.weight?": ("K", "D"),
            "module.2.bias?": ("K",),
            "module.3.weight?": ("K", "D"),
            "module.3.bias?": ("K",),
        },
        _net,
        ("module",),
    ),
    _adapter(
        "Attn_Net_Gated",
        {
            **{f"attention_{n}.0.{name}": shape for n in "ab" for name, shape in _FIRST.items()},
            "attention_c.weight": ("K", "D"),
            "attention_c.bias": ("K",),
        },
        _gated,
        ("attention_a", "attention_b", "attention_c"),
    ),
)
