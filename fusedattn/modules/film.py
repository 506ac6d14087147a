"""Module of FiLM: a conditioner around :func:`fusedattn.film`."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fusedattn._conditioning import ACTIVATIONS
from fusedattn._dispatch import check_backend, not_scriptable
from fusedattn.ops.film import film


@torch.fx.wrap  # recorded by torch.fx.symbolic_trace, which cannot follow what depends on sizes
def _check(condition: Tensor, width: int) -> None:
    if condition.shape[-1:] != (width,):
        raise ValueError(f"FiLM: condition: expected shape (B, {width}), got {tuple(condition.shape)}")


class FiLM(nn.Module):
    """Feature-wise linear modulation by a condition (Perez et al. 2018, arXiv:1709.07871).

    ``gamma, beta = Linear(condition)``; ``y = activation((gamma + gamma_offset) * x + beta) + residual``. Starts
    as the identity (before the activation): the linear layer is zero, with a bias of 1 - ``gamma_offset`` for
    gamma.

    Args:
        condition_dim: width of the condition.
        num_channels: C, the channels of x.
        channel_dim: dimension of the channels in x. Default: 1.
        gamma_offset: 1.0 for the (1 + gamma) form, 0.0 for the plain one. Default: 1.0.
        activation: see :func:`fusedattn.film`. Default: None.
        backend: see :func:`fusedattn.film`. Default: ``"auto"``.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        condition_dim: int,
        num_channels: int,
        *,
        channel_dim: int = 1,
        gamma_offset: float = 1.0,
        activation: str | None = None,
        backend: str = "auto",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            names = ", ".join(repr(name) for name in ACTIVATIONS)
            raise ValueError(f"FiLM: activation: expected one of {names}, got {activation!r}")
        check_backend("FiLM", backend)
        self.condition_dim, self.num_channels, self.channel_dim = condition_dim, num_channels, channel_dim
        self.gamma_offset, self.activation, self.backend = gamma_offset, activation, backend
        self.conditioner = nn.Linear(condition_dim, 2 * num_channels, device=device, dtype=dtype)
        self.reset_parameters()

    __prepare_scriptable__ = not_scriptable

    def reset_parameters(self) -> None:
        """Identity: gamma + gamma_offset = 1 and beta = 0 for every condition."""
        nn.init.zeros_(self.conditioner.weight)
        nn.init.zeros_(self.conditioner.bias)
        with torch.no_grad():
            bias = self.conditioner.bias  # perhaps a DTensor, which takes no slices
            of_gamma = torch.ones_like(bias, dtype=torch.int64).cumsum(0) <= self.num_channels
            bias.copy_(of_gamma * (1 - self.gamma_offset))

    def extra_repr(self) -> str:
        return (
            f"num_channels={self.num_channels}, channel_dim={self.channel_dim}, "
            f"gamma_offset={self.gamma_offset}, activation={self.activation!r}"
        )

    def forward(self, x: Tensor, condition: Tensor, residual: Tensor | None = None) -> Tensor:
        """Modulates x (B, ...) with C channels at ``channel_dim`` by condition (B, condition_dim).

        Where the channels are x's last dimension, a condition of x's rank has one for each place, or for some, its
        other sizes being 1: (B, T, condition_dim). B may be 1, too.
        """
        _check(condition, self.condition_dim)
        gamma, beta = self.conditioner(condition).to(x.dtype).chunk(2, dim=-1)
        return film(
            x,
            gamma,
            beta,
            channel_dim=self.channel_dim,
            gamma_offset=self.gamma_offset,
            activation=self.activation,
            residual=residual,
            backend=self.backend,
        )

    if TYPE_CHECKING:
        __call__ = forward
