"""The residual block of Diffusion Policy, and LeRobot's of the same.

Conventions: gamma x + beta without an offset, after norm and Mish, in that order. Without a scale the condition is
a bias alone, of which nothing can be fused.
"""

from fusedattn.dropin._adapter import Adapter
from fusedattn.dropin._modulate import LEAST_OF_FILM, in_result_dtype
from fusedattn.ops.film import film


def _conditioned(self, x, cond, first, second):
    made = self.cond_encoder(cond).reshape(x.shape[0], 2, -1)
    y = second(film(*in_result_dtype(first(x), *made.unbind(1))))
    return y + self.residual_conv(x)


def _block(self, x, cond):
    return _conditioned(self, x, cond, *self.blocks)


def _lerobot_block(self, x, cond):
    return _conditioned(self, x, cond, self.conv1, self.conv2)


def _probe(module, sizes, draw):
    return module(draw(2, sizes["I"], 5), draw(2, sizes["E"]))


def _reasons_of(flag):
    def reasons(module):
        return [] if getattr(module, flag) else [f"has no {flag}: its condition is a bias alone"]

    return reasons


def _adapter(name, source, fused, blocks, flag):
    first, second = blocks
    return Adapter(
        name=name,
        source=source,
        fuses="scale and shift in one pass",
        least=LEAST_OF_FILM,
        shapes={
            f"{first}.block.0.weight": ("C", "I", "K"),
            f"{first}.block.*": None,
            f"{second}.block.*": None,
            "cond_encoder.1.weight": ("M", "E"),
            "cond_encoder.1.bias": ("M",),
            "residual_conv.*": None,
        },
        fused=fused,
        probe=_probe,
        reasons=_reasons_of(flag),
    )


ADAPTERS = (
    _adapter(
        "diffusion_policy.ConditionalResidualBlock1D",
        "real-stanford/diffusion_policy, diffusion_policy/model/diffusion/conditional_unet1d.py",
        _block,
        ("blocks.0", "blocks.1"),
        "cond_predict_scale",
    ),
    _adapter(
        "lerobot.DiffusionConditionalResidualBlock1d",
        "huggingface/lerobot, src/lerobot/policies/diffusion/modeling_diffusion.py",
        _lerobot_block,
        ("conv1", "conv2"),
        "use_film_scale_modulation",
    ),
)
