"""FiLM's CUDA kernels, run on the CPU (tests/cuda_emulator): values and all gradients within tests/tolerance.py.

What the kernels and their launchers do is tested here, on x as (B, M, C, N) in memory order; tests/test_cuda.py
runs the whole op on a GPU.
"""

import functools

import pytest
import test_film
import torch
from cuda_emulator.arrays import array, name, poisoned
from pairwise import EVERYTHING, in_dtypes
from torch.autograd import Function

from fusedattn._conditioning import ACTIVATIONS

# Runs (N > 1) with head, packs and tail; rows by packs and by single channels, in several pieces.
EVERY_KERNEL = [(1, 2, 5, 129), (2, 9, 1064, 1), (1, 300, 24, 1), (3, 5, 7, 1)]
SHAPES = [
    *EVERY_KERNEL,
    (1, 1, 1, 2),
    (2, 1, 3, 63),
    (2, 1, 2, 1030),
    (1, 1, 1, 17001),  # several pieces
    (1, 1, 1, 1),
    (2, 40, 16, 1),
]
# Few threads, and yet more than one warp.
SMALL = [(2, 1, 2, 1030), (1, 1, 3, 130), (3, 5, 7, 1), (2, 40, 8, 1)]


@pytest.fixture(scope="module")
def module(emulated):
    return emulated("film")


class EmulatedFilm(Function):
    @staticmethod
    def forward(module, offset, x, gamma, beta, residual, gamma_offset, activation):
        """offset: by how many elements every array but the parameters is displaced from a 16-byte boundary."""
        y = displaced(poisoned(x.shape, x.dtype), offset)
        x, residual = (None if t is None else displaced(t, offset) for t in (x, residual))
        arrays = [array(t) for t in (x, gamma, beta)]
        module.film_fwd(name(x.dtype), *arrays, array(residual), (2, gamma_offset, activation), array(y))
        return y.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.module, ctx.offset, *tensors, gamma_offset, activation = inputs
        ctx.options = (2, gamma_offset, activation)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, dy):
        x, gamma, beta, residual = ctx.saved_tensors
        dx = displaced(poisoned(x.shape, x.dtype), ctx.offset)
        dgamma, dbeta = (None if t is None else poisoned(t.shape, t.dtype) for t in (gamma, beta))
        arrays = [array(t) for t in (displaced(dy, ctx.offset), displaced(x, ctx.offset), gamma, beta)]
        outputs = [array(t) for t in (dx, dgamma, dbeta)]
        ctx.module.film_bwd(name(x.dtype), *arrays, ctx.options, *outputs)
        return None, None, dx.clone(), dgamma, dbeta, None if residual is None else dy, None, None


def displaced(t, offset):
    """A copy of t that begins ``offset`` elements into its memory and ends where that ends."""
    memory = torch.empty(offset + t.numel(), dtype=t.dtype, device="cpu")
    return memory[offset:].view(t.shape).copy_(t)


def emulated_film(module, x, gamma, beta, *, residual, channel_dim, gamma_offset=0.0, activation=None, offset=0):
    if channel_dim != 2:
        raise ValueError("the tests of this file keep the channels at dimension 2 of (B, M, C, N)")
    number = list(ACTIVATIONS).index(activation)
    return EmulatedFilm.apply(module, offset, x, gamma, beta, residual, gamma_offset, number)


def check(module, shape, dtype=torch.float32, absent=(), shared=(), offset=0, **options):
    inputs = test_film.make_inputs(shape, 2, dtype, shared) | dict.fromkeys(absent)
    kernel = functools.partial(emulated_film, module, offset=offset)
    return test_film.check(inputs, kernel, channel_dim=2, **options)


@pytest.mark.sanitized
@in_dtypes(SHAPES, EVERY_KERNEL, test_film.DTYPES)
def test_matches_the_reference(module, sizes, dtype):
    check(module, sizes, dtype, activation="silu")


