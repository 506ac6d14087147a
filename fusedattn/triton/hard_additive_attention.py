"""Hard attention's pass over rows of scores in Triton.

Forward: a program has BLOCK_Q queries of one head and walks once over their keys, BLOCK_K at a time, with the
running maximum of the softmax, its sums of exp(e - max) and exp(e - max) (e - max), and the largest perturbed
score. Backward writes each gradient from its score. Forward is bound by the arithmetic of random words and
logarithms, some 80 instructions a pair, where its score of 256 channels takes 800; backward by memory.

Symbols: as in ``fusedattn/ops/hard_additive_attention.py``, definition and reference. Tests: ``make gates``,
``tests/test_hard_additive_attention.py``, ``tests/test_ptx_kernels.py``.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from fusedattn._options import HardAdditiveAttentionOptions as Options
from fusedattn._options import schema
from fusedattn.triton._common import (
    Kernel,
    distinct,
    launch,
    on_device_of,
    recorded,
    register,
    require,
)
from fusedattn.triton._philox import random_word

OP = "hard_additive_attention"
BLOCK_Q, BLOCK_K = 4, 32  # wider ones spill on AMD in float64

# Kernels

UNSPECIALISED = ["H", "Tq", "Tk", "mask_b", "mask_h", "mask_q", "mask_k", "of_seed"]
UNSPECIALISED_PLACE = ["first_head", "heads", "first_query", "first_key"]


@triton.jit
def _rows(H, Tq, BLOCK_Q: tl.constexpr):
    """(b, h, i [BLOCK_Q, 1]) of this program."""
    blocks = tl.cdiv(Tq, BLOCK_Q)
    program = tl.program_id(0)
    n = program // blocks
    return n // H, n % H, program % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)[:, None]


@triton.jit
def _visible_scores(scores_row, mask_row, within, j, mask_k):
    """Scores [BLOCK_Q, BLOCK_K], -inf where hidden."""
    if mask_row is not None:
        within &= tl.load(mask_row + j.to(tl.int64) * mask_k, mask=within, other=0) != 0
    return tl.load(scores_row + j, mask=within, other=float("-inf"))


@triton.jit(do_not_specialize=UNSPECIALISED + UNSPECIALISED_PLACE)
def hard_additive_attention_fwd_kernel(
    SCORES, MASK, SEED, LOG_PROB, ENTROPY, LSE, INDEX, BEST,
    H, Tq, Tk, mask_b, mask_h, mask_q, mask_k, of_seed,  # heads of a seed
    first_head, heads, first_query, first_key,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    b, h, i = _rows(H, Tq, BLOCK_Q)
    dtype: tl.constexpr = SCORES.dtype.element_ty
    infinity: tl.constexpr = float("inf")
    top = tl.full((BLOCK_Q,), -infinity, dtype)
    total = tl.zeros((BLOCK_Q,), dtype)
    weighted = tl.zeros((BLOCK_Q,), dtype)
    best = tl.full((BLOCK_Q,), -infinity, dtype)
    chosen = tl.zeros((BLOCK_Q,), dtype)  # the score of the best
    index = tl.full((BLOCK_Q,), -1, tl.int64)
    row = (b.to(tl.int64) * H + h) * Tq + i  # [BLOCK_Q, 1]
    scores_row, in_q = SCORES + row * Tk, i < Tq
    mask_row = MASK
    if MASK is not None:
        mask_row += b.to(tl.int64) * mask_b + h.to(tl.int64) * mask_h + i.to(tl.int64) * mask_q
    if SEED is not None:
        head = first_head.to(tl.int64) + b.to(tl.int64) * heads + h % of_seed
    for start in range(0, Tk, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)[None, :]
        score = _visible_scores(scores_row, mask_row, in_q & (j < Tk), j, mask_k)
        # Relative to 0 before anything is seen: no infinity less itself.
        before, top = top, tl.maximum(top, tl.max(score, 1))
        shift = tl.where(top == -infinity, 0.0, top)
        relative = score - shift[:, None]  # [BLOCK_Q, BLOCK_K]
        p = tl.exp(relative)
        fell = tl.where(before == -infinity, 0.0, before - shift)
        scaled = tl.exp(fell)
        weighted = scaled * (weighted + total * fell) + tl.sum(tl.where(p > 0, p * relative, p), 1)
        total = total * scaled + tl.sum(p, 1)
        perturbed = score
        if SEED is not None:
            # Once a block: on AMD its words are scalar registers, of which logarithms take most in float64.
            seed = tl.load(SEED + h // of_seed, volatile=True)
            word = random_word(seed, head, first_query + i, first_key + j)
            uniform = tl.minimum((word.to(dtype) + 0.5) * 0.00000000023283064365386963, 0.999999940395355224609375)
            perturbed = score - tl.log(-libdevice.log1p(-uniform))
        of_block, where = tl.max(perturbed, 1, return_indices=True, return_indices_tie_break_left=True)
        of_chosen = tl.sum(tl.where(tl.arange(0, BLOCK_K)[None, :] == where[:, None], score, 0.0), 1)
        more = of_block > best
        best = tl.where(more, of_block, best)
        chosen = tl.where(more, of_chosen, chosen)
        index = tl.where(more, start + where, index)
    empty = (top == -infinity) & (total == 0)  # not if NaN, of which no maximum knows
    index = tl.where((index < 0) & ~empty, 0, index)
    log_total = tl.log(tl.where(empty, 1.0, total))
    lse = top + log_total
    row, within = tl.reshape(row, (BLOCK_Q,)), tl.reshape(in_q, (BLOCK_Q,))
    tl.store(LOG_PROB + row, tl.where(empty, 0.0, chosen - lse), mask=within)
    tl.store(ENTROPY + row, tl.where(empty, 0.0, log_total - weighted / total), mask=within)
    tl.store(LSE + row, lse, mask=within)
    tl.store(INDEX + row, index, mask=within)
    tl.store(BEST + row, best, mask=within)


@triton.jit(do_not_specialize=UNSPECIALISED)
def hard_additive_attention_bwd_kernel(
    DLOG_PROB, DENTROPY, DLSE, SCORES, MASK, ENTROPY, LSE, INDEX, DSCORES,
    H, Tq, Tk, mask_b, mask_h, mask_q, mask_k,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    b, h, i = _rows(H, Tq, BLOCK_Q)
    j = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    row, within = (b.to(tl.int64) * H + h) * Tq + i, i < Tq  # [BLOCK_Q, 1]
    mask_row = MASK
    if MASK is not None:
        mask_row += b.to(tl.int64) * mask_b + h.to(tl.int64) * mask_h + i.to(tl.int64) * mask_q
    score = _visible_scores(SCORES + row * Tk, mask_row, within & (j < Tk), j, mask_k)
    index = tl.load(INDEX + row, mask=within, other=-1)
    log_p = score - tl.load(LSE + row, mask=within, other=0.0)
    of_all = tl.zeros_like(log_p)
    of_chosen = tl.zeros_like(log_p)
    if DLSE is not None:
        of_all += tl.load(DLSE + row, mask=within, other=0.0)
    if DENTROPY is not None:
        entropy = tl.load(ENTROPY + row, mask=within, other=0.0)
        finite = tl.where(score == -float("inf"), 0.0, log_p)
        of_all -= tl.load(DENTROPY + row, mask=within, other=0.0) * (finite + entropy)
    if DLOG_PROB is not None:
        dlog_prob = tl.load(DLOG_PROB + row, mask=within, other=0.0)
        of_all -= dlog_prob
        of_chosen = tl.where(j == index, dlog_prob, of_chosen)
    grad = tl.where(index < 0, 0.0, tl.exp(log_p) * of_all + of_chosen)
    tl.store(DSCORES + row * Tk + j, grad, mask=within & (j < Tk))


# Launchers


def _check(scores: Tensor, mask: Tensor | None, seed: Tensor | None) -> None:
    device = scores.device
    if scores.dim() not in (3, 4) or scores.dtype not in (torch.float32, torch.float64):
        raise RuntimeError(f"{OP}: scores: expected float32 or float64 (B, [H,] Tq, Tk), got {scores.dtype} "
                           f"{tuple(scores.shape)}")  # fmt: skip
    if mask is not None:
        require(OP, "mask", mask, scores.shape, torch.bool, device)
    if seed is not None:
        H = scores.shape[1] if scores.dim() == 4 else 1
        if seed.dim() != 1 or not seed.shape[0] or H % seed.shape[0]:
            raise RuntimeError(f"{OP}: seed: expected (S,), S dividing the {H} heads, got {tuple(seed.shape)}")
        require(OP, "seed", seed, seed.shape, torch.int64, device)


def _sizes(scores: Tensor, mask: Tensor | None) -> tuple[int, ...]:
    """H, Tq, Tk and the strides of the mask."""
    *lead, Tq, Tk = scores.shape
    strides = (0, 0, 0, 0) if mask is None else mask.stride()
    return (
        lead[1] if len(lead) == 2 else 1,
        Tq,
        Tk,
        *(strides if len(strides) == 4 else (strides[0], 0, *strides[1:])),
    )


def _programs(scores: Tensor) -> int:
    *lead, Tq, _ = scores.shape
    return torch.Size(lead).numel() * triton.cdiv(Tq, BLOCK_Q)


def forward(scores, mask, seed, *numbers):
    """hard_additive_attention_fwd, see csrc/library.cpp."""
    _check(scores, mask, seed)
    place, rows = Options(*numbers), scores.shape[:-1]
    log_prob, entropy, lse, best = (scores.new_empty(rows) for _ in range(4))
    index = scores.new_empty(rows, dtype=torch.int64)
    outputs = log_prob, entropy, lse, index, best
    if index.numel():
        sizes = _sizes(scores, mask)
        of_seed = 1 if seed is None else sizes[0] // seed.shape[0]
        place = place._replace(heads=place.heads or of_seed)
        with on_device_of(scores):
            launch(
                hard_additive_attention_fwd_kernel, (_programs(scores),), scores.contiguous(), mask,
                None if seed is None else seed.contiguous(), *outputs, *sizes, of_seed, *place,
                BLOCK_Q=BLOCK_Q, BLOCK_K=BLOCK_K,
            )  # fmt: skip
    return outputs


def backward(grad_log_prob, grad_entropy, grad_lse, scores, mask, seed, *rest):
    """hard_additive_attention_bwd, see csrc/library.cpp."""
    *_, entropy, lse, index, output_mask = rest
    _check(scores, mask, seed)
    if not output_mask & 1:
        return scores.new_empty(0)
    grads = [
        None if t is None else t.to(scores.dtype).contiguous() for t in (grad_log_prob, grad_entropy, grad_lse)
    ]
    dscores = torch.empty_like(scores, memory_format=torch.contiguous_format)
    if dscores.numel():
        grid = _programs(scores), triton.cdiv(scores.shape[-1], BLOCK_K)
        kept = (t.contiguous() for t in (entropy, lse, index))
        with on_device_of(scores):
            launch(
                hard_additive_attention_bwd_kernel, grid, *grads, scores.contiguous(), mask, *kept, dscores,
                *_sizes(scores, mask), BLOCK_Q=BLOCK_Q, BLOCK_K=BLOCK_K,
            )  # fmt: skip
    return dscores


_INPUTS = f"Tensor scores, Tensor? mask, Tensor? seed, {schema(Options)}"
register(
    f"{OP}_fwd_triton({_INPUTS}) -> (Tensor log_prob, Tensor entropy, Tensor lse, Tensor index, Tensor best)",
    forward,
)
register(
    f"{OP}_bwd_triton(Tensor? grad_log_prob, Tensor? grad_entropy, Tensor? grad_lse, {_INPUTS}, Tensor entropy, "
    "Tensor lse, Tensor index, int output_mask) -> Tensor grad_scores",
    backward,
)


def kernels(dtypes=(torch.float32, torch.float64), target=("cuda", 90)) -> list[Kernel]:
    """Every kernel as typical calls launch it: with and without mask, sampled and the most likely key."""

    def call(dtype, masked, sampled):
        scores = torch.empty((4, 512, 512), dtype=dtype, device="meta")
        mask = torch.empty_like(scores, dtype=torch.bool) if masked else None
        seed = scores.new_empty(1, dtype=torch.int64) if sampled else None
        given = scores, mask, seed, 0, 0, 0, 0
        log_prob, entropy, lse, index, _ = forward(*given)
        backward(log_prob, entropy, None, *given, entropy, lse, index, 1)

    calls = (
        partial(call, dtype, *case) for dtype in dtypes for case in ((True, True), (False, True), (False, False))
    )
    return distinct(kernel for of in calls for kernel in recorded(of, target))
