"""Windows of additive attention: what each query sees, against the definition written out, and the reference."""

import math

import pytest
import torch
from device import INTERPRETED, examples
from hypothesis import given, settings
from hypothesis import strategies as st
from pairwise import pairwise
from test_additive_attention import DTYPES, MASKS, check, make_inputs, run, shape
from test_additive_attention_bias import BIASES

from fusedattn import additive_attention, additive_attention_ref

pytestmark = pytest.mark.levels

WINDOWS = {
    "own": (0, 0),
    "both": (2, 5),
    "left": (4, -1),
    "right": (-1, 3),
    "large": (1000, 2**70),
    "causal": (3, -1, True),
    "causal_alone": (-1, -1, True),
}
# Of every query, for B batch elements and H heads or none.
CENTERS = {
    "none": lambda lead, Tq, Tk: None,
    "last": lambda lead, Tq, Tk: torch.arange(Tk - Tq, Tk),
    "scattered": lambda lead, Tq, Tk: torch.randint(-9, Tk + 9, (*lead, Tq)),
    "of_heads": lambda lead, Tq, Tk: torch.randint(0, Tk, (lead[-1], 1), dtype=torch.int16),
    "apart": lambda lead, Tq, Tk: torch.arange(Tq) * 23,
    "far": lambda lead, Tq, Tk: torch.tensor([-(2**63), 2**63 - 1, -1, Tk, 1]).repeat(Tq)[:Tq],
}
SIZES = [
    shape(2, 1, 61, 5, 4),  # one query
    shape(2, 6, 37, 40, 18, H=2),  # few
    shape(3, 70, 83, 6, 7),  # many; scores are recomputed
    shape(2, 50, 37, 33, 9, H=2),
]
if INTERPRETED:
    SIZES = [shape(1, 3, 61, 2, 3, H=2), shape(2, 17, 67, 2, 3), shape(1, 70, 33, 2, 3)]
    CENTERS = {name: CENTERS[name] for name in ("none", "scattered", "apart", "far")}
    WINDOWS = {name: WINDOWS[name] for name in ("both", "left", "large", "causal")}


def options_of(window, center, sizes):
    left, right, *is_causal = WINDOWS[window]
    B, H, Tq, Tk = (sizes[name] for name in ("B", "H", "Tq", "Tk"))
    size = None if left == right == -1 else (left, right)
    centers = CENTERS[center]((B,) if H is None else (B, H), Tq, Tk)
    return {"window_size": size, "window_center": centers, "is_causal": bool(is_causal)}


def bias_of(kind, sizes, dtype=torch.float32):
    """What follows the inputs: a bias, in the dtype of the arithmetic, or nothing."""
    if kind == "none":
        return []
    wide = torch.promote_types(dtype, torch.float32)
    return [BIASES[kind](*(sizes[name] for name in ("B", "H", "Tq", "Tk"))).to(wide)]


def in_window(sizes, window_size, window_center, is_causal):
    """bool (B, [H,] Tq, Tk), in Python's integers."""
    B, H, Tq, Tk = (sizes[name] for name in ("B", "H", "Tq", "Tk"))
    rows = (B, Tq) if H is None else (B, H, Tq)
    centers = torch.arange(Tq) if window_center is None else window_center.long()
    left, right = window_size or (-1, -1)

    def sees(c, j):
        return (left == -1 or c - left <= j) and (right == -1 or j <= c + right) and (not is_causal or j <= c)

    seen = [[sees(c, j) for j in range(Tk)] for c in centers.expand(rows).flatten().tolist()]
    return torch.tensor(seen).view(*rows, Tk)


@pytest.mark.interpreted
@pairwise(
    sizes=SIZES,
    window=WINDOWS,
    center=CENTERS,
    masked=["none", "lengths", "queries_keys", "keys"],
    bias=["none", "full", "heads_keys", "queries"],
    softcap=[None, 1.5],
)
def test_windows(sizes, window, center, masked, bias, softcap):
    torch.manual_seed(1)
    options = options_of(window, center, sizes)
    visible = in_window(sizes, **options)
    B, H, Tq, Tk = (sizes[name] for name in ("B", "H", "Tq", "Tk"))
    if masked == "lengths":
        options["key_lengths"] = torch.tensor([Tk - 3, 0, 9][:B])
        visible &= torch.arange(Tk) < options["key_lengths"].view(-1, *(1,) * (visible.dim() - 1))
    elif masked != "none":
        options["mask"] = MASKS[masked](B, H, Tq, Tk)
        visible &= options["mask"]
    actual = check([*make_inputs(sizes), *bias_of(bias, sizes)], softcap=softcap, **options)
    empty = ~visible.any(-1)
    assert ((actual["weights"] != 0) <= visible).all() and (actual["context"][empty] == 0).all()
    assert (actual["lse"] == -math.inf).equal(empty) and (actual["grad_query"][empty] == 0).all()
    assert bias != "full" or (actual["grad_bias"][~visible] == 0).all()


@pairwise(
    dtype=DTYPES,
    sizes=[shape(1, 1100, 1000, 3, 2), shape(1, 33, 70000, 2, 16), shape(8, 150, 150, 2, 1, H=8)],
    center=["none", "scattered", "last"],
    window=["both", "own"],
    bias=["none", "queries_keys", "keys", "batch"],
    scale=[1.0, 0.7],
)
def test_windows_in_several_chunks(dtype, sizes, center, window, bias, scale):
    inputs = [*make_inputs(sizes, dtype), *bias_of(bias, sizes, dtype)]
    check(inputs, scale=scale, **options_of(window, center, sizes))