@pytest.mark.skipif(not EVERYTHING, reason="nine million elements: in make test-all")
def test_threads_take_more_rows_where_there_are_blocks_enough(module):
    check(module, (1, 36000, 255, 1))  # 17 rows each, and one left over


@pytest.mark.parametrize("dtype", test_film.DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(module, activation, dtype):
    for shape in ((2, 1, 3, 70), (2, 6, 48, 1)):
        check(module, shape, dtype, activation=activation, gamma_offset=1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wide", [("gamma",), ("beta",), ("gamma", "beta")], ids="+".join)
def test_float32_parameters_beside_half_precision(module, wide, dtype):
    for shape in ((2, 1, 3, 70), (2, 6, 48, 1), (3, 19, 7, 1)):
        inputs = test_film.make_inputs(shape, 2, dtype, shared=wide[1:])
        inputs |= {name_: inputs[name_].float() * 1.0001 for name_ in wide}  # no longer a number of half precision
        test_film.check(inputs, functools.partial(emulated_film, module), channel_dim=2, activation="silu")


@pytest.mark.parametrize("shared", [(), ("gamma",), ("gamma", "beta")], ids=lambda s: "+".join(s) or "none")
@pytest.mark.parametrize(
    "absent", [(), ("gamma",), ("beta",), ("residual",), test_film.NAMES[1:]], ids=lambda s: "+".join(s) or "none"
)
def test_optional_and_shared_parameters(module, absent, shared):
    for shape in ((3, 2, 6, 35), (3, 19, 6, 1), (3, 19, 8, 1)):
        check(module, shape, absent=absent, shared=shared, activation="tanh")


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("offset", [1, 3, 4])
def test_unaligned_memory(module, offset, dtype):
    for shape in ((2, 1, 3, 66), (2, 9, 40, 1)):
        check(module, shape, dtype, offset=offset, activation="relu")


@pytest.mark.parametrize("shape", [(2, 1, 3, 66), (2, 9, 40, 1)])
def test_arrays_at_different_distances_from_a_boundary(module, shape):
    x = displaced(torch.randn(shape), 1)
    y = poisoned(shape, x.dtype)
    module.film_fwd("float32", array(x), None, None, array(displaced(x, 2)), (2, 0.0, 1), array(y))
    assert torch.equal(y, torch.relu(x) + x)


@pytest.mark.sanitized
@pytest.mark.races
@pytest.mark.parametrize("shape", SMALL)
def test_no_thread_relies_on_luck(module, shape, thread_order):
    """Under ThreadSanitizer a missing barrier is reported, and in other orders it changes the result."""
    module.set_order(thread_order)
    check(module, shape, activation="silu")
    module.set_order(0)


@pytest.mark.parametrize("shape", [(1, 1, 2, 17001), (2, 300, 24, 1), (7, 3, 7, 1)])
def test_the_order_of_threads_changes_no_bit(module, shape):
    results = []
    for seed in (0, 1, 2):
        module.set_order(seed)
        results.append(check(module, shape, activation="gelu"))
    module.set_order(0)
    for name_, result in results[0].items():
        assert all(torch.equal(result, other[name_]) for other in results[1:]), name_


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_infinity_and_huge_values_behave_as_in_the_reference(module, activation):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 90.0, -90.0, 20.0, -20.0, 0.0])
    x = x.view(1, 1, 1, 10)
    y = poisoned(x.shape, x.dtype)
    module.film_fwd("float32", array(x), None, None, None, (2, 0.0, list(ACTIVATIONS).index(activation)), array(y))
    expected = ACTIVATIONS[activation](x.double()).float()
    torch.testing.assert_close(y, expected, equal_nan=True, atol=1e-30, rtol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slopes_of_any_number_are_those_of_the_reference(module, activation):
    test_film.check_slopes_of_any_number(functools.partial(emulated_film, module), activation)
