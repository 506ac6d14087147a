"""Modules of conditional norms around :func:`fusedattn.norm_film`: a condition makes the affine of the norm."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fusedattn._conditioning import ACTIVATIONS, HALF, Parameter
from fusedattn._dispatch import beside
from fusedattn.modules.conditioning import Conditioned, Conditioner, check_activation
from fusedattn.ops.norm_film import norm_film

# torch.fx.symbolic_trace cannot follow what depends on sizes and dtypes: it records the calls of what is wrapped.
torch.fx.wrap("beside")


class _Norm(Conditioned):
    eps: float

    def normed(self, x: Tensor, gamma: Parameter, beta: Parameter, **options: Any) -> Any:
        options = {"eps": self.eps, "activation": self.activation, "backend": self.backend} | options
        return norm_film(x, gamma, beta, **options)


class _Adaptive(_Norm):
    """``linear(condition_activation(condition))``, parameters of each channel that are zero at the start."""

    number: int  # of parameters

    def __init__(
        self,
        condition_dim: int,
        num_channels: int,
        *,
        condition_activation: str | None,
        activation: str | None = None,
        backend: str,
        factory: dict[str, Any],
    ) -> None:
        super().__init__(activation=activation, backend=backend)
        check_activation(type(self).__name__, "condition_activation", condition_activation)
        self.condition_dim, self.num_channels = condition_dim, num_channels
        self.condition_activation = condition_activation
        self.linear = Conditioner(condition_dim, num_channels, (0.0,) * self.number, **factory)

    def of_condition(self, condition: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        self.check_condition(condition, self.condition_dim)
        made = self.linear(ACTIVATIONS[self.condition_activation](condition))
        parts = beside(x, made).chunk(self.number, dim=-1)
        return tuple(parts[n] for n in range(self.number))  # by number, for torch.fx.symbolic_trace


class AdaLayerNorm(_Adaptive):
    """Adaptive layer norm (Peebles & Xie 2023, arXiv:2212.09748).

    ``y = activation((1 + gamma) * LayerNorm(x) + beta) + residual`` with
    ``gamma, beta = linear(silu(condition))``. Starts as the layer norm: the linear layer is zero. Loads the
    ``state_dict`` of the layers that diffusers calls ``AdaLayerNorm`` (without an embedding of its own) and
    ``AdaLayerNormContinuous``; of DiT's final layer, shift before scale, the two halves change places.

    Args:
        condition_dim: width of the condition.
        num_channels: C, the channels of x.
        eps: added to the variance. Default: 1e-5.
        elementwise_affine: whether the norm has a weight and a bias of its own, ``norm.weight`` and
            ``norm.bias``. Default: False.
        condition_activation: applied to the condition, any that :func:`fusedattn.film` names. Default: ``"silu"``.
        channel_dim: dimension of the channels in x. Default: -1.
        activation: see :func:`fusedattn.norm_film`. Default: None.
        backend: see :func:`fusedattn.norm_film`. Default: ``"auto"``.
        device, dtype: of the parameters. Default: PyTorch's.

    Raises:
        ValueError: an activation or backend that does not exist; when called, a condition of another width, or
            what :func:`fusedattn.norm_film` refuses.
    """

    number = 2

    def __init__(
        self,
        condition_dim: int,
        num_channels: int,
        *,
        eps: float = 1e-5,
        elementwise_affine: bool = False,
        condition_activation: str | None = "silu",
        channel_dim: int = -1,
        activation: str | None = None,
        backend: str = "auto",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            condition_dim,
            num_channels,
            condition_activation=condition_activation,
            activation=activation,
            backend=backend,
            factory=factory,
        )
        self.channel_dim, self.eps = channel_dim, eps
        self.norm = nn.LayerNorm(num_channels, eps, elementwise_affine, **factory)

    def forward(self, x: Tensor, condition: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalises and modulates x (B, ..., C).

        The condition is (B, condition_dim) or, where the channels are x's last dimension, of x's rank with one for
        each place: (B, T, condition_dim).
        """
        gamma, beta = self.of_condition(condition, x)
        return self.normed(
            x,
            gamma,
            beta,
            norm="layer",
            weight=self.norm.weight,
            bias=self.norm.bias,
            channel_dim=self.channel_dim,
            gamma_offset=1.0,
            residual=residual,
        )

    if TYPE_CHECKING:
        __call__ = forward


