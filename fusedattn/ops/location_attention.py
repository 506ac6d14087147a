"""Location-sensitive attention, one step of a decoder (Chorowski et al. 2015, arXiv:1506.07503; Tacotron 2).

Mathematics, for every batch element (i step, j key, d score channel, n filter), with C channels of what the steps
before attended to, a_cj, convolved by filters of odd width K, zeros at either end::

    f_nj = sum_ck W_nck a_c,j+k-(K-1)/2               u_jd = sum_n U_dn f_nj              location features
    e_j  = scale * sum_d w_d phi(q_d + k_jd + u_jd)    then softcap: C tanh(e_j / C)
    p_j  = softmax_j(e_j)    c = sum_j p_j x_j         over the visible keys

Convolution and projection are both linear: the cheaper is taken of the two, one after the other, C K N + N D
products for each key, and a convolution by the filters U W, C K D. Backward, with g_j the gradient of the unscaled
score, as for additive attention (``fusedattn/ops/additive_attention.py``)::

    h_jd = g_j w_d phi'(q_d + k_jd + u_jd)      dq = sum_j h_j      dk_j = h_j      dU = sum_j h_j f_j
    df_j = U^T h_j                              dW_ck = sum_j df_j a_c,j+k-(K-1)/2     da by the transposed filters

The features are made block by block of keys, in forward and again in backward: none is stored. The operators take
several queries, each with previous weights of its own. In a loop they would be made a third time for the gradients
of keys and parameters: on the CPU a step's own backward adds those to the sums of the other steps, and the joint
backward is left with the value's.

Symbols: B batch, Tq queries, Tk key length, D score width,
Dv value width, C channels of previous weights, N filters, K their width, G groups of batch elements with a set of
parameters each. Kernels: ``csrc/location_attention/`` (C++), ``fusedattn/triton/location_attention.py``. Tests:
``tests/test_location_attention.py``.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedattn import _autograd, _normalizers, _scores, _steps
from fusedattn._dispatch import autocast, autocast_enabled, choose, fail, overridable, without_autocast
from fusedattn._dtypes import accumulation_dtype
from fusedattn._options import AdditiveScoresOptions as Options
from fusedattn._scores import shape_text
from fusedattn.ops.additive_attention import check_lengths, check_mask

OP = "location_attention"
_fail = partial(fail, OP)

# Reference


def _convolved(x, filters, groups):
    """F.conv1d, as long as x; PyTorch's takes nothing that is empty."""
    if x.numel() == 0:
        return (x.sum() + filters.sum()) * x.new_zeros(x.shape[0], filters.shape[0], x.shape[2])
    return F.conv1d(x, filters, padding=(filters.shape[-1] - 1) // 2, groups=groups)


def _features(previous, conv_weight, location_weight):
    """(B, Tq, Tk, D) of previous (B, Tq, C, Tk)."""
    (B, Tq, C, Tk), G = previous.shape, conv_weight.shape[0]
    grouped = previous.view(G, B // G * Tq, C, Tk).transpose(0, 1).flatten(1, 2)
    found = _convolved(grouped, conv_weight.flatten(0, 1), G)
    found = found.view(B // G * Tq, G, conv_weight.shape[1], Tk).permute(1, 0, 3, 2)  # (G, B / G Tq, Tk, N)
    if location_weight is not None:
        found = found @ location_weight.unsqueeze(1).mT
    return found.reshape(B, Tq, Tk, found.shape[-1])


def _reference(query, key, value, weight, previous, conv_weight, location_weight, mask, options: Options):
    """(context, weights, scores) in plain PyTorch, differentiable to any order."""
    dtype = query.dtype
    if mask is not None:
        key = _scores.without_unseen(mask, key)[0]
    z = query.unsqueeze(-2) + key.unsqueeze(-3) + _features(previous, conv_weight, location_weight)
    weight = weight.repeat_interleave(query.shape[0] // weight.shape[0], 0)
    scores = _scores.of_sum(z, weight, options)
    if value is None:
        context = weights = query.new_empty(0)
    else:
        context, weights = _normalizers.apply(OP, scores, value, mask, _normalizers.NAMED["softmax"], dtype)
    return context, weights, scores if mask is None else scores.masked_fill(~mask, float("-inf"))


@overridable
def location_attention_ref(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    previous: Tensor,
    conv_weight: Tensor,
    location_weight: Tensor,
    *,
    mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    activation: str = "tanh",
    negative_slope: float = 0.2,
    normalizer: str | Callable[[Tensor], Tensor] = "softmax",
    backend: str = "reference",
) -> tuple[Tensor, Tensor]:
    """:func:`location_attention` in plain PyTorch, on any device: the definition that kernels are tested against.

    Same arguments, shapes, results and errors; differentiable to any order. It builds the (B, Tk, D) tensors that
    the kernels avoid.
    """
    return location_attention(
        query,
        key,
        value,
        weight,
        previous,
        conv_weight,
        location_weight,
        mask=mask,
        key_lengths=key_lengths,
        scale=scale,
        softcap=softcap,
        activation=activation,
        negative_slope=negative_slope,
        normalizer=normalizer,
        backend=backend,
    )


# Declaration


def _fwd_fake(query, key, value, *rest):
    (B, Tq), Tk, wide = query.shape[:2], key.shape[1], accumulation_dtype(query.dtype)
    scores = query.new_empty((B, Tq, Tk), dtype=wide)
    if value is None:
        return query.new_empty(0), query.new_empty(0), scores, query.new_empty(0, dtype=wide)
    context, weights = query.new_empty((B, Tq, value.shape[2])), query.new_empty((B, Tq, Tk))
    return context, weights, scores, query.new_empty((B, Tq), dtype=wide)


def _bwd_fake(grad_context, grad_weights, grad_scores, *rest):
    return tuple(rest[0].new_empty(0) if t is None else t.new_empty(t.shape) for t in rest[:7])


LOCATION_ATTENTION = _autograd.Op(
    OP,
    inputs=("query", "key", "value", "weight", "previous", "conv_weight", "location_weight"),
    others=("mask",),
    options=Options,
    outputs=("context", "weights", "scores", "lse"),
    kept=("scores", "lse"),
    hidden=("lse",),
    shared=("key", "value", "weight", "conv_weight", "location_weight"),
    summed=("key", "weight", "conv_weight", "location_weight"),
    reference=_reference,
    fwd_fake=_fwd_fake,
    bwd_fake=_bwd_fake,
    fold=_autograd.BatchFold,
)


# Public function

_NO_KERNELS = {"cuda": f"it has no kernels of {OP}"}
MOST_PROJECTED = 32  # numbers of a key, in Triton: what is made of the previous weights before the projection


@overridable
def location_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    previous: Tensor,
    conv_weight: Tensor,
    location_weight: Tensor,
    *,
    mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    activation: str = "tanh",
    negative_slope: float = 0.2,
    normalizer: str | Callable[[Tensor], Tensor] = "softmax",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """A decoder's step of location-sensitive attention, which sees where the steps before attended to, fused::

        features = conv1d(previous, conv_weight, padding=(K - 1) // 2).mT @ location_weight.mT
        weights = softmax(scale * activation(query + key + features) @ weight)        context = weights @ value

    After Chorowski et al. 2015 (arXiv:1506.07503), as in Tacotron 2 (Shen et al. 2018, arXiv:1712.05884). Shapes:
    B batch, Tk key length, D score width, Dv value width, C channels, F filters of width K.

    Args:
        query: (B, D), already projected; float32, float64, float16 or bfloat16. Inner arithmetic is at least
            float32. Batches of query, key and value may be 1 where others have more.
        key: (B, Tk, D), already projected. Any strides.
        value: (B, Tk, Dv).
        weight: (D,).
        previous: (B, C, Tk), what steps before attended to: the weights of the last one, their sum over all.
        conv_weight: (F, C, K), of ``nn.Conv1d(C, F, K, padding=(K - 1) // 2)``; K is odd. The bias of a
            convolution or projection is one of the query.
        location_weight: (D, F), of ``nn.Linear(F, D)``.
        mask: bool, broadcastable to (B, Tk); True = may attend. Default: no mask.
        key_lengths: integers (B,); keys at or after a length are invisible. See
            :func:`fusedattn.additive_attention`.
        scale: factor of the score; above 1 it sharpens. Default: 1.0.
        softcap: C > 0 caps the scaled score to C * tanh(score / C). Default: None.
        activation, negative_slope: see :func:`fusedattn.additive_attention`.
        normalizer: ``"softmax"``; ``"sigmoid"``, which smooths (section 2.3 of the paper); or a callable on the
            scores (B, 1, Tk), see :func:`fusedattn.additive_attention`. Default: ``"softmax"``.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``. There are kernels for the CPU,
            and in Triton for up to 32 filters, or taps C K where filters and projection cost less folded into one.

        The last four tensors but mask may be in float32 beside half precision, and count unrounded.

    Returns:
        context (B, Dv) and weights (B, Tk), in the dtype of query. Without a visible key both are 0, and so are
        gradients. Every input has a gradient, previous among them.

    A key that is invisible is absent, whatever it and its value hold; its own gradients are zero. The previous
    weights count wherever they stand.

    Under autocast query, key and value are cast to its dtype, except float64 ones. Second derivatives and
    forward-mode ones are computed through the reference formula.

    Raises:
        TypeError: an input is not a Tensor.
        ValueError: an input with the wrong shape, dtype, device or value.
        UnsupportedError: no backend, or not the one asked for, can run these inputs.
    """
    return attend(
        query,
        key,
        value,
        weight,
        previous,
        conv_weight,
        location_weight,
        mask=mask,
        key_lengths=key_lengths,
        scale=scale,
        softcap=softcap,
        activation=activation,
        negative_slope=negative_slope,
        normalizer=normalizer,
        backend=backend,
    )


@overridable
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    previous: Tensor,
    conv_weight: Tensor,
    location_weight: Tensor,
    *,
    mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    activation: str = "tanh",
    negative_slope: float = 0.2,
    normalizer: str | Callable[[Tensor], Tensor] = "softmax",
    backend: str = "auto",
    parameters: tuple[Tensor | None, ...] | None = None,
    token: Tensor | None = None,
    unseen_are_zero: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`location_attention` for modules: with what :func:`prepared` makes of the parameters, once for the
    steps of a loop (``token``, see ``_steps.py``), and, for a normaliser, with zeros in what no query sees."""
    tensors = {
        "weight": weight,
        "previous": previous,
        "conv_weight": conv_weight,
        "location_weight": location_weight,
    }
    _scores.require_dense(OP, query=query, key=key, value=value, **tensors)
    device = query.device
    if autocast_enabled(device):
        query, key, value = autocast(query), autocast(key), autocast(value)
    if query.dim() != 2:
        _fail("query", "shape (B, D)", tuple(query.shape))
    if weight.dim() != 1:
        _fail("weight", f"shape {shape_text(query.shape[1])}", tuple(weight.shape))
    with without_autocast(device):
        query, key, weight, value = _scores.broadcast(OP, query.unsqueeze(1), key, weight, value)
        _scores.check_numbers(OP, scale, softcap, activation, negative_slope)
        _check(query, key, previous, conv_weight, location_weight)
        unable = _unable(conv_weight, location_weight)
        mask = _visible(key, mask, key_lengths)
        sizes = f"query {tuple(query.shape)}, key {tuple(key.shape)}"
        backend = choose(OP, backend, device, query.dtype, lambda: sizes, unable)
        wide = accumulation_dtype(query.dtype)
        previous = previous.to(wide).unsqueeze(1)
        if parameters is None:
            parameters = prepared(weight, conv_weight, location_weight, wide)
        options = Options(*_scores.numbers(scale, softcap, activation, negative_slope))
        composed = normalizer != "softmax"
        score_weight, filters, projection = parameters
        inputs = (query, key, None if composed else value, score_weight, previous, filters, projection, mask)
        if token is None or composed:
            context, weights, scores, *_ = LOCATION_ATTENTION(backend, inputs, options)
        else:
            context, weights, scores, *_ = _steps.attend(LOCATION_ATTENTION, backend, inputs, options, (), token)
        if composed:
            normalize = _normalizers.function(OP, normalizer)
            context, weights = _normalizers.apply(OP, scores, value, mask, normalize, query.dtype, unseen_are_zero)
        return context.squeeze(1), weights.squeeze(1)


def prepared(
    weight: Tensor, conv_weight: Tensor, location_weight: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The parameters as the operators take them, in the dtype of the arithmetic: weight (1, D), and filters
    (1, N, C, K) with their projection (1, D, N), or with as many channels as the score and None, whichever costs
    less."""
    weight, conv_weight, location_weight = (t.to(dtype) for t in (weight, conv_weight, location_weight))
    if not _are_folded(conv_weight, location_weight):
        return weight[None], conv_weight[None], location_weight[None]
    with without_autocast(weight.device):
        folded = location_weight @ conv_weight.flatten(1)
    return weight[None], folded.view(1, -1, *conv_weight.shape[1:]), None


def _are_folded(conv_weight: Tensor, location_weight: Tensor) -> bool:
    """Whether filters of as many channels as the score cost less than theirs and the projection."""
    (N, C, K), D = conv_weight.shape, location_weight.shape[0]
    return D * C * K <= N * C * K + D * N


def _unable(conv_weight: Tensor, location_weight: Tensor) -> dict[str, str]:
    """Backends without kernels for these sizes, and why."""
    (N, C, K), folded = conv_weight.shape, _are_folded(conv_weight, location_weight)
    if (C * K if folded else N) <= MOST_PROJECTED:
        return _NO_KERNELS
    of = "taps, of filters folded with the projection" if folded else "filters"
    reason = f"its kernels take at most {MOST_PROJECTED} {of}: conv_weight is {tuple(conv_weight.shape)}"
    return _NO_KERNELS | {"triton": reason}


def _visible(key: Tensor, mask: Tensor | None, key_lengths: Tensor | None) -> Tensor | None:
    """bool (B, 1, Tk); None for all keys."""
    B, Tk = key.shape[:2]
    if mask is not None:
        check_mask(mask, (B, Tk), key.device, OP)
        mask = mask.expand(B, Tk).unsqueeze(1)
    if key_lengths is None:
        return mask
    check_lengths(key_lengths, B, Tk, key.device, OP)
    within = (torch.arange(Tk, device=key.device) < key_lengths[:, None]).unsqueeze(1)
    return within if mask is None else mask & within


def _check(query, key, previous, conv_weight, location_weight) -> None:
    (B, _, D), Tk = query.shape, key.shape[1]
    for name, t in (
        ("previous", previous),
        ("conv_weight", conv_weight),
        ("location_weight", location_weight),
    ):
        _scores.check_parameter(OP, name, t, query)
    if previous.dim() != 3 or previous.shape[0] != B or previous.shape[2] != Tk:
        _fail("previous", f"shape {shape_text(B, 'C', Tk)}", tuple(previous.shape))
    C = previous.shape[1]
    if conv_weight.dim() != 3 or conv_weight.shape[1] != C or conv_weight.shape[2] % 2 == 0:
        _fail("conv_weight", f"shape {shape_text('F', C, 'K')} with an odd K", tuple(conv_weight.shape))
    if location_weight.shape != (D, conv_weight.shape[0]):
        _fail("location_weight", f"shape {shape_text(D, conv_weight.shape[0])}", tuple(location_weight.shape))
