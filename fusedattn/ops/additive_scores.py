"""The scores of additive attention alone (Bahdanau, Cho and Bengio 2015, arXiv:1409.0473).

Mathematics, for every batch element and head (i query, j key, d score channel)::

    e_ij = scale * sum_d w_d phi(q_id + k_jd)          then softcap: C tanh(e_ij / C)

What is only (Tq, Tk) large composes in PyTorch at a few percent of the cost: other normalisers, coverage, biases
of all kinds are a few lines over these scores. Forward and backward are those of additive attention
(``fusedattn/ops/additive_attention.py``), with g_ij the gradient of e_ij, through cap and scale.

Symbols: B batch, H heads, Tq / Tk query / key length, D score width. Kernels: ``csrc/additive_attention/``,
launched by ``csrc/additive_scores/cpu.cpp``, and ``fusedattn/triton/additive_scores.py``. Tests:
``tests/test_additive_scores.py``.
"""

import math

import torch
from torch import Tensor

from fusedattn import _autograd, _scores
from fusedattn._dispatch import autocast, autocast_enabled, choose, overridable
from fusedattn._options import AdditiveScoresOptions as Options

OP = "additive_scores"

# Reference


def _reference(query, key, weight, options: Options):
    # A weight wider than the other inputs makes wider scores; results are in the dtype of those.
    return _scores.reference(query, key, weight, options).to(query.dtype)


@overridable
def additive_scores_ref(
    query: Tensor,
    key: Tensor,
    weight: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    activation: str = "tanh",
    negative_slope: float = 0.2,
    backend: str = "reference",
) -> Tensor:
    """:func:`additive_scores` in plain PyTorch, on any device: the definition that kernels are tested against.

    Same arguments, shapes, result and errors; differentiable to any order. It builds the (B, H, Tq, Tk, D) tensor
    that the kernels avoid.
    """
    return additive_scores(
        query,
        key,
        weight,
        scale=scale,
        softcap=softcap,
        activation=activation,
        negative_slope=negative_slope,
        backend=backend,
    )


# Declaration


def _fwd_fake(query, key, weight, *options):
    return query.new_empty((*query.shape[:-1], key.shape[-2]))


def _bwd_fake(grad_scores, query, key, weight, *options):
    return tuple(t.new_empty(t.shape) for t in (query, key, weight))


def _flops(query, key, weight) -> int:
    """Of the product ``tanh(query + key) @ weight``, from shapes."""
    return 2 * math.prod(query) * key[-2]


SCORES = _autograd.Op(
    OP,
    inputs=("query", "key", "weight"),
    options=Options,
    outputs=("scores",),
    reference=_reference,
    fwd_fake=_fwd_fake,
    bwd_fake=_bwd_fake,
    fold=_scores.Fold,
    flops=_flops,
)


# Public function

_UNABLE = {"cuda": "the scores alone have no kernels in CUDA C++"}


@overridable
def additive_scores(
    query: Tensor,
    key: Tensor,
    weight: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    activation: str = "tanh",
    negative_slope: float = 0.2,
    backend: str = "auto",
) -> Tensor:
    """Scores of additive attention, ``scale * activation(query + key) @ weight`` for all pairs, fused.

    The primitive under :func:`fusedattn.additive_attention`, for what that does not have: softmax, mask and
    product with the values are left to the caller. After Bahdanau, Cho and Bengio 2015 (arXiv:1409.0473).
    Shapes: B batch, H heads (or none), Tq / Tk query / key length, D score width.

    Args:
        query: (B, Tq, D) or (B, H, Tq, D), already projected; float32, float64, float16 or bfloat16. Inner
            arithmetic is at least float32. Any strides; expanded (stride 0) inputs are not copied. Batch and heads
            of query and key may be 1 where the other has more.
        key: (B, Tk, D) or (B, H, Tk, D), already projected.
        weight: (D,) or (H, D); of the dtype of the others, or float32 beside half-precision ones, unrounded.
        scale: factor of the score. Default: 1.0.
        softcap: C > 0 caps the scaled score to C * tanh(score / C). Default: None.
        activation, negative_slope: see :func:`fusedattn.additive_attention`.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"`` (plain PyTorch).

    Returns:
        scores (B, [H,] Tq, Tk), in the dtype of query. Backward does not read them: they may be written in place,
        as by ``scores.masked_fill_(...)``. It computes the gradients that are asked for alone.

    Every key is seen here: one that is masked afterwards must not hold NaN, whose gradient would be NaN times 0.

    Under autocast the inputs are cast to its dtype, except float64 ones. Second derivatives and forward-mode ones
    are computed through the reference formula, which builds the (B, H, Tq, Tk, D) tensor.

    Raises:
        TypeError: query, key or weight is not a Tensor.
        ValueError: an input with the wrong shape, dtype, device or value.
        UnsupportedError: no backend, or not the one asked for, can run these inputs.
    """
    _scores.require_tensors(OP, query=query, key=key, weight=weight)
    device = query.device
    if autocast_enabled(device):
        query, key, weight = autocast(query), autocast(key), autocast(weight)
        with torch.autocast(device.type, enabled=False):  # the reference is to compute in the dtype of its inputs
            return additive_scores(
                query,
                key,
                weight,
                scale=scale,
                softcap=softcap,
                activation=activation,
                negative_slope=negative_slope,
                backend=backend,
            )
    query, key, weight, _ = _scores.broadcast(OP, query, key, weight)
    _scores.check_numbers(OP, scale, softcap, activation, negative_slope)
    backend = choose(
        OP,
        backend,
        device,
        query.dtype,
        lambda: f"query {tuple(query.shape)}, key {tuple(key.shape)}",
        _UNABLE,
    )
    options = Options(*_scores.numbers(scale, softcap, activation, negative_slope))
    return SCORES(backend, (query, key, weight), options)
