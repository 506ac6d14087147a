"""Conditioning by concatenation without the concatenation.

A layer of [x, z] is the sum of two layers, and a convolution, with taps k of the kernel, is one for each::

    W [x, z] = W_x x + W_z z        (W_z * z)[o, p] = sum_k W_z[o, :, k] z[:, p s + k d - padding]

A vector z that is tiled over the places of x is the same at all of them: W_z z is a bias of each channel. Zero
padding is not tiled, however, so that a place p sees z through those taps alone that fall inside of x::

    (W_z * z)[o, p] = sum_k (W_z[o, :, k] z) inside[k, p]

where inside, zeros and ones, is what the convolution makes of a map of ones with a kernel for each tap. Reflected,
replicated and circular padding repeats z, too: all taps are inside. Of several groups some see x alone, some z
alone, and at most one both. Tests: ``tests/test_concat_conditioning.py``.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedattn.modules.conditioning import Conditioned
from fusedattn.ops.film import film

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONVOLUTIONS: dict[int, Any] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}  # by the rank of x


class _Settings(NamedTuple):
    condition_dim: int
    condition_first: bool
    activation: str | None
    backend: str
    rank: int = 0  # of x; 0: a linear layer's, any
    stride: tuple[int, ...] = ()
    padding: str | tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"
    around: tuple[int, ...] = ()  # padding as F.pad takes it


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, settings: _Settings) -> Tensor:
    padding: Any = settings.padding
    if settings.padding_mode != "zeros":
        x, padding = F.pad(x, settings.around, settings.padding_mode), 0
    return _CONVOLUTIONS[x.dim()](x, weight, bias, settings.stride, padding, settings.dilation, groups)


def _inside(x: Tensor, weight: Tensor, settings: _Settings) -> Tensor:
    """(K, ...): which of the K taps of the kernel fall inside of x, at every place of the output."""
    taps = weight.shape[2:].numel()
    kernels = torch.eye(taps, dtype=x.dtype, device=x.device).view(taps, 1, *weight.shape[2:])
    return _convolve(x.new_ones(1, 1, *x.shape[2:]), kernels, None, 1, settings)[0]


def _parts(weight: Tensor, settings: _Settings) -> tuple[Tensor, Tensor]:
    """Of x and of the condition."""
    Z, before = settings.condition_dim, settings.condition_first
    one, other = weight.tensor_split([Z if before else weight.shape[1] - Z], 1)
    return (other, one) if before else (one, other)


def _check(x: Tensor, condition: Tensor, width: int, settings: _Settings) -> None:
    rank, Z = settings.rank, settings.condition_dim
    name, channel_dim = "ConcatConditioning", 1 if rank else -1
    if x.dim() != rank if rank else x.dim() < 2:
        wanted = f"rank {rank}" if rank else "rank 2 or more"
        raise ValueError(f"{name}: x: expected {wanted}, got shape {tuple(x.shape)}")
    if x.shape[channel_dim] != width:
        raise ValueError(f"{name}: x: expected {width} channels, got shape {tuple(x.shape)}")
    B, space = x.shape[0], tuple(x.shape[2:])
    shape = tuple(condition.shape)
    if rank:
        fits = len(shape) in (2, rank) and shape[1] == Z and shape[0] in (1, B) and shape[2:] in ((), space)
        places = f"{(B, Z)} or {(B, Z, *space)}"
    else:
        fits = len(shape) in (2, x.dim()) and shape[-1] == Z
        places = f"{(B, Z)} or {(*x.shape[:-1], Z)}"
    if not fits:
        raise ValueError(f"{name}: condition: expected shape {places}, got {shape}")


def _convolved(x: Tensor, condition: Tensor, weight: Tensor, bias: Tensor | None, settings: _Settings) -> Tensor:
    groups = settings.groups
    padded = settings.padding_mode == "zeros" and settings.padding not in ("valid", (0,) * (x.dim() - 2))
    inside = _inside(x, weight, settings) if condition.dim() == 2 and (padded or groups > 1) else None

    def part(source: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        if source.dim() > 2:
            return _convolve(source, weight, bias, groups, settings)
        taps = weight.flatten(2)
        if inside is None:
            return F.linear(source, taps.sum(2), bias)
        sources, kernels = source.unflatten(1, (groups, -1)), taps.unflatten(0, (groups, -1))
        made = torch.einsum("bgc,gock->bgok", sources, kernels).flatten(1, 2) @ inside.flatten(1)
        made = made if bias is None else made + bias.unsqueeze(-1)
        return made.unflatten(-1, inside.shape[1:])

    if groups == 1:
        of_x, of_condition = _parts(weight, settings)
        y, beta = part(x, of_x, bias, 1), part(condition, of_condition, None, 1)
        return film(y, None, beta, activation=settings.activation, backend=settings.backend)

    condition = condition.expand(x.shape[0], *condition.shape[1:])
    one, other = (condition, x) if settings.condition_first else (x, condition)
    width, rows = weight.shape[1], weight.shape[0] // groups  # of a group
    alone, rest = divmod(one.shape[1], width)
    shared = 1 if rest else 0
    weights = weight.split([alone * rows, shared * rows, (groups - alone - shared) * rows])
    biases = (None,) * 3 if bias is None else bias.split([len(w) for w in weights])
    pieces = []
    if alone:
        pieces.append(part(one[:, : alone * width], weights[0], biases[0], alone))
    if shared:
        of_one = part(one[:, alone * width :], weights[1][:, :rest], biases[1], 1)
        pieces.append(of_one + part(other[:, : width - rest], weights[1][:, rest:], None, 1))
    if len(weights[2]):
        skipped = width - rest if rest else 0
        pieces.append(part(other[:, skipped:], weights[2], biases[2], groups - alone - shared))
    y = torch.cat(pieces, 1)
    return film(y, activation=settings.activation, backend=settings.backend)


@torch.fx.wrap  # recorded by torch.fx.symbolic_trace, which cannot follow what depends on sizes
def _concatenated(
    x: Tensor, condition: Tensor, weight: Tensor, bias: Tensor | None, settings: _Settings
) -> Tensor:
    """The layer of the concatenation."""
    _check(x, condition, weight.shape[1] * settings.groups - settings.condition_dim, settings)
    if settings.rank:
        return _convolved(x, condition, weight, bias, settings)
    of_x, of_condition = _parts(weight, settings)
    y, beta = F.linear(x, of_x, bias), F.linear(condition, of_condition)
    return film(y, None, beta, channel_dim=-1, activation=settings.activation, backend=settings.backend)


class ConcatConditioning(Conditioned):
    """A linear or convolutional layer of x concatenated with a condition, without the concatenation.

    ``y = activation(layer(cat([x, tiled condition])))``, as conditional GANs (Mirza & Osindero 2014,
    arXiv:1411.1784) and many others condition. It is computed as a conditional bias (Dumoulin et al. 2018,
    Feature-wise transformations, doi:10.23915/distill.00011), exactly, also at the borders of convolutions, where
    zero padding is not tiled; a condition that is a map has a convolution of its own.

    Args:
        layer: ``nn.Linear``, ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` whose input is the concatenation; any
            stride, padding, dilation, groups and padding mode. Its parameters become this module's, under the same
            names: the ``state_dict`` is that of the layer.
        condition_dim: how many of the layer's inputs are the condition's.
        condition_first: whether the condition comes before x in the concatenation. Default: False.
        activation: see :func:`fusedattn.film`. Default: None.
        backend: see :func:`fusedattn.film`. Default: ``"auto"``.

    Raises:
        TypeError: a layer of another class.
        ValueError: condition_dim that leaves nothing to x, an activation or backend that does not exist; when
            called, x or a condition of the wrong shape.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        layer: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d,
        condition_dim: int,
        *,
        condition_first: bool = False,
        activation: str | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(activation=activation, backend=backend)
        if type(layer) not in _LAYERS:
            wanted = "nn.Linear, nn.Conv1d, nn.Conv2d or nn.Conv3d"
            raise TypeError(f"ConcatConditioning: layer: expected {wanted}, got {type(layer).__name__}")
        self.kind = type(layer)
        width = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        if not 0 < condition_dim < width:
            raise ValueError(
                f"ConcatConditioning: condition_dim: expected 1 to {width - 1}, for a layer of {width} inputs, "
                f"got {condition_dim}"
            )
        self.settings = _Settings(condition_dim, condition_first, activation, backend)
        if not isinstance(layer, nn.Linear):
            self.settings = self.settings._replace(
                rank=2 + len(layer.kernel_size),
                stride=layer.stride,
                padding=layer.padding,
                dilation=layer.dilation,
                groups=layer.groups,
                padding_mode=layer.padding_mode,
                around=tuple(layer._reversed_padding_repeated_twice),
            )
        for name in ("weight", "bias"):
            self.register_parameter(name, getattr(layer, name))

    def reset_parameters(self) -> None:
        """As the layer's."""
        self.kind.reset_parameters(self)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """The layer's class, its weight's shape, and the settings other than by default."""
        chosen = [
            f"{name}={value!r}"
            for name, value in self.settings._asdict().items()
            if name != "around" and value != _Settings._field_defaults.get(name)
        ]
        return ", ".join([self.kind.__name__, f"weight={tuple(self.weight.shape)}", *chosen])

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """The layer of the concatenation of x and condition.

        Args:
            x: (B, ..., channels) for a linear layer, (B, channels, *places) for a convolution.
            condition: a vector (B, condition_dim) for all places; or of x's rank, (B, ..., condition_dim) or
                (B, condition_dim, *places). B may be 1.

        Returns:
            as of the layer.
        """
        return _concatenated(x, condition, self.weight, self.bias, self.settings)

    if TYPE_CHECKING:
        __call__ = forward
