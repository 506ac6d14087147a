"""The AdaIN of StarGAN v2, and its form of one dimension in StyleTTS 2.

Conventions: a style makes gamma before beta, the affine is (1 + gamma), beta; some copies give the norm weights.
"""

from fusedattn.dropin._adapter import Adapter
from fusedattn.dropin._modulate import FUSES, modulated


def _forward(self, x, s):
    gamma, beta = self.fc(s).chunk(2, 1)
    return modulated(self.norm, x, gamma, beta, gamma_offset=1.0)


def _probe_of(*places):
    def probe(module, sizes, draw):
        return module(draw(2, sizes["C"], *places), draw(2, sizes["S"]))

    return probe


def _adapter(name, source, places):
    return Adapter(
        name=name,
        source=source,
        fuses=FUSES,
        shapes={
            "fc.weight": ("2C", "S"),
            "fc.bias": ("2C",),
            "norm.weight?": ("C",),
            "norm.bias?": ("C",),
        },
        fused=_forward,
        probe=_probe_of(*places),
        inside=("norm",),
    )


ADAPTERS = (
    _adapter("stargan_v2.AdaIN", "clovaai/stargan-v2, core/model.py", (3, 4)),
    _adapter("stargan_v2.AdaIN1d", "yl4579/StyleTTS2, Modules/istftnet.py", (5,)),
)
