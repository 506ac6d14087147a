"""Layer and rms norm with FiLM in Triton: groups are rows of C neighbouring channels.

A tile is BLOCK_R rows x BLOCK_C channels. Up to the tile that the table has, a row is whole in registers and read
once; h = pre_residual + gate x is formed in the same pass. Longer rows go in blocks of BLOCK_C channels, twice:
the second time they come from L2, mostly. Statistics are those of h minus a number near its mean (the rounded mean
itself; of a long row that of its first block), so they are exact also where the mean is far beyond the deviation.

A parameter is held, read once by a program, whose rows lie in one batch element; or it has a value for each
element, or for each row, and is read with them. Pairs are added in registers.

Backward: a program keeps the sums of what it holds in registers over the rows of its piece, or, of long rows, in
its own part of memory; ``torch.sum`` adds the parts of all programs. How work is cut depends on shapes alone and
no atomics are used: results are bitwise reproducible.

Symbols: B batch, T positions, C channels; u, dz, du, dn as in ``fusedattn/ops/norm_film.py``. Tests:
``tests/test_triton_norm_film.py``.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedattn._dtypes import accumulation_dtype
from fusedattn._options import NormFilmOptions as Options
from fusedattn.triton import _tiles
from fusedattn.triton._common import launch, load_wide, number, on_device_of
from fusedattn.triton.film_problem import aligned, plus, power_of_2
from fusedattn.triton.norm_film_problem import (
    NAMES,
    SUMS,
    Layout,
    conditioned,
    cut,
    formed,
    grad_normalised,
    gradient_of,
    inverse_root,
    read_or_zero,
    read_statistics,
    scaled,
    sum_where,
)

LEAST_STEPS = 16  # tiles of a piece, so that parts of sums stay small beside x

# How a parameter lies: held for all rows of a program, with a value for each element, or for each row. KINDS has
# two bits for each of NAMES.
HELD = tl.constexpr(0)
EACH = tl.constexpr(1)
ROW = tl.constexpr(2)
# Which of them are read.
PASSING = tl.constexpr(1)
ANY = tl.constexpr(2)


# Kernels


@triton.jit
def _parameter(P, steps, b, t, c, within_t, within_c, KIND: tl.constexpr, ALIGN: tl.constexpr, WHEN: tl.constexpr):
    """[1 or BLOCK_R, BLOCK_C or 1] values; None where the parameter is absent, or read at another time."""
    v = None
    if P is not None and (WHEN == ANY or (KIND != HELD) == (WHEN == PASSING)):
        if KIND == HELD:
            v = load_wide(P + b * aligned(steps[0], ALIGN) + c, within_c)[None, :]
        elif KIND == EACH:
            by_row = P + b * aligned(steps[0], ALIGN) + t * aligned(steps[1], ALIGN)
            v = load_wide(by_row[:, None] + c[None, :], within_t[:, None] & within_c[None, :])
        else:
            v = load_wide(P + b * steps[0] + t * steps[1], within_t)[:, None]
    return v


@triton.jit
def _pair(
    P, ADDED, steps, added_steps, b, t, c, within_t, within_c,
    KIND: tl.constexpr, ADDED_KIND: tl.constexpr, ALIGN: tl.constexpr, WHEN: tl.constexpr,
):  # fmt: skip
    return plus(
        _parameter(P, steps, b, t, c, within_t, within_c, KIND, ALIGN, WHEN),
        _parameter(ADDED, added_steps, b, t, c, within_t, within_c, ADDED_KIND, ALIGN, WHEN),
    )


@triton.jit
def _store_each(D, at, mask, terms, KIND: tl.constexpr):
    """A gradient with a value for each element."""
    if D is not None and KIND != HELD:
        tl.store(D + at, terms, mask=mask)


# Integers that change from call to call are not specialised, which would compile anew for 1 and multiples of 16.
UNSPECIALISED = [*Options._fields, "T", "C", "pieces", "steps", *(f"{name}_{d}" for name in NAMES for d in "bt")]


@triton.jit(do_not_specialize=UNSPECIALISED)
def norm_film_fwd_kernel_rows(
    X, PRE_RESIDUAL, GAMMA, GAMMA_ADDED, BETA, BETA_ADDED, WEIGHT, BIAS, PRE_GATE, PRE_GATE_ADDED,
    RESIDUAL, H, Y, MEAN, VAR, T, C,
    gamma_b, gamma_t, gamma_added_b, gamma_added_t, beta_b, beta_t, beta_added_b, beta_added_t,  # steps
    weight_b, weight_t, bias_b, bias_t, pre_gate_b, pre_gate_t, pre_gate_added_b, pre_gate_added_t,
    eps, gamma_offset, IS_RMS: tl.constexpr, ACTIVATION: tl.constexpr,
    KINDS: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C = aligned(C, ALIGN)
    program = tl.program_id(0)
    tiles = tl.cdiv(T, BLOCK_R)
    b = (program // tiles).to(tl.int64)
    t = (program % tiles).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    c = tl.arange(0, BLOCK_C)  # [BLOCK_C]
    within_t, within_c = t < T, c < C
    mask = within_t[:, None] & within_c[None, :]  # [BLOCK_R, BLOCK_C]
    row = b * T + t
    at = row[:, None] * C + c[None, :]
    gate = _pair(
        PRE_GATE, PRE_GATE_ADDED, (pre_gate_b, pre_gate_t), (pre_gate_added_b, pre_gate_added_t),
        b, t, c, within_t, within_c, KINDS >> 12 & 3, KINDS >> 14 & 3, ALIGN, ANY,
    )  # fmt: skip
    h = formed(X, PRE_RESIDUAL, gate, at, mask)
    if H is not None:
        tl.store(H + at, h, mask=mask)
    if IS_RMS:
        centred = h
        var = sum_where(mask, h * h) / C
        mean = tl.zeros_like(var).to(tl.float64)
    else:
        near = sum_where(mask, h) / C
        apart = h - near[:, None]
        off = sum_where(mask, apart) / C
        var = sum_where(mask, apart * apart) / C - off * off
        var = tl.where(var < 0.0, 0.0, var)  # NaN stays
        mean = near.to(tl.float64) + off.to(tl.float64)
        centred = apart - off[:, None]
    tl.store(MEAN + row, mean, mask=within_t)
    tl.store(VAR + row, var, mask=within_t)
    n = centred * inverse_root(var + number(eps, var.dtype))[:, None]
    gamma = _pair(
        GAMMA, GAMMA_ADDED, (gamma_b, gamma_t), (gamma_added_b, gamma_added_t),
        b, t, c, within_t, within_c, KINDS & 3, KINDS >> 2 & 3, ALIGN, ANY,
    )  # fmt: skip
    beta = _pair(
        BETA, BETA_ADDED, (beta_b, beta_t), (beta_added_b, beta_added_t),
        b, t, c, within_t, within_c, KINDS >> 4 & 3, KINDS >> 6 & 3, ALIGN, ANY,
    )  # fmt: skip
    weight = _parameter(WEIGHT, (weight_b, weight_t), b, t, c, within_t, within_c, KINDS >> 8 & 3, ALIGN, ANY)
    bias = _parameter(BIAS, (bias_b, bias_t), b, t, c, within_t, within_c, KINDS >> 10 & 3, ALIGN, ANY)
    y = conditioned(n, gamma, beta, weight, bias, gamma_offset, ACTIVATION)
    if RESIDUAL is not None:
        y += load_wide(RESIDUAL + at, mask)
    tl.store(Y + at, y, mask=mask)


@triton.jit(do_not_specialize=UNSPECIALISED)
def norm_film_fwd_kernel_long_rows(
    X, PRE_RESIDUAL, GAMMA, GAMMA_ADDED, BETA, BETA_ADDED, WEIGHT, BIAS, PRE_GATE, PRE_GATE_ADDED,
    RESIDUAL, H, Y, MEAN, VAR, T, C,
    gamma_b, gamma_t, gamma_added_b, gamma_added_t, beta_b, beta_t, beta_added_b, beta_added_t,
    weight_b, weight_t, bias_b, bias_t, pre_gate_b, pre_gate_t, pre_gate_added_b, pre_gate_added_t,
    eps, gamma_offset, IS_RMS: tl.constexpr, ACTIVATION: tl.constexpr,
    KINDS: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C = aligned(C, ALIGN)
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, BLOCK_R)  # [BLOCK_R], of one row
    b = tl.program_id(0).to(tl.int64) // T
    t = row - b * T
    within_t = t >= 0
    lanes = tl.arange(0, BLOCK_C)  # [BLOCK_C]
    ARITHMETIC: tl.constexpr = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    near = tl.zeros((BLOCK_R,), ARITHMETIC)
    total = tl.zeros((BLOCK_R, BLOCK_C), ARITHMETIC)
    squares = tl.zeros((BLOCK_R, BLOCK_C), ARITHMETIC)
    for start in range(0, C, BLOCK_C):
        c = start + lanes
        within_c = c < C
        mask = within_t[:, None] & within_c[None, :]  # [BLOCK_R, BLOCK_C]
        at = row[:, None] * C + c[None, :]
        gate = _pair(
            PRE_GATE, PRE_GATE_ADDED, (pre_gate_b, pre_gate_t), (pre_gate_added_b, pre_gate_added_t),
            b, t, c, within_t, within_c, KINDS >> 12 & 3, KINDS >> 14 & 3, ALIGN, ANY,
        )  # fmt: skip
        h = formed(X, PRE_RESIDUAL, gate, at, mask)
        if H is not None:
            tl.store(H + at, h, mask=mask)
        if not IS_RMS:
            if start == 0:
                near = sum_where(mask, h) / BLOCK_C
            h = tl.where(mask, h - near[:, None], 0.0)
        total += h
        squares += h * h
    off = tl.zeros((BLOCK_R,), ARITHMETIC)
    if not IS_RMS:
        off = tl.sum(total, 1) / C
    var = tl.sum(squares, 1) / C - off * off
    var = tl.where(var < 0.0, 0.0, var)  # NaN stays
    tl.store(MEAN + row, near.to(tl.float64) + off.to(tl.float64), mask=within_t)
    tl.store(VAR + row, var, mask=within_t)
    rstd = inverse_root(var + number(eps, var.dtype))[:, None]
    tl.debug_barrier()  # another thread may have written what one reads of h
    for start in range(0, C, BLOCK_C):
        c = start + lanes
        within_c = c < C
        mask = within_t[:, None] & within_c[None, :]
        at = row[:, None] * C + c[None, :]
        h = load_wide((X if H is None else H) + at, mask)
        n = (h - near[:, None] - off[:, None]) * rstd
        gamma = _pair(
            GAMMA, GAMMA_ADDED, (gamma_b, gamma_t), (gamma_added_b, gamma_added_t),
            b, t, c, within_t, within_c, KINDS & 3, KINDS >> 2 & 3, ALIGN, ANY,
        )  # fmt: skip
        beta = _pair(
            BETA, BETA_ADDED, (beta_b, beta_t), (beta_added_b, beta_added_t),
            b, t, c, within_t, within_c, KINDS >> 4 & 3, KINDS >> 6 & 3, ALIGN, ANY,
        )  # fmt: skip
        weight = _parameter(WEIGHT, (weight_b, weight_t), b, t, c, within_t, within_c, KINDS >> 8 & 3, ALIGN, ANY)
        bias = _parameter(BIAS, (bias_b, bias_t), b, t, c, within_t, within_c, KINDS >> 10 & 3, ALIGN, ANY)
        y = conditioned(n, gamma, beta, weight, bias, gamma_offset, ACTIVATION)
        if RESIDUAL is not None:
            y += load_wide(RESIDUAL + at, mask)
        tl.store(Y + at, y, mask=mask)


@triton.jit
def _read_normalised(H, at, mask, near, off, rstd):
    """n, 0 where masked."""
    h = load_wide(H + at, mask)
    return tl.where(mask, (h - near[:, None] - off[:, None]) * rstd[:, None], 0.0)


@triton.jit(do_not_specialize=UNSPECIALISED)
def norm_film_bwd_kernel_rows(
    DY, DH, X, H, GAMMA, GAMMA_ADDED, BETA, BETA_ADDED, WEIGHT, BIAS, PRE_GATE, PRE_GATE_ADDED, MEAN, VAR,
    DX, DR, DGAMMA, DGAMMA_ADDED, DBETA, DBETA_ADDED, DWEIGHT, DBIAS, DPRE_GATE, DPRE_GATE_ADDED,
    SUM_GAMMA, SUM_BETA, SUM_WEIGHT, SUM_BIAS, SUM_PRE_GATE,  # (B, pieces, C), of what is held
    T, C, pieces, steps,  # a program walks a piece, steps tiles of a batch element
    gamma_b, gamma_t, gamma_added_b, gamma_added_t, beta_b, beta_t, beta_added_b, beta_added_t,
    weight_b, weight_t, bias_b, bias_t, pre_gate_b, pre_gate_t, pre_gate_added_b, pre_gate_added_t,
    eps, gamma_offset, IS_RMS: tl.constexpr, ACTIVATION: tl.constexpr,
    KINDS: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C = aligned(C, ALIGN)
    program = tl.program_id(0).to(tl.int64)
    b, piece = program // pieces, program % pieces
    r = tl.arange(0, BLOCK_R)  # [BLOCK_R]
    c = tl.arange(0, BLOCK_C)  # [BLOCK_C]
    within_c = c < C
    gamma_steps, gamma_added_steps = (gamma_b, gamma_t), (gamma_added_b, gamma_added_t)
    beta_steps, beta_added_steps = (beta_b, beta_t), (beta_added_b, beta_added_t)
    gate_steps, gate_added_steps = (pre_gate_b, pre_gate_t), (pre_gate_added_b, pre_gate_added_t)
    weight_steps, bias_steps = (weight_b, weight_t), (bias_b, bias_t)
    held_gamma = _pair(
        GAMMA, GAMMA_ADDED, gamma_steps, gamma_added_steps,
        b, r, c, r >= 0, within_c, KINDS & 3, KINDS >> 2 & 3, ALIGN, HELD,
    )  # fmt: skip
    held_beta = _pair(
        BETA, BETA_ADDED, beta_steps, beta_added_steps,
        b, r, c, r >= 0, within_c, KINDS >> 4 & 3, KINDS >> 6 & 3, ALIGN, HELD,
    )  # fmt: skip
    held_weight = _parameter(WEIGHT, weight_steps, b, r, c, r >= 0, within_c, KINDS >> 8 & 3, ALIGN, HELD)
    held_bias = _parameter(BIAS, bias_steps, b, r, c, r >= 0, within_c, KINDS >> 10 & 3, ALIGN, HELD)
    held_gate = _pair(
        PRE_GATE, PRE_GATE_ADDED, gate_steps, gate_added_steps,
        b, r, c, r >= 0, within_c, KINDS >> 12 & 3, KINDS >> 14 & 3, ALIGN, HELD,
    )  # fmt: skip
    ARITHMETIC: tl.constexpr = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    sum_gamma = tl.zeros((BLOCK_R, BLOCK_C), ARITHMETIC)
    sum_beta = tl.zeros((BLOCK_R, BLOCK_C), ARITHMETIC)
    sum_weight = tl.zeros((BLOCK_R, BLOCK_C), ARITHMETIC)
    sum_bias = tl.zeros((BLOCK_R, BLOCK_C), ARITHMETIC)
    sum_gate = tl.zeros((BLOCK_R, BLOCK_C), ARITHMETIC)
    for step in range(steps):
        t = (piece * steps + step) * BLOCK_R + r
        within_t = t < T
        mask = within_t[:, None] & within_c[None, :]  # [BLOCK_R, BLOCK_C]
        row = b * T + t
        at = row[:, None] * C + c[None, :]
        gamma = plus(held_gamma, _pair(
            GAMMA, GAMMA_ADDED, gamma_steps, gamma_added_steps,
            b, t, c, within_t, within_c, KINDS & 3, KINDS >> 2 & 3, ALIGN, PASSING,
        ))  # fmt: skip
        beta = plus(held_beta, _pair(
            BETA, BETA_ADDED, beta_steps, beta_added_steps,
            b, t, c, within_t, within_c, KINDS >> 4 & 3, KINDS >> 6 & 3, ALIGN, PASSING,
        ))  # fmt: skip
        weight = plus(held_weight, _parameter(
            WEIGHT, weight_steps, b, t, c, within_t, within_c, KINDS >> 8 & 3, ALIGN, PASSING,
        ))  # fmt: skip
        bias = plus(held_bias, _parameter(
            BIAS, bias_steps, b, t, c, within_t, within_c, KINDS >> 10 & 3, ALIGN, PASSING,
        ))  # fmt: skip
        near, off, rstd = read_statistics(MEAN, VAR, row, within_t, eps, ARITHMETIC)
        n = _read_normalised(H, at, mask, near, off, rstd)
        dy = read_or_zero(DY, at, mask, n)
        u, dz, du, dn = grad_normalised(dy, n, gamma, beta, weight, bias, gamma_offset, ACTIVATION)
        mean_dn_n = sum_where(mask, dn * n) / C
        dh = dn - n * mean_dn_n[:, None]
        if not IS_RMS:
            dh -= (sum_where(mask, dn) / C)[:, None]
        dh *= rstd[:, None]
        if DH is not None:
            dh += load_wide(DH + at, mask)
        _store_each(DGAMMA, at, mask, dz * u, KINDS & 3)
        _store_each(DGAMMA_ADDED, at, mask, dz * u, KINDS >> 2 & 3)
        _store_each(DBETA, at, mask, dz, KINDS >> 4 & 3)
        _store_each(DBETA_ADDED, at, mask, dz, KINDS >> 6 & 3)
        _store_each(DWEIGHT, at, mask, du * n, KINDS >> 8 & 3)
        _store_each(DBIAS, at, mask, du, KINDS >> 10 & 3)
        sum_gamma += dz * u
        sum_beta += dz
        sum_weight += du * n
        sum_bias += du
        if DR is not None:
            tl.store(DR + at, dh, mask=mask)
        if DX is not None:
            gate = plus(held_gate, _pair(
                PRE_GATE, PRE_GATE_ADDED, gate_steps, gate_added_steps,
                b, t, c, within_t, within_c, KINDS >> 12 & 3, KINDS >> 14 & 3, ALIGN, PASSING,
            ))  # fmt: skip
            tl.store(DX + at, scaled(dh, gate), mask=mask)
        if PRE_GATE is not None or PRE_GATE_ADDED is not None:
            dh_x = tl.where(mask, dh, 0.0) * load_wide(X + at, mask)
            _store_each(DPRE_GATE, at, mask, dh_x, KINDS >> 12 & 3)
            _store_each(DPRE_GATE_ADDED, at, mask, dh_x, KINDS >> 14 & 3)
            sum_gate += dh_x
    part = program * C + c
    if SUM_GAMMA is not None:
        tl.store(SUM_GAMMA + part, tl.sum(sum_gamma, 0), mask=within_c)
    if SUM_BETA is not None:
        tl.store(SUM_BETA + part, tl.sum(sum_beta, 0), mask=within_c)
    if SUM_WEIGHT is not None:
        tl.store(SUM_WEIGHT + part, tl.sum(sum_weight, 0), mask=within_c)
    if SUM_BIAS is not None:
        tl.store(SUM_BIAS + part, tl.sum(sum_bias, 0), mask=within_c)
    if SUM_PRE_GATE is not None:
        tl.store(SUM_PRE_GATE + part, tl.sum(sum_gate, 0), mask=within_c)


@triton.jit
def _add_to(SUM, at, mask, terms, is_first):
    """Adds terms to a program's own part of the sums."""
    if SUM is not None:
        tl.store(SUM + at, tl.load(SUM + at, mask=mask & (is_first == 0), other=0.0) + terms, mask=mask)


