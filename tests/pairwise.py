"""Fewer cases than the product of several options: any two values of different options still meet in one of them.

A fault that needs one option, or two at once, shows as in the product; what takes three at once is left to
``make test-all``, which runs the product (FUSEDATTN_TESTS=all), and to hypothesis.
"""

import itertools
from collections.abc import Iterable

import pytest
from choose import TESTS

EVERYTHING = TESTS == "all"


def pairs(row: list[tuple[int, int]]) -> set[tuple]:
    """The pairs in a row, which says by number which value an option has."""
    return set(itertools.combinations(sorted(row), 2))


def rows(options: list[list]) -> list[tuple]:
    """Of the product of the options' values, few rows that hold every pair; the same ones every time."""
    numbered = [[(n, number) for number in range(len(values))] for n, values in enumerate(options)]
    missing = {
        pair for one, other in itertools.combinations(numbered, 2) for pair in itertools.product(one, other)
    }
    found = []
    while missing:
        row = list(min(missing))
        for n, choices in enumerate(numbered):
            if n not in dict(row):
                row.append(max(choices, key=lambda choice: len(missing & pairs([*row, choice]))))
        missing -= pairs(row)
        found.append(tuple(options[n][number] for n, number in sorted(row)))
    return found


def pairwise(**options: Iterable):
    """``pytest.mark.parametrize`` over three options or more by name: in pairs, or all in all if EVERYTHING."""
    values = [list(of) for of in options.values()]
    chosen = list(itertools.product(*values)) if EVERYTHING else rows(values)
    return pytest.mark.parametrize(tuple(options), chosen)


def in_dtypes(sizes: list, every_kernel: list, dtypes: tuple):
    """The same over ``sizes`` and ``dtype``: all sizes in the first dtype, those of ``every_kernel`` in each."""
    chosen = [
        (of, dtype)
        for of, dtype in itertools.product(sizes, dtypes)
        if EVERYTHING or dtype == dtypes[0] or of in every_kernel
    ]
    return pytest.mark.parametrize(("sizes", "dtype"), chosen)
