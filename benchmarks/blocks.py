"""Whole blocks of networks, as their authors write them and with what lies between their products fused."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

import fusedattn

from .contenders import Function
from .models import LayerCase


class BlockCase(LayerCase):
    """Two functions of data and then parameters: ``by_hand`` and ``with_ours``, which is compiled, too."""

    compiles_fused = True

    def fused(self) -> Function:
        return self.with_ours


@dataclass(frozen=True)
class DiTBlock(BlockCase):
    """A transformer block under adaLN-Zero (Peebles & Xie 2022, arXiv:2212.09748)."""

    B: int
    T: int
    width: int
    heads: int

    @property
    def name(self) -> str:
        return f"block DiT ({self.B}, {self.T}, {self.width}), {self.heads} heads {self.dtype}"

    def data(self) -> tuple[tuple[int, ...], ...]:
        return (self.B, self.T, self.width), (self.B, self.width)

    def parameters(self) -> tuple[tuple[int, ...], ...]:
        C = self.width
        return (6 * C, C), (3 * C, C), (C, C), (4 * C, C), (C, 4 * C)

    def _attention(self, y: Tensor, to_qkv: Tensor, to_out: Tensor) -> Tensor:
        q, k, v = F.linear(y, to_qkv).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return F.linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), to_out)

    def by_hand(self, x: Tensor, c: Tensor, to_six, to_qkv, to_out, up, down) -> Tensor:
        def modulated(h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            return F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift

        six = F.linear(F.silu(c), to_six).unsqueeze(1).chunk(6, -1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = six
        h = x + gate * self._attention(modulated(x, scale, shift), to_qkv, to_out)
        return h + gate_mlp * _mlp(modulated(h, scale_mlp, shift_mlp), up, down)

    def with_ours(self, x: Tensor, c: Tensor, to_six, to_qkv, to_out, up, down) -> Tensor:
        six = F.linear(F.silu(c), to_six).chunk(6, -1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = six
        options = {"norm": "layer", "gamma_offset": 1.0}
        y = self._attention(fusedattn.norm_film(x, scale, shift, **options), to_qkv, to_out)
        y, h = fusedattn.norm_film(y, scale_mlp, shift_mlp, pre_residual=x, pre_gate=gate, **options)
        return fusedattn.film(_mlp(y, up, down), gate_mlp, residual=h, channel_dim=-1)


def _mlp(y: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(y, up), approximate="tanh"), down)


@dataclass(frozen=True)
class FiLMedResNetBlock(BlockCase):
    """The residual block of FiLM (Perez et al. 2018, arXiv:1709.07871), without coordinate maps."""

    B: int
    C: int
    N: int
    condition: int

    @property
    def name(self) -> str:
        sizes = f"({self.B}, {self.C}, {self.N}, {self.N})"
        return f"block FiLMed ResNet {sizes}, condition {self.condition} {self.dtype}"

    def data(self) -> tuple[tuple[int, ...], ...]:
        return (self.B, self.C, self.N, self.N), (self.B, self.condition)

    def parameters(self) -> tuple[tuple[int, ...], ...]:
        C = self.C
        return (2 * C, self.condition), (C, C, 1, 1), (C, C, 3, 3)

    def _block(self, modulated: Callable[..., Tensor], x, z, to_both, one, three) -> Tensor:
        h = F.relu(F.conv2d(x, one))
        return modulated(F.conv2d(h, three, padding=1), *F.linear(z, to_both).chunk(2, -1), h)

    def by_hand(self, *inputs: Tensor) -> Tensor:
        def modulated(y: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor) -> Tensor:
            y = F.batch_norm(y, None, None, training=True)
            return residual + F.relu(y * (1 + gamma[:, :, None, None]) + beta[:, :, None, None])

        return self._block(modulated, *inputs)

    def with_ours(self, *inputs: Tensor) -> Tensor:
        def modulated(y: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor) -> Tensor:
            options = {"norm": "batch", "gamma_offset": 1.0, "activation": "relu"}
            return fusedattn.norm_film(y, gamma, beta, residual=residual, **options)

        return self._block(modulated, *inputs)
