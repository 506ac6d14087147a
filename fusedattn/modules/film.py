"""Module of FiLM: a conditioner around :func:`fusedattn.film`."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fusedattn.modules.conditioning import Conditioner, WithOffset


class FiLM(WithOffset):
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

    def _make_conditioner(self, factory: dict[str, Any]) -> nn.Linear:
        return Conditioner(self.condition_dim, self.num_channels, (1 - self.gamma_offset, 0.0), **factory)

    def forward(self, x: Tensor, condition: Tensor, residual: Tensor | None = None) -> Tensor:
        """Modulates x (B, ...) with C channels at ``channel_dim`` by condition (B, condition_dim).

        Where the channels are x's last dimension, a condition of x's rank has one for each place, or for some, its
        other sizes being 1: (B, T, condition_dim). B may be 1, too.
        """
        gamma, beta = self.of_condition(condition, x).chunk(2, dim=-1)
        return self.film(x, gamma, beta, residual)

    if TYPE_CHECKING:
        __call__ = forward
