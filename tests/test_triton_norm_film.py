"""norm_film's Triton kernels in the interpreter: the smallest shapes that reach every branch of them."""

import pytest
import torch
from device import INTERPRETED, raw_op
from test_norm_film import check, make_inputs, numbers, options_of
from test_norm_film_transforms import arguments

from fusedattn import UnsupportedError, norm_film, norm_film_ref
from fusedattn._conditioning import ACTIVATIONS

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.skipif(not INTERPRETED, reason="the interpreter needs TRITON_INTERPRET=1 and its own process"),
]
ROWS, MAPS = ("layer", "rms"), ("group", "instance", "batch")

X = (2, 5, 6)
EVERYTHING = {
    **{
        "x": X,
        "gamma": (2, 6),
        "gamma_added": (6,),
        "beta": (2, 6),
        "beta_added": X,
        "weight": (6,),
        "bias": (6,),
    },
    **{"pre_gate": (2, 5, 1), "pre_gate_added": (6,), "pre_residual": X, "residual": X},
}
LONG = (1, 2, 4500)  # channels: two blocks
MANY = (2, 5, 600)  # rows: several pieces, and a last one that is shorter


def given(*names):
    return {name: EVERYTHING[name] for name in ("x", *names)}


@pytest.mark.parametrize("norm", ROWS)
@pytest.mark.parametrize(
    "shapes",
    [
        given(),
        EVERYTHING,
        given("gamma", "bias"),
        given("beta", "weight", "pre_residual"),
        given("pre_gate", "residual"),
        {"x": X, "gamma": X, "beta": (2, 1, 6), "weight": (6,)},
        {"x": X, "gamma": (2, 1, 1), "gamma_added": X, "pre_gate": X},
    ],
    ids=["alone", "everything", "gamma-bias", "beta-weight", "gate", "each", "pairs"],
)
def test_rows(norm, shapes):
    check(make_inputs(shapes), norm=norm, gamma_offset=1.0)


@pytest.mark.parametrize(
    ("shapes", "dtype"),
    [
        ({"x": MANY, "gamma": (2, 600), "beta": (600,), "pre_gate": (2, 600)}, torch.bfloat16),
        ({"x": MANY, "weight": (600,), "bias": (600,)}, torch.float32),
        ({"x": LONG, "gamma": (1, 4500), "weight": (4500,), "beta": LONG, "pre_gate": (4500,)}, torch.float16),
        ({"x": (1, 2, 2049), "bias": (2049,), "pre_residual": (1, 2, 2049)}, torch.float64),
        ({"x": (9, 7), "gamma": (9, 7), "weight": (7,), "residual": (9, 7)}, torch.float64),
        ({"x": (3, 2, 3, 4), "gamma": (3, 2, 1, 4), "beta": (3, 4)}, torch.bfloat16),
    ],
    ids=["pieces-bfloat16", "pieces-float32", "long-float16", "long-float64", "vectors", "positions"],
)
def test_rows_of_every_length(shapes, dtype):
    check(make_inputs(shapes, dtype), norm="layer", activation="silu")
    if shapes["x"] != MANY:
        check(make_inputs(shapes, dtype), norm="rms")


def test_rows_whose_channels_are_not_the_last_dimension():
    shapes = {"x": (2, 6, 5), "gamma": (2, 6), "beta": (2, 6, 5), "pre_residual": (2, 6, 5), "residual": (2, 6, 5)}
    check(make_inputs(shapes), norm="layer", channel_dim=1)
    layout = {"layout": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)}
    check(make_inputs(shapes), norm="layer", channel_dim=1, **layout)


MAP = (2, 6, 4, 5)
OF_MAPS = {
    **{"x": MAP, "gamma": (2, 6), "gamma_added": (6,), "beta": (1, 6), "weight": (6,), "bias": (6,)},
    **{"pre_gate": (2, 6), "pre_gate_added": (6,), "pre_residual": MAP, "residual": MAP},
}


def of_maps(shape, channel_dim, *names):
    """Those of OF_MAPS for x of another shape."""
    sizes = {2: shape[0], 6: shape[channel_dim], 1: 1}
    like_x = ("x", "pre_residual", "residual")
    return {
        name: shape if name in like_x else tuple(sizes[n] for n in of)
        for name, of in OF_MAPS.items()
        if not names or name in ("x", *names)
    }


@pytest.mark.parametrize("norm", MAPS)
@pytest.mark.parametrize(
    "names",
    [("x",), (), ("gamma", "bias"), ("beta", "weight", "pre_residual"), ("pre_gate", "residual")],
    ids=["alone", "everything", "gamma-bias", "beta-weight", "gate"],
)
def test_maps(norm, names):
    """With channels before the positions and behind them."""
    check(make_inputs(of_maps(MAP, 1, *names)), channel_dim=1, gamma_offset=1.0, **options_of(norm))
    check(make_inputs(of_maps((2, 5, 6), 2, *names)), channel_dim=2, activation="silu", **options_of(norm))


