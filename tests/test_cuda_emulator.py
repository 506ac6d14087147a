"""The emulator that runs CUDA kernels on the CPU (tests/cuda_emulator): what it computes, and what it reports.

A clean run proves nothing unless a wrong kernel fails it: bugs are planted in a copy of the real kernels
(cuda_emulator/planted.py), and the same tests must report each of them.
"""

import os

import numpy as np
import pytest
import test_cuda_additive_attention
import test_cuda_film
import torch
from cuda_emulator import build, planted
from cuda_emulator.arrays import array, name, poisoned
from test_additive_attention import make_inputs, shape

KERNEL_TESTS = sorted(
    str(p) for p in (build.ROOT / "tests").glob("test_cuda_*.py") if p.name != "test_cuda_emulator.py"
)


@pytest.fixture(scope="module")
def module(emulated):
    return emulated("emulator")


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
def test_tensor_cores_multiply_matrices(module, dtype):
    K = 8 if dtype == torch.float32 else 16
    # Integers that every type holds exactly, so that the order of the sum does not matter.
    a, b = (torch.randint(-9, 9, shape).to(dtype) for shape in ((16, K), (K, 8)))
    c = poisoned((16, 8), torch.float32)
    module.product(name(dtype), array(a), array(b), array(c))
    assert torch.equal(c, a.float() @ b.float())


def test_tf32_keeps_ten_bits_of_the_mantissa(module):
    a, b = torch.zeros(16, 8), torch.eye(8)
    a[0, :4] = torch.tensor([1 + 2**-10, 1 + 2**-11, 1 + 2**-12, -1 - 2**-11])
    c = poisoned((16, 8), torch.float32)
    module.product("float32", array(a), array(b), array(c))
    assert c[0, :4].tolist() == [1 + 2**-10, 1 + 2**-10, 1, -1 - 2**-10]


def test_collectives(module, thread_order):
    module.set_order(thread_order)
    out = np.zeros((64, 4), np.int64)
    module.collectives(out)
    module.set_order(0)
    n = np.arange(64)
    np.testing.assert_array_equal(out[:, 0], np.where(n < 32, n[:32].sum(), n[32:].sum()))
    np.testing.assert_array_equal(out[:, 1], np.where(n % 32 == 0, n, n - 1))
    np.testing.assert_array_equal(out[:, 2], 0xAAAAAAAA)
    np.testing.assert_array_equal(out[:, 3], 40)


NOTHING_WRONG = 4


@pytest.mark.parametrize(
    ("kind", "grid", "block", "shared_bytes", "report"),
    [
        (0, 1, 64, 0, "a barrier that not all threads reach"),
        (1, 1, 64, 0, "a barrier that not all threads reach"),
        (2, 1, 64, 0, "reads lane 20, which is not in the mask"),
        (3, 1, 64, 0, "threads meet at different barriers"),
        (NOTHING_WRONG, 0, 64, 0, "no GPU has a grid of (0, 1, 1) blocks"),
        (NOTHING_WRONG, 2**31, 64, 0, "expected at most 2147483647 blocks, but these sizes need 2147483648"),
        (NOTHING_WRONG, 1, 1025, 0, "no GPU has a block of (1025, 1, 1) threads"),
        (NOTHING_WRONG, 1, 32, 100 << 10, "shared memory: expected at most 101376 bytes"),
    ],
)
def test_misuse_is_an_error_that_names_the_kernel(module, kind, grid, block, shared_bytes, report):
    with pytest.raises(RuntimeError) as caught:
        module.misuse(kind, grid, block, shared_bytes)
    assert "misuse_kernel" in str(caught.value)
    assert report in str(caught.value)
    module.misuse(NOTHING_WRONG, 1, 64, 0)  # the next launch works


@pytest.fixture
def module_75(module):
    module.set_architecture(75)
    yield module
    module.set_architecture(80)


