"""The blocks of DiT.

Conventions: a condition makes shift, scale, gate of attention, then of the MLP; the affine is (1 + scale), shift,
of a norm without parameters. Between attention and MLP the residual is added, normalised, modulated in one pass.
"""

from fusedattn.dropin._adapter import Adapter
from fusedattn.dropin._modulate import FUSES, in_result_dtype, modulated
from fusedattn.ops.film import film

_SOURCE = "facebookresearch/DiT, models.py"


def _block(self, x, c):
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.adaLN_modulation(c).chunk(6, 1)
    y = self.attn(modulated(self.norm1, x, scale, shift, gamma_offset=1.0))
    y, h = modulated(self.norm2, y, mlp_scale, mlp_shift, gamma_offset=1.0, pre_residual=x, pre_gate=gate)
    y, gate, h = in_result_dtype(self.mlp(y), mlp_gate, h)
    return film(y, gate, residual=h, channel_dim=-1)


def _final(self, x, c):
    shift, scale = self.adaLN_modulation(c).chunk(2, 1)
    return self.linear(modulated(self.norm_final, x, scale, shift, gamma_offset=1.0))


def _probe(module, sizes, draw):
    return module(draw(2, 3, sizes["C"]), draw(2, sizes["E"]))


def _modulation(parts, norms):
    shapes = {"adaLN_modulation.1.weight": (f"{parts}C", "E"), "adaLN_modulation.1.bias": (f"{parts}C",)}
    return shapes | {f"{norm}.{name}?": ("C",) for norm in norms for name in ("weight", "bias")}


ADAPTERS = (
    Adapter(
        name="dit.DiTBlock",
        source=_SOURCE,
        fuses="norms, modulation, gates and residuals, each group in one pass",
        shapes={**_modulation(6, ("norm1", "norm2")), "attn.*": None, "mlp.*": None},
        fused=_block,
        probe=_probe,
        inside=("norm1", "norm2"),
    ),
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