@pytest.mark.parametrize(
    ("norm", "shape", "channel_dim", "dtype"),
    [
        ("instance", (1, 2, 2500), 1, torch.bfloat16),
        ("batch", (2, 2500, 2), 2, torch.float16),
        ("group", (2, 3, 6, 4), 2, torch.float64),
        ("group", (5, 6), 1, torch.float32),
        ("batch", (5, 6), 1, torch.float64),
    ],
    ids=["pieces", "pieces-of-columns", "copied", "vectors", "vectors-of-a-batch"],
)
def test_maps_of_every_layout(norm, shape, channel_dim, dtype):
    inputs = make_inputs(of_maps(shape, channel_dim), dtype)
    check(inputs, channel_dim=channel_dim, activation="relu", **options_of(norm))


def test_channels_last_is_not_copied():
    inputs = make_inputs(of_maps(MAP, 1, "gamma"))
    x = inputs["x"].to(memory_format=torch.channels_last)
    y = norm_film(x, inputs["gamma"], norm="batch")
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, norm_film_ref(x, inputs["gamma"], norm="batch"))


def test_given_statistics_are_constants():
    running = torch.randn(6), torch.rand(6)
    for names in ((), ("pre_residual",)):
        for shape, channel_dim in ((MAP, 1), ((2, 5, 6), 2)):
            inputs = make_inputs(of_maps(shape, channel_dim, *names))
            check(inputs, norm="batch", running=running, channel_dim=channel_dim, activation="gelu")


def test_a_value_for_each_place_is_not_of_maps():
    with pytest.raises(UnsupportedError, match="triton: gamma, beta or pre_gate has one value a place"):
        norm_film(torch.randn(MAP), torch.randn(2, 1, 4, 5), norm="group", num_groups=3, backend="triton")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    check(make_inputs(given("gamma", "beta", "residual")), norm="layer", activation=activation)


@pytest.mark.parametrize("norm", ["layer", "group", "batch"])
def test_operators_follow_their_schema(norm):
    """Every output that is asked for, and no other."""
    inputs = arguments(norm, (2, 5, 6), 2)
    y, h, mean, var = raw_op("norm_film_fwd")(*inputs)
    expected = raw_op("norm_film_bwd")(y, h, *inputs[:12], *inputs[13:], h, mean, var, (1 << 10) - 1)
    for bit in range(10):
        found = raw_op("norm_film_bwd")(y, h, *inputs[:12], *inputs[13:], h, mean, var, 1 << bit)
        for n, (t, whole) in enumerate(zip(found, expected, strict=True)):
            torch.testing.assert_close(t, whole if n == bit else whole.new_empty(0), rtol=0, atol=0)


@pytest.mark.parametrize(("dtype", "mean"), [(torch.float32, 1e4), (torch.bfloat16, 64.0)])
@pytest.mark.parametrize(
    ("norm", "shape"), [("layer", (1, 2, 700)), ("layer", LONG), ("group", (2, 6, 33)), ("batch", (1, 2, 2500))]
)
def test_the_mean_is_known_beyond_the_precision_of_x(norm, shape, dtype, mean):
    x = (numbers(shape, torch.Generator().manual_seed(0)) + mean).to(dtype)
    exact = norm_film_ref(x.double(), **options_of(norm))
    error = (norm_film(x, **options_of(norm)).double() - exact).abs().max().item()
    assert error < 32 * torch.finfo(dtype).eps * exact.abs().max().item()


@pytest.mark.parametrize("norm", ROWS)
def test_what_is_not_a_number_stays_in_its_group(norm):
    for shape in (X, LONG):
        x = numbers(shape, torch.Generator().manual_seed(0)).float()
        clean = norm_film(x, norm=norm)
        x[0, 1, 3] = float("nan")
        y = norm_film(x, norm=norm)
        assert y[0, 1].isnan().all()
        y[0, 1] = clean[0, 1]
        assert torch.equal(y, clean)


def test_what_is_not_a_number_stays_in_its_group_of_maps():
    x = numbers(MAP, torch.Generator().manual_seed(0)).float()
    clean = norm_film(x, norm="group", num_groups=3)
    x[1, 2, 3, 1] = float("nan")
    y = norm_film(x, norm="group", num_groups=3)
    assert y[1, 2:4].isnan().all()
    y[1, 2:4] = clean[1, 2:4]
    assert torch.equal(y, clean)


@pytest.mark.parametrize("norm", ROWS)
def test_no_elements(norm):
    for shape in ((0, 5, 6), (2, 0, 6)):
        x, gamma = torch.randn(shape, requires_grad=True), torch.randn(shape[0], 6, requires_grad=True)
        y, h = norm_film(x, gamma, norm=norm, pre_residual=x)
        y.sum().backward()
        assert y.shape == h.shape == x.grad.shape == shape and torch.equal(gamma.grad, torch.zeros_like(gamma))


def test_the_same_bits_again():
    for norm, shapes in (
        ("layer", {"x": MANY, "gamma": (2, 600), "weight": (600,)}),
        ("batch", of_maps((2, 2500, 2), 2)),
    ):
        inputs = make_inputs(shapes)
        first, second = (check(inputs, norm=norm, channel_dim=2) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_options_of_kernels_reach_them():
    """eps of float64 has more bits than a kernel's argument of float32."""
    for dtype in (torch.float32, torch.float64):
        check(make_inputs(given("gamma"), dtype), norm="rms", eps=0.1, gamma_offset=0.7)
