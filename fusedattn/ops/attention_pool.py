"""Attention over the instances of a bag: ABMIL (Ilse et al. 2018, arXiv:1802.04712), CLAM, HAN.

Mathematics, for every bag, instance t and head k, with or without the gate::

    f_td = tanh(h_td) sigmoid(g_td)                            e_kt = sum_d w_kd f_td
    p_kt = softmax_t(e_kt)                                     c_k = sum_t p_kt x_t

Backward, with L the log-sum-exp of the scores and g_kt the gradient of e_kt::

    g_kt = p_kt (dc_k . x_t - dc_k . c_k + dL_k) + de_kt                        dx_t = sum_k p_kt dc_k
    df_td = sum_k g_kt w_kd       dh, dg from it as in gated_film       dw_kd = sum_t g_kt f_td

Scores, c and L are kept; nothing of size T D. Forward reads h and g, then x; backward reads each and writes
its gradient once.

Symbols: B bags, T instances, D width of the scores, K heads, Dv width of the values, G groups of bags with a
weight each. Kernels: ``csrc/attention_pool/`` (C++), ``fusedattn/triton/attention_pool.py``. Tests:
``tests/test_attention_pool.py``.
"""

import torch
from torch import Tensor

from fusedattn import _autograd
from fusedattn._dispatch import (
    autocast,
    autocast_enabled,
    choose,
    fail,
    once_per_signature,
    overridable,
    without_autocast,
)
from fusedattn._dtypes import accumulation_dtype
from fusedattn._options import AttentionPoolOptions as Options
from fusedattn._scores import of_visible, require_dense, shape_text

OP = "attention_pool"

# Reference


