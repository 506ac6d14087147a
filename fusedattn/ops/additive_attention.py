"""Additive attention (Bahdanau, Cho and Bengio 2015, arXiv:1409.0473).

Mathematics, for every batch element and head (i query, j key, d score channel)::

    e_ij = scale * sum_d w_d phi(q_id + k_jd)          score, then softcap: C tanh(e_ij / C), then + bias_ij
    p_ij = softmax_j(e_ij) over the visible keys       weights
    L_i  = log sum_j exp(e_ij)                         lse
    c_i  = sum_j p_ij x_j                              context

Forward, for phi = tanh, with Eq = exp(2q) and Ek = exp(2k)::

    tanh(q + k) = 1 - 2r,   r = 1 / (1 + Eq Ek)

so no transcendental function is evaluated per pair and channel. sigmoid(z) = (1 + tanh(z / 2)) / 2 is 1 - r of
exp(q) and exp(k); relu and leaky_relu take no exponentials. Backward, with a_ij = dc_i . x_j + dp_ij::

    g_ij  = p_ij (a_ij - sum_j p_ij a_ij + dL_i)       gradient of the capped score, and of the bias
    dq_id = 4 w_d sum_j g_ij (r - r^2)     dk_jd = 4 w_d sum_i g_ij (r - r^2)
    dw_d  = sum_ij g_ij - 2 sum_ij g_ij r              dx_j = sum_i p_ij dc_i

and for any other phi dq_id = w_d sum_j g_ij phi'(q_id + k_jd), dw_d = sum_ij g_ij phi(q_id + k_jd).

Dropout makes p~_ij = p_ij / (1 - P) of the weights that it keeps and 0 of the others, by random words of which
none is stored (``fusedattn/_philox.py``)::

    c_i = sum_j p~_ij x_j      a_ij = (p~_ij / p_ij) dc_i . x_j + dp_ij      dx_j = sum_i p~_ij dc_i

A window, c_i - left <= j <= c_i + right with c_i = i unless it is given, is part of what is visible; keys outside
of it are not computed (``fusedattn/_windows.py``). Other normalisers than the softmax are composed over the scores
(``fusedattn/_normalizers.py``).

Symbols: B batch, H heads, Tq / Tk query / key length, D score width, Dv value width. Kernels:
``csrc/additive_attention/`` (C++, CUDA), ``fusedattn/triton/additive_attention.py``. Tests:
``tests/test_additive_attention.py``, ``tests/test_triton_additive_attention.py``. Benchmark: ``benchmarks/``.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fusedattn import _autograd, _nested, _normalizers, _philox, _scores, _steps, _windows
from fusedattn._dispatch import (
    autocast,
    autocast_enabled,
    choose,
    fail,
    overridable,
    tf32_allowed,
)
from fusedattn._dtypes import accumulation_dtype
from fusedattn._options import AdditiveAttentionOptions as Options
from fusedattn._scores import check_integers, shape_text
from fusedattn._typing import attention_function
from fusedattn.ops.additive_scores import additive_scores

# Reference


def _visible_keys(
    shape,
    device,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    window: tuple[int, int] = _windows.ALL,
    window_center: Tensor | None = None,
) -> Tensor:
    """bool (B, [H,] Tq, Tk): True where a query may attend to a key."""
    B, Tq, Tk = shape[0], shape[-2], shape[-1]
    visible = torch.ones(Tq, Tk, dtype=torch.bool, device=device)
    if window != _windows.ALL:
        visible = visible & _windows.within(window, window_center, Tq, Tk, device)
    if key_lengths is not None:
        within = torch.arange(Tk, device=device) < key_lengths[:, None]
        visible = visible & within.view(B, *(1,) * (len(shape) - 2), Tk)
    if mask is not None:
        visible = visible & mask
    return visible.expand(shape)


def _reference(
    query, key, value, weight, bias, mask, key_lengths, window_center, key_exp, key_bound, seed, options: Options
):  # fmt: skip
    """(context, lse, weights) in plain PyTorch, differentiable to any order; weight (D,), or (H, D) with heads."""
    shape = (*query.shape[:-1], key.shape[-2])
    window = (options.window_left, options.window_right)
    visible = _visible_keys(shape, query.device, mask, key_lengths, window, window_center)
    if mask is not None or key_lengths is not None or options.has_window:
        key, value = _scores.without_unseen(visible, key, value)
    scores = _scores.reference(query, key, weight, options)
    if bias is not None:
        scores, visible = _scores.biased(scores, bias, visible)
    scores = _scores.of_visible(visible, scores)
    # A weight wider than the other inputs makes wider scores; results are in the dtype of those.
    weights = torch.softmax(scores, -1).to(query.dtype).masked_fill(~visible, 0.0)
    lse = torch.logsumexp(scores.to(accumulation_dtype(scores.dtype)), -1)
    dropped = weights
    if seed is not None:
        dropped = _philox.dropout(weights, options.dropout_p, seed, _philox.place_of(options))
    return dropped @ value, lse.masked_fill(~visible.any(-1), float("-inf")), weights


@attention_function
@overridable
def additive_attention_ref(
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
    normalizer: str | Callable[[Tensor], Tensor] = "softmax",
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    return_weights: bool = False,
    return_lse: bool = False,
    backend: str = "reference",
) -> Tensor | tuple[Tensor, ...]:
    """:func:`additive_attention` in plain PyTorch, on any device: the definition that kernels are tested against.

    Same arguments (``backend`` is ignored), shapes, results and errors; differentiable to any order. It builds
    the (B, H, Tq, Tk, D) tensor that the kernels avoid.
    """
    return additive_attention(
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
        normalizer=normalizer,
        dropout_p=dropout_p,
        generator=generator,
        return_weights=return_weights,
        return_lse=return_lse,
        backend=backend,
    )


# Declaration


def _fwd_fake(*arguments):
    (query, _, value, *_), _, (return_weights, keep_scores, *_) = ATTENTION.fwd_parts(arguments)
    rows, (Tk, Dv) = query.shape[:-1], value.shape[-2:]
    acc = accumulation_dtype(query.dtype)
    return (
        query.new_empty((*rows, Dv)),
        query.new_empty(rows, dtype=acc),
        query.new_empty((*rows, Tk) if return_weights else (0,)),
        query.new_empty((*rows, Tk) if keep_scores else (0,), dtype=acc),
    )


def _bwd_fake(grad_context, grad_lse, grad_weights, query, key, value, weight, bias, *rest):
    grad_bias = query.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return (*(t.new_empty(t.shape) for t in (query, key, value, weight)), grad_bias)


def _flops(query, key, value, *_) -> int:
    """Of the products ``tanh(query + key) @ weight`` and ``weights @ value``, from shapes."""
    *lead, Tq, D = query
    return 2 * math.prod(lead) * Tq * key[-2] * (D + value[-1])


class _Fold(_scores.Fold):
    def folded(self):
        *_, bias, mask, lengths, center, _, _, seed = self.tensors
        rows, mask, center = self.rows(3), self.output(mask, self.dims[5]), self.output(center, self.dims[7])
        if lengths is not None and self.dims[6] is not None:  # what differs over N becomes part of the mask
            Tq, (B, heads, Tk, _) = rows[0].shape[2], rows[1].shape
            lengths = lengths.movedim(self.dims[6], 1)[..., None, None, None]
            visible = torch.arange(Tk, device=lengths.device) < lengths
            visible = visible.expand(B, self.N, heads // self.N, 1, Tk).flatten(1, 2).expand(-1, -1, Tq, -1)
            mask, lengths = visible if mask is None else visible & mask, None
        if seed is not None:  # one for each sample's heads
            dim = self.dims[10]
            seed = seed.expand(self.N, -1) if dim is None else seed.movedim(dim, 0)
            seed = seed.flatten().contiguous()
        bias = None if bias is None else self._bias(rows[0].shape[1] // self.N)
        return (*rows, self.weight(3), bias, mask, lengths, center, None, None, seed)

    def _bias(self, heads):
        bias = self.spread(self.tensors[4], self.dims[4])  # (B, N, H, Tq, Tk), or without H
        return bias.expand(-1, -1, heads, -1, -1).flatten(1, 2) if self.heads else bias

    def gradients_apart(self, grads):
        found, dims = super().gradients_apart(grads)
        *others, of_bias = found
        if self.heads and of_bias.dim() > 1 and self.spread(self.tensors[4], self.dims[4]).shape[2] == 1:
            of_bias = of_bias.sum(2, keepdim=True)  # one for all heads was spread over them
        return (*others, of_bias), dims


ATTENTION = _autograd.Op(
    "additive_attention",
    inputs=("query", "key", "value", "weight", "bias"),
    others=("mask", "key_lengths", "window_center", "key_exp", "key_bound", "dropout_seed"),
    options=Options,
    outputs=("context", "lse", "weights", "scores"),
    kept=("context", "lse", "scores"),
    hidden=("scores",),
    shared=("key", "value", "weight"),
    reference=_reference,
    fwd_fake=_fwd_fake,
    bwd_fake=_bwd_fake,
    fold=_Fold,
    flops=_flops,
)


# Public function


_fail = partial(fail, "additive_attention")


def check_mask(mask, full, device, op="additive_attention"):
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        fail(op, "mask", "a bool Tensor (True = may attend)", getattr(mask, "dtype", type(mask).__name__))
    _check_broadcasts(op, "mask", mask, full, device)


def _check_broadcasts(op, argument, t, full, device):
    if t.device != device:
        fail(op, argument, f"a Tensor on {device} like query", f"one on {t.device}")
    sizes = zip(reversed(t.shape), reversed(full), strict=False)
    if t.dim() > len(full) or any(m != 1 and m != n for m, n in sizes):
        fail(op, argument, f"a shape broadcastable to {shape_text(*full)}", tuple(t.shape))


def autocast_bias(bias: Tensor | None) -> Tensor | None:
    """As autocast has it; float32 stays, which scores of lower precision take unrounded."""
    return bias if bias is None or bias.dtype == torch.float32 else autocast(bias)


def checked_bias(bias, full, dtype, device, op="additive_attention"):
    """With as many dimensions as the scores."""
    dtypes = tuple(dict.fromkeys((dtype, accumulation_dtype(dtype))))
    if not isinstance(bias, Tensor) or bias.dtype not in dtypes:
        got = getattr(bias, "dtype", type(bias).__name__)
        of_bool = " (what is True where a query may attend to a key is mask)" if got == torch.bool else ""
        fail(op, "bias", f"a Tensor of {' or '.join(map(str, dtypes))}", f"{got}{of_bool}")
    _check_broadcasts(op, "bias", bias, full, device)
    return bias.view((1,) * (len(full) - bias.dim()) + bias.shape)


def seen_keys(key: Tensor, mask: Tensor | None, key_lengths: Tensor | None) -> Tensor:
    """bool (B, [H,] Tk): the keys that some query may attend to, by a mask of any number of queries."""
    *lead, Tk = key.shape[:-1]
    if mask is not None:
        Tq = mask.shape[-2] if mask.dim() > 1 else 1
        check_mask(mask, (*lead, Tq, Tk), key.device)
        mask = mask.any(-2, keepdim=True) if mask.dim() > 1 else mask
    if key_lengths is not None:
        check_lengths(key_lengths, key.shape[0], Tk, key.device)
    return _visible_keys((*lead, 1, Tk), key.device, mask, key_lengths).squeeze(-2)


def check_lengths(key_lengths, B, Tk, device, op="additive_attention"):
    check_integers(op, "key_lengths", key_lengths)
    if key_lengths.dim() != 1 or key_lengths.shape[0] != B or key_lengths.device != device:
        got = f"{tuple(key_lengths.shape)} on {key_lengths.device}"
        fail(op, "key_lengths", f"shape {shape_text(B)} on {device}", got)
    # Values are looked at only where that neither synchronises a device nor breaks a trace; the kernels clamp
    # to [0, Tk] everywhere.
    if device.type == "cpu" and B and type(key_lengths) is Tensor and not is_traced():
        low, high = (int(x) for x in torch.aminmax(key_lengths))
        if low < 0 or high > Tk:
            fail(op, "key_lengths", f"values in [0, {Tk}] (Tk)", f"values in [{low}, {high}]")


def _dropout_seed(dropout_p, generator, device) -> Tensor | None:
    """A fresh one, None without dropout."""
    _scores.check_dropout("additive_attention", "dropout_p", dropout_p)
    _scores.check_generator("additive_attention", generator, device)
    return None if dropout_p == 0 else _philox.draw_seed(device, generator)


def is_traced() -> bool:
    compiling = torch.compiler.is_compiling()
    return compiling or torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() > 0


def keeps_scores(query: Tensor, key: Tensor, *others: Tensor | None, row: int | None = None) -> bool:
    """Whether the (Tq, Tk) scores are kept for backward: if they are no larger than query and key.

    ``row`` stands in for Tk where a query has another number of scores.

    Recomputing them costs a third of the backward pass; memory stays linear in Tq + Tk either way. A compiled
    program recomputes where its sizes change from call to call: it would be compiled anew to compare them.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_exporting() or torch.jit.is_tracing():
        return False
    transformed = torch._C._are_functorch_transforms_active()  # an outer level may ask for gradients
    if not transformed and not any([t is not None and t.requires_grad for t in (query, key, *others)]):
        return False
    (Tq, D), Tk = query.shape[-2:], key.shape[-2]
    row = Tk if row is None else row
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(Tq * row <= (Tq + Tk) * D)
    return Tq * row <= (Tq + Tk) * D


