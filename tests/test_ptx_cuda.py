"""CUDA C++ kernels as nvcc compiles them, run as PTX behind their own launchers.

The emulator (tests/cuda_emulator) runs what g++ makes of the same source; this runs what a GPU would be given.
"""

import pytest
import torch
from ptx import nvcc
from test_additive_attention import make_inputs, shape

test_cuda_additive_attention = pytest.importorskip("test_cuda_additive_attention")
test_cuda_film = pytest.importorskip("test_cuda_film")


def executed(name):
    """The module; a test that ran none of its PTX fails."""
    if reason := nvcc.missing():
        pytest.skip(reason)
    module = nvcc.load(name)
    before = sum(module.executed.values())
    yield module
    assert sum(module.executed.values()) > before, "no instruction was executed"


@pytest.fixture
def film():
    yield from executed("film")


@pytest.fixture
def attention():
    yield from executed("additive_attention")


# Runs with head, packs and tail; several pieces of a run; rows by packs and by single channels.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 1, 3, 63), (1, 1, 1, 17001), (3, 5, 7, 1), (2, 40, 16, 1)])
def test_film(film, shape, dtype):
    test_cuda_film.check(film, shape, dtype, activation="gelu")


@pytest.mark.parametrize("activation", test_cuda_film.ACTIVATIONS)
def test_film_activations(film, activation):
    test_cuda_film.check(film, (2, 1, 3, 70), activation=activation, gamma_offset=1.0, offset=1)


# One query, few of them, tiles; each over two tiles of keys, with keys beyond the range of the paired loops.
@pytest.mark.parametrize(("Tq", "keep_scores"), [(1, True), (3, True), (17, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_additive_attention(attention, Tq, dtype, keep_scores):
    inputs = make_inputs(shape(1, Tq, 70, 33, 9), dtype)
    inputs[1][0, 65] *= 30
    test_cuda_additive_attention.check(attention, inputs, keep_scores, key_lengths=torch.tensor([69]))


def test_additive_attention_in_tf32(attention):
    test_cuda_additive_attention.check_tf32(attention, shape(1, 17, 70, 9, 66))
