"""CUDA C++ kernels as nvcc compiles them, run as PTX behind their own launchers.

The emulator (tests/cuda_emulator) runs what g++ makes of the same source; this runs what a GPU would be given.
"""

import re
import subprocess

import numpy as np
import ptx
import pytest
import torch
from cuda_emulator.arrays import array
from ptx import nvcc
from test_additive_attention import make_inputs, shape
from test_additive_attention_bias import BIASES

from fusedattn import _philox

test_cuda_additive_attention = pytest.importorskip("test_cuda_additive_attention")
test_cuda_film = pytest.importorskip("test_cuda_film")

pytestmark = pytest.mark.compiled


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


@pytest.mark.parametrize(("Tq", "keep_scores"), [(1, True), (3, True), (17, False)])
def test_options_of_additive_attention(attention, Tq, keep_scores):
    options = {"activation": "leaky_relu", "dropout_p": 0.4, "window_size": (9, 3)}
    centers = torch.randint(-5, 75, (1, Tq))
    seed = torch.tensor([0x123456789ABCDEF])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_philox, "draw_seed", lambda device, generator=None: seed)
        inputs = make_inputs(shape(1, Tq, 70, 33, 9))
        test_cuda_additive_attention.check(attention, inputs, keep_scores, window_center=centers, **options)


# Each with another sum of its gradient.
@pytest.mark.parametrize(
    ("Tq", "keep_scores", "kind"),
    [(1, True, "one"), (3, True, "queries"), (17, False, "keys"), (17, True, "full")],
)
def test_bias_of_additive_attention(attention, Tq, keep_scores, kind):
    bias = BIASES[kind](2, None, Tq, 70)
    inputs = [*make_inputs(shape(2, Tq, 70, 9, 3)), bias]
    test_cuda_additive_attention.check(attention, inputs, keep_scores, softcap=2.0)


def test_additive_attention_in_tf32(attention):
    test_cuda_additive_attention.check_tf32(attention, shape(1, 17, 70, 9, 66))


SM_75 = """
#include "product.cuh"
using namespace fusedattn;
template __global__ void fusedattn::product_kernel<__half>(const __half*, const __half*, float*);
__global__ void round_kernel(const float* x, __nv_bfloat16* rounded, float* result) {
  rounded[threadIdx.x] = gpu::to_storage<__nv_bfloat16>(x[threadIdx.x]);
  result[threadIdx.x] = gpu::to_arithmetic(rounded[threadIdx.x]);
}
"""


@pytest.fixture(scope="module")
def sm_75(tmp_path_factory):
    """The kernels above for compute capability 7.5, by name: it multiplies matrices and rounds by other code."""
    if reason := nvcc.missing():
        pytest.skip(reason)
    source = tmp_path_factory.mktemp("sm_75") / "kernels.cu"
    source.write_text(SM_75)
    text = source.with_suffix(".ptx")
    includes = [f"-I{folder}" for folder in (nvcc.ROOT / "csrc", nvcc.BINDINGS)]
    subprocess.run(["nvcc", "-std=c++17", "-ptx", "-arch=compute_75", *includes, source, "-o", text], check=True)
    names = re.findall(r"\.entry (\w+)", text.read_text())
    return {re.search(r"[a-z]+_kernel", name)[0]: ptx.parse(text.read_text(), name) for name in names}


def test_tensor_cores_of_7_5(sm_75):
    a, b = (torch.randint(-9, 9, shape).half() for shape in ((16, 16), (16, 8)))
    c = np.full((16, 8), np.nan, np.float32)
    ptx.launch(sm_75["product_kernel"], (1,), 32, [array(a), array(b), c])
    assert torch.equal(torch.from_numpy(c), a.float() @ b.float())


def test_rounding_to_bfloat16_on_7_5(sm_75):
    bits = torch.tensor([0x3F807FFF, 0x3F808000, 0x3F808001, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0x00018000, 1])
    x = torch.cat([bits.int().view(torch.float32), torch.randn(24)])
    x = torch.cat([x, -x, torch.tensor([float("nan")] * 64)])
    rounded, result = np.zeros(128, np.uint16), np.zeros(128, np.float32)
    ptx.launch(sm_75["round_kernel"], (1,), 128, [x.numpy(), rounded, result])
    expected, exact = x.bfloat16(), dict(rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(torch.from_numpy(rounded).view(torch.bfloat16), expected, **exact)
    torch.testing.assert_close(torch.from_numpy(result), expected.float(), **exact)
