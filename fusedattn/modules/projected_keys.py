"""Keys and values projected once, for many steps, with what can be computed of them once."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree

from fusedattn import _scores, _steps
from fusedattn._dispatch import is_eager
from fusedattn._dtypes import accumulation_dtype
from fusedattn._steps import version
from fusedattn.modules.growing_rows import GrowingRows
from fusedattn.ops.additive_attention import seen_keys


class _Exponentials(NamedTuple):
    """exp(2 key), and max ``|key|`` of the keys that some query sees, of tensors as they were at one version."""

    exp: Tensor
    bound: Tensor
    key: Tensor
    versions: tuple[int | None, ...]


def over_heads(mask: Tensor | None, has_heads: bool) -> Tensor | None:
    """A mask or bias (B, Tq, Tk) as one for every head, and that of a single head (B, 1, Tq, Tk) without it."""
    if mask is None:
        return None
    if not has_heads:
        return mask.squeeze(1) if mask.dim() == 4 else mask
    return mask.unsqueeze(1) if mask.dim() == 3 else mask


def center_over_heads(center: Tensor | None, has_heads: bool) -> Tensor | None:
    """Centers (B, Tq) as those of every head, and those of a single head (B, 1, Tq) without it."""
    if center is None:
        return None
    if not has_heads:
        return center.squeeze(1) if center.dim() == 3 else center
    return center.unsqueeze(1) if center.dim() == 2 else center


def _both(mask: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if mask is None else mask if other is None else mask & other


@dataclass(frozen=True, eq=False)
class ProjectedKeys:
    """Keys and values projected once, for many decoding steps. Made by :meth:`AdditiveAttention.project_keys`.

    ``key`` (B, H, Tk, D) and ``value`` (B, H, Tk, Dv), of a single head (B, Tk, D) and (B, Tk, Dv), carry
    gradients; ``mask`` and ``key_lengths`` belong to them. Batch elements are chosen by ``keys[index]`` (a slice,
    a list or tensor of indices, or a bool mask), one is repeated by ``keys.expand(B)``, and ``keys.to(...)`` moves
    or casts. A pytree of these four.

    Steps over the same keys, or over their first batch elements (``keys[:n]``), leave the gradients of key, value
    and weight to one joint backward pass after all of them: the memory for it is that of the steps' queries,
    contexts and scores. Compiled and transformed steps make
    their own, and so do those with a window but no ``window_center``.

    On the CPU the exponentials of the keys are kept, so that a step costs none. They are used only with the
    tensors and versions that they were computed from: keys that were replaced or edited in place, or whose mask or
    lengths were, do without, and so do copies. Keys that no query sees may hold anything.

    ``keys.append(more)`` has one key more, without a copy of those before it.
    """

    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    key_lengths: Tensor | None = None

    # No fields: neither part of the pytree nor cast, moved or replaced with the others.
    _exponentials = None
    _shared = None
    _cast = None
    _growing = None
    _zeroed = None
    _repeated = None
    is_shared = True

    def _versions(self) -> tuple[int | None, ...]:
        return version(self.key), version(self.mask), version(self.key_lengths)

    def _keep(self, exp: Tensor, bound: Tensor) -> ProjectedKeys:
        object.__setattr__(self, "_exponentials", _Exponentials(exp, bound, self.key, self._versions()))
        return self

    def with_exponentials(self) -> ProjectedKeys:
        """Computes and keeps the exponentials, where the kernels use them: on the CPU, outside of transforms."""
        transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        if transformed or self.key.device.type != "cpu" or not self.key.numel():
            return self
        keys = self
        if self.key.is_inference():  # such a tensor has no version, an edit of it would go unnoticed
            with torch.inference_mode(False):
                keys = replace(self, key=self.key.clone())
        # An unnoticed edit of those could show keys that were hidden.
        mask, lengths = (None if t is None or t.is_inference() else t for t in (self.mask, self.key_lengths))
        with torch.no_grad():
            wide = keys.key.to(accumulation_dtype(keys.key.dtype)).contiguous()
            if mask is None and lengths is None:
                low, high = torch.aminmax(wide)  # a norm takes seven times as long
                bound = torch.maximum(-low, high)
            else:
                seen = seen_keys(wide, over_heads(mask, wide.dim() == 4), lengths)
                bound = torch.linalg.vector_norm(wide, torch.inf, dim=-1).masked_fill(~seen, 0.0).amax()
            return keys._keep((2 * wide).exp_(), bound)

    def exponentials(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """(exp(2 key), max ``|key|``) if they are those of ``key`` cast to ``dtype``, else (None, None)."""
        kept = self._exponentials
        if (
            kept is None
            or torch.compiler.is_compiling()
            or kept.key is not self.key
            or kept.versions != self._versions()
            or kept.exp.dtype != accumulation_dtype(dtype)
            or (self.key.dtype is not dtype and torch.promote_types(self.key.dtype, dtype) != dtype)  # it rounds
        ):
            return None, None
        return kept.exp, kept.bound

    def shared(self) -> _steps.Shared:
        """What makes the gradients of key and value, and of the weight beside them, once for all steps."""
        if self._shared is None:
            object.__setattr__(self, "_shared", _steps.Shared(self.key, self.value))
        return self._shared  # type: ignore[return-value]

    def repeated(self, state: tuple, parameters: tuple[Tensor | None, ...]) -> _steps.Repeated | None:
        """The call of the last step, if one of this state with these parameters repeats it."""
        kept, tensors = self._repeated, (self.key, self.value, self.mask, self.key_lengths, *parameters)
        return kept if kept is not None and kept.is_like(state, tensors) else None

    def to_repeat(self, state: tuple, parameters: tuple[Tensor | None, ...]) -> _steps.Repeated | None:
        """Where to keep that call; None where an edit of what hides keys would go unnoticed."""
        if any(t is not None and t.is_inference() for t in (self.mask, self.key_lengths)):
            return None
        repeated = _steps.Repeated(state, (self.key, self.value, self.mask, self.key_lengths, *parameters))
        object.__setattr__(self, "_repeated", repeated)
        return repeated

    def of_one_step(self, key: Tensor, value: Tensor) -> ProjectedKeys:
        """With a key and a value that belong to one step: nothing is shared by its gradients."""
        keys = replace(self, key=key, value=value)
        object.__setattr__(keys, "is_shared", False)
        return keys

    def append(self, more: ProjectedKeys) -> ProjectedKeys:
        """These and one key more (B, [H,] 1, D), visible to all: what a net that attends to its own past sees."""
        if self.mask is not None or self.key_lengths is not None:
            raise ValueError("ProjectedKeys: append: expected keys without mask and key_lengths of their own")
        key, value = self._growing or (GrowingRows.of(self.key), GrowingRows.of(self.value))
        key, value = key.append(more.key), value.append(more.value)
        keys = self.of_one_step(key.rows, value.rows)
        object.__setattr__(keys, "_growing", (key, value))
        return keys

    def hiding(self, mask: Tensor | None, key_lengths: Tensor | None) -> ProjectedKeys:
        """To a step with a mask, (B, H, Tq, Tk) or without H as for :func:`over_heads`, and lengths of its own."""
        if mask is None and key_lengths is None:
            return self
        if mask is not None and mask.dtype is not torch.bool:
            raise ValueError(f"ProjectedKeys: mask: expected a bool Tensor (True = may attend), got {mask.dtype}")
        # Lengths as part of the mask: steps whose masks differ have joint gradients.
        mask = _both(mask, self._within(key_lengths))
        return replace(self, mask=_both(over_heads(self.mask, self.key.dim() == 4), mask))

    def visible(self) -> Tensor | None:
        """bool, broadcastable to (B, [H,] Tq, Tk): mask and lengths in one; None where they hide nothing."""
        return _both(over_heads(self.mask, self.key.dim() == 4), self._within(self.key_lengths))

    def _within(self, key_lengths: Tensor | None) -> Tensor | None:
        """bool (B, [H,] 1, Tk): the keys before the lengths."""
        return None if key_lengths is None else seen_keys(self.key, None, key_lengths).unsqueeze(-2)

    def in_dtype(self, dtype: torch.dtype) -> ProjectedKeys:
        """With key and value in a dtype, cast once for all steps."""
        if self.key.dtype is dtype and self.value.dtype is dtype:
            return self
        state = dtype, *self._state()
        if self._cast is not None and self._cast[0] == state and _steps.are_recorded():
            return self._cast[1]
        keys = ProjectedKeys(self.key.to(dtype), self.value.to(dtype), self.mask, self.key_lengths)
        exp, bound = self.exponentials(dtype)
        if exp is not None:
            keys._keep(exp, bound)  # type: ignore[arg-type]
        if _steps.are_recorded():
            object.__setattr__(self, "_cast", (state, keys))
        return keys

    def _state(self) -> tuple[Any, ...]:
        """What tells that nothing was edited since, and whether the same ones ask for a gradient."""
        grads = torch.is_grad_enabled(), self.key.requires_grad, self.value.requires_grad
        return *grads, version(self.value), *self._versions()

    def without_unseen(self) -> ProjectedKeys:
        """With zeros in the keys and values that their own mask and lengths hide, made once for all steps."""
        visible = self.visible()
        if visible is None:
            return self
        parts = [t for t in (self.key, self.value, self.mask, self.key_lengths) if t is not None]
        keeps = is_eager() and not any(t.is_inference() for t in parts)  # those have no version
        state = self._state()
        if keeps and self._zeroed is not None and self._zeroed[0] == state:
            return self._zeroed[1]
        key, value = _scores.without_unseen(torch.atleast_2d(visible), self.key, self.value)
        keys = replace(self, key=key, value=value)
        if keeps:
            object.__setattr__(self, "_zeroed", (state, keys))
        return keys

    def __getstate__(self) -> dict[str, Tensor | None]:
        # Without what belongs to a version: a copy of an edited tensor may have that, too.
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __getitem__(self, index: Any) -> ProjectedKeys:
        """The batch elements that ``index`` chooses; the batch stays a dimension."""
        if isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0) or isinstance(index, tuple):
            raise IndexError(f"ProjectedKeys: expected a slice or a list of batch elements, got {index!r}")
        if torch.is_inference_mode_enabled() and not torch.compiler.is_compiling():  # as in with_exponentials
            with torch.inference_mode(False), torch.no_grad():
                return self[index]
        parts = (None if t is None else t[index] if batched else t for t, batched in self._parts())
        keys = ProjectedKeys(*parts)  # type: ignore[arg-type]
        if kept := self._valid():
            keys._keep(kept.exp[index].contiguous(), kept.bound)  # a bound of all is one of some
        if isinstance(index, slice) and not index.start and index.step in (None, 1) and _steps.are_recorded():
            object.__setattr__(keys, "_shared", self.shared())  # steps may have fewer batch elements at the end
        return keys

    def expand(self, batch: int) -> ProjectedKeys:
        """One batch element as ``batch`` of them, without a copy."""
        if self.key.shape[0] not in (1, batch):
            raise ValueError(f"ProjectedKeys: expected a batch of 1 to expand to {batch}, got {self.key.shape[0]}")
        parts = ((None if t is None else t.expand(batch, *t.shape[1:]) if b else t) for t, b in self._parts())
        return ProjectedKeys(*parts)  # type: ignore[arg-type]

    def to(self, *args: Any, **kwargs: Any) -> ProjectedKeys:
        """As :meth:`torch.Tensor.to`; a dtype concerns key and value alone."""
        key, value = self.key.to(*args, **kwargs), self.value.to(*args, **kwargs)
        others = (None if t is None else t.to(key.device) for t in (self.mask, self.key_lengths))
        keys = ProjectedKeys(key, value, *others)
        return keys._keep(kept.exp, kept.bound) if key is self.key and (kept := self._valid()) else keys

    def _valid(self) -> _Exponentials | None:
        return self._exponentials if self.exponentials(self.key.dtype)[0] is not None else None

    def _parts(self) -> list[tuple[Tensor | None, bool]]:
        """Every part, and whether its first dimension is the batch."""
        mask, B = self.mask, self.key.shape[0]
        of_batch = mask is not None and mask.dim() >= 3 and mask.shape[0] == B
        return [(self.key, True), (self.value, True), (mask, of_batch), (self.key_lengths, True)]


# torch.export replaces names by text in its guards: key_lengths has to come before key.
_pytree.register_dataclass(
    ProjectedKeys,
    field_names=["value", "mask", "key_lengths", "key"],
    serialized_type_name="fusedattn.ProjectedKeys",
)
