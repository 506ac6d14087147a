"""Conditioned layers and blocks as papers have them, around the fused operations."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedattn._dispatch import beside
from fusedattn.modules.attention import BahdanauAttention
from fusedattn.modules.concat import ConcatConditioning
from fusedattn.modules.conditioning import Conditioned
from fusedattn.modules.normalization import ConditionalBatchNorm
from fusedattn.modules.projected_keys import ProjectedKeys
from fusedattn.ops.film import film
from fusedattn.ops.gated_film import gated_film

# torch.fx.symbolic_trace cannot follow what depends on sizes and dtypes: it records the calls of what is wrapped.
torch.fx.wrap("beside")


@torch.fx.wrap
def _pooled(x: Tensor, num_channels: int | None = None) -> Tensor:
    """The mean over the places of x (B, C, ...)."""
    if num_channels is not None and (x.dim() < 2 or x.shape[1] != num_channels):
        raise ValueError(f"SqueezeExcite: x: expected shape (B, {num_channels}, ...), got {tuple(x.shape)}")
    return x.mean(tuple(range(2, x.dim()))) if x.dim() > 2 else x


class SqueezeExcite(Conditioned):
    """Squeeze and excitation: channels gated by their own means (Hu et al. 2018, arXiv:1709.01507).

    ``y = sigmoid(fc2(relu(fc1(mean(x))))) * x + residual``, with the mean of each channel over its places. Starts
    as the paper's, with ``nn.Linear`` layers. Loads the ``state_dict`` of torchvision's ``SqueezeExcitation``,
    too, whose layers are convolutions of one place.

    Args:
        num_channels: C, the channels of x.
        squeeze_channels: width between the layers. Default: C // 16, the paper's, and at least 1.
        backend: see :func:`fusedattn.film`. Default: ``"auto"``.
        device, dtype: of the parameters. Default: PyTorch's.

    Raises:
        ValueError: a backend that does not exist; when called, what :func:`fusedattn.film` refuses.
    """

    def __init__(
        self,
        num_channels: int,
        squeeze_channels: int | None = None,
        *,
        backend: str = "auto",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(backend=backend)
        self.num_channels = num_channels
        width = max(num_channels // 16, 1) if squeeze_channels is None else squeeze_channels
        self.fc1 = nn.Linear(num_channels, width, device=device, dtype=dtype)
        self.fc2 = nn.Linear(width, num_channels, device=device, dtype=dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        for name in (f"{prefix}fc1.weight", f"{prefix}fc2.weight"):
            if isinstance(state_dict.get(name), Tensor):  # perhaps of a convolution
                state_dict[name] = state_dict[name].flatten(1)
        super()._load_from_state_dict(state_dict, prefix, *others)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Gates the channels of x (B, C, ...); adds residual, like x."""
        means = _pooled(x, self.num_channels)
        gate = torch.sigmoid(self.fc2(torch.relu(self.fc1(means))))
        return film(x, beside(x, gate), residual=residual, backend=self.backend)

    if TYPE_CHECKING:
        __call__ = forward


@torch.fx.wrap
def _coordinates(x: Tensor) -> Tensor:
    """(1, 2, H, W): for each place of x where it is, from -1 to 1, from left to right and from top to bottom."""
    height, width = x.shape[2:]
    down = torch.linspace(-1, 1, height, dtype=x.dtype, device=x.device)
    right = torch.linspace(-1, 1, width, dtype=x.dtype, device=x.device)
    return torch.stack([right.expand(height, width), down.unsqueeze(1).expand(height, width)]).unsqueeze(0)


