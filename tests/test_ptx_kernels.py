"""Every Triton kernel as compiled: the public functions run on tensors of the CPU, their kernels as PTX.

This sees what the interpreter cannot: inline assembly, libdevice, layouts in registers and shared memory,
barriers, tensor cores, masks as predicates. Memory ends where a tensor ends, so a wrong mask is an error.
"""

import functools
import itertools
import os
import re

import ptx
import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are compiled here, not interpreted", allow_module_level=True)

import test_additive_attention
import test_additive_attention_varlen
import test_attention_pool
import test_film
import test_film_parameters
import test_gated_film
import test_hard_additive_attention
import test_location_attention
import test_norm_film
import triton
from ptx.launcher import on_ptx

from fusedattn import (
    _philox,
    additive_attention,
    additive_attention_varlen,
    attention_pool,
    film,
    gated_film,
    location_attention,
    norm_film,
)
from fusedattn._conditioning import ACTIVATIONS
from fusedattn.triton import (
    additive_attention_bwd,
    additive_attention_fwd,
    additive_attention_problem,
    film_broadcast,
    norm_film_maps,
    norm_film_rows,
)
from fusedattn.triton import attention_pool as attention_pool_kernels
from fusedattn.triton import film as film_kernels
from fusedattn.triton import gated_film as gated_film_kernels
from fusedattn.triton import hard_additive_attention as hard_additive_attention_kernels
from fusedattn.triton import location_attention as location_attention_kernels

pytestmark = pytest.mark.compiled

on_triton = functools.partial(functools.partial, backend="triton")
ARCHS = [80, 90]

RUNS, ROWS = ((2, 5, 7, 9), 1), ((2, 19, 37), 2)


def names_of_kernels(*modules) -> set[str]:
    functions = (item for module in modules for item in vars(module).items())
    return {name for name, f in functions if isinstance(f, triton.JITFunction) and "_kernel" in name}


def check_film(shape, channel_dim, dtype=torch.float32, shared=(), absent=(), **options):
    inputs = test_film.make_inputs(shape, channel_dim, dtype, shared)
    inputs |= dict.fromkeys(absent)
    test_film.check(inputs, on_triton(film), channel_dim=channel_dim, **options)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_film_activations(activation):
    with on_ptx(80):
        for shape, channel_dim in (RUNS, ROWS):
            check_film(shape, channel_dim, activation=activation, gamma_offset=1.0)


@pytest.mark.parametrize(
    "dtype, activation",
    [
        (torch.float16, "silu"),
        (torch.bfloat16, "tanh"),
        (torch.float64, None),
        (torch.float64, "gelu"),
        (torch.float64, "tanh"),
    ],
)
def test_film_dtypes(dtype, activation):
    with on_ptx(90):
        for shape, channel_dim in (RUNS, ROWS):
            check_film(shape, channel_dim, dtype, activation=activation)


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "gelu_tanh"])
def test_film_slopes_of_any_number(activation):
    with on_ptx(90):
        test_film.check_slopes_of_any_number(on_triton(film), activation)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_film_kernel(arch):
    with on_ptx(arch) as launches:
        check_film((2, 3, 32, 16), 1, torch.bfloat16)  # 16 bytes a thread
        check_film((1, 3, 2500), 1, shared=("gamma",))  # several pieces of a run
        check_film((2, 700, 17), 2, shared=("gamma", "beta"), activation="relu")  # several pieces of rows
        check_film((2, 3, 6, 6), 1, torch.bfloat16)  # four elements a thread
        check_film((2, 3, 9), 1, absent=("gamma", "residual"))
        check_film((2, 3, 9), 1, absent=("beta",))
    assert set(launches.executed) == names_of_kernels(film_kernels)


