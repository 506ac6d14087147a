"""What the tests run on, by environment variables; conftest.py puts them into effect.

FUSEDATTN_TEST_DEVICE=cuda      tensors that tests make without naming a device are made there. ``standin`` is a
                                device for machines without a GPU, which refuses what a GPU would (standin.py)
FUSEDATTN_TEST_BACKEND=triton   what backend="auto" takes, and whose raw operators are tested
TRITON_INTERPRET=1              the same on the CPU, in Triton's interpreter (triton_interpreter.py): slow, and
                                meant for tests marked ``interpreted``
"""

import os
import sys

import pytest
import torch
from choose import TESTS
from hypothesis import assume
from pairwise import EVERYTHING

from fusedattn import _dispatch

DEVICE = os.environ.get("FUSEDATTN_TEST_DEVICE", "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKEND = os.environ.get("FUSEDATTN_TEST_BACKEND", "triton" if INTERPRETED else "auto")

cpu_alone = pytest.mark.skipif(DEVICE != "cpu", reason="concerns the CPU alone")


def not_on_the_standin(reason: str):
    return pytest.mark.skipif(DEVICE == "standin", reason=reason)


def examples(n: int) -> int:
    """How many hypothesis draws: few where the same test has run in full elsewhere; a night has time for more."""
    return min(n, 10) if DEVICE == "standin" or TESTS == "values" else 10 * n if EVERYTHING else n


def off_the_kink(activation: str | None, z: torch.Tensor) -> None:
    """Lets hypothesis draw again where relu's slope is that of a rounding error."""
    assume(activation != "relu" or bool(((z == 0) | (z.abs() > 1e-5)).all()))


def raw_op(name: str):
    """The raw operator of the backend under test: Triton's have names of their own."""
    return getattr(torch.ops.fusedattn, f"{name}_triton" if BACKEND == "triton" else name)


def replace_in_package(old, new) -> None:
    """Puts a function in another's place wherever fusedattn has imported or listed it."""
    for module in [m for name, m in sys.modules.items() if name.partition(".")[0] == "fusedattn"]:
        for container in (vars(module), *(x for x in vars(module).values() if type(x) is dict)):
            for name in [name for name, value in container.items() if value is old]:
                container[name] = new


def force_backend() -> None:
    choose = _dispatch.choose

    def choose_under_test(op, requested, *rest):
        return choose(op, BACKEND if requested == "auto" else requested, *rest)

    replace_in_package(choose, choose_under_test)