def _reference(hidden, gate, value, weight, lengths, options: Options):
    wide, dtype = accumulation_dtype(hidden.dtype), hidden.dtype
    B, T = hidden.shape[:2]
    visible = None
    if lengths is not None:
        visible = torch.arange(T, device=hidden.device) < lengths[:, None]
        hidden, gate, value = (
            None if t is None else torch.where(visible[..., None], t, 0.0) for t in (hidden, gate, value)
        )
    features = torch.tanh(hidden.to(wide))
    if gate is not None:
        features = features * torch.sigmoid(gate.to(wide))
    weight = weight.to(wide).unsqueeze(1).expand(-1, B // weight.shape[0], -1, -1).flatten(0, 1)
    scores = weight @ features.transpose(1, 2)  # (B, K, T)
    if visible is None:
        lse, weights = scores.logsumexp(-1), scores.softmax(-1)
    else:
        masked = of_visible(visible.unsqueeze(1), scores)
        empty = ~visible.any(-1)[:, None]
        lse = masked.logsumexp(-1).masked_fill(empty, float("-inf"))
        weights = masked.softmax(-1).masked_fill(empty[..., None], 0.0)
        scores = scores.masked_fill(~visible.unsqueeze(1), float("-inf"))
    context = hidden.new_empty(0) if value is None else (weights @ value.to(wide)).to(dtype)
    return context, lse, scores


@overridable
def attention_pool_ref(
    hidden: Tensor,
    value: Tensor | None,
    weight: Tensor,
    gate: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    return_scores: bool = False,
    return_weights: bool = False,
    backend: str = "reference",
) -> Tensor | tuple[Tensor, ...]:
    """:func:`attention_pool` in plain PyTorch, on any device: the definition that kernels are tested against.

    Same arguments, shapes, results and errors.
    """
    return attention_pool(
        hidden,
        value,
        weight,
        gate,
        lengths=lengths,
        return_scores=return_scores,
        return_weights=return_weights,
        backend=backend,
    )


# Declaration


def _fwd_fake(hidden, gate, value, weight, lengths):
    (B, T), K, wide = hidden.shape[:2], weight.shape[1], accumulation_dtype(hidden.dtype)
    context = hidden.new_empty(0 if value is None else (B, K, value.shape[2]))
    return context, hidden.new_empty((B, K), dtype=wide), hidden.new_empty((B, K, T), dtype=wide)


def _bwd_fake(grad_context, grad_lse, grad_scores, hidden, gate, value, weight, lengths, context, lse, scores):
    return tuple(hidden.new_empty(0) if t is None else t.new_empty(t.shape) for t in (hidden, gate, value, weight))


ATTENTION_POOL = _autograd.Op(
    OP,
    inputs=("hidden", "gate", "value", "weight"),
    others=("lengths",),
    options=Options,
    outputs=("context", "lse", "scores"),
    kept=("context", "lse", "scores"),
    reference=_reference,
    fwd_fake=_fwd_fake,
    bwd_fake=_bwd_fake,
    fold=_autograd.BatchFold,
)


# Public function

_UNABLE = {"cuda": "it has no kernels of attention_pool"}


@once_per_signature
def _plan(tensors, return_weights, backend) -> str:
    """The backend; raises for what cannot be computed."""
    hidden, value, weight, gate, lengths = tensors
    given = {"value": value, "gate": gate, "lengths": lengths}
    require_dense(OP, hidden=hidden, weight=weight, **{name: t for name, t in given.items() if t is not None})
    _check(hidden, value, weight, gate, lengths)
    if value is None and return_weights:
        fail(OP, "return_weights", "False without value", "True")
    return choose(OP, backend, hidden.device, hidden.dtype, lambda: f"hidden {tuple(hidden.shape)}", _UNABLE)


@overridable
def attention_pool(
    hidden: Tensor,
    value: Tensor | None,
    weight: Tensor,
    gate: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    return_scores: bool = False,
    return_weights: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Attention pooling of bags of instances: ``softmax(tanh(hidden) * sigmoid(gate) @ weight) @ value``, fused.

    Multiple-instance learning with attention (ABMIL, Ilse et al. 2018, arXiv:1802.04712; CLAM, Lu et al. 2021,
    arXiv:2004.09666), hierarchical attention networks (HAN, Yang et al. 2016). Shapes: B bags, T instances, D
    width of the scores, K heads, Dv width of the values.

    Args:
        hidden: (B, T, D), before tanh; float32, float64, float16 or bfloat16. Inner arithmetic is at least
            float32.
        value: (B, T, Dv), what is pooled; None: the scores alone are returned.
        weight: (D,) for one head, or (K, D); of the dtype of hidden, or float32 beside half precision.
        gate: (B, T, D), before the sigmoid. Default: None, for no gate.
        lengths: integers (B,) between 0 and T: instances at or after a bag's length do not count, whatever they
            hold. A bag of none has context 0. Default: None, for T.
        return_scores: also return the scores before the softmax, -inf past the length. Default: False.
        return_weights: also return the weights, 0 past the length. Default: False.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``.

    Returns:
        context (B, Dv), with heads (B, K, Dv), or a tuple of it and what else was asked for, in this order:
        scores, weights (B, T), with heads (B, K, T). Without value the scores. All in the dtype of hidden.

    Under autocast the inputs are cast to its dtype, except float64 ones. Second derivatives and forward-mode ones
    are computed through the reference formula.

    Raises:
        TypeError: hidden, weight or another input is not a Tensor.
        ValueError: an input with the wrong shape, dtype or device; weights without a value.
        UnsupportedError: no backend, or not the one asked for, can run these inputs.
    """
    if isinstance(hidden, Tensor) and autocast_enabled(hidden.device):
        hidden, weight = (autocast(t) if isinstance(t, Tensor) else t for t in (hidden, weight))
        value, gate = (autocast(t) if isinstance(t, Tensor) else t for t in (value, gate))
    backend = _plan((hidden, value, weight, gate, lengths), return_weights, backend)
    heads = weight.dim() == 2
    lengths = None if lengths is None else lengths.long()
    weight = weight[None] if heads else weight[None, None]
    with without_autocast(hidden.device):
        context, lse, scores = ATTENTION_POOL(backend, (hidden, gate, value, weight, lengths), Options())
    found = [] if value is None else [context]
    if value is None or return_scores:
        found.append(scores.to(hidden.dtype))
    if return_weights:
        # A bag of nothing has lse -inf, and weights 0.
        weights = torch.exp(scores - lse.clamp_min(torch.finfo(lse.dtype).min).unsqueeze(-1))
        found.append(weights.to(hidden.dtype))
    results = [t if heads else t.squeeze(1) for t in found]
    return results[0] if len(results) == 1 else tuple(results)


def _check(hidden, value, weight, gate, lengths) -> None:
    dtype, device = hidden.dtype, hidden.device
    if not dtype.is_floating_point:
        fail(OP, "hidden", "a floating-point dtype", dtype)
    if hidden.dim() != 3:
        fail(OP, "hidden", "shape (B, T, D)", tuple(hidden.shape))
    B, T, D = hidden.shape
    if value is not None and (value.dim() != 3 or value.shape[:2] != hidden.shape[:2]):
        fail(OP, "value", f"shape ({B}, {T}, Dv)", tuple(value.shape))
    if gate is not None and gate.shape != hidden.shape:
        fail(OP, "gate", f"shape {tuple(hidden.shape)} like hidden", tuple(gate.shape))
    if weight.dim() not in (1, 2) or weight.shape[-1] != D:
        fail(OP, "weight", f"shape {shape_text(D)} or (K, {D})", tuple(weight.shape))
    if lengths is not None and (
        lengths.is_floating_point() or lengths.is_complex() or lengths.dtype is torch.bool
    ):
        fail(OP, "lengths", "integers", lengths.dtype)
    if lengths is not None and (lengths.dim() != 1 or lengths.shape[0] != B):
        fail(OP, "lengths", f"shape {shape_text(B)}", tuple(lengths.shape))
    for name, t in (("value", value), ("gate", gate)):
        if t is not None and t.dtype != dtype:
            fail(OP, name, f"{dtype} like hidden", t.dtype)
    if weight.dtype not in (dtype, accumulation_dtype(dtype)):
        expected = " or ".join(dict.fromkeys(map(str, (dtype, accumulation_dtype(dtype)))))
        fail(OP, "weight", expected, weight.dtype)
    for name, t in (("value", value), ("weight", weight), ("gate", gate), ("lengths", lengths)):
        if t is not None and t.device != device:
            fail(OP, name, f"{device} like hidden", t.device)