def test_7_5_has_less_memory_and_half_precision_on_tensor_cores_alone(module_75):
    with pytest.raises(RuntimeError, match="shared memory: expected at most 65536 bytes, which every sm_75 has"):
        module_75.misuse(NOTHING_WRONG, 1, 32, 65 << 10)
    a, b = torch.ones(16, 16, dtype=torch.bfloat16), torch.ones(16, 8, dtype=torch.bfloat16)
    c = poisoned((16, 8), torch.float32)
    with pytest.raises(RuntimeError, match="tensor cores before 8.0 have half alone"):
        module_75.product("bfloat16", array(a), array(b), array(c))
    module_75.product("float16", array(a.half()), array(b.half()), array(c))
    assert (c == 16).all()


@pytest.fixture(scope="module")
def film_with_bugs(emulated):
    return build.load("film", planted.sources())


@pytest.fixture(scope="module")
def attention_with_bugs(emulated):
    return build.load("additive_attention", planted.sources())


def check_film(module):
    for sizes in test_cuda_film.SMALL:
        test_cuda_film.check(module, sizes, activation="silu")


def check_attention(module):
    for sizes in (shape(2, 7, 35, 20, 9), shape(1, 66, 67, 33, 65)):
        test_cuda_additive_attention.check(module, make_inputs(sizes), is_causal=True)


# Whom a bug is shown to, and what must be reported without a sanitizer.
REPORTED = {
    "missing-barrier": (check_film, "grad_gamma: NaN at other positions than the reference"),
    "missing-barrier-between-tiles": (check_attention, "context: error"),
    "barrier-after-an-early-return": (check_film, "a barrier that not all threads reach"),
    "elements-left-unwritten": (check_film, "y: NaN at other positions than the reference"),
    "wrong-mask": (check_attention, "context: error"),
    "tile-of-a-window-left-out": (check_attention, "context: NaN at other positions than the reference"),
}


@pytest.mark.parametrize("bug", REPORTED)
def test_planted_bugs_are_reported(film_with_bugs, attention_with_bugs, bug):
    check, report = REPORTED[bug]
    module = film_with_bugs if check is check_film else attention_with_bugs
    check(module)
    module.show_bug(planted.number(bug))
    try:
        with pytest.raises((AssertionError, RuntimeError)) as caught:
            check(module)
    finally:
        module.show_bug(0)
    assert report in str(caught.value)


# Under sanitizers


def run_tests(variant, *selection, **options):
    """pytest in a process of its own; a report of a sanitizer ends it."""
    arguments = ["-m", "pytest", "-q", "-x", "--capture=sys", "-p", "no:cacheprovider", *selection]
    result = build.python(variant, *arguments, capture_output=True, text=True, cwd=build.ROOT, **options)
    return result.returncode, result.stdout + result.stderr


@pytest.mark.sanitizers
@pytest.mark.parametrize(("variant", "marker"), [("address", "sanitized"), ("thread", "races")])
def test_kernels_under_a_sanitizer(emulated, variant, marker):
    status, report = run_tests(variant, "-m", marker, *KERNEL_TESTS)
    assert status == 0, report
    assert "skipped" not in report, report


FILM = ["tests/test_cuda_film.py", "-m", "races"]
ATTENTION = ["tests/test_cuda_additive_attention.py", "-m", "races", "-k", "tiles-float32"]


@pytest.mark.sanitizers
@pytest.mark.parametrize(
    ("bug", "variant", "tests", "expected"),
    [
        ("overrun-of-an-array", "address", FILM, "AddressSanitizer: heap-buffer-overflow"),
        ("overrun-of-shared-memory", "address", FILM, "AddressSanitizer: heap-buffer-overflow"),
        ("missing-barrier", "thread", FILM, "ThreadSanitizer: data race"),
        ("missing-barrier-between-tiles", "thread", ATTENTION, "ThreadSanitizer: data race"),
    ],
)
def test_sanitizers_report_planted_bugs(emulated, bug, variant, tests, expected):
    shown = {build.CSRC_VARIABLE: str(planted.sources()), build.BUG_VARIABLE: str(planted.number(bug))}
    status, report = run_tests(variant, *tests, variables=shown)
    assert status != 0, "the planted bug was not reported"
    assert expected in report, report
    file, *_ = planted.BUGS[bug]
    assert os.path.basename(file) in report, report  # where it is
