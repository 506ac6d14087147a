"""The table of tiles and its opt-in tuning, with a fake clock: nothing is compiled or launched."""

import functools
import os
import warnings

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("launches are recorded here, not interpreted", allow_module_level=True)

from fusedattn.triton import _tiles, additive_attention, additive_attention_fwd, film
from fusedattn.triton._common import recorded

KERNELS = sorted({tile.kernel for tile in _tiles.TABLE})
TARGETS = {
    _tiles.SM_80: ("cuda", 86),
    _tiles.SM_90: ("cuda", 100),
    _tiles.SM_120: ("cuda", 120),
    _tiles.AMD: ("hip", "gfx942"),
}
TENSOR = torch.empty(0)


@pytest.fixture
def clock(monkeypatch):
    """Tuning is on and thinks it is on a GPU; returns what was timed, in order. Fewer warps are faster."""
    timed = []

    def milliseconds(call):
        call()
        return timed[-1].warps

    monkeypatch.setenv(_tiles.VARIABLE, "1")
    monkeypatch.setattr(_tiles, "can_time", lambda device: True)
    monkeypatch.setattr(_tiles, "milliseconds", milliseconds)
    monkeypatch.setattr(_tiles, "_fastest", {})
    _tiles._warn_once.cache_clear()
    yield timed
    _tiles._warn_once.cache_clear()


def choose(timed, kernel="scores", sizes=(4, 500, 900), **options):
    return _tiles.choose(kernel, sizes[1], options.pop("tensor", TENSOR), sizes, timed.append, **options)


@pytest.mark.parametrize("gpu", TARGETS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_size_has_a_tile_on_every_gpu(kernel, gpu):
    rows = [tile for tile in _tiles.rows(kernel, gpu) if tile.most > 0]
    assert rows[-1].most == float("inf")
    assert rows == sorted(rows, key=lambda tile: tile.most)


def tiles_of_scores(kernels):
    return {
        ((k.constexprs["BLOCK_Q"], k.constexprs["BLOCK_K"]), k.num_warps)
        for k in kernels
        if k.function is additive_attention_fwd.additive_attention_fwd_kernel_scores
    }


@pytest.mark.parametrize("gpu", TARGETS)
def test_launchers_take_the_rows_of_the_target(gpu):
    found = set()
    for Tq in (16, 17):
        call = functools.partial(additive_attention._typical_call, (2, Tq, 40, 8), torch.float32, False, "tanh")
        found |= tiles_of_scores(recorded(call, TARGETS[gpu]))
    rows = _tiles.rows("scores", gpu)
    assert found == {(tile.extents, tile.warps) for tile in rows if tile.most > 0}
    # What is compiled for gates has the tiles that only tuning takes, too; windows and biases may take more warps.
    compiled = additive_attention.kernels((torch.float32,), TARGETS[gpu])
    listed = tiles_of_scores(k for k in compiled if not k.name.endswith(("-window", "-centers", "-bias")))
    assert listed == {(tile.extents, tile.warps) for tile in rows}


def test_the_default_never_tunes(clock, monkeypatch):
    for value in ("", "0"):
        monkeypatch.setenv(_tiles.VARIABLE, value)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert choose(clock, sizes=(4, 16, 900)).most == 16
            assert choose(clock, sizes=(4, 17, 900)).most == float("inf")
    assert clock == []


def test_tuning_takes_the_fastest_and_says_so_before(clock):
    with pytest.warns(UserWarning, match="about to be timed") as said:
        chosen = choose(clock)
    rows = _tiles.rows("scores", _tiles.SM_90)
    assert clock == rows and len(said) == 1
    assert chosen.warps == min(tile.warps for tile in rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose(clock, sizes=(8, 500, 900))
    assert clock == 2 * rows  # another bucket, no other warning


@pytest.mark.filterwarnings("ignore:fusedattn")
def test_what_was_tuned_is_taken_where_nothing_can_be_timed(clock, monkeypatch):
    """While a graph is captured."""
    monkeypatch.setattr(_tiles, "can_time", lambda device: False)
    usual = choose(clock)
    assert clock == [] and usual.most > 0
    monkeypatch.setattr(_tiles, "can_time", lambda device: True)
    monkeypatch.setattr(_tiles, "milliseconds", lambda call: (call(), 0.0 if clock[-1] is not usual else 1.0)[1])
    tuned = choose(clock)
    monkeypatch.setattr(_tiles, "can_time", lambda device: False)
    assert tuned is not usual and choose(clock) is tuned
    recorded(lambda: clock.append(choose(clock)))
    assert clock[-1] is usual  # tools see what does not hang on this machine


def test_the_warning_comes_before_anything_runs(clock):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=_tiles.VARIABLE):
            choose(clock)
    assert clock == []


@pytest.mark.filterwarnings("ignore:fusedattn")
def test_sizes_share_a_bucket_up_to_a_power_of_two(clock):
    for length in range(257, 513):
        choose(clock, sizes=(4, length, length))
    assert len(clock) == len(_tiles.rows("scores", _tiles.SM_90))
    choose(clock, sizes=(4, 513, 512))
    choose(clock, tensor=TENSOR.half())
    choose(clock, kernel="film", name="film_fwd")
    choose(clock, kernel="film", name="film_bwd")
    assert len(_tiles._fastest) == 5


@pytest.mark.filterwarnings("ignore:fusedattn")
@pytest.mark.parametrize("n", [5000, 33])
def test_launchers_try_every_row_and_end_with_the_fastest(clock, monkeypatch, n):
    launched = []

    def milliseconds(call):
        call()
        return launched[-1]

    monkeypatch.setattr(_tiles, "milliseconds", milliseconds)
    monkeypatch.setattr(film, "launch", lambda *_, num_warps, **__: launched.append(num_warps))
    x, warps = torch.empty(2, 3, n, device="meta"), [tile.warps for tile in _tiles.rows("film", _tiles.SM_90)]
    for _ in range(2):
        film.forward(x, *(None,) * 5, 1, 0.0, 0)
    assert launched == [*warps, min(warps), min(warps)]
