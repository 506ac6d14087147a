"""The residual block of Diffusion Policy.

Conventions: FiLM without an offset after the first convolution, its norm and Mish, scale before bias; without
``cond_predict_scale`` the bias alone.
"""

from fusedattn.dropin._adapter import Adapter
from fusedattn.dropin._modulate import in_result_dtype
from fusedattn.ops.film import film


def _forward(self, x, cond):
    made = self.cond_encoder(cond).flatten(1)
    scale, bias = made.chunk(2, 1) if self.cond_predict_scale else (None, made)
    y = film(*in_result_dtype(self.blocks[0](x), scale, bias))
    return self.blocks[1](y) + self.residual_conv(x)


def _probe(module, sizes, draw):
    return module(draw(2, sizes["I"], 4), draw(2, sizes["E"]))


_BLOCK = {"block.0.bias": ("C",), "block.1.weight": ("C",), "block.1.bias": ("C",)}

ADAPTERS = (
    Adapter(
        name="diffusion_policy.ConditionalResidualBlock1D",
        source="real-stanford/diffusion_policy, diffusion_policy/model/diffusion/conditional_unet1d.py",
        fuses="scale and bias in one pass",
        shapes={
            "blocks.0.block.0.weight": ("C", "I", "K"),
            "blocks.1.block.0.weight": ("C", "C", "K"),
            **{f"blocks.{n}.{name}": shape for n in (0, 1) for name, shape in _BLOCK.items()},
            "cond_encoder.1.weight": ("W", "E"),
            "cond_encoder.1.bias": ("W",),
            "residual_conv.weight?": ("C", "I", 1),
            "residual_conv.bias?": ("C",),
        },
        fused=_forward,
        probe=_probe,
    ),
)
