"""On a GPU: the device computes what the emulator does, results repeat, calls can be captured in a CUDA graph.

The tests of the ops run there too: FUSEDATTN_TEST_DEVICE=cuda pytest tests/test_film.py (benchmarks/gpu/).
"""

import functools

import pytest
import test_additive_attention
import test_cuda_additive_attention
import test_cuda_film
import test_extremes
import test_film
import torch
from device import DEVICE, not_on_the_standin

from fusedattn import _library, additive_attention, film

GPU = "cuda" if DEVICE == "cpu" else DEVICE
pytestmark = pytest.mark.skipif(
    GPU == "cuda" and (_library.CUDA_ERROR is not None or not torch.cuda.is_available()),
    reason=_library.CUDA_ERROR or "there is no GPU",
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def on_the_gpu(poisoned_memory):
    torch.set_default_device(GPU)
    yield
    torch.set_default_device(None)


def on_the_emulator(kernel):
    """The emulated kernel as a function of tensors on the GPU."""

    def function(*tensors, **options):
        options = {name: t.cpu() if isinstance(t, torch.Tensor) else t for name, t in options.items()}
        outputs = kernel(*(t if t is None else t.cpu() for t in tensors), **options)
        return outputs.to(GPU) if isinstance(outputs, torch.Tensor) else tuple(t.to(GPU) for t in outputs)

    return function


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", test_cuda_film.SHAPES)
def test_film_is_as_accurate_as_in_the_emulator(emulated, shape, dtype):
    kernel = functools.partial(test_cuda_film.emulated_film, emulated("film"))
    inputs = test_film.make_inputs(shape, 2, dtype)
    test_film.check(inputs, eager=on_the_emulator(kernel), channel_dim=2, activation="silu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", test_cuda_additive_attention.SHAPES)
def test_additive_attention_is_as_accurate_as_in_the_emulator(emulated, sizes, dtype):
    kernel = functools.partial(test_cuda_additive_attention.emulated_attention, emulated("additive_attention"))
    inputs = test_additive_attention.make_inputs(sizes, dtype)
    test_additive_attention.check(inputs, eager=on_the_emulator(kernel))


@pytest.fixture
def tf32():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def test_tf32_is_as_accurate_as_in_the_emulator(emulated, tf32):
    module = emulated("additive_attention")
    kernel = functools.partial(test_cuda_additive_attention.emulated_attention, module, tf32=True)
    inputs = test_additive_attention.make_inputs(test_additive_attention.shape(2, 70, 83, 17, 70))
    test_additive_attention.check(inputs, eager=on_the_emulator(kernel))


@pytest.mark.parametrize("Tq", [1, 70])
def test_results_repeat_to_the_bit(Tq):
    sizes = test_additive_attention.shape(3, Tq, 700, 33, 17)
    runs = [
        test_additive_attention.run(
            additive_attention, [*test_additive_attention.make_inputs(sizes), torch.randn(700)]
        )
        for _ in range(3)
    ]
    runs_of_film = [
        test_film.run(film, test_film.make_inputs((3, 17, 5000), 1), activation="gelu") for _ in range(3)
    ]
    for first, *others in (runs, runs_of_film):
        for name, result in first.items():
            assert all(torch.equal(result, other[name]) for other in others), name


def capture(function):
    """A CUDA graph of function, after the warm-up that capturing asks for, and its outputs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return graph, outputs


@not_on_the_standin("it has no graphs")
@pytest.mark.parametrize("Tq", [1, 20])
def test_calls_are_captured_in_a_cuda_graph(Tq):
    torch.use_deterministic_algorithms(False)  # its filling of fresh memory is not for a graph
    inputs = test_additive_attention.make_inputs(test_additive_attention.shape(2, Tq, 300, 32, 16))
    x, gamma, beta, residual = test_film.make_inputs((2, 8, 100), 1).values()

    def function():
        return additive_attention(*inputs), film(x, gamma, beta, residual=residual, activation="silu")

    graph, outputs = capture(function)
    for t in (*inputs, x, residual):
        t.mul_(0.5)
    graph.replay()
    torch.testing.assert_close(outputs, function(), rtol=0, atol=0)


def test_tensors_on_several_devices_are_named():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=f"gamma: expected dtype torch.float32 on {GPU}:0 like x, got .* on cpu"):
        film(x, torch.ones(3, device="cpu"))


@not_on_the_standin("the kernels that refuse them are the GPU's")
def test_raw_ops_name_tensors_on_another_device():
    with pytest.raises(RuntimeError, match="gamma: expected a tensor on device cuda:0"):
        torch.ops.fusedattn.film_fwd(
            torch.ones(2, 3), torch.ones(3, device="cpu"), None, None, None, None, 1, 0.0, 0
        )


@not_on_the_standin("it does not count its memory")
def test_training_on_a_long_sequence_takes_linear_memory():
    T = 16384
    inputs = [torch.randn(1, T, 64, requires_grad=True) for _ in range(3)] + [torch.randn(64, requires_grad=True)]
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    additive_attention(*inputs).sum().backward()
    # Triton holds some 32 MiB of scores at a time, and their gradients; all of them would be 1 GiB.
    assert torch.cuda.max_memory_allocated() - before < 256 << 20


test_products_of_sizes_beyond_64_bits = test_extremes.test_products_of_sizes_beyond_64_bits


def test_key_lengths_out_of_range_are_clamped():
    inputs = test_additive_attention.make_inputs(test_additive_attention.shape(2, 3, 5, 4))
    actual = additive_attention(*inputs, key_lengths=torch.tensor([-3, 99]))
    torch.testing.assert_close(actual, additive_attention(*inputs, key_lengths=torch.tensor([0, 5])))
