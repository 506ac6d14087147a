"""The residual block of guided-diffusion, and of what copied it: improved-diffusion, latent diffusion.

Conventions: group norm in float32, SiLU, a convolution, twice. With ``use_scale_shift_norm`` the embedding makes
scale before shift of the second norm, the affine is (1 + scale), shift; without, it is added before that norm.
"""

from fusedattn.dropin._adapter import Adapter
from fusedattn.dropin._modulate import modulated


def _forward(self, x, emb):
    norm, _, convolution = self.in_layers
    h = modulated(norm, x, None, None, activation="silu")
    if getattr(self, "updown", False):
        h, x = self.h_upd(h), self.x_upd(x)
    h = convolution(h)
    made = self.emb_layers(emb).type(h.dtype)
    norm, _, *rest = self.out_layers
    scale = shift = None
    if self.use_scale_shift_norm:
        scale, shift = made.chunk(2, 1)
    else:
        h = h + made.reshape(*made.shape, *[1] * (h.dim() - 2))
    h = modulated(norm, h, scale, shift, gamma_offset=1.0, activation="silu")
    for layer in rest:
        h = layer(h)
    return self.skip_connection(x) + h


def _probe(module, sizes, draw):
    places = [4] * (module.in_layers[2].weight.dim() - 2)
    for layers in (module.in_layers, module.out_layers):
        layers[0].float()  # as it stays where the convolutions are in half precision
    return module(draw(2, sizes["I"], *places), draw(2, sizes["E"]))


ADAPTERS = (
    Adapter(
        name="guided_diffusion.ResBlock",
        source="openai/guided-diffusion, guided_diffusion/unet.py",
        fuses="both norms with scale, shift and SiLU, each in one pass",
        shapes={
            "in_layers.0.weight": ("I",),
            "in_layers.0.bias": ("I",),
            "in_layers.2.weight": None,
            "in_layers.2.bias": None,
            "emb_layers.1.weight": ("M", "E"),
            "emb_layers.1.bias": ("M",),
            "out_layers.0.weight": ("C",),
            "out_layers.0.bias": ("C",),
            "out_layers.3.weight": None,
            "out_layers.3.bias": None,
            "skip_connection.*": None,
            "?_upd.*": None,
        },
        fused=_forward,
        probe=_probe,
        method="_forward",  # which its forward may checkpoint
        inside=("in_layers", "in_layers.0", "in_layers.1", "out_layers", "out_layers.0", "out_layers.1"),
        tolerance=1e-5,  # its norms are in float32
    ),
)