@pytest.mark.parametrize("arch", ARCHS)
def test_film_kernels_of_any_shape(arch):
    """Aligned and not, by pairs and by place, with parts to be added and without, in several pieces."""
    cases = (
        ((2, 3, 64), 2, (2, 3, 64), None, (2, 1, 64), None),
        ((2, 3, 20), 2, (2, 3, 20), (20,), (2, 3, 1), (20,)),
        ((2, 40, 3, 3), 1, (2, 1, 3, 3), None, (40,), (1, 40, 1, 3)),
        ((70, 9), 1, (70, 1), None, (1, 9), ()),
        ((2, 3, 20), 2, None, None, (2, 3, 1), (20,)),
    )
    with on_ptx(arch) as launches:
        for (shape, channel_dim, *parameters), dtype in itertools.product(cases, (torch.float32, torch.bfloat16)):
            inputs = test_film_parameters.tensors([shape, *parameters, shape], dtype)
            test_film_parameters.check(inputs, on_triton(film), channel_dim=channel_dim, activation="silu")
    assert set(launches.executed) >= names_of_kernels(film_broadcast)


@pytest.mark.parametrize("arch", ARCHS)
def test_gated_film_kernels(arch):
    """Aligned and not, with parts to be added by halves and without, in several pieces; a condition of its own
    layout, one for all channels, and halves of one channel each."""
    half, single = torch.bfloat16, torch.float32
    cases = (
        ((2, 6, 8, 8), 1, "BC", None, (half, half)),
        ((2, 5, 24), 2, "full", "C", (half, single)),
        ((2, 40, 3, 3), 1, "place", "full", (single, single), "channels_last"),
        ((3, 7, 2), 2, "BC", None, (single, single)),
        ((1, 4, 700), 1, None, None, (half, half)),
    )
    with on_ptx(arch) as launches:
        for case in cases[ARCHS.index(arch) :: len(ARCHS)]:
            test_gated_film.check(*case, function=on_triton(gated_film))
    assert set(launches.executed) == names_of_kernels(gated_film_kernels)


@pytest.mark.parametrize("arch", ARCHS)
def test_attention_pool_kernels(arch):
    """Aligned and not, several pieces and heads, bags of several lengths."""
    shape, dtype, gated = ((2, 150, 32, 3), torch.bfloat16, True) if arch == 80 else ((2, 70, 37, 4), None, False)
    inputs = test_attention_pool.make_inputs(*shape, K=3, gated=gated, dtype=dtype or torch.float32)
    with on_ptx(arch) as launches:
        test_attention_pool.check(inputs, torch.tensor([shape[1], 40]), on_triton(attention_pool))
    assert set(launches.executed) == names_of_kernels(attention_pool_kernels)


@pytest.mark.parametrize("arch", ARCHS)
def test_hard_additive_attention_kernels(arch):
    """Sampled and the most likely key, with a mask and without, over two blocks of keys."""
    dtype, sample, masked = (torch.float32, True, True) if arch == 80 else (torch.float64, False, False)
    inputs = test_hard_additive_attention.make_inputs(2, 3, 140, 4, 2, dtype=dtype)
    visible = torch.rand(2, 3, 140) > 0.3 if masked else None
    with on_ptx(arch) as launches:
        test_hard_additive_attention.check(inputs, visible, mask=visible, sample=sample, backend="triton")
    assert set(launches.executed) >= names_of_kernels(hard_additive_attention_kernels)


@pytest.mark.parametrize("arch", ARCHS)
def test_location_attention_kernels(arch):
    """Projected and folded, over two tiles of keys and of channels, with keys hidden."""
    filters, dtype = ((2, 3, 11), torch.float32) if arch == 80 else ((1, 40, 3), torch.bfloat16)
    inputs = test_location_attention.make_inputs(1, 70, 20, 4, *filters, dtype)
    hidden = test_location_attention.hiding("mask", 1, 70)
    with on_ptx(arch) as launches:
        test_location_attention.check(inputs, hidden, on_triton(location_attention), softcap=2.0)
    assert set(launches.executed) >= names_of_kernels(location_attention_kernels)


