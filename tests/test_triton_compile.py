"""What is compiled of the Triton kernels, with neither GPU nor driver: every activation, and few specialisations.

What the interpreter accepts may not compile. ``make gates`` compiles every kernel for every supported GPU and
judges the machine code.
"""

import functools
import importlib.util
import math
import os
import random

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled under TRITON_INTERPRET=1", allow_module_level=True)

from fusedattn._options import AdditiveAttentionOptions as Options  # noqa: E402
from fusedattn.triton import additive_attention, film, film_problem, norm_film
from fusedattn.triton._common import recorded

pytestmark = pytest.mark.compiled


def film_call(shape, channel_dim, activation=0, shared=False, dtype=torch.float32):
    x = torch.empty(shape, dtype=dtype, device="meta")
    C = x.shape[channel_dim]
    gamma = torch.empty((C,) if shared else (shape[0], C), dtype=dtype, device="meta")
    film.forward(x, gamma, *(None,) * 4, channel_dim, 0.0, activation)
    film.backward(x, x, gamma, *(None,) * 3, channel_dim, 0.0, activation, 0b11)


@pytest.mark.parametrize("activation", range(film_problem.ACTIVATIONS))
def test_every_activation_compiles(activation):
    for dtype, target in ((torch.float32, ("cuda", 90)), (torch.float64, ("hip", "gfx942"))):
        for kernel in recorded(lambda: film_call((2, 3, 40), 1, activation, dtype=dtype)):  # noqa: B023
            kernel.compile(*target)


@pytest.mark.parametrize("shape, channel_dim", [((8, 64, 14, 14), 1), ((8, 50, 100), 2)], ids=["runs", "rows"])
@pytest.mark.parametrize("dtype, width", [(torch.float32, "v4.b32"), (torch.bfloat16, "v2.b32")])
def test_multiples_of_4_are_loaded_4_at_a_time(shape, channel_dim, dtype, width):
    for kernel in recorded(lambda: film_call(shape, channel_dim, dtype=dtype))[:2]:
        code = kernel.compile("cuda", 90).asm["ptx"]
        assert f"ld.global.{width}" in code and f"st.global.{width}" in code


@pytest.mark.parametrize(("layout", "most"), [("runs", 7), ("rows", 4)])
def test_random_lengths_compile_few_kernels(layout, most):
    """Runs: with loads of 16 bytes, of four elements or of one. Rows: with two tiles for adding up the pieces."""
    chosen = random.Random(0).sample(range(500, 2000), 50)
    found = set()
    for n in chosen:
        shape, channel_dim = ((8, 64, n), 1) if layout == "runs" else ((8, n, 64), 2)
        found.update(k.specialisation for k in recorded(lambda: film_call(shape, channel_dim)))  # noqa: B023
    assert len(found) <= most


def test_what_is_recorded_is_what_triton_specialises():
    """N a multiple of 16 and a channel stride of 1 are noted; sizes that need no kernel of their own are not."""
    forward, backward = recorded(lambda: film_call((2, 3, 64), 1))
    assert forward.function is film.film_fwd_kernel_runs and backward.function is film.film_bwd_kernel_runs
    assert "N" in forward.divisible and "R" not in forward.divisible
    assert forward.constexprs["gamma_c"] == 1 and forward.signature["BETA"] == "constexpr"
    assert forward.signature["C"] == "i32"


def test_pointers_into_less_than_2_gib_are_addressed_in_32_bits_on_amd():
    """As Triton's launcher has it there."""
    gamma = torch.empty(1, 2, device="meta")
    small, large = (
        recorded(lambda: film.forward(torch.empty(1, 2, n, device="meta"), gamma, *(None,) * 4, 1, 0.0, 0))[0]  # noqa: B023
        for n in (1 << 10, 1 << 28)
    )
    assert {"X", "Y", "GAMMA"} <= set(small.near)
    assert "GAMMA" in large.near and not {"X", "Y"} & set(large.near)
    for kernel in (small, large):
        assert kernel.compile("hip", "gfx942").asm["ttir"].count("tt.pointer_range = 32") == len(kernel.near)
        assert "tt.pointer_range" not in kernel.compile("cuda", 90).asm["ttir"]