@attention_function
@overridable
def additive_attention(
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
    normalizer: str | Callable[[Tensor], Tensor] = "softmax",
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    return_weights: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Additive (Bahdanau) attention: ``softmax(scale * activation(query + key) @ weight) @ value``, fused.

    After Bahdanau, Cho and Bengio 2015 (arXiv:1409.0473). Shapes: B batch, H heads (or none), Tq / Tk query /
    key length, D score width, Dv value width.

    Args:
        query: (B, Tq, D) or (B, H, Tq, D), already projected; float32, float64, float16 or bfloat16. Inner
            arithmetic is at least float32. Any strides; expanded (stride 0) inputs are not copied. Batch and heads
            of query, key and value may be 1 where the others have more. Or query, key and value are nested tensors
            of layout ``torch.jagged``, Tq and Tk their ragged dimension: context and lse are so too, by
            :func:`additive_attention_varlen`, without ``mask``, ``key_lengths``, dropout and weights. Compiled,
            they know their ``max_seqlen``, and value has the offsets of key.
        key: (B, Tk, D) or (B, H, Tk, D), already projected.
        value: (B, Tk, Dv) or (B, H, Tk, Dv).
        weight: (D,) or (H, D); of the dtype of the others, or float32 beside half-precision ones. The score takes
            it unrounded, and its gradient is in its own dtype.
        mask: bool, broadcastable to (B, [H,] Tq, Tk); True = may attend. Default: no mask.
        bias: broadcastable to (B, [H,] Tq, Tk), of the dtype of the others, or float32 beside half-precision ones;
            added to the score after scale and softcap, unrounded: relative position terms, ALiBi (Press et al.
            2022, arXiv:2108.12409), coverage. It is read as it lies, and its gradient is summed over the
            dimensions that it is broadcast in. -inf hides a key from the softmax as a mask does, and has gradient
            0; but the key and its value are read, and must be finite. Default: None.
        key_lengths: integers (B,); keys at or after a length are invisible. On the CPU a length outside
            [0, Tk] raises; on a GPU, and while traced or transformed, lengths are clamped.
        is_causal: query i sees keys j <= i only: the window (-1, 0), around ``window_center`` if that is given.
            Default: False.
        window_size: (left, right); query i sees the keys i - left <= j <= i + right, both included, -1 for no
            bound. Aligned at the top left also where Tq and Tk differ, as ``is_causal`` is (flash-attention aligns
            at the bottom right: here that is ``window_center=torch.arange(Tk - Tq, Tk)``). Keys outside of a
            window are not computed: time falls with it. With ``is_causal``, right is 0. All of ``mask``, ``bias``,
            ``key_lengths`` and windows combine. Default: None, no window.
        window_center: integers, broadcastable to (B, [H,] Tq), of any value: the place of each query among the
            keys, in place of i (local attention, Luong et al. 2015, arXiv:1508.04025). Only with ``window_size``
            or ``is_causal``. Default: None, i.
        scale: factor of the score. Default: 1.0.
        softcap: C > 0 caps the scaled score to C * tanh(score / C) (the clipping of pointer networks, Bello et
            al. 2017, arXiv:1611.09940). Default: None.
        activation: of query + key: ``"tanh"``, ``"sigmoid"``, ``"relu"`` or ``"leaky_relu"``, the latter two with
            PyTorch's gradients at zero. Default: ``"tanh"``.
        negative_slope: of ``"leaky_relu"``, any number. Default: 0.2.
        normalizer: ``"softmax"``; ``"sigmoid"``, sigma(e) / sum sigma(e) over the visible keys, which smooths
            (Chorowski et al. 2015, arXiv:1506.07503); or a callable that takes the scores (B, [H,] Tq, Tk), in
            float32 for half-precision inputs and -inf at invisible keys, to weights of that shape: sparsemax,
            entmax, any that works along the last dimension. A row without a visible key is 0 for it. Any but
            softmax is composed in PyTorch over :func:`fusedattn.additive_scores`, with memory for
            (B, [H,] Tq, Tk). Default: ``"softmax"``.
        dropout_p: probability in [0, 1) with which each weight counts as 0 in the context, the others times
            1 / (1 - dropout_p), as :func:`torch.nn.functional.dropout` (Srivastava et al. 2014). Which of them is
            decided by random bits of a seed, batch, head, query and key: the same on every backend, with any
            number of threads. Nothing of it is stored, and lse does not know of it. Default: 0.0.
        generator: draws that seed, on the device of the inputs. Default: None, PyTorch's default generator, so
            that ``torch.manual_seed`` decides, a checkpointed call (``preserve_rng_state``) repeats its bits,
            ``torch.vmap`` draws as its ``randomness`` says, and compiled code other bits than eager one. A
            generator cannot be passed to compiled code, and checkpointing does not restore it.
        return_weights: also return the weights, differentiable: those before dropout.
        return_lse: also return the log-sum-exp of the scores, differentiable; with softmax alone.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"`` (plain PyTorch).

    Returns:
        context (B, [H,] Tq, Dv), or a tuple (context[, weights][, lse]): weights (B, [H,] Tq, Tk) in the dtype
        of the inputs, lse (B, [H,] Tq) in float32 for half-precision inputs, else in their dtype. A query with
        no visible key gets context 0, weights 0, lse -inf and zero gradients. Backward reads context and lse: as
        after ``torch.softmax``, writing into them in place before it is an error.

    A key that no query of its batch element and head sees is absent: whatever it and its value hold, NaN and
    infinity included, results and gradients of any order are those with zeros there, and its own gradients are
    zero. Of a key that some queries see, a NaN in the key leaves the results of the others alone, but may reach
    their gradients; one in its value may reach the results of all.

    Where PyTorch's settings allow TF32 for float32 matrix products (``torch.set_float32_matmul_precision``), GPUs
    may use it for the product of weights and value.

    Under autocast the four inputs are cast to its dtype, except float64 ones. Second derivatives and forward-mode
    ones are computed through the reference formula, which builds the (B, H, Tq, Tk, D) tensor.

    Raises:
        TypeError: query, key, value or weight is not a Tensor.
        ValueError: an input with the wrong shape, dtype, device or value.
        UnsupportedError: no backend, or not the one asked for, can run these inputs.
    """
    if _nested.any_of(query, key, value):
        _nested.require_default(
            mask=mask,
            bias=bias,
            key_lengths=key_lengths,
            window_center=window_center,
            return_weights=return_weights,
        )
        if normalizer != "softmax":
            _fail("normalizer", "'softmax' with nested tensors", repr(normalizer))
        if dropout_p != 0:
            _fail("dropout_p", "0.0 with nested tensors", dropout_p)
        return _nested.attend(
            query,
            key,
            value,
            weight,
            is_causal=is_causal,
            window_size=window_size,
            scale=scale,
            softcap=softcap,
            activation=activation,
            negative_slope=negative_slope,
            return_lse=return_lse,
            backend=backend,
        )
    return attend(
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
        normalizer=normalizer,
        dropout_p=dropout_p,
        generator=generator,
        return_weights=return_weights,
        return_lse=return_lse,
        backend=backend,
    )


@overridable
def attend(
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
    normalizer: str | Callable[[Tensor], Tensor] = "softmax",
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    return_weights: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
    key_exp: Tensor | None = None,
    key_bound: Tensor | None = None,
    token: Tensor | None = None,
    repeated: _steps.Repeated | None = None,
    unseen_are_zero: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """:func:`additive_attention` for the modules: optionally with exp(2 key) and max |key| already at hand, as a
    step of a loop (``token``, ``repeated``, see ``_steps.py``), and, for a normaliser, with zeros in what no query
    sees."""
    _scores.require_tensors("additive_attention", query=query, key=key, value=value, weight=weight)
    device = query.device
    if autocast_enabled(device):
        inputs = [autocast(t) for t in (query, key, value, weight)]
        with torch.autocast(device.type, enabled=False):  # the reference is to compute in the dtype of its inputs
            return attend(
                *inputs,
                mask=mask,
                bias=autocast_bias(bias),
                key_lengths=key_lengths,
                is_causal=is_causal,
                window_size=window_size,
                window_center=window_center,
                scale=scale,
                softcap=softcap,
                activation=activation,
                negative_slope=negative_slope,
                normalizer=normalizer,
                dropout_p=dropout_p,
                generator=generator,
                return_weights=return_weights,
                return_lse=return_lse,
                backend=backend,
                key_exp=key_exp if inputs[1].dtype == key.dtype else None,
                key_bound=key_bound,
                token=token,
                unseen_are_zero=unseen_are_zero,
            )
    given = query
    query, key, weight, value = _scores.broadcast("additive_attention", query, key, weight, value)
    _scores.check_numbers("additive_attention", scale, softcap, activation, negative_slope)
    dtype = query.dtype
    # Most calls have neither, and small ones notice a look at what they are.
    may_drop = generator is not None or type(dropout_p) is not float or dropout_p != 0
    seed = _dropout_seed(dropout_p, generator, device) if may_drop else None
    if mask is not None or bias is not None:
        full = (*query.shape[:-1], key.shape[-2])
        if mask is not None:
            check_mask(mask, full, device)
        if bias is not None:
            bias = checked_bias(bias, full, dtype, device)
    if key_lengths is not None:
        check_lengths(key_lengths, query.shape[0], key.shape[-2], device)
        key_lengths = key_lengths.to(torch.int64)
    window = _windows.sides("additive_attention", window_size, window_center, is_causal)
    if window_center is not None:
        window_center = _windows.centers("additive_attention", window_center, query.shape[:-1], device)
        window_center = None if window == _windows.ALL else window_center
    if callable(normalizer) or normalizer != "softmax":
        if return_lse:
            _fail("return_lse", "False with a normalizer other than 'softmax'", return_lse)
        visible = None
        if mask is not None or key_lengths is not None or window != _windows.ALL:
            full = (*query.shape[:-1], key.shape[-2])
            visible = _visible_keys(full, device, mask, key_lengths, window, window_center)
        score = partial(
            additive_scores,
            scale=scale,
            softcap=softcap,
            activation=activation,
            negative_slope=negative_slope,
            backend=backend,
        )
        drop = None if seed is None else partial(_philox.dropout, p=dropout_p, seed=seed)
        of_all = _normalizers.attend(
            "additive_attention",
            query,
            key,
            value,
            weight,
            bias,
            visible,
            normalizer,
            score,
            unseen_are_zero,
            drop,
        )
        return of_all if return_weights else of_all[0]
    backend = choose(
        "additive_attention",
        backend,
        device,
        dtype,
        lambda: f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}",
    )
    if mask is not None and backend != "reference":
        mask = mask.expand(full)
    tensors = (query, key, value, weight, bias, mask, key_lengths, window_center, key_exp, key_bound, seed)
    left, right = window
    options = Options(left, right, *_scores.numbers(scale, softcap, activation, negative_slope), dropout_p)
    flags = (return_weights, keeps_scores(*tensors[:5]), dtype == torch.float32 and tf32_allowed())
    if repeated is not None and backend == "cpu" and seed is None:
        repeated.keep(ATTENTION, given, tensors, options, flags, token)
    if token is None:
        context, lse, weights, *_ = ATTENTION(backend, tensors, options, flags)
    else:
        context, lse, weights, *_ = _steps.attend(ATTENTION, backend, tensors, options, flags, token)
    return _requested(context, lse, weights, return_weights, return_lse)


def _requested(context, lse, weights, return_weights, return_lse):
    if not return_weights and not return_lse:
        return context
    return (context,) + ((weights,) if return_weights else ()) + ((lse,) if return_lse else ())