def check_norm_film(norm, x, dtype=torch.float32, channel_dim=None, **shapes):
    inputs = test_norm_film.make_inputs({"x": x, **shapes}, dtype)
    options = test_norm_film.options_of(norm) | {"channel_dim": channel_dim}
    test_norm_film.check(inputs, function=on_triton(norm_film), activation="silu", **options)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_norm_film_kernel_of_rows(arch):
    """Aligned and not, parameters held and for each place, rows that a tile holds and longer ones."""
    x, odd, long = (2, 5, 64), (2, 3, 50), (1, 2, 4500)
    with on_ptx(arch) as launches:
        gate = {"pre_gate": (2, 64), "pre_residual": x, "residual": x}
        check_norm_film("layer", x, gamma=(2, 64), gamma_added=x, beta=(64,), weight=(64,), bias=(64,), **gate)
        check_norm_film("rms", odd, torch.bfloat16, gamma=odd, beta=(2, 3, 1), weight=(50,))
        check_norm_film("layer", (4, 40), torch.float64, gamma=(4, 40), bias=(40,))
        check_norm_film("layer", long, gamma=(1, 4500), beta=long, pre_gate=(4500,))
    assert set(launches.executed) == names_of_kernels(norm_film_rows)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_norm_film_kernel_of_maps(arch):
    """Planes and columns of channels, aligned and not, in one piece and in several."""
    with on_ptx(arch) as launches:
        shapes = {"gamma": (2, 6), "beta": (6,), "weight": (6,), "bias": (6,), "pre_gate": (2, 6)}
        check_norm_film("group", (2, 6, 4, 8), **shapes, pre_residual=(2, 6, 4, 8), residual=(2, 6, 4, 8))
        check_norm_film("batch", (2, 9, 16), torch.bfloat16, channel_dim=2, gamma=(2, 16), pre_residual=(2, 9, 16))
        check_norm_film("instance", (2, 3, 3, 3), torch.float64, weight=(3,))
        check_norm_film("batch", (1, 2, 5000), gamma=(2,))
    assert set(launches.executed) == names_of_kernels(norm_film_maps)


SIZES = {
    "tiles": test_additive_attention.shape(2, 19, 77, 21, 33),
    "tall_tiles": test_additive_attention.shape(1, 33, 70, 18, 17),
    "few_queries": test_additive_attention.shape(2, 2, 70, 21, 16),
    "split_keys": test_additive_attention.shape(1, 5, 600, 10, 17),
    "heads": test_additive_attention.shape(1, 5, 17, 12, 8, H=2),
}


def check_attention(sizes, dtype=torch.float32, spread=1.0, **options):
    inputs = test_additive_attention.make_inputs(SIZES[sizes], dtype, spread=spread)
    test_additive_attention.check(inputs, on_triton(additive_attention), **options)


@pytest.mark.parametrize(
    "arch, dtype, cases",
    [
        (80, torch.float32, SIZES),
        (90, torch.bfloat16, SIZES),
        (80, torch.float64, ["few_queries", "split_keys"]),
    ],
    ids=["sm_80-float32", "sm_90-bfloat16", "sm_80-float64"],
)
def test_every_attention_kernel(arch, dtype, cases):
    with on_ptx(arch) as launches:
        for sizes in cases:
            check_attention(sizes, dtype)
        B, _, Tq, Tk, *_ = SIZES["few_queries"].values()
        check_attention("few_queries", dtype, mask=torch.ones(B, Tq, Tk, dtype=torch.bool).tril(3))
        centers = torch.tensor([[3, 80], [64, -9]])
        check_attention("few_queries", dtype, window_size=(9, 5), window_center=centers)
    files = (additive_attention_problem, additive_attention_fwd, additive_attention_bwd)
    assert set(launches.executed) == names_of_kernels(*files)


