"""gated_film in Triton: ``y = tanh(a + h_a) sigmoid(b + h_b)`` and its gradients, a and b the halves of x.

The walk is film's for parameters of any shape (``film_broadcast.py``), over y: x lies along it at its own steps,
its second half a constant number of elements behind the first, and so do the halves of a condition. A tile reads
both halves and writes one of y; backward it reads both and one of dy and writes both of dx, so each is touched
once. The gradient of a condition with a value for each element lies like dx and is written beside it; others are
summed as film's are, da and db apart. No atomics are used: results are bitwise reproducible.

Costs. Bound by memory; the two functions take some 40 instructions an element of y.

Symbols: as in ``film_broadcast.py``. Definition and reference: ``fusedattn/ops/gated_film.py``. Tests:
``tests/test_gated_film.py``, ``tests/test_ptx_kernels.py``, ``make gates``.
"""

import copy
import math
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedattn._dtypes import accumulation_dtype
from fusedattn._options import GatedFilmOptions as Options
from fusedattn._options import schema
from fusedattn.triton._common import Kernel, asked_for, distinct, launch, load_wide, recorded, register, require
from fusedattn.triton.film_broadcast import (
    OUTER,
    Gradient,
    Walk,
    in_rank,
    pair,
    place,
    shape_in_rank,
    share,
    spread,
    store_terms,
    tile_of_program,
)
from fusedattn.triton.film_problem import SIGMOID, TANH, View, activate, aligned, plus

NAMES = ("condition", "added")

# Kernels


@triton.jit
def _behind(P, apart, KIND: tl.constexpr, ALIGN: tl.constexpr):
    """Where the second half of a condition begins, or None."""
    UNIT: tl.constexpr = ALIGN if KIND % 2 == 1 else 1
    if P is None:  # noqa: SIM108, of which Triton 3.6 makes no such expression
        second = P
    else:
        second = P + aligned(apart, UNIT)
    return second


