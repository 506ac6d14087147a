"""Modules that condition features, channel by channel: bias, scale and gate, and what all such modules share.

Dumoulin et al. 2018 (Feature-wise transformations, doi:10.23915/distill.00011) surveys the family.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fusedattn._conditioning import ACTIVATIONS
from fusedattn._dispatch import beside, check_backend, not_scriptable
from fusedattn.ops.film import film

# torch.fx.symbolic_trace cannot follow what depends on sizes or dtypes: it records calls of what is wrapped.
torch.fx.wrap("beside")

# What extra_repr shows of a module that has it.
_SHOWN = (
    *("num_channels", "num_features", "num_styles", "channel_dim", "gamma_offset", "eps", "momentum"),
    *("coordinates", "fusing", "feedback", "activation"),
)


@torch.fx.wrap
def _check(caller: str, argument: str, t: Tensor, lead: str, width: int) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{caller}: {argument}: expected a Tensor, got {type(t).__name__}")
    if t.shape[-1:] != (width,):
        raise ValueError(f"{caller}: {argument}: expected shape ({lead}, {width}), got {tuple(t.shape)}")


def check_activation(caller: str, argument: str, name: str | None) -> None:
    if name not in ACTIVATIONS:
        names = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"{caller}: {argument}: expected one of {names}, got {name!r}")


class Conditioner(nn.Linear):
    """A linear layer that makes parameters of a condition, each of them the same for every condition at the start.

    Args:
        condition_dim: width of the condition.
        num_channels: C, the width of each parameter.
        starts: what each parameter is at the start; there are as many as numbers here.
        device, dtype: of weight and bias.
    """

    def __init__(
        self, condition_dim: int, num_channels: int, starts: tuple[float, ...], *, device: Any, dtype: Any
    ) -> None:
        self.starts = starts  # nn.Linear calls reset_parameters
        super().__init__(condition_dim, len(starts) * num_channels, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        with torch.no_grad():  # perhaps a DTensor, which takes no slices
            place = torch.ones_like(self.bias, dtype=torch.int64).cumsum(0)
            width = self.out_features // len(self.starts)
            self.bias.zero_()
            for n, start in enumerate(self.starts):
                self.bias.add_((place > n * width) * (place <= (n + 1) * width) * start)


def _reset(module: nn.Module) -> None:
    """Resets the modules within; what is in one that can do so itself is left to it."""
    for child in module.children():
        getattr(child, "reset_parameters", partial(_reset, child))()


class Conditioned(nn.Module):
    """What conditioned modules have in common."""

    def __init__(self, *, activation: str | None = None, backend: str, **others: Any) -> None:
        super().__init__(**others)
        check_activation(type(self).__name__, "activation", activation)
        check_backend(type(self).__name__, backend)
        self.activation, self.backend = activation, backend

    __prepare_scriptable__ = not_scriptable

    def reset_parameters(self) -> None:
        """Everything as at the start, see the class."""
        _reset(self)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in _SHOWN if hasattr(self, name))

    def check_condition(self, t: Tensor, width: int, *, argument: str = "condition", lead: str = "B") -> None:
        """Raises unless a condition, or what stands for one, is (..., width)."""
        _check(type(self).__name__, argument, t, lead, width)


class PerChannel(Conditioned):
    """One linear layer of the condition, ``conditioner``, and :func:`fusedattn.film` by what it makes."""

    conditioner: nn.Linear
    gamma_offset = 0.0

    def __init__(
        self,
        condition_dim: int,
        num_channels: int,
        *,
        channel_dim: int = 1,
        activation: str | None = None,
        backend: str = "auto",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(activation=activation, backend=backend)
        self.condition_dim, self.num_channels, self.channel_dim = condition_dim, num_channels, channel_dim
        self.conditioner = self._make_conditioner({"device": device, "dtype": dtype})

    def _make_conditioner(self, factory: dict[str, Any]) -> nn.Linear:
        raise NotImplementedError

    def of_condition(self, condition: Tensor, x: Tensor) -> Tensor:
        """What the linear layer makes, in the dtype of x, or float32 beside half precision."""
        self.check_condition(condition, self.condition_dim)
        return beside(x, self.conditioner(condition))

    def film(self, x: Tensor, gamma: Tensor | None, beta: Tensor | None, residual: Tensor | None) -> Tensor:
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


class WithOffset(PerChannel):
    """With a gamma that ``gamma_offset`` is added to."""

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
        self.gamma_offset = gamma_offset  # the conditioner starts by it
        super().__init__(
            condition_dim,
            num_channels,
            channel_dim=channel_dim,
            activation=activation,
            backend=backend,
            device=device,
            dtype=dtype,
        )


class ConditionalBias(PerChannel):
    """A bias per channel by a condition: what concatenating the condition to a layer's input comes to.

    ``y = activation(x + beta) + residual`` with ``beta = Linear(condition)``, as in conditional PixelCNN (van den
    Oord et al. 2016, arXiv:1606.05328). Starts as the identity (before the activation): the linear layer is zero.

    Args:
        condition_dim: width of the condition.
        num_channels: C, the channels of x.
        channel_dim: dimension of the channels in x. Default: 1.
        activation: see :func:`fusedattn.film`. Default: None.
        backend: see :func:`fusedattn.film`. Default: ``"auto"``.
        device, dtype: of the parameters. Default: PyTorch's.

    Raises:
        ValueError: an activation or backend that does not exist; when called, a condition of another width, or
            what :func:`fusedattn.film` refuses.
        TypeError: when called, a condition that is no Tensor.
    """

    def _make_conditioner(self, factory: dict[str, Any]) -> nn.Linear:
        return Conditioner(self.condition_dim, self.num_channels, (0.0,), **factory)

    def forward(self, x: Tensor, condition: Tensor, residual: Tensor | None = None) -> Tensor:
        """Shifts x, as :meth:`FiLM.forward` modulates it."""
        beta = self.of_condition(condition, x)
        return self.film(x, None, beta, residual)

    if TYPE_CHECKING:
        __call__ = forward


class ConditionalScale(WithOffset):
    """A factor per channel by a condition, FiLM without beta (section 5 of Perez et al. 2018, arXiv:1709.07871).

    ``y = activation((gamma + gamma_offset) * x) + residual`` with ``gamma = Linear(condition)``. Starts as the
    identity (before the activation): the linear layer is zero, with a bias of 1 - ``gamma_offset``.

    Args:
        condition_dim, num_channels, channel_dim, activation, backend, device, dtype: see :class:`ConditionalBias`.
        gamma_offset: 1.0 for the (1 + gamma) form, 0.0 for the plain one. Default: 1.0.

    Raises:
        ValueError: as :class:`ConditionalBias`.
    """

    def _make_conditioner(self, factory: dict[str, Any]) -> nn.Linear:
        return Conditioner(self.condition_dim, self.num_channels, (1 - self.gamma_offset,), **factory)

    def forward(self, x: Tensor, condition: Tensor, residual: Tensor | None = None) -> Tensor:
        """Scales x, as :meth:`FiLM.forward` modulates it."""
        gamma = self.of_condition(condition, x)
        return self.film(x, gamma, None, residual)

    if TYPE_CHECKING:
        __call__ = forward


class ConditionalGate(PerChannel):
    """A gate per channel by a condition, as an LSTM's: gated attention (Chaplot et al. 2018, arXiv:1706.07230).

    ``y = activation(sigmoid(gamma) * x) + residual`` with ``gamma = Linear(condition)``, which starts as the
    paper's does, an ``nn.Linear``.

    Args:
        condition_dim, num_channels, channel_dim, activation, backend, device, dtype: see :class:`ConditionalBias`.

    Raises:
        ValueError: as :class:`ConditionalBias`.
    """

    def _make_conditioner(self, factory: dict[str, Any]) -> nn.Linear:
        return nn.Linear(self.condition_dim, self.num_channels, **factory)

    def forward(self, x: Tensor, condition: Tensor, residual: Tensor | None = None) -> Tensor:
        """Gates x, as :meth:`FiLM.forward` modulates it."""
        gate = torch.sigmoid(self.of_condition(condition, x))
        return self.film(x, gate, None, residual)

    if TYPE_CHECKING:
        __call__ = forward