@pytest.mark.parametrize("arch, lengths", [(80, ([19, 0, 3], [40, 2, 5])), (90, ([2, 4], [3, 70]))])
def test_attention_of_packed_sequences(arch, lengths):
    """Tiles that begin with a segment, and few queries of each; empty segments, and none beyond the last row."""
    inputs = test_additive_attention_varlen.make_inputs(*lengths, D=21, Dv=17, H=2, dtype=torch.float32)
    call = functools.partial(additive_attention_varlen, is_causal=arch == 80)
    on = functools.partial(test_additive_attention_varlen.packed, call, lengths)
    with on_ptx(arch):
        found = test_additive_attention_varlen.run(on(backend="triton"), inputs)
    torch.testing.assert_close(found, test_additive_attention_varlen.run(on(backend="reference"), inputs))


# In float64 scale and soft cap have more bits than a kernel's argument of float32.
@pytest.mark.parametrize(
    "sizes, dtype", [("tiles", torch.float32), ("few_queries", torch.float32), ("few_queries", torch.float64)]
)
def test_attention_with_everything_masked_that_can_be(sizes, dtype):
    B, _, Tq, Tk, *_ = SIZES[sizes].values()
    mask = torch.rand(B, Tq, Tk, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[:, 1] = False
    options = {"mask": mask, "key_lengths": torch.tensor([Tk - 9, 3]), "is_causal": True}
    with on_ptx(90):
        check_attention(sizes, dtype, scale=0.7, softcap=2.1, **options)


@pytest.mark.parametrize("sizes, activation", [("tiles", "relu"), ("few_queries", "leaky_relu")])
def test_attention_of_other_activations(sizes, activation):
    with on_ptx(90):
        check_attention(sizes, activation=activation)


def test_attention_of_half_precision():
    with on_ptx(80):
        check_attention("tiles", torch.float16)


@pytest.mark.parametrize("spread, dtype", [(9.0, torch.float32), (50.0, torch.float32), (9.0, torch.float64)])
def test_attention_beyond_the_range_of_exponentials(spread, dtype):
    with on_ptx(80):
        check_attention("tall_tiles", dtype, spread)


def test_attention_at_minus_infinity():
    with on_ptx(80):
        test_additive_attention.check_minus_infinity(20, 35, torch.float32, on_triton(additive_attention))


# What the executor must find in these kernels


def unmasked(access: str):
    """Takes the predicates off all accesses of this kind."""

    def edit(text: str) -> str:
        edited, count = re.subn(rf"@!?%p\d+ ({access})", r"\1", text)
        assert count, f"no masked {access}"
        return edited

    return edit


# A store beyond a row may hit the next one, where another thread stores something else.
@pytest.mark.parametrize(
    "access, found, message",
    [
        ("ld.global", ptx.OutOfBounds, "^load of"),
        ("st.global", (ptx.OutOfBounds, ptx.Race), "^store of|to one address"),
    ],
    ids=["loads", "stores"],
)
@pytest.mark.parametrize("shape, channel_dim", [RUNS, ROWS])
def test_unmasked_film_is_found(shape, channel_dim, access, found, message):
    x = torch.randn(shape)
    with on_ptx(80, edit=unmasked(access)), pytest.raises(found, match=message):
        film(x, torch.randn(x.shape[channel_dim]), channel_dim=channel_dim, backend="triton")


@pytest.mark.parametrize("sizes", ["tiles", "few_queries"])
def test_unmasked_attention_is_found(sizes):
    inputs = test_additive_attention.make_inputs(SIZES[sizes])
    with on_ptx(80, edit=unmasked("ld.global")), pytest.raises(ptx.OutOfBounds, match="^load of"):
        additive_attention(*inputs, backend="triton")


def test_attention_without_barriers_is_found():
    inputs = test_additive_attention.make_inputs(SIZES["tiles"])
    edit = functools.partial(re.sub, r"bar\.sync\s+0;", "")
    with on_ptx(80, edit=edit), pytest.raises(ptx.Race, match="no barrier"):
        additive_attention(*inputs, backend="triton")


def test_attention_with_dropout(monkeypatch):
    monkeypatch.setattr(_philox, "draw_seed", lambda device, generator=None: torch.tensor([2**40 + 7]))
    with on_ptx(90):
        check_attention("few_queries", dropout_p=0.3)
