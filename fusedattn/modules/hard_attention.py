"""Hard attention over feature maps, around :func:`fusedattn.hard_additive_attention`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedattn._dispatch import beside
from fusedattn._philox import draw_seed
from fusedattn._scores import check_generator
from fusedattn.modules._tracing import recorded_whole
from fusedattn.modules.attention import _cast, _check, _for_one_query
from fusedattn.modules.projected_keys import ProjectedKeys
from fusedattn.modules.spatial_attention import SpatialAttention
from fusedattn.ops.hard_additive_attention import HardAttentionOutput, attend

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fusedattn._typing import CappedScoreOptions


class HardAttention(SpatialAttention):
    """Stochastic attention of a decoder's state to one place of a feature map (Xu et al. 2015, arXiv:1502.03044).

    With the weights alpha and the gate beta of :class:`SpatialAttention`, one place i is sampled for each image
    ("Show, Attend and Tell", section 4.1)::

        i ~ alpha    z = beta a_i    or, with probability ``expectation_prob``,    z = beta sum_i alpha_i a_i

    Where z is the expectation nothing was sampled, and log_prob is 0: the gradient goes through alpha. The score
    network learns of samples by :meth:`reinforce_loss`, whose moving average of rewards is the buffer
    ``baseline``. In evaluation the most likely place is taken.

    Args:
        query_dim, num_channels, attention_dim, gate, bias: see :class:`SpatialAttention`.
        expectation_prob: of the expectation in place of a sample, for each image at each call in training.
            Default: 0.5, as in the paper.
        baseline_decay: of the moving average. Default: 0.9, as in the paper.
        reward_weight, entropy_weight: lambda_r and lambda_e of :meth:`reinforce_loss`. Default: 1.0, 0.0.
        normalize, scale, softcap, activation, negative_slope, backend, device, dtype: see
            :class:`AdditiveAttention`.

    Raises:
        ValueError: an unknown gate, a probability or a decay outside of [0, 1], a normalizer other than the
            softmax, dropout; when called, inputs of another shape.
    """

    baseline: Tensor

    def __init__(
        self,
        query_dim: int,
        num_channels: int,
        attention_dim: int,
        *,
        gate: str | None = "scalar",
        bias: bool = True,
        expectation_prob: float = 0.5,
        baseline_decay: float = 0.9,
        reward_weight: float = 1.0,
        entropy_weight: float = 0.0,
        **options: Unpack[CappedScoreOptions],
    ) -> None:
        for name, number in (("expectation_prob", expectation_prob), ("baseline_decay", baseline_decay)):
            if not 0 <= number <= 1:
                raise ValueError(f"HardAttention: {name}: expected a number in [0, 1], got {number!r}")
        given: dict[str, Any] = dict(options)
        for name, only in (("normalizer", "softmax"), ("dropout", 0.0)):  # what is sampled from is the softmax
            if given.get(name, only) != only:
                raise ValueError(f"HardAttention: {name}: expected {only!r}, got {given[name]!r}")
        super().__init__(query_dim, num_channels, attention_dim, gate=gate, bias=bias, **options)
        self.expectation_prob, self.baseline_decay = expectation_prob, baseline_decay
        self.reward_weight, self.entropy_weight = reward_weight, entropy_weight
        self.register_buffer("baseline", torch.zeros((), device=options.get("device")))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, expectation_prob={self.expectation_prob}"

    @recorded_whole
    def forward(  # type: ignore[override]  # what was sampled, not weights
        self,
        query: Tensor,
        features: Tensor | ProjectedKeys,
        *,
        mask: Tensor | None = None,
        sample: bool | None = None,
        generator: torch.Generator | None = None,
    ) -> HardAttentionOutput:
        """One step.

        Args:
            query: (B, query_dim), the state h.
            features: (B, C, *places), usually (B, C, H, W), or ``project_keys(features)``, made for all steps.
            mask: bool (B, *places), of projected features (B, T); True = may attend.
            sample: whether to sample, now and then the expectation, or to take the most likely place. Default:
                None, as ``training`` has it.
            generator: see :func:`fusedattn.hard_additive_attention`.

        Returns:
            HardAttentionOutput of ``context`` z (B, C), ``index`` (B,), the number of the place in the flattened
            map, ``log_prob`` (B,) and ``entropy`` (B,). An image of which nothing is seen has index -1, and 0 for
            all else.
        """
        _check(query, "HardAttention: query", "B", self.query_dim)
        check_generator("HardAttention", generator, query.device)
        projected = self.query_proj(query.unsqueeze(1))
        if isinstance(features, ProjectedKeys):
            keys = features.in_dtype(projected.dtype)
        else:
            self._check_map(features)
            mask = self._flat(mask, tuple(features.shape[2:]))
            key, value = self._project(features.flatten(2).transpose(1, 2), None)
            keys = ProjectedKeys(_cast(key, projected.dtype), _cast(value, projected.dtype))
        keys = keys.hiding(_for_one_query(mask, "HardAttention"), None)
        sample = self.training if sample is None else sample
        expects = sample and self.expectation_prob > 0
        found = attend(
            projected,
            keys.key,
            keys.value,
            beside(projected, self._score_weight()),
            draw_seed(query.device, generator) if sample else None,
            mask=keys.mask,
            key_lengths=keys.key_lengths,
            scale=self.scale,
            softcap=self.softcap,
            activation=self.activation,
            negative_slope=self.negative_slope,
            backend=self.backend,
            return_expected=expects,
        )
        context, log_prob = found.context.squeeze(1), found.log_prob.squeeze(1)
        if found.expected is not None:
            uniform = torch.rand(len(log_prob), device=query.device, generator=generator)
            is_expected = uniform < self.expectation_prob
            context = torch.where(is_expected.unsqueeze(1), found.expected.squeeze(1), context)
            log_prob = log_prob.masked_fill(is_expected, 0.0)
        if self.gate_proj is not None:
            context = torch.sigmoid(self.gate_proj(query)) * context
        return HardAttentionOutput(context, found.index.squeeze(1), log_prob, found.entropy.squeeze(1))

    def reinforce_loss(self, reward: Tensor, log_prob: Tensor, entropy: Tensor) -> Tensor:
        """What to add to the loss ``-reward.mean()`` of the likelihood, so that samples learn (section 4.1).

        The mean over the batch of ``-(lambda_r (reward - b) sum_t log_prob_t + lambda_e sum_t entropy_t)``, in
        which the rewards and b, the moving average of earlier ones, count as constants. In training b then becomes
        ``baseline_decay b + (1 - baseline_decay) mean(reward)``.

        Args:
            reward: (B,), the log-likelihood of what was decoded, log p(y | s, a), or another reward.
            log_prob, entropy: (B,), or (B, T) of T steps, as of :meth:`forward`; 0 at steps that do not count.
        """
        for name, t in (("log_prob", log_prob), ("entropy", entropy)):
            if t.dim() not in (1, 2) or t.shape[0] != reward.shape[0] or reward.dim() != 1:
                shapes = f"{tuple(t.shape)} with reward {tuple(reward.shape)}"
                raise ValueError(
                    f"HardAttention: {name}: expected shape (B,) or (B, T) with reward (B,), got {shapes}"
                )
        reward = reward.detach()
        advantage = reward - self.baseline
        chosen, spread = (t if t.dim() == 1 else t.sum(1) for t in (log_prob, entropy))
        loss = -(self.reward_weight * advantage * chosen + self.entropy_weight * spread).mean()
        if self.training:
            with torch.no_grad():
                self.baseline.lerp_(reward.mean().to(self.baseline.dtype), 1 - self.baseline_decay)
        return loss

    @staticmethod
    def crop(image: Tensor, index: Tensor, places: Sequence[int], size: Sequence[int]) -> Tensor:
        """What the sampled place shows: the part of an image around its centre, 0 outside of the image.

        Args:
            image: (B, C, H, W), of which the feature map was made.
            index: (B,), as of :meth:`forward`; -1 gives zeros.
            places: (rows, columns) of the feature map, which divides the image evenly.
            size: (height, width) of the part.

        Returns:
            (B, C, height, width), differentiable in image.
        """
        if image.dim() != 4 or index.shape != image.shape[:1] or len(places) != 2 or len(size) != 2:
            raise ValueError(
                "HardAttention: crop: expected image (B, C, H, W), index (B,), places (rows, columns), size "
                f"(height, width), got {tuple(image.shape)}, {tuple(index.shape)}, {tuple(places)}, {tuple(size)}"
            )
        seen = index.clamp_min(0)
        y, in_rows = _span(seen // places[1], places[0], image.shape[2], size[0])
        x, in_columns = _span(seen % places[1], places[1], image.shape[3], size[1])
        within = (index >= 0).view(-1, 1, 1) & in_rows.unsqueeze(2) & in_columns.unsqueeze(1)
        batch = torch.arange(len(index), device=image.device).view(-1, 1, 1)
        part = image[batch, :, y.unsqueeze(2), x.unsqueeze(1)].permute(0, 3, 1, 2)
        return torch.where(within.unsqueeze(1), part, 0.0)

    if TYPE_CHECKING:
        __call__ = forward  # type: ignore[assignment]


def _span(cell: Tensor, cells: int, length: int, size: int) -> tuple[Tensor, Tensor]:
    """Numbers (B, size) of the pixels around the centre of a cell, of so many in a length, and which exist."""
    first = ((2 * cell + 1) * length - size * cells).div(2 * cells, rounding_mode="floor")
    pixels = first.unsqueeze(1) + torch.arange(size, device=cell.device)
    return pixels.clamp(0, length - 1), (pixels >= 0) & (pixels < length)
