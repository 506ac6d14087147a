"""attention_pool in Triton: scores of instances and gradients. Softmax and products with values are PyTorch's.

Forward: a program scores BLOCK_T instances for one head, D in steps, so hidden and gate are read once for each
head, which are few. Backward: a program has BLOCK_D channels of a piece of a bag, walks over its instances, writes
their gradients of hidden and gate and keeps its part of weight's in registers; ``torch.sum`` adds the parts. Other
heads' gradients of weight are programs of their own, which write nothing else. No atomics are used: results are
bitwise reproducible. Instances past the length are not read.

Costs. Bound by memory for few heads: forward reads hidden and gate, backward reads both and writes both gradients;
tanh and the logistic function take some 40 instructions an element.

Symbols: as in ``fusedattn/ops/attention_pool.py``, definition and reference. Tests: ``make gates``,
``tests/test_attention_pool.py``, ``tests/test_ptx_kernels.py``.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedattn._dtypes import accumulation_dtype
from fusedattn.triton import film_problem
from fusedattn.triton._common import (
    Kernel,
    asked_for,
    distinct,
    launch,
    load_wide,
    on_device_of,
    recorded,
    register,
    require,
)
from fusedattn.triton.film_problem import SIGMOID, TANH, activate, aligned, alignment, power_of_2

# Kernels. They divide in 32 bits: a division of 64 is a call, around which registers spill.


@triton.jit
def _length(LENGTHS, b, T):
    """How many instances of bag b count."""
    return T if LENGTHS is None else tl.minimum(tl.load(LENGTHS + b).to(tl.int32), T)


UNSPECIALISED = ["T", "K", "bags", "pieces", "steps"]


@triton.jit(do_not_specialize=UNSPECIALISED)
def attention_pool_fwd_kernel(
    HIDDEN, GATE, WEIGHT, LENGTHS, SCORES,
    T, D, K, bags,  # bags of a group, which share a weight
    ALIGN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    D = aligned(D, ALIGN)
    tiles = tl.cdiv(T, BLOCK_T)
    program = tl.program_id(0)
    k = (program % K).to(tl.int64)
    bag = program // K // tiles
    b = bag.to(tl.int64)
    t = (program // K % tiles) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    seen = t < _length(LENGTHS, b, T)
    row = (b * T + t) * D  # [BLOCK_T]
    ARITHMETIC: tl.constexpr = tl.float64 if HIDDEN.dtype.element_ty == tl.float64 else tl.float32
    score = tl.zeros((BLOCK_T, BLOCK_D), ARITHMETIC)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)  # [BLOCK_D]
        mask = seen[:, None] & (d < D)[None, :]  # [BLOCK_T, BLOCK_D]
        at = row[:, None] + d[None, :]
        f = activate(load_wide(HIDDEN + at, mask), TANH)
        if GATE is not None:
            f *= activate(load_wide(GATE + at, mask), SIGMOID)
        score += f * load_wide(WEIGHT + ((bag // bags).to(tl.int64) * K + k) * D + d, d < D)[None, :]
    out = tl.where(seen, tl.sum(score, 1), float("-inf"))
    tl.store(SCORES + (b * K + k) * T + t, out, mask=t < T)


@triton.jit(do_not_specialize=UNSPECIALISED)
def attention_pool_bwd_kernel(
    DSCORES, HIDDEN, GATE, WEIGHT, LENGTHS, DHIDDEN, DGATE, DWEIGHT,  # DWEIGHT (B, pieces, K, D)
    T, D, K, bags, pieces, steps,  # a program walks over a piece, steps tiles of instances
    ALIGN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    D = aligned(D, ALIGN)
    tiles_d = tl.cdiv(D, BLOCK_D)
    program = tl.program_id(0)
    own = (program % K).to(tl.int64)  # head of which this is the gradient of weight
    part = program // K // tiles_d  # counts b, then pieces
    bag = part // pieces
    b = bag.to(tl.int64)
    d = program // K % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    length = _length(LENGTHS, b, T)
    weight = WEIGHT + (bag // bags).to(tl.int64) * K * D + d
    dscores = DSCORES + b * K * T
    ARITHMETIC: tl.constexpr = tl.float64 if HIDDEN.dtype.element_ty == tl.float64 else tl.float32
    dweight = tl.zeros((BLOCK_T, BLOCK_D), ARITHMETIC)
    for step in range(steps):
        t = (part % pieces * steps + step) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
        mask = (t < length)[:, None] & (d < D)[None, :]  # [BLOCK_T, BLOCK_D]
        at = ((b * T + t) * D)[:, None] + d[None, :]
        h = activate(load_wide(HIDDEN + at, mask), TANH)
        f = h
        if GATE is not None:
            s = activate(load_wide(GATE + at, mask), SIGMOID)
            f = h * s
        dweight += load_wide(dscores + own * T + t, t < length)[:, None] * f
        if own == 0:
            df = tl.zeros((BLOCK_T, BLOCK_D), ARITHMETIC)
            of_head, weight_of_head = dscores + t, weight
            for _ in range(K):
                df += load_wide(of_head, t < length)[:, None] * load_wide(weight_of_head, d < D)[None, :]
                of_head += T
                weight_of_head += D
            within = (t < T)[:, None] & (d < D)[None, :]
            if GATE is None:
                tl.store(DHIDDEN + at, df * (1.0 - h * h), mask=within)
            else:
                tl.store(DHIDDEN + at, df * s * (1.0 - h * h), mask=within)
                tl.store(DGATE + at, df * f * (1.0 - s), mask=within)
    tl.store(DWEIGHT + (part.to(tl.int64) * K + own) * D + d, tl.sum(dweight, 0), mask=d < D)


# Launchers


def _check(hidden, gate, value, weight, lengths) -> None:
    """Raises where kernels would read what is not there."""
    op, (B, T, D) = "attention_pool", hidden.shape
    if weight.dim() != 3 or weight.shape[0] == 0 or B % weight.shape[0]:
        raise RuntimeError(f"{op}: weight: expected shape (groups of {B}, K, {D}), got {tuple(weight.shape)}")
    wide = accumulation_dtype(hidden.dtype)
    dtype = wide if weight.dtype == wide else hidden.dtype
    require(op, "weight", weight, (*weight.shape[:2], D), dtype, hidden.device)
    if gate is not None:
        require(op, "gate", gate, hidden.shape, hidden.dtype, hidden.device)
    if value is not None:
        require(op, "value", value, (B, T, value.shape[-1]), hidden.dtype, hidden.device)
    if lengths is not None:
        require(op, "lengths", lengths, (B,), torch.int64, hidden.device)


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _seen(t: Tensor | None, lengths: Tensor | None) -> Tensor | None:
    """Rows of instances, zero past the length, whatever they hold."""
    if t is None or lengths is None:
        return t
    return torch.where((torch.arange(t.shape[1], device=t.device) < lengths[:, None])[..., None], t, 0.0)


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """Those of a bag of nothing, whose scores are all -inf, are 0."""
    return torch.exp(scores - lse.clamp_min(torch.finfo(lse.dtype).min).unsqueeze(-1))


# Elements of a tile, its longest row, and its warps. Backward keeps three tiles in registers, forward two. Larger
# tiles of these sizes spilled a number or two somewhere.
_FORWARD, _BACKWARD = (1024, 128, 4), (512, 16, 4)


def _blocks(D: int, dtype: torch.dtype, tile: tuple[int, int, int]) -> dict[str, int]:
    elements, longest, warps = tile
    along = power_of_2(D, longest)
    rows = elements // along // (2 if dtype == torch.float64 else 1)
    return {"ALIGN": alignment(D), "BLOCK_T": rows, "BLOCK_D": along, "num_warps": warps}


def forward(hidden, gate, value, weight, lengths):
    """attention_pool_fwd, see csrc/library.cpp."""
    _check(hidden, gate, value, weight, lengths)
    (B, T, D), (G, K, _) = hidden.shape, weight.shape
    wide = accumulation_dtype(hidden.dtype)
    scores = hidden.new_empty((B, K, T), dtype=wide)
    blocks = _blocks(D, hidden.dtype, _FORWARD)
    if scores.numel():
        pointers = *_dense(hidden, gate, weight, lengths), scores
        programs = B * triton.cdiv(T, blocks["BLOCK_T"]) * K
        with on_device_of(hidden):
            launch(attention_pool_fwd_kernel, (programs,), *pointers, T, D, K, B // G, **blocks)
    lse = scores.logsumexp(-1)
    if value is None:
        return hidden.new_empty(0), lse, scores
    return _weights(scores, lse).to(value.dtype) @ _seen(value, lengths), lse, scores


def backward(
    grad_context, grad_lse, grad_scores, hidden, gate, value, weight, lengths, context, lse, scores, output_mask
):
    """attention_pool_bwd, see csrc/library.cpp."""
    _check(hidden, gate, value, weight, lengths)
    (B, T, D), (G, K, _) = hidden.shape, weight.shape
    of_hidden, of_gate, of_value, of_weight = asked_for(output_mask, 4)
    dscores, dvalue = torch.zeros_like(scores) if grad_scores is None else grad_scores.to(scores.dtype), None
    if grad_context is not None or grad_lse is not None:
        weights, relative = _weights(scores, lse), torch.zeros_like(lse)
        dweights = torch.zeros_like(weights)
        if grad_context is not None:
            dweights = (grad_context @ _seen(value, lengths).transpose(1, 2)).to(weights.dtype)
            relative = (grad_context.to(lse.dtype) * context.to(lse.dtype)).sum(-1)
            if of_value:
                dvalue = weights.to(value.dtype).transpose(1, 2) @ grad_context
        if grad_lse is not None:
            relative = relative - grad_lse
        dscores = dscores + weights * (dweights - relative.unsqueeze(-1))
    dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    dgate = None if gate is None else torch.empty_like(dhidden)
    blocks = _blocks(D, hidden.dtype, _BACKWARD)
    tiles_t, tiles_d = triton.cdiv(T, blocks["BLOCK_T"]), triton.cdiv(D, blocks["BLOCK_D"])
    most = max(1, film_problem.PROGRAMS // max(B * tiles_d, 1))
    steps = triton.cdiv(tiles_t, most)
    pieces = triton.cdiv(tiles_t, max(steps, 1))
    parts = hidden.new_empty((G, B // G * pieces, K, D), dtype=scores.dtype)
    if parts.numel():
        pointers = *_dense(dscores, hidden, gate, weight, lengths), dhidden, dgate, parts
        sizes = T, D, K, B // G, pieces, steps
        grid = (B * pieces * tiles_d * K,)
        with on_device_of(hidden):
            launch(attention_pool_bwd_kernel, grid, *pointers, *sizes, **blocks)
    if of_value and value is not None and dvalue is None:
        dvalue = torch.zeros_like(value, memory_format=torch.contiguous_format)
    dweight = parts.sum(1).to(weight.dtype) if of_weight else None
    found = (dhidden if of_hidden else None, dgate if of_gate else None, dvalue, dweight)
    return tuple(hidden.new_empty(0) if t is None else t for t in found)


_INPUTS = "Tensor hidden, Tensor? gate, Tensor? value, Tensor weight, Tensor? lengths"
register(f"attention_pool_fwd_triton({_INPUTS}) -> (Tensor context, Tensor lse, Tensor scores)", forward)
register(
    f"attention_pool_bwd_triton(Tensor? grad_context, Tensor? grad_lse, Tensor? grad_scores, {_INPUTS}, "
    "Tensor context, Tensor lse, Tensor scores, int output_mask) "
    "-> (Tensor grad_hidden, Tensor grad_gate, Tensor grad_value, Tensor grad_weight)",
    backward,
)


def kernels(dtypes=(torch.float32, torch.bfloat16), target=("cuda", 90)) -> list[Kernel]:
    """Every kernel as typical calls launch it: a slide's patches, gated and not, and ragged bags with heads."""

    def call(dtype, T, D, K, gated, ragged):
        hidden = torch.empty((4, T, D), dtype=dtype, device="meta")
        given = (
            hidden,
            torch.empty_like(hidden) if gated else None,
            None,
            hidden.new_empty((1, K, D)),
            hidden.new_empty(4, dtype=torch.int64) if ragged else None,
        )
        outputs = forward(*given)
        backward(None, None, outputs[2], *given, *outputs, 0b1111)

    cases = (10_000, 256, 1, True, False), (10_000, 128, 1, False, False), (300, 100, 3, True, True)
    calls = (partial(call, dtype, *case) for dtype in dtypes for case in cases)
    return distinct(kernel for of in calls for kernel in recorded(of, target))