@triton.jit(do_not_specialize=UNSPECIALISED)
def norm_film_bwd_kernel_long_rows(
    DY, DH, X, H, GAMMA, GAMMA_ADDED, BETA, BETA_ADDED, WEIGHT, BIAS, PRE_GATE, PRE_GATE_ADDED, MEAN, VAR,
    DX, DR, DGAMMA, DGAMMA_ADDED, DBETA, DBETA_ADDED, DWEIGHT, DBIAS, DPRE_GATE, DPRE_GATE_ADDED,
    SUM_GAMMA, SUM_BETA, SUM_WEIGHT, SUM_BIAS, SUM_PRE_GATE,
    T, C, pieces, steps,  # a program walks a piece, steps rows of a batch element
    gamma_b, gamma_t, gamma_added_b, gamma_added_t, beta_b, beta_t, beta_added_b, beta_added_t,
    weight_b, weight_t, bias_b, bias_t, pre_gate_b, pre_gate_t, pre_gate_added_b, pre_gate_added_t,
    eps, gamma_offset, IS_RMS: tl.constexpr, ACTIVATION: tl.constexpr,
    KINDS: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C = aligned(C, ALIGN)
    program = tl.program_id(0).to(tl.int64)
    b, piece = program // pieces, program % pieces
    lanes = tl.arange(0, BLOCK_C)  # [BLOCK_C]
    gamma_steps, gamma_added_steps = (gamma_b, gamma_t), (gamma_added_b, gamma_added_t)
    beta_steps, beta_added_steps = (beta_b, beta_t), (beta_added_b, beta_added_t)
    gate_steps, gate_added_steps = (pre_gate_b, pre_gate_t), (pre_gate_added_b, pre_gate_added_t)
    weight_steps, bias_steps = (weight_b, weight_t), (bias_b, bias_t)
    ARITHMETIC: tl.constexpr = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    for step in range(steps):
        t = piece * steps + step + tl.arange(0, BLOCK_R)  # [BLOCK_R], of one row
        within_t = t < T
        row = b * T + t
        near, off, rstd = read_statistics(MEAN, VAR, row, within_t, eps, ARITHMETIC)
        mean_dn = tl.zeros((BLOCK_R, 1), ARITHMETIC)
        mean_dn_n = tl.zeros((BLOCK_R, 1), ARITHMETIC)
        for sweep in tl.static_range(2):
            total = tl.zeros((BLOCK_R, BLOCK_C), ARITHMETIC)
            total_n = tl.zeros((BLOCK_R, BLOCK_C), ARITHMETIC)
            for start in range(0, C, BLOCK_C):
                c = start + lanes
                within_c = c < C
                mask = within_t[:, None] & within_c[None, :]  # [BLOCK_R, BLOCK_C]
                at = row[:, None] * C + c[None, :]
                gamma = _pair(
                    GAMMA, GAMMA_ADDED, gamma_steps, gamma_added_steps,
                    b, t, c, within_t, within_c, KINDS & 3, KINDS >> 2 & 3, ALIGN, ANY,
                )  # fmt: skip
                beta = _pair(
                    BETA, BETA_ADDED, beta_steps, beta_added_steps,
                    b, t, c, within_t, within_c, KINDS >> 4 & 3, KINDS >> 6 & 3, ALIGN, ANY,
                )  # fmt: skip
                weight = _parameter(WEIGHT, weight_steps, b, t, c, within_t, within_c, KINDS >> 8 & 3, ALIGN, ANY)
                bias = _parameter(BIAS, bias_steps, b, t, c, within_t, within_c, KINDS >> 10 & 3, ALIGN, ANY)
                n = _read_normalised(H, at, mask, near, off, rstd)
                dy = read_or_zero(DY, at, mask, n)
                u, dz, du, dn = grad_normalised(dy, n, gamma, beta, weight, bias, gamma_offset, ACTIVATION)
                if sweep == 0:
                    total += dn
                    total_n += dn * n
                else:
                    dh = (dn - n * mean_dn_n - mean_dn) * rstd[:, None]
                    if DH is not None:
                        dh += load_wide(DH + at, mask)
                    part = (program * C + c)[None, :]
                    _store_each(DGAMMA, at, mask, dz * u, KINDS & 3)
                    _store_each(DGAMMA_ADDED, at, mask, dz * u, KINDS >> 2 & 3)
                    _store_each(DBETA, at, mask, dz, KINDS >> 4 & 3)
                    _store_each(DBETA_ADDED, at, mask, dz, KINDS >> 6 & 3)
                    _store_each(DWEIGHT, at, mask, du * n, KINDS >> 8 & 3)
                    _store_each(DBIAS, at, mask, du, KINDS >> 10 & 3)
                    _add_to(SUM_GAMMA, part, mask, dz * u, step == 0)
                    _add_to(SUM_BETA, part, mask, dz, step == 0)
                    _add_to(SUM_WEIGHT, part, mask, du * n, step == 0)
                    _add_to(SUM_BIAS, part, mask, du, step == 0)
                    if DR is not None:
                        tl.store(DR + at, dh, mask=mask)
                    gate = _pair(
                        PRE_GATE, PRE_GATE_ADDED, gate_steps, gate_added_steps,
                        b, t, c, within_t, within_c, KINDS >> 12 & 3, KINDS >> 14 & 3, ALIGN, ANY,
                    )  # fmt: skip
                    if DX is not None:
                        tl.store(DX + at, scaled(dh, gate), mask=mask)
                    if gate is not None:
                        dh_x = dh * load_wide(X + at, mask)
                        _store_each(DPRE_GATE, at, mask, dh_x, KINDS >> 12 & 3)
                        _store_each(DPRE_GATE_ADDED, at, mask, dh_x, KINDS >> 14 & 3)
                        _add_to(SUM_PRE_GATE, part, mask, dh_x, step == 0)
            if sweep == 0:
                mean_dn_n = (tl.sum(total_n, 1) / C)[:, None]
                if not IS_RMS:
                    mean_dn = (tl.sum(total, 1) / C)[:, None]


# Launchers


class _Parameter(NamedTuple):
    tensor: Tensor | None
    kind: int = 0
    b: int = 0  # steps
    t: int = 0


class Rows:
    """x as B batches of T rows, and how its parameters lie along them."""

    def __init__(self, layout: Layout, parameters):
        self.layout, self.B, self.T, self.C = layout, layout.B, layout.T, layout.C
        self.parameters = [self._of(t) for t in parameters]
        held_by_batch = any(t is not None and t.dim() == 2 and self.T > 1 for t in parameters)
        joined = all(p.kind == HELD.value or p.b == self.T * p.t for p in self.parameters)
        if not held_by_batch and joined:
            self.B, self.T = 1, self.B * self.T

    def _of(self, t: Tensor | None) -> _Parameter:
        if t is None:
            return _Parameter(None)
        if t.dim() == 1:
            return _Parameter(t.contiguous(), HELD.value)
        if t.dim() == 2:  # (B, C)
            t = t if t.stride(1) == 1 else t.contiguous()
            # Each row is of another batch element, then, and its gradient is no sum.
            return _Parameter(
                t, *((EACH.value, t.stride(0), t.stride(0)) if self.T == 1 else (HELD.value, t.stride(0)))
            )
        rows = t.movedim(self.layout.channel_dim, -1).reshape(self.B, self.T, self.C)
        if self.C > 1 and rows.stride(2) == 0:
            return _Parameter(rows, ROW.value, rows.stride(0), rows.stride(1))
        rows = rows if rows.stride(2) == 1 else rows.contiguous()
        return _Parameter(rows, EACH.value, rows.stride(0), rows.stride(1))

    @property
    def tensors(self) -> list[Tensor | None]:
        return [p.tensor for p in self.parameters]

    def steps(self) -> list[int]:
        return [step for p in self.parameters for step in (p.b, p.t)]

    def kinds(self) -> dict[str, int]:
        read_whole = [self.C, *(n for p in self.parameters if p.kind != ROW.value for n in (p.b, p.t))]
        align = next(n for n in (16, 4, 1) if all(step % n == 0 for step in read_whole))
        return {"KINDS": sum(p.kind << 2 * n for n, p in enumerate(self.parameters)), "ALIGN": align}

    def blocks(self, tile: _tiles.Tile) -> tuple[bool, dict[str, int]]:
        """Whether rows are longer than a tile, and its extents."""
        (elements,) = tile.extents_in(self.layout.x.dtype)
        block_c = triton.next_power_of_2(self.C)
        if block_c > elements:
            return True, {"BLOCK_R": 1, "BLOCK_C": elements}
        return False, {"BLOCK_R": power_of_2(self.T, elements // block_c), "BLOCK_C": block_c}

    def tiled(self, name: str, run):
        sizes = (self.B, self.T, self.C)
        with on_device_of(self.layout.x):
            return run(_tiles.choose("norm", self.C, self.layout.x, sizes, run, name))


def forward(layout: Layout, parameters, pre_residual, residual, h, y, mean, var, options: dict) -> None:
    """Fills y, h (None where it is x), mean and var."""
    rows = Rows(layout, parameters)

    def run(tile):
        is_long, blocks = rows.blocks(tile)
        kernel = norm_film_fwd_kernel_long_rows if is_long else norm_film_fwd_kernel_rows
        programs = rows.B * triton.cdiv(rows.T, blocks["BLOCK_R"])
        launch(
            kernel, (programs,), layout.x, pre_residual, *rows.tensors, residual, h, y, mean, var,
            rows.T, rows.C, *rows.steps(), options=options, **rows.kinds(), **blocks, num_warps=tile.warps,
        )  # fmt: skip

    rows.tiled("norm_film_fwd", run)


def backward(
    layout: Layout, grad_y, grad_h, h, parameters, mean, var, asked: list[bool], dx, dr, options: dict
) -> list[Tensor | None]:
    """Fills dx and dr; returns the gradients of parameters in the order of NAMES, of those that are asked for."""
    rows = Rows(layout, parameters)
    asked = [a and t is not None for a, t in zip(asked, parameters, strict=True)]
    is_held = [a and p.kind == HELD.value for a, p in zip(asked, rows.parameters, strict=True)]
    summed = list(dict.fromkeys(name for name, held in zip(SUMS, is_held, strict=True) if held))
    each = [
        (t.new_empty(t.shape) if t.dim() <= 2 else torch.empty_like(layout.x, dtype=t.dtype))
        if a and not held
        else None
        for t, a, held in zip(parameters, asked, is_held, strict=True)
    ]

    def run(tile):
        is_long, blocks = rows.blocks(tile)
        tiles = triton.cdiv(rows.T, blocks["BLOCK_R"])
        pieces, steps = cut(rows.B, tiles, LEAST_STEPS) if summed else (tiles, 1)
        dtype = accumulation_dtype(layout.x.dtype)
        sums = torch.empty((len(summed), rows.B, pieces, rows.C), dtype=dtype, device=layout.x.device)
        by_name = dict(zip(summed, sums.unbind(), strict=True))
        kernel = norm_film_bwd_kernel_long_rows if is_long else norm_film_bwd_kernel_rows
        launch(
            kernel, (rows.B * pieces,), grad_y, grad_h, layout.x, h, *rows.tensors, mean, var,
            dx, dr, *each, *(by_name.get(name) for name in dict.fromkeys(SUMS)),
            rows.T, rows.C, pieces, steps, *rows.steps(),
            options=options, **rows.kinds(), **blocks, num_warps=tile.warps,
        )  # fmt: skip
        return sums

    sums = rows.tiled("norm_film_bwd", run)
    sums = dict(zip(summed, sums.sum(2), strict=True)) if summed else {}
    found = []
    for t, gradient, name, held in zip(parameters, each, SUMS, is_held, strict=True):
        if held:
            gradient = gradient_of(t, sums[name])
        found.append(None if gradient is None else gradient.contiguous())
    return found