def test_random_lengths_compile_few_kernels_of_additive_attention():
    """Each kernel once; packing has three tiles, one of them for queries and for keys with lengths, the pass over
    inputs two sides and one sum over splits."""
    generator = torch.Generator().manual_seed(0)
    D, found = 33, set()
    weight, lengths = torch.empty(D, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")
    options = (None, None, lengths, *[None] * 4, *Options(-1, -1, 1.0, 0.0, 0, 0.2))
    for Tq, Tk in torch.randint(17, 2000, (50, 2), generator=generator).tolist():
        inputs = [torch.empty(3, T, D, device="meta") for T in (Tq, Tk, Tk)] + [weight]

        def call(inputs=inputs):
            context, lse, _, scores = additive_attention.additive_attention_fwd(*inputs, *options, False, False)
            additive_attention.additive_attention_bwd(
                context, None, None, *inputs, *options, context, lse, scores, 0b1111
            )

        found.update(kernel.specialisation for kernel in recorded(call))
    assert len(found) <= 12


def test_one_query_of_many_keys_fills_a_large_gpu_in_backward():
    """Each kernel that walks the keys has eight warps for each of 132 multiprocessors."""
    call = functools.partial(additive_attention._typical_call, (1, 1, 100000, 256), torch.float32, False, "tanh")
    found = [kernel for kernel in recorded(call) if "_bwd_" in kernel.name]
    assert len(found) == 4
    for kernel in found:
        assert math.prod(kernel.grid) * kernel.num_warps >= 8 * 132, kernel.name


def norm_film_call(norm, shape, dtype=torch.float32):
    """Of everything that a norm takes, beside what has a value for each place."""
    channel_dim = 2 if norm < norm_film.GROUP else 1
    x = torch.empty(shape, dtype=dtype, device="meta")
    own, sample = x.new_empty(shape[channel_dim]), x.new_empty(shape[0], shape[channel_dim])
    inputs = (x, sample, sample, None, None, own, own, sample, None, x, None, None)
    options = (norm, 4, True, 1e-5, channel_dim, 1.0, film_problem.SILU.value)
    y, h, mean, var = norm_film.forward(*inputs, x, *options)
    norm_film.backward(y, h, *inputs, *options, h, mean, var, (1 << 10) - 1)


@pytest.mark.parametrize("norm, shape", [(0, (8, 50, 100)), (4, (8, 64, 14, 14))], ids=["rows", "maps"])
def test_norms_load_16_bytes_a_thread(norm, shape):
    for kernel in recorded(lambda: norm_film_call(norm, shape)):
        if "_statistics" not in kernel.name and "_means" not in kernel.name:  # of what is small
            code = kernel.compile("cuda", 90).asm["ptx"]
            assert "ld.global.v4.b32" in code
            assert "st.global.v4.b32" in code or "_sums" in kernel.name


def test_random_lengths_compile_few_kernels_of_norms():
    """Rows by their power of two, maps by their alignment and by how many parts are joined."""
    lengths, found = random.Random(0).sample(range(513, 1000), 30), {0: set(), 4: set()}
    for n in lengths:
        for norm, shape in ((0, (8, n, 64)), (4, (8, 16, n))):
            call = functools.partial(norm_film_call, norm, shape)
            found[norm].update(kernel.specialisation for kernel in recorded(call))
    assert len(found[0]) == 2 and len(found[4]) <= 3 * 4 + 2


def test_one_group_of_maps_fills_a_large_gpu():
    """Whatever is as large as x is read by eight warps for each of 132 multiprocessors."""
    for kernel in recorded(functools.partial(norm_film_call, norm_film.GROUP, (1, 4, 1024, 1024))):
        if "_statistics" not in kernel.name and "_means" not in kernel.name:
            assert math.prod(kernel.grid) * kernel.num_warps >= 8 * 132, kernel.name
