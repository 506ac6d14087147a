"""Predicted times follow from counted instructions, data sheets and the shapes, and stand beside measured ones."""

import json
import sys
from dataclasses import replace

import pytest
from test_gates import kernel

from benchmarks import roofline, streams
from benchmarks.cases import AttentionCase
from benchmarks.gpu import device, timings

H100 = next(device for device in roofline.DEVICES if device.name == "H100")
FORWARD, BACKWARD = kernel(), kernel(name="additive_attention_bwd_kernel_inputs<float>", slots=7.5, fp32=6.5)
COUNTS = roofline.Counts("CUDA C++", (FORWARD, BACKWARD))


def test_data_sheet_rates():
    """The peak float32 rates of the data sheets, in Tflop/s, follow from lanes and clock."""
    peaks = {d.name: 2 * d.multiprocessors * d.fp32_lanes * d.clock / 1e12 for d in roofline.DEVICES}
    assert peaks == pytest.approx({"A100": 19.5, "H100": 67, "H200": 67, "B200": 75}, rel=0.01)


def test_the_slowest_unit_decides():
    clocks = 1e12 / (132 * 1.98e9)
    assert roofline.Cost(3.84, 0.5, 3).seconds(1e12, H100) == pytest.approx(clocks / 32)  # MUFU: the plan's 32
    assert roofline.Cost(3.42, 1, 2).seconds(1e12, H100) == pytest.approx(clocks / 16)  # tanh.approx
    assert roofline.Cost(8, 0.5, 6).seconds(1e12, H100) == pytest.approx(clocks / 16)  # slots
    a100 = roofline.DEVICES[0]
    assert roofline.Cost(4, 0.5, 4).seconds(1e12, a100) == pytest.approx(1e12 / (108 * 1.41e9) / 16)  # lanes


ANY = roofline.Cost(4, 0.5, 3)
TILES, SPLIT = roofline.Loop(ANY, 64, 64), roofline.Loop(ANY, 64, 64, splits_keys=True)
STRIPS, FEW = roofline.Loop(ANY, 64, 64, channels=32), roofline.Loop(ANY, 16, 64, few=True)


def test_whole_tiles():
    assert TILES.tanh(AttentionCase(2, 64, 128, 8)) == 2 * 64 * 128 * 8
    assert TILES.tanh(AttentionCase(2, 65, 65, 8)) == 2 * 128 * 128 * 8
    assert TILES.tanh(AttentionCase(1, 1, 100, 8)) == 64 * 128 * 8
    assert FEW.tanh(AttentionCase(1, 1, 100, 8)) == 100 * 8


@pytest.mark.parametrize(
    "loop, case, rounds",
    [
        (TILES, AttentionCase(132, 64, 128, 64), 1),
        (TILES, AttentionCase(133, 64, 128, 64), 264 / 133),
        (TILES, AttentionCase(66, 64, 128, 64), 2),
        (STRIPS, AttentionCase(66, 64, 128, 64), 1),  # two blocks of 32 channels
        (SPLIT, AttentionCase(66, 64, 128, 64), 1),  # two blocks of 64 keys
        (TILES, AttentionCase(1, 1, 9999, 64), 132),
        (FEW, AttentionCase(1, 1, 9999, 64), 1),
    ],
)
def test_whole_rounds_of_blocks(loop, case, rounds):
    assert loop.rounds(case, 132) == pytest.approx(rounds)


SPLIT_1 = kernel(name="additive_attention_fwd_kernel_split<float, 1>", slots=20.0, mufu=1.5)
SPLIT_16 = kernel(name="additive_attention_fwd_kernel_split<float, 16>", slots=5.0)


@pytest.mark.parametrize("queries, slots", [(1, 20), (2, 5), (16, 5), (17, 4 * 64 / 17)])
def test_few_queries_take_the_kernel_made_for_them(queries, slots):
    counts = roofline.Counts("CUDA C++", (kernel(slots=4.0), SPLIT_16, SPLIT_1))
    case = AttentionCase(132, queries, 640, 128)
    found = counts.seconds(case, H100, "forward", "float32", products=0)
    assert found == pytest.approx(case.work("forward") * slots / 128 / (132 * 1.98e9))


