"""FiLM in Triton with gamma and beta of any shape, and pairs of them. Those of one value per channel: ``film.py``.

x is walked in memory order, over rows of N neighbouring elements. Dimensions that every parameter goes through at
one step, or repeats over, count as one; up to ``OUTER`` dimensions of rows remain. A parameter has a value for
each element of a row or one for all, and a step for each outer dimension. A tile is BLOCK_R rows x BLOCK_N
elements; pairs are added in registers, and a row's place is found by division once, not for each element.

Backward splits the outer dimensions into those that a row of a tile holds and those that it passes through. What
repeats over these is summed in registers and written at the end; what does not is written on the way. Either goes
straight to where it belongs if nothing else is to be added to it, as the gradient of a parameter with a value for
each element; else ``torch.sum`` adds the parts. Passed through are the dimensions that leave the fewest parts. One
split serves all parameters: two that each repeat where the other does not leave as many as x has elements.

Where there are few rows, ``pieces`` of them share a walk and take turns, so that rows which are neighbours in the
tile are neighbours in memory, too. No atomics are used: results are bitwise reproducible.

Symbols: N elements of a row; G places of the held dimensions, K of the passed ones; R rows of all tiles, G of them
times pieces. Tests: ``tests/test_film_parameters.py``.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedattn._dtypes import accumulation_dtype
from fusedattn._options import FilmOptions as Options
from fusedattn.triton import _tiles, film_problem
from fusedattn.triton._common import launch, load_wide, number
from fusedattn.triton.film_problem import View, activate, affine, aligned, grad_z, plus, power_of_2

OUTER = 3  # more remain only where parameters of rank 5 repeat in turns
NAMES = ("gamma", "gamma_added", "beta", "beta_added")
LEAST_STEPS = 16  # of a row that shares its walk, so that parts stay few beside x

# A KIND tells how a parameter lies: odd, it has a value for each element of a row; 2 or 3, it changes along the
# dimensions that rows pass through.


# Kernels


@triton.jit
def tile_of_program(R, N, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows [BLOCK_R], the number of the tile along rows, places in them [BLOCK_N]; which rows and which elements
    exist."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    row = (program // tiles_n).to(R.dtype) * BLOCK_R + tl.arange(0, BLOCK_R)
    tile_n = program % tiles_n
    n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    within = row < R
    return row, tile_n, n, within, within[:, None] & (n < N)[None, :]


@triton.jit
def place(index, sizes, steps, FIRST: tl.constexpr, LAST: tl.constexpr, ALIGN: tl.constexpr):
    """Offsets of flat indices over the dimensions FIRST to LAST - 1; divides in the type of the index."""
    at = tl.zeros_like(index).to(tl.int64)
    for d in tl.static_range(LAST - 1, FIRST - 1, -1):
        inside = index if d == FIRST else index % sizes[d]
        at += inside.to(tl.int64) * aligned(steps[d], ALIGN)
        index = index // sizes[d]
    return at


@triton.jit
def _values(
    P, held, passed, n, within, mask, sizes, steps,
    SPLIT: tl.constexpr, DIMS: tl.constexpr, KIND: tl.constexpr, ALIGN: tl.constexpr, NOW: tl.constexpr,
):  # fmt: skip
    """A parameter's [BLOCK_R, BLOCK_N] values, or [BLOCK_R, 1] where a row shares one.

    None where it is absent, or read at another time: as rows pass (NOW), or once.
    """
    if P is None or (KIND >= 2) != NOW:
        v = None
    else:
        UNIT: tl.constexpr = ALIGN if KIND % 2 == 1 else 1
        at = place(held, sizes, steps, 0, SPLIT, UNIT)
        if NOW:
            at += place(passed, sizes, steps, SPLIT, DIMS, UNIT)
        by_row = P + at
        v = load_wide(by_row[:, None] + n[None, :], mask) if KIND % 2 == 1 else load_wide(by_row, within)[:, None]
    return v


@triton.jit
def pair(
    P, ADDED, held, passed, n, within, mask, sizes, steps, added_steps,
    SPLIT: tl.constexpr, DIMS: tl.constexpr, KIND: tl.constexpr, ADDED_KIND: tl.constexpr, ALIGN: tl.constexpr,
    NOW: tl.constexpr,
):  # fmt: skip
    """The sum of what there is to read of two parameters."""
    return plus(
        _values(P, held, passed, n, within, mask, sizes, steps, SPLIT, DIMS, KIND, ALIGN, NOW),
        _values(ADDED, held, passed, n, within, mask, sizes, added_steps, SPLIT, DIMS, ADDED_KIND, ALIGN, NOW),
    )


@triton.jit
def share(row, within, step, pieces, K):
    """Which of K places rows are at that take turns, and whether there is one."""
    turn = row % pieces
    return turn.to(K.dtype) + step * pieces, within & (turn < K - step * pieces)  # near 2^31 it may be past it


@triton.jit
def factor(gamma, gamma_offset):
    """gamma + gamma_offset; None stays None, for a factor of 1."""
    scale = None if gamma is None else gamma + number(gamma_offset, gamma.dtype)
    return scale  # alone: a tuple with None in it does not compile


@triton.jit
def store_terms(D, part, n, tile_n, N, within, mask, terms, KIND: tl.constexpr, NOW: tl.constexpr):
    """Terms of a gradient, [BLOCK_R, BLOCK_N], to these rows of its parts: each one, or the sum of a row."""
    if D is not None and (KIND >= 2) == NOW:
        if KIND % 2 == 1:
            tl.store(D + (part * N)[:, None] + n[None, :], terms, mask=mask)
        else:
            tl.store(D + part * tl.cdiv(N, terms.shape[1]) + tile_n, tl.sum(terms, 1), mask=within)


# Integers that change from call to call are not specialised, which would compile anew for 1 and multiples of 16.
UNSPECIALISED = [
    *Options._fields, "R", "N", "K", "pieces", "walk",
    *(f"{name}_{d}" for name in ("size", "x", *NAMES) for d in range(OUTER)),
]  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALISED)
def film_fwd_kernel_broadcast(
    X, GAMMA, GAMMA_ADDED, BETA, BETA_ADDED, RESIDUAL, Y, R, N,
    size_0, size_1, size_2, x_0, x_1, x_2,  # sizes, then steps, of the outer dimensions
    gamma_0, gamma_1, gamma_2, gamma_added_0, gamma_added_1, gamma_added_2,
    beta_0, beta_1, beta_2, beta_added_0, beta_added_1, beta_added_2,
    GAMMA_KIND: tl.constexpr, GAMMA_ADDED_KIND: tl.constexpr,
    BETA_KIND: tl.constexpr, BETA_ADDED_KIND: tl.constexpr,
    gamma_offset, ACTIVATION: tl.constexpr, DIMS: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    N = aligned(N, ALIGN)
    sizes = (size_0, size_1, size_2)
    row, _, n, within, mask = tile_of_program(R, N, BLOCK_R, BLOCK_N)
    gamma = pair(
        GAMMA, GAMMA_ADDED, row, row, n, within, mask, sizes, (gamma_0, gamma_1, gamma_2),
        (gamma_added_0, gamma_added_1, gamma_added_2), DIMS, DIMS, GAMMA_KIND, GAMMA_ADDED_KIND, ALIGN, False,
    )  # fmt: skip
    beta = pair(
        BETA, BETA_ADDED, row, row, n, within, mask, sizes, (beta_0, beta_1, beta_2),
        (beta_added_0, beta_added_1, beta_added_2), DIMS, DIMS, BETA_KIND, BETA_ADDED_KIND, ALIGN, False,
    )  # fmt: skip
    at = place(row, sizes, (x_0, x_1, x_2), 0, DIMS, ALIGN)[:, None] + n[None, :]
    z = affine(load_wide(X + at, mask), factor(gamma, gamma_offset), beta)
    y = activate(z, ACTIVATION)
    if RESIDUAL is not None:
        y += load_wide(RESIDUAL + at, mask)
    tl.store(Y + at, y, mask=mask)


@triton.jit(do_not_specialize=UNSPECIALISED)
def film_bwd_kernel_broadcast(
    DY, X, GAMMA, GAMMA_ADDED, BETA, BETA_ADDED, DX, DGAMMA, DGAMMA_ADDED, DBETA, DBETA_ADDED,
    R, N, K, pieces, walk,  # a row passes through `walk` of K places, every pieces-th
    size_0, size_1, size_2, x_0, x_1, x_2,
    gamma_0, gamma_1, gamma_2, gamma_added_0, gamma_added_1, gamma_added_2,
    beta_0, beta_1, beta_2, beta_added_0, beta_added_1, beta_added_2,
    GAMMA_KIND: tl.constexpr, GAMMA_ADDED_KIND: tl.constexpr,
    BETA_KIND: tl.constexpr, BETA_ADDED_KIND: tl.constexpr,
    gamma_offset, ACTIVATION: tl.constexpr, SPLIT: tl.constexpr, DIMS: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    N = aligned(N, ALIGN)
    sizes = (size_0, size_1, size_2)
    x_steps = (x_0, x_1, x_2)
    gamma_steps = (gamma_0, gamma_1, gamma_2)
    gamma_added_steps = (gamma_added_0, gamma_added_1, gamma_added_2)
    beta_steps = (beta_0, beta_1, beta_2)
    beta_added_steps = (beta_added_0, beta_added_1, beta_added_2)
    row, tile_n, n, within, mask = tile_of_program(R, N, BLOCK_R, BLOCK_N)
    held = row // pieces
    gamma_held = pair(
        GAMMA, GAMMA_ADDED, held, held, n, within, mask, sizes, gamma_steps, gamma_added_steps,
        SPLIT, DIMS, GAMMA_KIND, GAMMA_ADDED_KIND, ALIGN, False,
    )  # fmt: skip
    beta_held = pair(
        BETA, BETA_ADDED, held, held, n, within, mask, sizes, beta_steps, beta_added_steps,
        SPLIT, DIMS, BETA_KIND, BETA_ADDED_KIND, ALIGN, False,
    )  # fmt: skip
    at_held = place(held, sizes, x_steps, 0, SPLIT, ALIGN)
    ARITHMETIC: tl.constexpr = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    sum_dz_x = tl.zeros((BLOCK_R, BLOCK_N), ARITHMETIC)
    sum_dz = tl.zeros((BLOCK_R, BLOCK_N), ARITHMETIC)
    for step in range(walk):
        passed, there = share(row, within, step, pieces, K)
        these = there[:, None] & (n < N)[None, :]
        gamma = plus(gamma_held, pair(
            GAMMA, GAMMA_ADDED, held, passed, n, there, these, sizes, gamma_steps, gamma_added_steps,
            SPLIT, DIMS, GAMMA_KIND, GAMMA_ADDED_KIND, ALIGN, True,
        ))  # fmt: skip
        beta = plus(beta_held, pair(
            BETA, BETA_ADDED, held, passed, n, there, these, sizes, beta_steps, beta_added_steps,
            SPLIT, DIMS, BETA_KIND, BETA_ADDED_KIND, ALIGN, True,
        ))  # fmt: skip
        at = (at_held + place(passed, sizes, x_steps, SPLIT, DIMS, ALIGN))[:, None] + n[None, :]
        x = load_wide(X + at, these)
        scale = factor(gamma, gamma_offset)
        dz = grad_z(load_wide(DY + at, these), affine(x, scale, beta), ACTIVATION)
        tl.store(DX + at, dz if scale is None else dz * scale, mask=these)
        dz_x = dz * x
        part = held.to(tl.int64) * K + passed
        store_terms(DGAMMA, part, n, tile_n, N, there, these, dz_x, GAMMA_KIND, True)
        store_terms(DGAMMA_ADDED, part, n, tile_n, N, there, these, dz_x, GAMMA_ADDED_KIND, True)
        store_terms(DBETA, part, n, tile_n, N, there, these, dz, BETA_KIND, True)
        store_terms(DBETA_ADDED, part, n, tile_n, N, there, these, dz, BETA_ADDED_KIND, True)
        sum_dz_x += dz_x
        sum_dz += dz
    part = row.to(tl.int64)
    store_terms(DGAMMA, part, n, tile_n, N, within, mask, sum_dz_x, GAMMA_KIND, False)
    store_terms(DGAMMA_ADDED, part, n, tile_n, N, within, mask, sum_dz_x, GAMMA_ADDED_KIND, False)
    store_terms(DBETA, part, n, tile_n, N, within, mask, sum_dz, BETA_KIND, False)
    store_terms(DBETA_ADDED, part, n, tile_n, N, within, mask, sum_dz, BETA_ADDED_KIND, False)


# Launchers


class _Dim(NamedTuple):
    """Dimensions of x that are neighbours in memory, as one."""

    size: int
    steps: tuple[int, ...]  # of x, then of the sources, then of the parameters
    repeats: tuple[bool, ...]  # of the parameters: one value serves all places along it
    of: tuple[int, ...]


def shape_in_rank(t: Tensor, rank: int, channel_dim: int) -> list[int]:
    """By the rank of a parameter alone: (), (C,), (B, C), or that of x."""
    if t.dim() == rank:
        return [*t.shape]
    shape = [1] * rank
    for size, d in zip(t.shape, (0, channel_dim)[2 - t.dim() :], strict=True):
        shape[d] = size
    return shape


def in_order(t: Tensor, view: View) -> Tensor:
    """t, in the rank of x, in its order where neighbours along a row are none in t."""
    x, order = view.x, view.order
    last = next((d for d in reversed(order) if x.shape[d] != 1), 0)
    if t.shape[last] == 1 or t.stride(last) == 1:
        return t
    return t.permute(order).contiguous().permute(sorted(range(x.dim()), key=order.__getitem__))


def spread(t: Tensor, x: Tensor) -> Tensor:
    """A value for each element of x."""
    return torch.empty_like(x, dtype=accumulation_dtype(t.dtype)).copy_(t)


def in_rank(t: Tensor, view: View, channel_dim: int) -> Tensor:
    """A parameter in the rank of x, as a walk takes it."""
    return in_order(t.reshape(shape_in_rank(t, view.x.dim(), channel_dim)), view)


class Walk:
    """x and its parameters, in its rank, along the dimensions that kernels take: ``dims``, rows last.

    ``sources`` lie along x, too, at steps of their own. Where there are too many dimensions it does not ``fit``:
    parameters have to be ``spread``.
    """

    def __init__(
        self,
        view: View,
        parameters: Sequence[Tensor | None],
        names: tuple[str, ...] = NAMES,
        sources: tuple[Tensor, ...] = (),
    ):
        self.view, self.parameters, self.names, self.sources = view, parameters, names, sources
        self.dims = self._joined()

    @classmethod
    def of(cls, view: View, parameters: Sequence[Tensor | None], channel_dim: int) -> "Walk":
        """With parameters as they are given, in whatever rank, spread if need be."""
        parameters = [None if t is None else in_rank(t, view, channel_dim) for t in parameters]
        walk = cls(view, parameters)
        return walk if walk.fits else cls(view, [None if t is None else spread(t, view.x) for t in parameters])

    @property
    def fits(self) -> bool:
        return len(self.dims) <= OUTER + 1

    def _joined(self) -> list[_Dim]:
        x, dims = self.view.x, list[_Dim]()
        for d in self.view.order:
            if x.shape[d] == 1:
                continue
            repeats = tuple(t is None or t.shape[d] == 1 for t in self.parameters)
            steps = (0 if t is None or t.shape[d] == 1 else t.stride(d) for t in self.parameters)
            lying = (t.stride(d) for t in (x, *self.sources))
            dim = _Dim(x.shape[d], (*lying, *steps), repeats, (d,))
            if dims and dims[-1].repeats == repeats and dims[-1].steps == tuple(n * dim.size for n in dim.steps):
                last = dims.pop()
                dim = dim._replace(size=last.size * dim.size, of=(*last.of, d))
            dims.append(dim)
        n = len(self.parameters)
        return dims or [_Dim(1, (1,) * (1 + len(self.sources) + n), (False,) * n, ())]

    @property
    def outer(self) -> list[_Dim]:
        return self.dims[:-1]

    @property
    def row(self) -> _Dim:
        return self.dims[-1]

    def blocks(self, rows: int, tile: _tiles.Tile) -> dict[str, int]:
        """Extents of a tile: long enough along memory to coalesce, then as many rows as fill it."""
        (elements,) = tile.extents_in(self.view.x.dtype)
        if self.row.size <= 128:
            elements //= 8  # each of many rows has its addresses in registers
        block_r = power_of_2(rows, elements // power_of_2(self.row.size, elements // 4))
        return {"BLOCK_R": block_r, "BLOCK_N": power_of_2(self.row.size, elements // block_r)}

    def cut(self, G: int, K: int, tile: _tiles.Tile) -> tuple[int, int]:
        """Rows that share a walk through K places, and the places of each."""
        rows = self.blocks(G * K, tile)["BLOCK_R"] * film_problem.PROGRAMS  # of PROGRAMS programs
        pieces = min(triton.cdiv(K, LEAST_STEPS), triton.cdiv(rows, G))
        steps = triton.cdiv(K, pieces)
        return triton.cdiv(K, steps), steps

    def arguments(self, held: list[_Dim], passed: list[_Dim]) -> tuple[tuple[int, ...], dict[str, int]]:
        """What kernels take of the outer dimensions, in this order, and of how parameters lie along all."""
        outer = [*held, *passed]
        padded = [*outer, *[_Dim(1, (0,) * len(self.row.steps), (), ())] * (OUTER - len(outer))]
        numbers = [dim.size for dim in padded]
        for steps in zip(*(dim.steps for dim in padded), strict=True):
            numbers += steps
        lying = 1 + len(self.sources)
        kinds = {}
        whole = [self.row.size, *(step for dim in outer for step in dim.steps[:lying])]  # what has to be aligned
        for p, name in enumerate(self.names):
            by_element, moves = not self.row.repeats[p], any(not dim.repeats[p] for dim in passed)
            kinds[f"{name.upper()}_KIND"] = by_element + 2 * moves
            if by_element and self.parameters[p] is not None:
                whole += [dim.steps[lying + p] for dim in outer]
        align = next(n for n in (16, 4, 1) if all(step % n == 0 for step in whole))
        return tuple(numbers), {**kinds, "DIMS": len(outer), "ALIGN": align}

    def split(self, asked: tuple[bool, ...]) -> tuple[list[_Dim], list[_Dim]]:
        """The outer dimensions that rows hold, and those that they pass through: the fewest parts remain."""
        every = range(len(self.outer))
        choices = (passed for n in range(len(self.dims)) for passed in itertools.combinations(every, n))
        best = min(choices, key=functools.partial(self._parts, asked))
        return [self.outer[d] for d in every if d not in best], [self.outer[d] for d in best]

    def _parts(self, asked: tuple[bool, ...], passed: tuple[int, ...]) -> int:
        """How many sums remain to be added where rows pass through these."""
        total = 0
        for p, t in enumerate(self.parameters):
            moves = any(not self.outer[d].repeats[p] for d in passed)
            kept = [dim for d, dim in enumerate(self.outer) if moves or d not in passed]
            if asked[p] and t is not None and any(dim.repeats[p] for dim in kept):
                total += math.prod(dim.size for dim in kept) * (1 if self.row.repeats[p] else self.row.size)
        return total


def forward(view, parameters, channel_dim: int, residual: Tensor | None, y: Tensor, options: dict) -> None:
    """Fills y; parameters in the order of NAMES, residual with the strides of x."""
    walk = Walk.of(view, parameters, channel_dim)
    numbers, kinds = walk.arguments(walk.outer, [])
    R, N = math.prod(dim.size for dim in walk.outer), walk.row.size

    def run(tile):
        blocks = walk.blocks(R, tile)
        programs = triton.cdiv(R, blocks["BLOCK_R"]) * triton.cdiv(N, blocks["BLOCK_N"])
        pointers = view.x, *walk.parameters, residual, y
        launch(
            film_fwd_kernel_broadcast, (programs,), *pointers, R, N, *numbers,
            options=options, **kinds, **blocks, num_warps=tile.warps,
        )  # fmt: skip

    view.tiled("film_fwd_broadcast", run)


def backward(
    view, grad_output, parameters, asked: tuple[bool, ...], channel_dim: int, dx: Tensor, options: dict
) -> list[Tensor | None]:
    """Fills dx; returns the gradients of parameters in the order of NAMES, of those that are asked for."""
    walk = Walk.of(view, parameters, channel_dim)
    held, passed = walk.split(asked)
    numbers, kinds = walk.arguments(held, passed)
    G, K, N = math.prod(dim.size for dim in held), math.prod(dim.size for dim in passed), walk.row.size

    def run(tile):
        pieces, steps = walk.cut(G, K, tile)
        blocks = walk.blocks(G * pieces, tile)
        tiles_n = triton.cdiv(N, blocks["BLOCK_N"])
        gradients = [
            Gradient(walk, p, t, held, passed, pieces, tiles_n) if asked[p] and t is not None else None
            for p, t in enumerate(walk.parameters)
        ]
        pointers = grad_output, view.x, *walk.parameters, dx, *(g and g.parts for g in gradients)
        launch(
            film_bwd_kernel_broadcast, (triton.cdiv(G * pieces, blocks["BLOCK_R"]) * tiles_n,),
            *pointers, G * pieces, N, K, pieces, steps, *numbers,
            options=options, SPLIT=len(held), **kinds, **blocks, num_warps=tile.warps,
        )  # fmt: skip
        return gradients

    gradients = zip(view.tiled("film_bwd_broadcast", run), parameters, strict=True)
    return [None if g is None else g.of(t, channel_dim) for g, t in gradients]


class Gradient:
    """The gradient of parameter number p, t: its parts, which a kernel writes, and what is to be added of them."""

    def __init__(
        self, walk: Walk, p: int, t: Tensor, held: list[_Dim], passed: list[_Dim], pieces: int, tiles_n: int
    ):
        moves = any(not dim.repeats[p] for dim in passed)
        # The sizes of the parts, and the dimension of the walk that each is, or None: to be summed.
        along = [(dim.size, None if dim.repeats[p] else dim) for dim in (*held, *(passed if moves else ()))]
        along += [] if moves else [(pieces, None)]
        along.append((tiles_n, None) if walk.row.repeats[p] else (walk.row.size, walk.row))
        self.walk, self.shape = walk, t.shape
        self.summed = [n for n, (_, dim) in enumerate(along) if dim is None]
        self.places = [d for _, dim in along if dim is not None for d in dim.of]
        sizes = [size for size, _ in along]
        self.is_direct = all(sizes[n] == 1 for n in self.summed)
        dtype = t.dtype if self.is_direct else accumulation_dtype(t.dtype)
        self.parts = torch.empty(sizes, dtype=dtype, device=t.device)

    def of(self, given: Tensor, channel_dim: int) -> Tensor:
        """In the shape and dtype of the parameter as it was given."""
        parts = self.parts if self.is_direct else self.parts.sum(self.summed)
        parts = parts.reshape([self.walk.view.x.shape[d] for d in self.places])
        parts = parts.permute(sorted(range(parts.dim()), key=self.places.__getitem__)).reshape(self.shape)
        parts = parts.sum_to_size(shape_in_rank(given, self.walk.view.x.dim(), channel_dim))
        return parts.reshape(given.shape).to(given.dtype).contiguous()
