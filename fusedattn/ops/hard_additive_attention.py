"""Hard additive attention: one key of each query, sampled (Xu et al. 2015, arXiv:1502.03044, section 4.1).

Mathematics, with the scores e_ij of ``fusedattn/ops/additive_scores.py`` over the keys that query i sees::

    p_ij = softmax_j(e_ij)          L_i = log sum_j exp(e_ij)          H_i = - sum_j p_ij log p_ij
    n_i  = argmax_j(e_ij - log E_ij)      E_ij = - log(1 - u_ij)       distributed as p_i (Gumbel 1954)
    l_i  = e_in - L_i               log_prob of the key n = n_i        c_i = x_n

u_ij is the uniform number of ``fusedattn/_philox.py``, no larger than 1 - 2^-24; without it n_i = argmax_j(e_ij).
Backward, g_ij the gradient of e_ij, of which the context has no part::

    g_ij = p_ij (dL_i - dH_i (log p_ij + H_i)) + dl_i ([j = n_i] - p_ij)         dx_j = sum_i [j = n_i] dc_i

What is only (Tq, Tk) large composes: scores and their gradients are ``additive_scores``', and one pass over each
row of them, the raw operators of this op, makes everything but the context. Of a part of the keys (:func:`attend`)
the largest perturbed score m = max_j(e_ij - log E_ij) tells which part has the whole's n.

Symbols: B batch, H heads, Tq / Tk query / key length, D score width, Dv value width. Kernels:
``csrc/hard_additive_attention/`` (C++), ``fusedattn/triton/hard_additive_attention.py``. Tests:
``tests/test_hard_additive_attention.py``.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fusedattn import _autograd, _normalizers, _philox, _scores, _windows
from fusedattn._dispatch import autocast, autocast_enabled, choose, overridable, without_autocast
from fusedattn._dtypes import accumulation_dtype
from fusedattn._options import HardAdditiveAttentionOptions as Options
from fusedattn._philox import EVERYTHING, Place, draw_seed
from fusedattn.ops.additive_attention import (
    _visible_keys,
    autocast_bias,
    check_lengths,
    check_mask,
    checked_bias,
)
from fusedattn.ops.additive_scores import additive_scores

OP = "hard_additive_attention"
LARGEST_UNIFORM = 1 - 2.0**-24


class HardAttentionOutput(NamedTuple):
    """What :func:`hard_additive_attention` returns."""

    context: Tensor
    index: Tensor  # type: ignore[assignment]  # tuples have a method of that name
    log_prob: Tensor
    entropy: Tensor


# Reference


def _noise(seed: Tensor, shape, dtype: torch.dtype, place: Place) -> Tensor:
    """Gumbel noise, -log E."""
    uniform = (_philox.words(seed, shape, place).to(dtype) + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform.clamp(max=LARGEST_UNIFORM)))


def _reference(scores, mask, seed, options: Options):
    masked = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    if scores.shape[-1] == 0:
        zeros = scores.sum(-1)
        nowhere = torch.full_like(zeros, -1, dtype=torch.int64)
        least = torch.full_like(zeros, float("-inf"))
        return zeros, zeros, zeros + float("-inf"), nowhere, least
    # A row of nothing over zeros, masked afterwards: no NaN in any derivative.
    empty = (masked == float("-inf")).all(-1)
    masked = masked.masked_fill(empty.unsqueeze(-1), 0.0)
    lse = masked.logsumexp(-1)
    logs = masked - lse.unsqueeze(-1)
    finite = logs.masked_fill(logs == float("-inf"), 0.0)  # p log p is 0 where p is
    entropy = -(logs.exp() * finite).sum(-1)
    with torch.no_grad():
        noise = None if seed is None else _noise(seed, scores.shape, scores.dtype, Place(*options))
        best, index = (masked if noise is None else masked + noise).max(-1)
    log_prob = logs.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    return (
        log_prob.masked_fill(empty, 0.0),
        entropy.masked_fill(empty, 0.0),
        lse.masked_fill(empty, float("-inf")),
        index.masked_fill(empty, -1),
        best.masked_fill(empty, float("-inf")),
    )


@overridable
def hard_additive_attention_ref(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
    is_causal: bool = False,
    window_size: tuple[int, int] | None = None,
    window_center: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    activation: str = "tanh",
    negative_slope: float = 0.2,
    generator: torch.Generator | None = None,
    sample: bool = True,
    backend: str = "reference",
) -> HardAttentionOutput:
    """:func:`hard_additive_attention` in plain PyTorch, on any device: what kernels are tested against.

    Same arguments, shapes, results and errors; differentiable to any order. With the same state of the generator
    it samples the same keys, except where rounding decides.
    """
    return hard_additive_attention(
        query,
        key,
        value,
        weight,
        mask=mask,
        bias=bias,
        key_lengths=key_lengths,
        is_causal=is_causal,
        window_size=window_size,
        window_center=window_center,
        scale=scale,
        softcap=softcap,
        activation=activation,
        negative_slope=negative_slope,
        generator=generator,
        sample=sample,
        backend=backend,
    )


# Declaration


def _fwd_fake(scores, *_):
    log_prob, entropy, lse, best = (scores.new_empty(scores.shape[:-1]) for _ in range(4))
    return log_prob, entropy, lse, scores.new_empty(scores.shape[:-1], dtype=torch.int64), best


def _bwd_fake(grad_log_prob, grad_entropy, grad_lse, scores, *_):
    return scores.new_empty(scores.shape)


class _Fold(_scores.Fold):
    def folded(self):
        scores, mask, seed = self.tensors
        if seed is not None:  # one of each sample
            dim = self.dims[2]
            seed = (seed.expand(self.N, -1) if dim is None else seed.movedim(dim, 0)).flatten().contiguous()
        return self.output(scores, self.dims[0]), self.output(mask, self.dims[1]), seed


HARD_ATTENTION = _autograd.Op(
    OP,
    inputs=("scores",),
    others=("mask", "seed"),
    options=Options,
    outputs=("log_prob", "entropy", "lse", "index", "best"),
    kept=("entropy", "lse", "index"),
    hidden=("index", "best"),
    reference=_reference,
    fwd_fake=_fwd_fake,
    bwd_fake=_bwd_fake,
    fold=_Fold,
)


# Public function

_UNABLE = {"cuda": "hard attention has no kernels in CUDA C++"}


class Part(NamedTuple):
    """Hard attention to a part of the keys.

    ``best`` is the largest perturbed score, ``lse`` the log-sum-exp, both -inf of a query that sees none. The
    whole has context and index of the part with the largest ``best``; with L the log-sum-exp over all parts, its
    log_prob is that part's plus ``lse - L``, and its entropy sum_n exp(lse_n - L) (entropy_n - lse_n + L).
    """

    context: Tensor
    index: Tensor  # type: ignore[assignment]  # tuples have a method of that name
    log_prob: Tensor
    entropy: Tensor
    lse: Tensor
    best: Tensor
    expected: Tensor | None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
    is_causal: bool = False,
    window_size: tuple[int, int] | None = None,
    window_center: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    activation: str = "tanh",
    negative_slope: float = 0.2,
    backend: str = "auto",
    place: Place = EVERYTHING,
    return_expected: bool = False,
) -> Part:
    """:func:`hard_additive_attention` by a seed, of a part of the whole at ``place``, perhaps with the expected
    context sum_j p_ij x_j beside it."""
    device = query.device
    if autocast_enabled(device):
        query, key, value, weight = (autocast(t) for t in (query, key, value, weight))
        bias = autocast_bias(bias)
    query, key, weight, value = _scores.broadcast(OP, query, key, weight, value)
    _scores.check_numbers(OP, scale, softcap, activation, negative_slope)
    shape, dtype = (*query.shape[:-1], key.shape[-2]), query.dtype
    if mask is not None:
        check_mask(mask, shape, device, OP)
    if bias is not None:
        bias = checked_bias(bias, shape, dtype, device, OP)
    if key_lengths is not None:
        check_lengths(key_lengths, shape[0], shape[-1], device, OP)
    window = _windows.sides(OP, window_size, window_center, is_causal)
    if window_center is not None:
        window_center = _windows.centers(OP, window_center, shape[:-1], device)
    backend = choose(
        OP,
        backend,
        device,
        dtype,
        lambda: f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}",
        _UNABLE,
    )
    visible = None
    if mask is not None or key_lengths is not None or window != _windows.ALL:
        visible = _visible_keys(shape, device, mask, key_lengths, window, window_center)
        (key,) = _scores.without_unseen(visible, key)
    wide = accumulation_dtype(dtype)
    with without_autocast(device):
        scores = additive_scores(
            query.to(wide),
            key.to(wide),
            weight.to(wide),
            scale=scale,
            softcap=softcap,
            activation=activation,
            negative_slope=negative_slope,
            backend=backend,
        )
        if bias is not None:
            scores, visible = _scores.biased(scores, bias, visible)
            visible = visible.expand(shape)
        log_prob, entropy, lse, index, best = HARD_ATTENTION(backend, (scores, visible, seed), Options(*place))
        expected = None
        if return_expected:
            softmax = _normalizers.NAMED["softmax"]
            expected, _ = _normalizers.apply(OP, scores, value, visible, softmax, value.dtype)
    return Part(_chosen(value, index), index, log_prob, entropy, lse, best, expected)


def _chosen(value: Tensor, index: Tensor) -> Tensor:
    """The values at an index, 0 where that is -1."""
    if value.shape[-2] == 0:
        return value.new_zeros(*index.shape, value.shape[-1])
    rows = index.clamp_min(0).unsqueeze(-1).expand(*index.shape, value.shape[-1])
    return value.gather(-2, rows).masked_fill((index < 0).unsqueeze(-1), 0.0)


@overridable
def hard_additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
    is_causal: bool = False,
    window_size: tuple[int, int] | None = None,
    window_center: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    activation: str = "tanh",
    negative_slope: float = 0.2,
    generator: torch.Generator | None = None,
    sample: bool = True,
    backend: str = "auto",
) -> HardAttentionOutput:
    """Hard (stochastic) additive attention: each query gets the value of one key, sampled by the softmax, fused.

    After Xu et al. 2015 (arXiv:1502.03044), section 4.1. Shapes: B batch, H heads (or none), Tq / Tk query / key
    length, D score width, Dv value width.

    Args:
        query, key, value, weight, mask, bias, key_lengths, is_causal, window_size, window_center, scale, softcap,
            activation, negative_slope: see :func:`fusedattn.additive_attention`. Keys outside of a window are
            hidden, but their scores are computed.
        generator: draws the seed of the samples, in eager mode alone. Default: PyTorch's own of the device, so
            that ``torch.manual_seed`` decides. The same seed gives the same keys on every backend and for any
            number of threads, except where rounding decides between two of them.
        sample: False takes the most likely key, the first of several. Default: True.
        backend: ``"auto"``, ``"cpu"``, ``"triton"`` or ``"reference"`` (plain PyTorch).

    Returns:
        HardAttentionOutput, a NamedTuple of ``context`` (B, [H,] Tq, Dv), the value of the key; ``index``
        (B, [H,] Tq), int64, its number; ``log_prob`` (B, [H,] Tq), the logarithm of its probability; ``entropy``
        (B, [H,] Tq) of the distribution. The latter two are in float32 for half-precision inputs, else in their
        dtype, and differentiable in query, key and weight: score-function estimators (REINFORCE) take log_prob.
        The gradient of context reaches the chosen value alone. A query that sees no key has index -1, context 0,
        log_prob 0, entropy 0 and zero gradients.

    Whatever a key that no query sees holds, and a value that none has chosen, has no effect. Memory is that of the
    scores (B, [H,] Tq, Tk), in float32 for half-precision inputs.

    Under autocast the four inputs are cast to its dtype, except float64 ones. Second derivatives and forward-mode
    ones are computed through the reference formula. Under ``vmap`` its ``randomness`` says whether samples share
    their seed.

    Raises:
        TypeError: query, key, value or weight is not a Tensor.
        ValueError: an input with the wrong shape, dtype, device or value; a generator of another device.
        UnsupportedError: no backend, or not the one asked for, can run these inputs.
    """
    _scores.require_tensors(OP, query=query, key=key, value=value, weight=weight)
    _scores.check_generator(OP, generator, query.device)
    seed = draw_seed(query.device, generator) if sample else None
    found = attend(
        query,
        key,
        value,
        weight,
        seed,
        mask=mask,
        bias=bias,
        key_lengths=key_lengths,
        is_causal=is_causal,
        window_size=window_size,
        window_center=window_center,
        scale=scale,
        softcap=softcap,
        activation=activation,
        negative_slope=negative_slope,
        backend=backend,
    )
    return HardAttentionOutput(found.context, found.index, found.log_prob, found.entropy)