UNSPECIALISED = [
    "R", "N", "K", "pieces", "walk", "apart", *(f"{name}_apart" for name in NAMES),
    *(f"{name}_{d}" for name in ("size", "y", "x", *NAMES) for d in range(OUTER)),
]  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALISED)
def gated_film_fwd_kernel(
    X, CONDITION, ADDED, Y, R, N,
    apart, condition_apart, added_apart,  # elements from half to half
    size_0, size_1, size_2, y_0, y_1, y_2, x_0, x_1, x_2,  # sizes, then steps, of the outer dimensions
    condition_0, condition_1, condition_2, added_0, added_1, added_2,
    CONDITION_KIND: tl.constexpr, ADDED_KIND: tl.constexpr, DIMS: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    N = aligned(N, ALIGN)
    sizes = (size_0, size_1, size_2)
    condition_steps = (condition_0, condition_1, condition_2)
    added_steps = (added_0, added_1, added_2)
    row, _, n, within, mask = tile_of_program(R, N, BLOCK_R, BLOCK_N)
    h_a = pair(
        CONDITION, ADDED, row, row, n, within, mask, sizes, condition_steps, added_steps,
        DIMS, DIMS, CONDITION_KIND, ADDED_KIND, ALIGN, False,
    )  # fmt: skip
    h_b = pair(
        _behind(CONDITION, condition_apart, CONDITION_KIND, ALIGN), _behind(ADDED, added_apart, ADDED_KIND, ALIGN),
        row, row, n, within, mask, sizes, condition_steps, added_steps,
        DIMS, DIMS, CONDITION_KIND, ADDED_KIND, ALIGN, False,
    )  # fmt: skip
    at = place(row, sizes, (x_0, x_1, x_2), 0, DIMS, ALIGN)[:, None] + n[None, :]
    a = plus(load_wide(X + at, mask), h_a)
    b = plus(load_wide(X + aligned(apart, ALIGN) + at, mask), h_b)
    to = place(row, sizes, (y_0, y_1, y_2), 0, DIMS, ALIGN)[:, None] + n[None, :]
    tl.store(Y + to, activate(a, TANH) * activate(b, SIGMOID), mask=mask)


@triton.jit(do_not_specialize=UNSPECIALISED)
def gated_film_bwd_kernel(
    DY, X, CONDITION, ADDED, DX,
    DCONDITION, DADDED,  # of those with a value for each element, like dx
    DA_CONDITION, DA_ADDED, DB_CONDITION, DB_ADDED,  # parts of the others
    R, N, K, pieces, walk,  # a row passes through `walk` of K places, every pieces-th
    apart, condition_apart, added_apart,
    size_0, size_1, size_2, y_0, y_1, y_2, x_0, x_1, x_2,
    condition_0, condition_1, condition_2, added_0, added_1, added_2,
    CONDITION_KIND: tl.constexpr, ADDED_KIND: tl.constexpr,
    SPLIT: tl.constexpr, DIMS: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    N = aligned(N, ALIGN)
    apart = aligned(apart, ALIGN)
    sizes = (size_0, size_1, size_2)
    y_steps = (y_0, y_1, y_2)
    x_steps = (x_0, x_1, x_2)
    condition_steps = (condition_0, condition_1, condition_2)
    added_steps = (added_0, added_1, added_2)
    condition_b = _behind(CONDITION, condition_apart, CONDITION_KIND, ALIGN)
    added_b = _behind(ADDED, added_apart, ADDED_KIND, ALIGN)
    row, tile_n, n, within, mask = tile_of_program(R, N, BLOCK_R, BLOCK_N)
    held = row // pieces
    held_a = pair(
        CONDITION, ADDED, held, held, n, within, mask, sizes, condition_steps, added_steps,
        SPLIT, DIMS, CONDITION_KIND, ADDED_KIND, ALIGN, False,
    )  # fmt: skip
    held_b = pair(
        condition_b, added_b, held, held, n, within, mask, sizes, condition_steps, added_steps,
        SPLIT, DIMS, CONDITION_KIND, ADDED_KIND, ALIGN, False,
    )  # fmt: skip
    x_held = place(held, sizes, x_steps, 0, SPLIT, ALIGN)
    y_held = place(held, sizes, y_steps, 0, SPLIT, ALIGN)
    ARITHMETIC: tl.constexpr = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    sum_a = tl.zeros((BLOCK_R, BLOCK_N), ARITHMETIC)
    sum_b = tl.zeros((BLOCK_R, BLOCK_N), ARITHMETIC)
    for step in range(walk):
        passed, there = share(row, within, step, pieces, K)
        these = there[:, None] & (n < N)[None, :]
        h_a = plus(held_a, pair(
            CONDITION, ADDED, held, passed, n, there, these, sizes, condition_steps, added_steps,
            SPLIT, DIMS, CONDITION_KIND, ADDED_KIND, ALIGN, True,
        ))  # fmt: skip
        h_b = plus(held_b, pair(
            condition_b, added_b, held, passed, n, there, these, sizes, condition_steps, added_steps,
            SPLIT, DIMS, CONDITION_KIND, ADDED_KIND, ALIGN, True,
        ))  # fmt: skip
        at = (x_held + place(passed, sizes, x_steps, SPLIT, DIMS, ALIGN))[:, None] + n[None, :]
        of_y = (y_held + place(passed, sizes, y_steps, SPLIT, DIMS, ALIGN))[:, None] + n[None, :]
        t = activate(plus(load_wide(X + at, these), h_a), TANH)
        s = activate(plus(load_wide(X + apart + at, these), h_b), SIGMOID)
        dy_s = load_wide(DY + of_y, these) * s
        da = dy_s * (1.0 - t * t)
        db = dy_s * t * (1.0 - s)
        tl.store(DX + at, da, mask=these)
        tl.store(DX + apart + at, db, mask=these)
        if DCONDITION is not None:
            tl.store(DCONDITION + at, da, mask=these)
            tl.store(DCONDITION + apart + at, db, mask=these)
        if DADDED is not None:
            tl.store(DADDED + at, da, mask=these)
            tl.store(DADDED + apart + at, db, mask=these)
        part = held.to(tl.int64) * K + passed
        store_terms(DA_CONDITION, part, n, tile_n, N, there, these, da, CONDITION_KIND, True)
        store_terms(DA_ADDED, part, n, tile_n, N, there, these, da, ADDED_KIND, True)
        store_terms(DB_CONDITION, part, n, tile_n, N, there, these, db, CONDITION_KIND, True)
        store_terms(DB_ADDED, part, n, tile_n, N, there, these, db, ADDED_KIND, True)
        sum_a += da
        sum_b += db
    part = row.to(tl.int64)
    store_terms(DA_CONDITION, part, n, tile_n, N, within, mask, sum_a, CONDITION_KIND, False)
    store_terms(DA_ADDED, part, n, tile_n, N, within, mask, sum_a, ADDED_KIND, False)
    store_terms(DB_CONDITION, part, n, tile_n, N, within, mask, sum_b, CONDITION_KIND, False)
    store_terms(DB_ADDED, part, n, tile_n, N, within, mask, sum_b, ADDED_KIND, False)


# Launchers


class _Problem:
    """x, its conditions and the walk over y, whose layout ``y`` has; ``whole`` are the conditions in x's rank."""

    def __init__(self, x: Tensor, conditions: tuple[Tensor | None, ...], options: Options):
        self.given, self.channel_dim = x, options.channel_dim
        self.view = view = View(x, self.channel_dim, ())
        within = view.order[view.order.index(self.channel_dim) + 1 :]
        if view.C == 2 and all(x.shape[d] == 1 for d in within):  # neighbours in y would be none in x: a copy
            view.x = view.x.movedim(self.channel_dim, 0).contiguous().movedim(0, self.channel_dim)
            view.order = [self.channel_dim, *(d for d in range(x.dim()) if d != self.channel_dim)]
        self.y = copy.copy(view)
        self.y.x, self.y.C = self._empty_half(), view.C // 2
        self.whole = [None if t is None else in_rank(t, view, self.channel_dim) for t in conditions]
        self.walk = self._walked()
        if not self.walk.fits:
            self.whole = [None if t is None else spread(t, view.x) for t in self.whole]
            self.walk = self._walked()
        self.has_each = [t is not None and t.shape == x.shape for t in self.whole]  # element its own value

    def _empty_half(self) -> Tensor:
        x, step = self.view.x, 1
        sizes, strides = [*x.shape], [0] * x.dim()
        sizes[self.channel_dim] //= 2
        for d in reversed(self.view.order):
            strides[d] = step
            step *= sizes[d]
        return x.new_empty_strided(sizes, strides)

    def half(self, t: Tensor) -> Tensor:
        """The first half of what has the rank of x; all of it where both are the same."""
        C = t.shape[self.channel_dim]
        return t if C == 1 else t.narrow(self.channel_dim, 0, C // 2)

    def _apart(self, t: Tensor | None) -> int:
        """How many elements lie between its halves."""
        d = self.channel_dim
        return 0 if t is None or t.shape[d] == 1 else t.shape[d] // 2 * t.stride(d)

    def _walked(self) -> Walk:
        halves = [None if t is None else self.half(t) for t in self.whole]
        return Walk(self.y, halves, NAMES, (self.half(self.view.x),))

    def arguments(self, held, passed) -> tuple[tuple[int, ...], dict[str, int]]:
        """As Walk's, with the distances between halves, which have to be aligned, too."""
        numbers, kinds = self.walk.arguments(held, passed)
        apart, *others = (self._apart(t) for t in (self.view.x, *self.whole))
        read = [apart, *(n for n, name in zip(others, NAMES, strict=True) if kinds[f"{name.upper()}_KIND"] % 2)]
        most = kinds["ALIGN"]
        kinds["ALIGN"] = next(n for n in (16, 4, 1) if n <= most and all(step % n == 0 for step in read))
        return (apart, *others, *numbers), kinds

    def restored(self, y: Tensor) -> Tensor:
        """y with the strides that the operator's fake promises."""
        if self.view.x is self.given:
            return y
        out = torch.empty_like(self.half(self.given))
        return y if out.stride() == y.stride() else out.copy_(y)

    def gradient(self, given: Tensor, each: Tensor | None, halves: list[Gradient]) -> Tensor:
        """Of a condition, in its shape and dtype, from what kernels wrote: of each element, or parts by halves."""
        shape = shape_in_rank(given, self.given.dim(), self.channel_dim)
        if each is not None:
            return each.sum_to_size(shape).reshape(given.shape).to(given.dtype).contiguous()
        half = self.half(given.new_empty(shape, device="meta"))
        a, b = (g.of(half.to(given.dtype), self.channel_dim) for g in halves)
        whole = a + b if shape[self.channel_dim] == 1 else torch.cat([a, b], self.channel_dim)
        return whole.reshape(given.shape)


def _check(x, conditions, options: Options) -> None:
    """Raises where kernels would read what is not there."""
    rank, wide = x.dim(), accumulation_dtype(x.dtype)
    if not 0 < options.channel_dim < rank:
        raise RuntimeError(f"gated_film: channel_dim: expected 1 to {rank - 1}, got {options.channel_dim}")
    B, C = x.shape[0], x.shape[options.channel_dim]
    if C % 2:
        raise RuntimeError(f"gated_film: x: expected an even number of channels, got {C}")
    for name, t in zip(("condition", "condition_added"), conditions, strict=True):
        if t is not None:
            full = x.shape if t.dim() == rank else (B, C)[2 - t.dim() :] if t.dim() <= 2 else ()
            shape = tuple(1 if n == 1 else m for n, m in zip(t.shape, full, strict=False))
            require("gated_film", name, t, shape, wide if t.dtype == wide else x.dtype, x.device)


def forward(x, condition, condition_added, *options):
    """gated_film_fwd, see csrc/library.cpp."""
    options, conditions = Options(*options), (condition, condition_added)
    _check(x, conditions, options)
    p = _Problem(x, conditions, options)
    if x.numel() == 0:
        return p.restored(p.y.x)
    walk, y = p.walk, p.y.x
    numbers, kinds = p.arguments(walk.outer, [])
    R, N = math.prod(dim.size for dim in walk.outer), walk.row.size

    def run(tile):
        blocks = walk.blocks(R, tile)
        programs = triton.cdiv(R, blocks["BLOCK_R"]) * triton.cdiv(N, blocks["BLOCK_N"])
        launch(
            gated_film_fwd_kernel, (programs,), p.view.x, *p.whole, y, R, N, *numbers,
            **kinds, **blocks, num_warps=tile.warps,
        )  # fmt: skip

    p.y.tiled("gated_film_fwd", run)
    return p.restored(y)


def backward(grad_output, x, condition, condition_added, *rest):
    """gated_film_bwd, see csrc/library.cpp."""
    *options, output_mask = rest
    options, conditions = Options(*options), (condition, condition_added)
    _check(x, conditions, options)
    p = _Problem(x, conditions, options)
    require("gated_film", "grad_output", grad_output, p.y.x.shape, x.dtype, x.device)
    of_x, *asked = asked_for(output_mask, 3)
    asked = [a and t is not None for a, t in zip(asked, conditions, strict=True)]
    if x.numel() == 0:
        zeros = (t.new_zeros(t.shape) if a else x.new_empty(0) for a, t in zip(asked, conditions, strict=True))
        return torch.empty_like(x) if of_x else x.new_empty(0), *zeros
    walk, dy, dx = p.walk, p.y.like(grad_output), torch.empty_like(p.view.x)
    of_each = [
        torch.empty_like(dx, dtype=t.dtype) if a and e else None
        for a, e, t in zip(asked, p.has_each, p.whole, strict=True)
    ]
    summed = [a and not e for a, e in zip(asked, p.has_each, strict=True)]
    held, passed = walk.split(tuple(summed))
    numbers, kinds = p.arguments(held, passed)
    G, K, N = math.prod(dim.size for dim in held), math.prod(dim.size for dim in passed), walk.row.size

    def run(tile):
        pieces, steps = walk.cut(G, K, tile)
        blocks = walk.blocks(G * pieces, tile)
        tiles_n = triton.cdiv(N, blocks["BLOCK_N"])
        found = [
            [Gradient(walk, n, t, held, passed, pieces, tiles_n) for _ in "ab"] if s else []
            for n, (s, t) in enumerate(zip(summed, walk.parameters, strict=True))
        ]
        parts = (halves[which].parts if halves else None for which in (0, 1) for halves in found)
        launch(
            gated_film_bwd_kernel, (triton.cdiv(G * pieces, blocks["BLOCK_R"]) * tiles_n,),
            dy, p.view.x, *p.whole, dx, *of_each, *parts, G * pieces, N, K, pieces, steps, *numbers,
            SPLIT=len(held), **kinds, **blocks, num_warps=tile.warps,
        )  # fmt: skip
        return found

    halves = p.y.tiled("gated_film_bwd", run)
    found = (
        p.gradient(t, each, parts) if a else x.new_empty(0)
        for a, t, each, parts in zip(asked, conditions, of_each, halves, strict=True)
    )
    return p.view.restored(dx, x) if of_x else x.new_empty(0), *found


_CONDITIONS = "Tensor? condition, Tensor? condition_added"
register(f"gated_film_fwd_triton(Tensor x, {_CONDITIONS}, {schema(Options)}) -> Tensor", forward)
register(
    f"gated_film_bwd_triton(Tensor grad_output, Tensor x, {_CONDITIONS}, {schema(Options)}, int output_mask) "
    "-> (Tensor grad_x, Tensor grad_condition, Tensor grad_condition_added)",
    backward,
)


def kernels(dtypes=(torch.float32, torch.bfloat16), target=("cuda", 90)) -> list[Kernel]:
    """Every kernel as typical calls launch it: maps and sequences with a condition for each batch element or each
    place, short rows, a pair, and none."""

    def call(dtype, shape, channel_dim, condition=None, added=None):
        x = torch.empty(shape, dtype=dtype, device="meta")
        half = [n // 2 if d == channel_dim else n for d, n in enumerate(shape)]
        conditions = (
            None if condition is None else x.new_empty(condition),
            None if added is None else x.new_empty(added, dtype=torch.float32),
        )
        forward(x, *conditions, channel_dim)
        backward(x.new_empty(half), x, *conditions, channel_dim, 0b111)

    maps, tokens = (32, 256, 32, 32), (8, 1024, 512)
    cases = (
        (maps, 1, (32, 256)),
        (maps, 1, maps),
        (tokens, 2, (8, 512)),
        (tokens, 2, tokens, (512,)),
        ((32, 256, 7, 7), 1, (32, 256)),
        (maps, 1),
    )
    calls = (partial(call, dtype, *case) for dtype in dtypes for case in cases)
    return distinct(kernel for of in calls for kernel in recorded(of, target))