@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_windows_and_other_options(activation):
    sizes = shape(2, 40, 50, 20, 6, H=2)
    options = options_of("both", "scattered", sizes)
    check(make_inputs(sizes), activation=activation, softcap=2.0, scale=0.5, **options)


@pytest.mark.interpreted
@pytest.mark.parametrize("Tq", [3, 40])
@pytest.mark.parametrize("function", [additive_attention, *[additive_attention_ref] * (not INTERPRETED)])
@pytest.mark.parametrize("center", ["none", "apart"])
def test_what_is_in_no_window_is_absent(Tq, function, center):
    check_absent(shape(1, Tq, 90, 2, 4) if INTERPRETED else shape(2, Tq, 90, 20, 4), center, function)


def check_absent(sizes, center, function):
    """Whatever a key in no window holds; bits of results and gradients are those with zeros there."""
    options = options_of("both", center, sizes)
    hidden = ~in_window(sizes, **options).any(-2)
    query, key, value, weight = make_inputs(sizes)
    results = []
    for number in (0.0, math.nan):
        rows = [t.masked_fill(hidden.unsqueeze(-1), number) for t in (key, value)]
        results.append(run(function, [query, *rows, weight], **options))
    expected, actual = results
    assert hidden.any() and all(torch.equal(actual[name], expected[name]) for name in expected)
    assert (actual["grad_key"][hidden] == 0).all() and (actual["grad_value"][hidden] == 0).all()


def test_a_key_does_not_touch_queries_whose_window_is_elsewhere():
    sizes = shape(1, 60, 60, 9, 4)
    inputs = make_inputs(sizes)
    clean = additive_attention(*inputs, window_size=(2, 2), return_weights=True)
    inputs[1][:, 30] = math.nan
    results = additive_attention(*inputs, window_size=(2, 2), return_weights=True)
    near = (torch.arange(60) - 30).abs() <= 2
    for actual, expected in zip(results, clean, strict=True):
        assert actual[:, ~near].equal(expected[:, ~near]) and actual[:, near].isnan().any(-1).all()


@st.composite
def windows(draw):
    side = st.one_of(st.just(-1), st.integers(0, 80))
    sizes = shape(draw(st.integers(1, 3)), draw(st.integers(1, 70)), draw(st.integers(0, 90)), 5, 4)
    options = {"window_size": (draw(side), draw(side)), "is_causal": draw(st.booleans())}
    torch.manual_seed(draw(st.integers(0, 1000)))
    if draw(st.booleans()):
        options["window_center"] = torch.randint(-20, sizes["Tk"] + 20, (sizes["B"], sizes["Tq"]))
    if draw(st.booleans()):
        options["mask"] = MASKS[draw(st.sampled_from(sorted(MASKS)))](*(sizes[n] for n in ("B", "H", "Tq", "Tk")))
    dtype = draw(st.sampled_from(DTYPES))
    return sizes, dtype, bias_of(draw(st.sampled_from(["none", *sorted(BIASES)])), sizes, dtype), options


@settings(max_examples=examples(40), deadline=None, derandomize=True, database=None)
@given(windows())
def test_any_window_matches_the_reference(problem):
    sizes, dtype, bias, options = problem
    check([*make_inputs(sizes, dtype), *bias], **options)


def test_a_window_without_bounds_is_none():
    inputs = make_inputs(shape(2, 20, 30, 9))
    expected = additive_attention(*inputs)
    center = torch.randint(0, 30, (2, 20))
    assert additive_attention(*inputs, window_size=(-1, -1), window_center=center).equal(expected)


CENTER = torch.zeros(2, 3, dtype=torch.int64)
BAD_WINDOWS = {
    "float_center": (
        {"window_center": CENTER.float()},
        "window_center: expected a Tensor of integers, got torch.float32",
    ),
    "center_of_another_shape": (
        {"window_center": CENTER[:, :2]},
        r"window_center: expected a shape broadcastable to \(2, 3\) on cpu, got \(2, 2\)",
    ),
    "center_of_every_key": ({"window_center": CENTER[None]}, r"to \(2, 3\) on cpu, got \(1, 2, 3\)"),
    "a_list_of_centers": ({"window_center": [0]}, "window_center: expected a Tensor of integers, got list"),
    "center_without_window": (
        {"window_center": CENTER, "window_size": None},
        "window_center: expected None without window_size and is_causal",
    ),
    "three_sizes": ({"window_size": (1, 2, 3)}, r"window_size: expected a pair of integers.*got \(1, 2, 3\)"),
    "one_number": ({"window_size": 3}, "window_size: expected a pair of integers.*got 3"),
    "below_minus_one": ({"window_size": (0, -2)}, r"window_size: .*-1 or more, got \(0, -2\)"),
    "float_size": ({"window_size": (1.0, 2)}, r"window_size: expected a pair of integers.*got \(1.0, 2\)"),
}


@pytest.mark.parametrize("function", [additive_attention, additive_attention_ref])
@pytest.mark.parametrize("case", BAD_WINDOWS)
def test_bad_windows(case, function):
    inputs = make_inputs(shape(2, 3, 5, 4))
    options, message = BAD_WINDOWS[case]
    with pytest.raises(ValueError, match=f"additive_attention: {message}" if "window" in message[:9] else message):
        function(*inputs, **{"window_size": (1, 1), **options})