def test_triton_goes_over_the_inputs_twice():
    names = [
        "bwd_kernel_inputs-8x128-fp32",
        "bwd_kernel_inputs-8x128-fp32 #2",
        "bwd_kernel_inputs-8x128-bf16-fp32",
    ]
    kernels = [kernel(backend="Triton", name=n, slots=s) for n, s in zip(names, (7.0, 5.5, 9.0), strict=True)]
    (loop,) = roofline.Counts("Triton", tuple(kernels)).loops("sm_90", "backward", "float32")
    assert loop.cost == roofline.Cost(12.5, 1.0, 6.0)
    assert (loop.queries, loop.keys, loop.channels) == (8, 32, 128)


def test_triton_moves_its_scores_and_packed_rows():
    forward = kernel(backend="Triton", name="fwd_kernel_scores-16x128x256-fp32", slots=4.0)
    few = kernel(backend="Triton", name="fwd_kernel_few-32x64-fp32", slots=13.0)
    counts = roofline.Counts("Triton", (forward, few))
    case = AttentionCase(2, 10, 128, 64)
    assert counts.scratch(case, "forward") == 8 * (2 * (10 + 128) * 64 + 2 * 10 * 128)
    assert counts.scratch(replace(case, Tq=1), "forward") == 0
    assert COUNTS.scratch(case, "training") == 0
    assert counts.loops("sm_90", "forward", "float32")[0].queries == 16


def test_aims_are_parts_of_the_bound():
    case = AttentionCase(132, 256, 256, 128)
    p = roofline.Prediction(2.0, "arithmetic", eager=30.0, compiled=4.0)
    assert roofline.Aim("", case, "forward", of_bound=0.6).needed(p, H100) == 0.6
    assert roofline.Aim("", case, "forward", vs_eager=30).needed(p, H100) == 2
    assert roofline.Aim("", case, "forward", vs_compiled=4).needed(p, H100) == 2
    seconds = case.work("forward") / 28 / (132 * 1.98e9)
    p = replace(p, seconds=seconds)
    assert roofline.Aim("", case, "forward", tanh_per_clock=22.4).needed(p, H100) == pytest.approx(0.8)


def test_half_precision_moves_half_the_bytes():
    case = roofline.FILM
    assert roofline.film(case, "training", H100, "bfloat16").seconds == pytest.approx(
        roofline.film(case, "training", H100).seconds / 2
    )


def test_attention_on_paper():
    case = AttentionCase(132, 256, 256, 128)  # whole tiles and rounds
    forward = roofline.attention(case, "forward", H100, COUNTS)
    clocks = case.work("forward") / (132 * 1.98e9)
    assert forward.limit == "arithmetic"
    assert forward.seconds == pytest.approx(
        clocks * 4.7 / 128
    )  # 3.7 slots, and one of the product with the values
    training = roofline.attention(case, "training", H100, COUNTS)
    assert not case.recomputes_scores
    assert training.seconds == pytest.approx(clocks * (4.7 + 7.5 + 2) / 128)
    tensor = 4 * case.work("forward") / 3.35e12
    assert (forward.eager, training.eager) == pytest.approx((4 * tensor, 11 * tensor))
    assert forward.compiled == pytest.approx(clocks * 19.4 / 128)


def test_long_sequences_recompute_scores():
    case = AttentionCase(132, 512, 512, 128)
    training = roofline.attention(case, "training", H100, COUNTS)
    clocks = case.work("forward") / (132 * 1.98e9)
    assert case.recomputes_scores
    # In a pass of its own, which MUFU bounds: half of one per tanh on 16 lanes.
    assert training.seconds == pytest.approx(clocks * ((4.7 + 7.5 + 2) / 128 + 1 / 32))


def test_film_on_paper():
    p = roofline.film(roofline.FILM, "forward", H100)
    assert p.seconds == pytest.approx(2 * 4 * 64 * 256 * 112**2 / 3.35e12)
    assert p.eager == pytest.approx(2 * p.seconds)


CALL = streams.Stream(
    *("norm_film", "layer", (8, 1024, 1152), (8192, 1152)),
    (streams.Pass("norm_film_fwd_kernel_rows", 2, 1),),
    (streams.Pass("norm_film_bwd_kernel_rows", 3, 1),),
    {"forward": 3, "training": 7},
)
ROWS = kernel(
    backend="Triton", op="norm_film", name="norm_film_fwd_kernel_rows-1x2048-bf16", threads=256, occupancy=0.25
)


