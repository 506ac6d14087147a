"""The gated activation of ritheshkumar95/pytorch-vqvae's PixelCNN.

Conventions: tanh of the first half of the channels times the sigmoid of the second; conditions come added.
"""

from fusedattn.dropin._adapter import Adapter
from fusedattn.ops.gated_film import gated_film


def _forward(self, x):
    return gated_film(x)


def _probe(module, sizes, draw):
    return module(draw(2, 4, 3, 5))


ADAPTERS = (
    Adapter(
        name="pixelcnn.GatedActivation",
        source="ritheshkumar95/pytorch-vqvae, modules.py",
        fuses="both halves in one pass",
        shapes={},
        fused=_forward,
        probe=_probe,
    ),
)
