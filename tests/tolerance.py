"""The tolerance of every test that compares a kernel with PyTorch: derived, never picked by hand.

Let ``ref64`` be the result in float64, ``eager`` PyTorch's in the dtype under test and ``actual`` ours. Then::

    max |actual - ref64|  <=  2 max |eager - ref64| + floor

A kernel sums in another order than eager, so twice eager's error is what equal accuracy may look like. The floor
is needed where eager happens to be exact (a row of one key, a sum of one term, float64)::

    floor = u max|ref64| + 2 u_inner m sqrt(terms) + tiny       u = eps(dtype) / 2, u_inner = eps(arithmetic) / 2

Where factors of products may be rounded to a coarser type first (``factor_eps``, say TF32_EPS), each of the two is
off by up to factor_eps / 2, so a sum by factor_eps times that of the magnitudes of its terms.

u max|ref64| is the one rounding of an output to its dtype; tiny is that of a subnormal one. Everything before is
at least float32: each term of a sum carries a few roundings of its own (of unit size, independent: 2 u_inner), and
the error of adding n of them grows as the root of n (Higham, Accuracy and Stability of Numerical Algorithms,
section 2.8). The magnitude m is ``scale`` where sums cancel (pass that of the terms), else max |ref64|. NaN and
infinities must stand at the same positions.
"""

import math

import torch
from torch import Tensor

TF32_EPS = 2.0**-10


def rounding_floor(dtype: torch.dtype, magnitude: float, terms: int = 1, scale: float | None = None) -> float:
    """The error that rounding alone may cause in results of this magnitude, sums of terms of ``scale``."""
    inner = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    own = torch.finfo(dtype)
    scale = magnitude if scale is None else scale
    return magnitude * own.eps / 2 + scale * inner * math.sqrt(max(terms, 1)) + own.smallest_normal * own.eps


def assert_close_to_reference(
    actual: Tensor,
    eager: Tensor,
    reference64: Tensor,
    *,
    terms: int = 1,
    name: str = "",
    scale: float | None = None,
    factor_eps: float = 0.0,
) -> None:
    """Asserts that ``actual`` is as near to ``reference64`` as PyTorch in the same dtype (see the module's head).

    Args:
        actual: the result under test; its dtype and shape must be those of ``eager``.
        eager: PyTorch's result in the same dtype.
        reference64: the result in float64 of the same (rounded) inputs.
        terms: how many terms the longest sum has.
        name: what is compared, for the message.
        scale: magnitude of the terms where they cancel; default: the largest finite |reference64|.
        factor_eps: epsilon of the type that factors of products may be rounded to; 0 where they are not.
    """
    name = name or "result"
    if actual.shape != reference64.shape or actual.dtype != eager.dtype:
        raise AssertionError(
            f"{name}: expected {eager.dtype} {tuple(reference64.shape)}, got {actual.dtype} {tuple(actual.shape)}"
        )
    got, plain, exact = (t.detach().to(torch.float64) for t in (actual, eager, reference64))
    # What overflows the dtype in eager is compared as an infinity there, not as a float64 number.
    exact = torch.where(exact.abs() > torch.finfo(actual.dtype).max, exact.sign() * math.inf, exact)
    for kind, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = test(got) != test(exact)
        if wrong.any():
            where = wrong.nonzero()[0].tolist()
            raise AssertionError(
                f"{name}: {kind} at other positions than the reference ({int(wrong.sum())} of {wrong.numel()}), "
                f"first at {where}: got {got[tuple(where)]:.9g}, expected {exact[tuple(where)]:.9g}"
            )
    finite = torch.isfinite(exact)
    if not finite.any():
        return
    error = torch.where(finite, (got - exact).abs(), 0.0)
    eager_error = (plain - exact)[finite & torch.isfinite(plain)].abs()
    magnitude = exact[finite].abs().max().item()
    allowed = 2 * (eager_error.max().item() if eager_error.numel() else 0.0)
    allowed += rounding_floor(actual.dtype, magnitude, terms, scale)
    allowed += factor_eps * (magnitude if scale is None else scale)
    worst = error.max().item()
    if not worst <= allowed:
        where = tuple((error == worst).nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: error {worst:.3e} exceeds {allowed:.3e} (twice eager's plus rounding), "
            f"worst at {list(where)}: got {got[where]:.9g}, expected {exact[where]:.9g}"
        )
