"""FiLM's Triton kernels in the interpreter: values and all gradients, within tests/tolerance.py.

Run with ``TRITON_INTERPRET=1`` in a process of its own, as ``make test`` does.
"""

import triton_interpreter  # noqa: F401, I001, first: it skips this file outside the interpreter

import functools
import random

import pytest
import torch
from test_film import ACTIVATIONS, DTYPES, NAMES, check, make_inputs, run, shape_id
from torch._dynamo.testing import CompileCounterWithBackend

import fusedattn.triton.film as kernels
from fusedattn import film, film_ref

film_triton = functools.partial(film, backend="triton")

# The kernels of tests/test_film.py's shapes: runs and rows, whole and in pieces, tails on every side.
SHAPES = [
    ((1, 1), 1),
    ((2, 63), 1),
    ((2, 3, 63), 1),
    ((3, 129, 17), 1),
    ((2, 129, 63), 2),
    ((2, 7, 5, 33), -1),
    ((2, 3, 4, 5, 6), 2),
    ((1, 2, 5000), 1),  # several pieces of a run
    ((2, 3000, 17), 2),  # several pieces of rows
]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter takes milliseconds a program: pieces as on a GPU, but fewer of them."""
    monkeypatch.setattr(kernels, "PROGRAMS", 6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "channel_dim"), SHAPES, ids=shape_id)
def test_matches_the_reference(shape, channel_dim, dtype):
    check(make_inputs(shape, channel_dim, dtype), film_triton, channel_dim=channel_dim, activation="silu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    for dtype, shape, channel_dim in ((torch.float32, (2, 5, 67), 1), (torch.float64, (2, 67, 5), 2)):
        inputs = make_inputs(shape, channel_dim, dtype)
        check(inputs, film_triton, channel_dim=channel_dim, activation=activation, gamma_offset=1.0)


@pytest.mark.parametrize(
    "shared", [(), ("gamma",), ("beta",), ("gamma", "beta")], ids=lambda s: "+".join(s) or "none"
)
@pytest.mark.parametrize("absent", [(), ("gamma",), ("beta",), NAMES[1:]], ids=lambda s: "+".join(s))
def test_optional_and_shared_parameters(absent, shared):
    for shape, channel_dim in (((3, 6, 35), 1), ((3, 35, 6), 2)):
        inputs = make_inputs(shape, channel_dim, shared=shared) | dict.fromkeys(absent)
        check(inputs, film_triton, channel_dim=channel_dim, activation="tanh")


def test_offset_is_not_rounded_to_float32():
    inputs = make_inputs((2, 3, 5), 1, torch.float64)
    check(inputs, film_triton, gamma_offset=0.1)


@pytest.mark.parametrize("size", [6, 1])
def test_channels_last_is_kept_without_a_copy(size, monkeypatch):
    inputs = make_inputs((3, 35, size, 7), 1)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t: pytest.fail("copied"))
    actual = check(
        inputs, film_triton, layout=lambda t: t.to(memory_format=torch.channels_last), activation="gelu"
    )
    assert actual["y"].stride()[1] == 1


@pytest.mark.parametrize(
    "layout",
    [
        lambda t: t[:, :, ::2],
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: t.transpose(1, 2),
        lambda t: t[:1].expand(4, -1, -1),
    ],
    ids=["strided", "batch-inside", "transposed", "expanded"],
)
def test_other_strides(layout):
    inputs = make_inputs((4, 6, 10), 1)
    B, C = layout(inputs["x"]).shape[:2]
    inputs |= {name: torch.randn(C, 2 * B)[:, ::2].T for name in ("gamma", "beta")}
    actual = check(inputs, film_triton, layout=layout, activation="relu")
    assert actual["y"].stride() == torch.empty_like(layout(inputs["x"])).stride()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=shape_id)
def test_empty(shape):
    actual = run(film_triton, make_inputs(shape, 1), activation="silu")
    exact = run(film_ref, make_inputs(shape, 1), activation="silu")
    for name, result in actual.items():
        assert torch.equal(result, exact[name]), name


@pytest.mark.filterwarnings("ignore:.*encountered in")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_infinity_and_huge_values_behave_as_in_the_reference(activation):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 90.0, -90.0, 20.0, -20.0, 0.0])
    x = x.repeat(4).view(1, 1, 40)
    one = torch.ones(1, 1)
    actual = film_triton(x, one, activation=activation)
    expected = film_ref(x.double(), one.double(), activation=activation)
    torch.testing.assert_close(actual, expected.float(), equal_nan=True, atol=1e-30, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:.*encountered in")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_huge_values(activation):
    x = torch.tensor([1e4, -1e4, 90.0, -90.0, 20.0, -20.0, 0.0]).view(1, 1, 7)
    check({"x": x, "gamma": torch.ones(1, 1), "beta": None, "residual": None}, film_triton, activation=activation)


def test_second_derivatives():
    inputs = make_inputs((2, 3, 5), 1, torch.float64, shared=("beta",))
    leaves = [inputs[name].requires_grad_() for name in NAMES]

    def function(x, gamma, beta, residual):
        return film_triton(x, gamma, beta, residual=residual, activation="silu", gamma_offset=1.0)

    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("channels_last", [False, True])
def test_raw_ops_pass_opcheck(channels_last):
    x = torch.randn(2, 3, 4, 5)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    gamma, beta = torch.randn(2, 3), torch.randn(3)
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for args in (
        (x, gamma, beta, x, 1, 1.0, 3),
        (x, None, None, None, 1, 0.0, 0),
        (x[:, :, ::2], gamma, None, None, 1, 0.0, 1),
    ):
        torch.library.opcheck(torch.ops.fusedattn.film_fwd_triton.default, args, test_utils=utils)
        torch.library.opcheck(
            torch.ops.fusedattn.film_bwd_triton.default,
            (torch.randn_like(args[0]), *args[:3], *args[4:]),
            test_utils=utils,
        )


def test_compile_without_graph_breaks():
    def function(x, weight, gamma, beta):
        return film_triton(x @ weight, gamma, beta, activation="gelu", gamma_offset=1.0).sin()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 6):
        leaves = [torch.randn(2, n, 4), torch.randn(4, 7), torch.randn(2, n), torch.randn(n)]
        results = []
        for f in (function, compiled):
            inputs = [t.clone().requires_grad_() for t in leaves]
            y = f(*inputs)
            results.append([y, *torch.autograd.grad(y.sum(), inputs)])
        torch.testing.assert_close(*results)


def test_function_transforms():
    x, gamma = torch.randn(3, 2, 3, 5), torch.randn(3, 3)

    def gradient(function, x, gamma):
        return torch.func.grad(lambda *a: function(*a, activation="silu").square().sum(), argnums=(0, 1))(x, gamma)

    results = [torch.func.vmap(functools.partial(gradient, f))(x, gamma) for f in (film_triton, film_ref)]
    torch.testing.assert_close(*results)


def test_random_lengths_are_traced_once():
    """With gradients, between other operators: one graph without breaks, then the same for every length."""
    counter = CompileCounterWithBackend("aot_eager")
    linear = torch.nn.Linear(3, 3)

    def model(x, gamma):
        return film_triton(linear(x), gamma, channel_dim=2, activation="silu").sin()

    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    traced = []
    for length in random.Random(0).sample(range(2, 40), 10):
        x, gamma = torch.randn(2, length, 3), torch.randn(2, 3)
        actual = compiled(x, gamma)
        torch.testing.assert_close(actual, model(x, gamma))
        actual.sum().backward()
        traced.append(counter.frame_count)
    assert len(set(traced)) == 1, traced


def test_auto_does_not_take_the_interpreter():
    x = torch.randn(2, 3, 5)
    assert torch.equal(film(x, activation="tanh"), film(x, activation="tanh", backend="cpu"))