class AdaGroupNorm(_Adaptive):
    """Adaptive group norm (Dhariwal & Nichol 2021, arXiv:2105.05233).

    ``y = activation((1 + gamma) * GroupNorm(x) + beta) + residual`` with
    ``gamma, beta = linear(silu(condition))``. Starts as the group norm: the linear layer is zero. With as many
    groups as channels it is StyleGAN's AdaIN (Karras et al. 2019, arXiv:1812.04948). Loads the ``state_dict`` of
    diffusers' ``AdaGroupNorm``, whose ``condition_activation`` is None by default; the paper's has
    ``affine=True``.

    Args:
        condition_dim, num_channels: see :class:`AdaLayerNorm`.
        num_groups: a divisor of C.
        eps: added to the variance. Default: 1e-5.
        affine: whether the norm has a weight and a bias of its own, ``norm.weight`` and ``norm.bias``. Default:
            False.
        condition_activation, activation, backend, device, dtype: see :class:`AdaLayerNorm`.

    Raises:
        ValueError: num_groups that does not divide C; else as :class:`AdaLayerNorm`.
    """

    number = 2

    def __init__(
        self,
        condition_dim: int,
        num_channels: int,
        num_groups: int,
        *,
        eps: float = 1e-5,
        affine: bool = False,
        condition_activation: str | None = "silu",
        activation: str | None = None,
        backend: str = "auto",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_groups < 1 or num_channels % num_groups:
            raise ValueError(
                f"AdaGroupNorm: num_groups: expected a divisor of the {num_channels} channels, got {num_groups}"
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            condition_dim,
            num_channels,
            condition_activation=condition_activation,
            activation=activation,
            backend=backend,
            factory=factory,
        )
        self.eps = eps
        self.norm = nn.GroupNorm(num_groups, num_channels, eps, affine, **factory)

    def forward(self, x: Tensor, condition: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalises and modulates x (B, C, ...) by condition (B, condition_dim)."""
        gamma, beta = self.of_condition(condition, x)
        return self.normed(
            x,
            gamma,
            beta,
            norm="group",
            num_groups=self.norm.num_groups,
            weight=self.norm.weight,
            bias=self.norm.bias,
            gamma_offset=1.0,
            residual=residual,
        )

    if TYPE_CHECKING:
        __call__ = forward


Modulated = tuple[Tensor, Parameter, Parameter, Parameter, Parameter]


class _OfBlock(_Norm):
    """What a transformer block of two layers, each with shift, scale and gate, asks of its conditional norms."""

    def modulate(self, x: Tensor, six: Any) -> Any:
        shift, scale, *others = six
        return self.normed(x, scale, shift, norm="layer", gamma_offset=1.0), *others

    def add_norm(
        self, x: Tensor, residual: Tensor, gate: Parameter, shift: Parameter, scale: Parameter
    ) -> tuple[Tensor, Tensor]:
        """What lies between the two layers, in one pass: (y, h) with ``h = residual + gate * x`` and y, the
        modulated norm of h, for the second layer."""
        return self.normed(x, scale, shift, norm="layer", gamma_offset=1.0, pre_residual=residual, pre_gate=gate)


class AdaLayerNormZero(_OfBlock, _Adaptive):
    """Adaptive layer norms and gates of a transformer block, adaLN-Zero (Peebles & Xie 2023, arXiv:2212.09748).

    ``shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = linear(silu(condition))``; the layer norms have no
    weight and bias of their own. A block is::

        y, gate, shift_mlp, scale_mlp, gate_mlp = norm(x, condition)         # (1 + scale) * LayerNorm(x) + shift
        y, h = norm.add_norm(attention(y), x, gate, shift_mlp, scale_mlp)    # h = x + gate * attention(y)
        out = fusedattn.film(mlp(y), gate_mlp, residual=h, channel_dim=-1)   # h + gate_mlp * mlp(y)

    Starts with gates of zero, the linear layer being zero: the block is the identity. Loads the ``state_dict`` of
    diffusers' ``AdaLayerNormZero`` (without an embedding of its own), whose results it returns, and as ``linear``
    the last layer of DiT's ``adaLN_modulation``.

    Args:
        condition_dim, num_channels, condition_activation, backend, device, dtype: see :class:`AdaLayerNorm`.
        eps: added to the variance. Default: 1e-6, the paper's.

    Raises:
        ValueError: as :class:`AdaLayerNorm`.
    """

    number = 6

    def __init__(
        self,
        condition_dim: int,
        num_channels: int,
        *,
        eps: float = 1e-6,
        condition_activation: str | None = "silu",
        backend: str = "auto",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            condition_dim,
            num_channels,
            condition_activation=condition_activation,
            backend=backend,
            factory={"device": device, "dtype": dtype},
        )
        self.eps = eps

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Of x (B, T, C) and condition (B, condition_dim), or (B, T, condition_dim) for one of each place.

        Returns:
            y like x, for the first layer, then gate, shift_mlp, scale_mlp and gate_mlp, (B, C) or (B, T, C).
        """
        return self.modulate(x, self.of_condition(condition, x))

    if TYPE_CHECKING:
        __call__ = forward


class AdaLayerNormSingle(_OfBlock):
    """The part of a block in adaLN-single, where all blocks share one layer of the condition (Chen et al. 2023,
    PixArt-alpha, arXiv:2310.00426).

    The shared layer, ``nn.Sequential(nn.SiLU(), nn.Linear(C, 6 * C))`` as a rule, makes its 6 C values once; each
    block adds a table: ``shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = scale_shift_table + condition``.
    The sum is not made, it is a pair (see :func:`fusedattn.film`); a block is as in :class:`AdaLayerNormZero`.
    Starts as the paper's: the table is normal with a deviation of 1 / sqrt(C). Loads that of a block of PixArt.

    Args:
        num_channels: C, the channels of x.
        eps: added to the variance. Default: 1e-6, the paper's.
        backend, device, dtype: see :class:`AdaLayerNorm`.

    Raises:
        ValueError: a backend that does not exist; when called, a condition of another width than 6 C, or what
            :func:`fusedattn.norm_film` refuses.
    """

    def __init__(
        self,
        num_channels: int,
        *,
        eps: float = 1e-6,
        backend: str = "auto",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(backend=backend)
        self.num_channels, self.eps = num_channels, eps
        self.scale_shift_table = nn.Parameter(torch.empty(6, num_channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A normal table, see the class."""
        nn.init.normal_(self.scale_shift_table, std=self.num_channels**-0.5)

    def forward(self, x: Tensor, condition: Tensor) -> Modulated:
        """Of x (B, T, C) and condition (B, 6 C), or (B, T, 6 C) for one of each place.

        Returns:
            y like x, for the first layer, then gate, shift_mlp, scale_mlp and gate_mlp, each a pair of a row of
            the table (C,) and a part of the condition (B, C) or (B, T, C).
        """
        self.check_condition(condition, 6 * self.num_channels)
        parts = beside(x, condition).chunk(6, dim=-1)
        table = beside(x, self.scale_shift_table).unbind()
        return self.modulate(x, tuple((table[n], parts[n]) for n in range(6)))

    if TYPE_CHECKING:
        __call__ = forward


@torch.fx.wrap
def _moments(x: Tensor, style: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Deviation and mean of each channel of a style, (B, C)."""
    C = x.shape[1]
    if style.dim() < 3 or style.shape[1] != C:
        raise ValueError(f"AdaIN: style: expected shape (B, {C}, ...) of rank 3 or more, got {tuple(style.shape)}")
    style = style.float() if style.dtype in HALF else style
    var, mean = torch.var_mean(style, tuple(range(2, style.dim())), correction=0)
    return (var + eps).sqrt(), mean


class AdaIN(_Norm):
    """Adaptive instance norm: x with the mean and deviation of a style's maps (Huang & Belongie 2017,
    arXiv:1703.06868).

    ``y = activation(std(style) * (x - mean(x)) / std(x) + mean(style)) + residual``, by batch element and channel,
    with ``std = sqrt(var + eps)`` of the biased variance for both: the identity where the style is x. It has no
    parameters. Where mean and deviation come from a layer instead (StyleGAN), see :class:`AdaGroupNorm`.

    Args:
        eps: added to the variances. Default: 1e-5.
        activation, backend: see :class:`AdaLayerNorm`.

    Raises:
        ValueError: an activation or backend that does not exist; when called, a style of the wrong shape, or what
            :func:`fusedattn.norm_film` refuses.
    """

    def __init__(self, *, eps: float = 1e-5, activation: str | None = None, backend: str = "auto") -> None:
        super().__init__(activation=activation, backend=backend)
        self.eps = eps

    def forward(self, x: Tensor, style: Tensor, residual: Tensor | None = None) -> Tensor:
        """Gives x (B, C, ...) the moments of style (B, C, ...) or (1, C, ...), whose other sizes are its own."""
        deviation, mean = _moments(x, style, self.eps)
        return self.normed(
            x,
            deviation,
            mean,
            norm="instance",
            residual=residual,
        )

    if TYPE_CHECKING:
        __call__ = forward


@torch.fx.wrap
def _of_style(table: Tensor, style: Tensor) -> Tensor:
    """Rows (B, C) or (C,) of a table (S, C): by index, or their sum by weights."""
    S, rank = table.shape[0], style.dim()
    if style.dtype.is_floating_point:
        if rank not in (1, 2) or style.shape[-1] != S:
            raise ValueError(
                f"ConditionalInstanceNorm: style: expected shape (B, {S}) or ({S},), got {tuple(style.shape)}"
            )
        return style.to(table.dtype) @ table
    if rank > 1:
        raise ValueError(f"ConditionalInstanceNorm: style: expected shape (B,) or (), got {tuple(style.shape)}")
    return F.embedding(style, table)


class ConditionalInstanceNorm(_Norm):
    """Instance norm with a weight and a bias for each style (Dumoulin et al. 2017, arXiv:1610.07629).

    ``y = activation(weight[style] * InstanceNorm(x) + bias[style]) + residual``. Starts as the instance norm, with
    weights of 1 and biases of 0. Loads the ``state_dict`` of an affine ``nn.InstanceNorm2d``, too, with which
    every style then starts.

    Args:
        num_styles: S, how many styles there are.
        num_channels: C, the channels of x.
        eps: added to the variance. Default: 1e-5.
        activation, backend, device, dtype: see :class:`AdaLayerNorm`.

    Raises:
        ValueError: an activation or backend that does not exist; when called, a style of the wrong shape, or what
            :func:`fusedattn.norm_film` refuses.
        IndexError: a style that does not exist.
    """

    def __init__(
        self,
        num_styles: int,
        num_channels: int,
        *,
        eps: float = 1e-5,
        activation: str | None = None,
        backend: str = "auto",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(activation=activation, backend=backend)
        self.num_styles, self.num_channels, self.eps = num_styles, num_channels, eps
        self.weight = nn.Parameter(torch.empty(num_styles, num_channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_styles, num_channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights of 1, biases of 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        for name in (f"{prefix}weight", f"{prefix}bias"):
            t = state_dict.get(name)
            if isinstance(t, Tensor) and t.dim() == 1:  # of an nn.InstanceNorm
                state_dict[name] = t.expand(self.num_styles, -1)
        super()._load_from_state_dict(state_dict, prefix, *others)

    def forward(self, x: Tensor, style: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalises x (B, C, ...) in styles.

        Args:
            x: (B, C, ...).
            style: integers (B,), one style for each batch element, or () for all; or weights in floating point,
                (B, S) or (S,): a mix of styles.
            residual: like x, added after the activation. Default: None.
        """
        return self.normed(
            x,
            beside(x, _of_style(self.weight, style)),
            beside(x, _of_style(self.bias, style)),
            norm="instance",
            residual=residual,
        )

    if TYPE_CHECKING:
        __call__ = forward


class ConditionalBatchNorm(_Norm, _NormBase):
    """Batch norm whose weight and bias a condition changes (de Vries et al. 2017, arXiv:1707.00683).

    ``y = activation((weight + dgamma) * BatchNorm(x) + bias + dbeta) + residual`` with ``dgamma, dbeta =
    conditioner(condition)``, a linear layer or, with ``hidden_dim``, the paper's network of one hidden layer with
    relu. Starts as the batch norm: the last linear layer is zero. ``load_state_dict(batch_norm.state_dict(),
    strict=False)`` takes over an ``nn.BatchNorm2d`` (or 1d, 3d) as it was trained. Running statistics are kept and
    used as there; those of a batch are of one process: ``nn.SyncBatchNorm.convert_sync_batchnorm`` passes it by.

    Args:
        condition_dim: width of the condition.
        num_features: C, the channels of x.
        hidden_dim: width of the hidden layer. Default: None, for none.
        eps, momentum, affine, track_running_stats: as ``nn.BatchNorm2d``'s. Default: 1e-5, 0.1, True, True.
        activation, backend, device, dtype: see :class:`AdaLayerNorm`.

    Raises:
        ValueError: as :class:`AdaLayerNorm`.
    """

    def __init__(
        self,
        condition_dim: int,
        num_features: int,
        *,
        hidden_dim: int | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        activation: str | None = None,
        backend: str = "auto",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            activation=activation,
            backend=backend,
            num_features=num_features,
            eps=eps,
            momentum=momentum,
            affine=affine,
            track_running_stats=track_running_stats,
            **factory,
        )
        self.condition_dim = condition_dim
        last = Conditioner(hidden_dim or condition_dim, num_features, (0.0, 0.0), **factory)
        self.conditioner: nn.Module = last
        if hidden_dim is not None:
            self.conditioner = nn.Sequential(nn.Linear(condition_dim, hidden_dim, **factory), nn.ReLU(), last)

    def reset_parameters(self) -> None:
        """Everything as at the start, see the class, running statistics included."""
        _NormBase.reset_parameters(self)
        super().reset_parameters()

    def forward(self, x: Tensor, condition: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalises and modulates x (B, C, ...) by condition (B, condition_dim)."""
        self.check_condition(condition, self.condition_dim)
        gamma, beta = beside(x, self.conditioner(condition)).chunk(2, dim=-1)
        affine = self.weight is not None
        return self.normed(
            x,
            (self.weight, gamma) if affine else gamma,
            (self.bias, beta) if affine else beta,
            norm="batch",
            gamma_offset=0.0 if affine else 1.0,
            activation=self.activation,
            residual=residual,
            running_mean=self.running_mean,
            running_var=self.running_var,
            num_batches_tracked=self.num_batches_tracked,
            training=self.training or self.running_mean is None,
            momentum=self.momentum,
        )

    if TYPE_CHECKING:
        __call__ = forward
