"""The blocks of DiT, and of SiT, whose block is the same.

Conventions: a condition makes shift, scale, gate of attention, then of the MLP; the affine is (1 + scale), shift,
of a norm without parameters. Between attention and MLP the residual is added, normalised, modulated in one pass.
"""

from fusedattn.dropin._adapter import Adapter
from fusedattn.dropin._modulate import FUSES, FUSES_BLOCK, feed_forward, modulated

_SOURCE = "facebookresearch/DiT, models.py"


def _block(self, x, c):
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.adaLN_modulation(c).chunk(6, 1)
    y = self.attn(modulated(self.norm1, x, scale, shift, gamma_offset=1.0))
    return feed_forward(self.norm2, self.mlp, y, x, gate, mlp_shift, mlp_scale, mlp_gate)


def _final(self, x, c):
    shift, scale = self.adaLN_modulation(c).chunk(2, 1)
    return self.linear(modulated(self.norm_final, x, scale, shift, gamma_offset=1.0))


def _probe(module, sizes, draw):
    return module(draw(2, 3, sizes["C"]), draw(2, sizes["E"]))


def _modulation(parts, norms):
    shapes = {"adaLN_modulation.1.weight": (f"{parts}C", "E"), "adaLN_modulation.1.bias": (f"{parts}C",)}
    return shapes | {f"{norm}.{name}?": ("C",) for norm in norms for name in ("weight", "bias")}


def _adapter_of_block(name, source):
    return Adapter(
        name=name,
        source=source,
        fuses=FUSES_BLOCK,
        shapes={**_modulation(6, ("norm1", "norm2")), "attn.*": None, "mlp.*": None},
        fused=_block,
        probe=_probe,
        inside=("norm1", "norm2"),
    )


ADAPTERS = (
    _adapter_of_block("dit.DiTBlock", _SOURCE),
    _adapter_of_block("dit.SiTBlock", "willisma/SiT, models.py"),
    Adapter(
        name="dit.FinalLayer",
        source=_SOURCE,
        fuses=FUSES,
        shapes={**_modulation(2, ("norm_final",)), "linear.weight": ("O", "C"), "linear.bias?": ("O",)},
        fused=_final,
        probe=_probe,
        inside=("norm_final",),
    ),
)