def test_memory_delivers_what_is_in_flight_within_its_latency():
    part = streams.part_of_bandwidth(ROWS, CALL.forward[0], CALL, H100, 2)
    asked = 512 / 256 * 1152 * 2 * 2  # two programs, each a row of two tensors
    assert part == pytest.approx(asked / (700e-9 * 3.35e12 / 132))
    packs = replace(ROWS, backend="CUDA C++", name="norm_film_fwd_kernel_rows<bfloat16, 8>", occupancy=1.0)
    assert streams.part_of_bandwidth(packs, CALL.forward[0], CALL, H100, 2) == 1.0


def test_a_second_pass_over_x_takes_its_time(monkeypatch):
    maps = replace(CALL, forward=(streams.Pass("moments", 1, 0), streams.Pass("maps", 1, 1)), backward=())
    monkeypatch.setattr(streams, "STREAMS", (replace(maps, necessary={"forward": 2, "training": 2}),))
    kernels = tuple(replace(ROWS, name=f"{name}-1x2048-bf16", occupancy=1.0) for name in ("moments", "maps"))
    found, _ = streams.predict(kernels, H100, "bfloat16")
    assert found.seconds == pytest.approx(3 * 2 * 8 * 1024 * 1152 / 3.35e12)
    assert (found.of_copy, found.of_necessary) == pytest.approx((1, 2 / 3))
    assert not list(streams.predict(kernels[:1], H100, "bfloat16"))  # not all were counted


@pytest.mark.parametrize(
    "backend, dtype, ops",
    [
        ("CUDA C++", "float32", {"film"}),
        ("Triton", "float32", {"film", "norm_film", "gated_film"}),
        ("Triton", "bfloat16", {"film", "norm_film", "gated_film"}),
    ],
)
def test_streaming_kernels_reach_the_bandwidth_of_a_copy(backend, dtype, ops):
    """On A100 and H100; an H200 and a B200 need more in flight than half precision has."""
    kernels = roofline.Counts.load(backend).kernels
    for gpu in roofline.DEVICES[:2]:
        found = list(streams.predict(kernels, gpu, dtype))
        assert {f.stream.op for f in found} == ops
        below = {(f.stream.name, f.mode) for f in found if f.of_copy < streams.WANTED}
        assert below <= {("batch, channels last", "forward")}


def test_uncounted_kernels_are_named():
    with pytest.raises(roofline.CountsError, match="no backward score loop of CUDA C.. for sm_90"):
        roofline.Counts("CUDA C++", (FORWARD,)).loops("sm_90", "backward", "float32")


def test_measured_stands_beside_predicted(tmp_path, monkeypatch, capsys):
    case = AttentionCase(4, 512, 512, 256)
    p = roofline.attention(case, "forward", H100, COUNTS)
    row = {"case": case.name, "mode": "forward", "contender": "cuda", "dtype": "float32"}
    row["milliseconds"] = 2e3 * p.seconds
    rows = [row, row | {"contender": "eager @", "milliseconds": 1}, row | {"dtype": "bfloat16", "milliseconds": 1}]
    rows.append(row | {"case": roofline.LARGE.name, "milliseconds": None})  # out of memory
    result = tmp_path / "result.json"
    result.write_text(json.dumps({"machine": {"gpu": "NVIDIA H100 80GB HBM3"}, "rows": rows}))
    monkeypatch.setattr(roofline.Counts, "load", classmethod(lambda cls, backend: COUNTS))
    monkeypatch.setattr(sys, "argv", ["roofline", "--result", str(result)])
    assert roofline.main() == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "(4, 512, 512, 256)" in x and "forward" in x]
    assert " 50%" in line
    result.write_text(json.dumps({"machine": {}, "rows": []}))
    with pytest.raises(SystemExit):
        roofline.main()


def test_a_gpu_measures_each_backend_by_the_name_that_the_model_looks_for(monkeypatch):
    monkeypatch.setattr(device, "usable", lambda: ["cuda"])
    found = timings.functions_of(roofline.FILM, compiling=False)
    assert list(found) == ["cuda", "eager", "clone"]
    assert found["cuda"].keywords == {"channel_dim": 1, "backend": "cuda"}
    assert set(roofline.CONTENDERS.values()) == {"cuda", "triton"}