class FiLMResBlock(Conditioned):
    """The residual block of FiLM (Perez et al. 2018, arXiv:1709.07871, figure 3).

    ``h = relu(input_proj(x))``, a convolution of one place; ``y = h + relu((1 + gamma) * bn1(conv1(h)) + beta)``
    with ``gamma, beta = bn1.conditioner(condition)`` and a batch norm without weight and bias of its own. Starts
    with gamma and beta of zero, the convolutions as ``nn.Conv2d``. Its layers have the names that the authors use.

    Args:
        condition_dim: width of the condition.
        num_channels: C, the channels of h and y.
        in_channels: of x. Default: C.
        coordinates: whether ``input_proj`` sees two more maps, the coordinates of each place from -1 to 1. They
            are not copied beside x, see :class:`ConcatConditioning`. Default: True, the paper's.
        kernel_size: of ``conv1``, odd. Default: 3.
        eps, momentum: of the batch norm. Default: 1e-5, 0.1.
        backend: see :func:`fusedattn.norm_film`. Default: ``"auto"``.
        device, dtype: of the parameters. Default: PyTorch's.

    Raises:
        ValueError: a backend that does not exist; when called, a condition of another width, or what
            :func:`fusedattn.norm_film` refuses.
    """

    def __init__(
        self,
        condition_dim: int,
        num_channels: int,
        *,
        in_channels: int | None = None,
        coordinates: bool = True,
        kernel_size: int = 3,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        backend: str = "auto",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(backend=backend)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.coordinates = coordinates
        inputs = num_channels if in_channels is None else in_channels
        layer = nn.Conv2d(inputs + 2 * coordinates, num_channels, 1, **factory)
        self.input_proj: nn.Module = layer
        if coordinates:
            self.input_proj = ConcatConditioning(layer, 2, activation="relu", backend=backend)
        self.conv1 = nn.Conv2d(num_channels, num_channels, kernel_size, padding="same", **factory)
        self.bn1 = ConditionalBatchNorm(
            condition_dim,
            num_channels,
            eps=eps,
            momentum=momentum,
            affine=False,
            activation="relu",
            backend=backend,
            **factory,
        )

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Of x (B, in_channels, H, W) and condition (B, condition_dim): y (B, C, H, W)."""
        h = self.input_proj(x, _coordinates(x)) if self.coordinates else torch.relu(self.input_proj(x))
        return self.bn1(self.conv1(h), condition, h)

    if TYPE_CHECKING:
        __call__ = forward


@torch.fx.wrap
def _of_places(condition: Tensor, weight: Tensor) -> Tensor:
    """A linear layer of a vector (B, width), or of each place of a map (B, width, H, W)."""
    if condition.dim() not in (2, 4) or condition.shape[1] != weight.shape[1]:
        width = weight.shape[1]
        raise ValueError(
            f"GatedConditionalConv2d: condition: expected shape (B, {width}) or (B, {width}, H, W), "
            f"got {tuple(condition.shape)}"
        )
    if condition.dim() == 2:
        return F.linear(condition, weight)
    return F.conv2d(condition, weight[..., None, None])


class GatedConditionalConv2d(Conditioned, nn.Conv2d):
    """The masked, gated convolution of conditional PixelCNN (van den Oord et al. 2016, arXiv:1606.05328).

    ``y = tanh(a + h_a) * sigmoid(b + h_b)`` with a and b the halves of the channels of a convolution of x and h_a
    and h_b those of ``V condition``, V without a bias. Starts as the paper's, with layers as ``nn.Conv2d`` and
    ``nn.Linear`` have them. It is an ``nn.Conv2d`` with twice the channels, whose ``state_dict`` it loads
    (``strict=False`` where there is a condition); V is ``conditioner.weight``.

    Args:
        in_channels: of x.
        num_channels: C, the channels of y.
        kernel_size: as that of ``nn.Conv2d``.
        condition_dim: width of the condition. Default: None, for none.
        mask: ``"A"`` hides the place itself and all that come after it, row by row, ``"B"`` those after it alone;
            all channels of a place come at once. It needs an odd kernel, and padding ``"same"`` to be centred.
            Default: None.
        stride, padding, dilation, groups, bias: as those of ``nn.Conv2d``. Default: 1, ``"same"``, 1, 1, True.
        backend: see :func:`fusedattn.gated_film`. Default: ``"auto"``.
        device, dtype: of the parameters. Default: PyTorch's.

    Raises:
        ValueError: a mask or a backend that does not exist, a mask for an even kernel; when called, a condition of
            the wrong shape.
    """

    def __init__(
        self,
        in_channels: int,
        num_channels: int,
        kernel_size: int | tuple[int, int],
        condition_dim: int | None = None,
        *,
        mask: str | None = None,
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = "same",
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        backend: str = "auto",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            backend=backend,
            in_channels=in_channels,
            out_channels=2 * num_channels,
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
            **factory,
        )
        if mask not in (None, "A", "B"):
            raise ValueError(f"GatedConditionalConv2d: mask: expected None, 'A' or 'B', got {mask!r}")
        if mask is not None and not all(k % 2 for k in self.kernel_size):
            raise ValueError(
                f"GatedConditionalConv2d: kernel_size: expected odd numbers with a mask, got {self.kernel_size}"
            )
        self.mask, self.condition_dim = mask, condition_dim
        self.conditioner = None
        if condition_dim is not None:
            self.conditioner = nn.Linear(condition_dim, 2 * num_channels, bias=False, **factory)

    def reset_parameters(self) -> None:
        """As ``nn.Conv2d`` and ``nn.Linear``."""
        nn.Conv2d.reset_parameters(self)
        super().reset_parameters()

    def extra_repr(self) -> str:
        return nn.Conv2d.extra_repr(self) + (f", mask={self.mask!r}" if self.mask is not None else "")

    def _seen(self) -> Tensor:
        """The weight, zero for what is hidden."""
        if self.mask is None:
            return self.weight
        height, width = self.kernel_size
        seen = height // 2 * width + width // 2 + (self.mask == "B")
        hidden = torch.arange(height * width, device=self.weight.device).view(height, width) >= seen
        return self.weight.masked_fill(hidden, 0.0)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Of x (B, in_channels, H, W) and, if any, condition (B, condition_dim) or, one for each place of y,
        (B, condition_dim, H, W): y (B, C, H, W)."""
        z = self._conv_forward(x, self._seen(), self.bias)
        if condition is None:
            return gated_film(z, backend=self.backend)
        if self.conditioner is None:
            raise ValueError(
                "GatedConditionalConv2d: condition: expected None without condition_dim, got a Tensor"
            )
        condition = beside(z, _of_places(condition, self.conditioner.weight))
        return gated_film(z, condition, backend=self.backend)

    if TYPE_CHECKING:
        __call__ = forward


class _Hadamard(nn.Module):
    """Attention with the scores weight . (context * state), in PyTorch's own kernels."""

    def __init__(self, state_dim: int, factory: dict[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(state_dim, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.weight.shape[0] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, context: Tensor, states: Tensor, *, key_lengths: Tensor | None) -> Tensor:
        mask = None if key_lengths is None else _visible(states, key_lengths)
        query = (self.weight * context).unsqueeze(1)
        return F.scaled_dot_product_attention(query, states, states, mask, scale=1.0).squeeze(1)


@torch.fx.wrap
def _visible(states: Tensor, lengths: Tensor) -> Tensor:
    return (torch.arange(states.shape[1], device=states.device) < lengths.unsqueeze(1)).unsqueeze(1)


@torch.fx.wrap
def _last(states: Tensor, lengths: Tensor | None) -> Tensor:
    """The last state of each sequence that is visible."""
    if lengths is None:
        return states[:, -1]
    return states[torch.arange(states.shape[0], device=states.device), lengths - 1]


class _Additive(BahdanauAttention):
    """Attention with the scores weight . tanh(W_c context + b + W_h state), W_c and W_h perhaps one."""

    def __init__(self, state_dim: int, attention_dim: int, tied: bool, **options: Any) -> None:
        self.tied = tied  # __init__ resets the parameters
        super().__init__(state_dim, state_dim, attention_dim, **options)

    def reset_parameters(self) -> None:
        if self.tied:
            self.key_proj.weight = self.query_proj.weight
        super().reset_parameters()

    def forward(  # type: ignore[override]
        self, context: Tensor, states: Tensor | ProjectedKeys, *, key_lengths: Tensor | None
    ) -> Tensor:
        return super().forward(context, states, key_lengths=key_lengths, return_weights=False)


class MultiHopFiLM(Conditioned):
    """Blocks of FiLM under a question that is attended to anew for each (Strub et al. 2018, arXiv:1808.04446).

    Hop k reads the states h_t of the question, with what the hop before it read for a query, and block k is
    conditioned by that, making gamma and beta of it::

        p_t = softmax_t(score(c, h_t))      c = sum_t p_t h_t       x = block(x, c), or block(x, cat([c, mean(x)]))

    Args:
        state_dim: width of the states.
        blocks: modules called as ``block(x, condition)``, :class:`FiLMResBlock` or :class:`FiLM` for example, with
            conditions of ``state_dim``, and of the channels of x beyond that with ``feedback``.
        fusing: how c and h_t are joined. ``"hadamard"``, the authors' default, has the score w . (c * h_t);
            ``"concat"``, w . tanh(W [h_t, c] + b), and ``"sum"``, w . tanh(W (h_t + c) + b), are additive
            attention, with tanh where the authors' hidden layer has relu. Default: ``"hadamard"``.
        attention_dim: width of the hidden layer of ``"concat"`` and ``"sum"``. Default: ``state_dim``.
        shared_attention: whether all hops have the same parameters. Default: True.
        feedback: whether blocks are conditioned by the mean of x over its places, too. Default: False.
        backend: see :func:`fusedattn.additive_attention`. Default: ``"auto"``.
        device, dtype: of the parameters of the attention. Default: PyTorch's.

    Raises:
        ValueError: no blocks, a fusing or backend that does not exist; when called, states of another width.
    """

    def __init__(
        self,
        state_dim: int,
        blocks: Iterable[nn.Module],
        *,
        fusing: str = "hadamard",
        attention_dim: int | None = None,
        shared_attention: bool = True,
        feedback: bool = False,
        backend: str = "auto",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(backend=backend)
        if fusing not in ("hadamard", "concat", "sum"):
            raise ValueError(f"MultiHopFiLM: fusing: expected one of 'hadamard', 'concat', 'sum', got {fusing!r}")
        self.blocks = nn.ModuleList(blocks)
        if not self.blocks:
            raise ValueError("MultiHopFiLM: blocks: expected one or more, got none")
        self.state_dim, self.fusing, self.feedback = state_dim, fusing, feedback
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        def attention() -> nn.Module:
            if fusing == "hadamard":
                return _Hadamard(state_dim, factory)
            width = attention_dim or state_dim
            return _Additive(state_dim, width, fusing == "sum", backend=backend, **factory)

        self.attention = nn.ModuleList(attention() for _ in range(1 if shared_attention else len(self.blocks)))

    def forward(
        self, x: Tensor, states: Tensor, context: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> Tensor:
        """Runs x through the blocks.

        Args:
            x: what the first block takes.
            states: (B, T, state_dim) of the question.
            context: (B, state_dim), the query of the first hop. Default: the last state of each question.
            lengths: int (B,); states at or after a length are invisible; with ``"hadamard"`` they must be finite.
                Default: None, all are seen.

        Returns:
            what the last block makes.
        """
        self.check_condition(states, self.state_dim, argument="states", lead="B, T")
        context = _last(states, lengths) if context is None else context
        memory: Tensor | ProjectedKeys = states
        shared = self.attention[0] if len(self.attention) == 1 else None
        if isinstance(shared, _Additive) and not isinstance(states, torch.fx.Proxy):  # which cannot follow this
            memory, lengths = shared.project_keys(states, key_lengths=lengths), None  # once for all hops
        for n, block in enumerate(self.blocks):
            attention = self.attention[n if len(self.attention) > 1 else 0]
            context = attention(context, memory, key_lengths=lengths)
            x = block(x, torch.cat([context, _pooled(x)], -1) if self.feedback else context)
        return x

    if TYPE_CHECKING:
        __call__ = forward
