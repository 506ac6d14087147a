"""CUDA C++ kernels as nvcc compiles them, run as PTX behind their own launchers.

The emulator (tests/cuda_emulator) runs what g++ makes of the same source; this runs what a GPU would be given.
"""

import pytest
import torch
from ptx import nvcc

test_cuda_film = pytest.importorskip("test_cuda_film")


@pytest.fixture(scope="module")
def film():
    if reason := nvcc.missing():
        pytest.skip(reason)
    return nvcc.load("film")


# Runs with head, packs and tail; several pieces of a run; rows by packs and by single channels.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 1, 3, 63), (1, 1, 1, 17001), (3, 5, 7, 1), (2, 40, 16, 1)])
def test_film(film, shape, dtype):
    test_cuda_film.check(film, shape, dtype, activation="gelu")


@pytest.mark.parametrize("activation", test_cuda_film.ACTIVATIONS)
def test_film_activations(film, activation):
    test_cuda_film.check(film, (2, 1, 3, 70), activation=activation, gamma_offset=1.0, offset=1)
