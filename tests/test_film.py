"""The kernels of FiLM against the reference: values and all gradients, within tests/tolerance.py.

Triton's kernels take the tests marked ``interpreted`` in its interpreter.
"""

import copy
import io

import pytest
import torch
from device import DEVICE, INTERPRETED, examples, not_on_the_standin, off_the_kink, raw_op
from hypothesis import given, settings
from hypothesis import strategies as st
from pairwise import in_dtypes
from tolerance import assert_close_to_reference

from fusedattn import FiLM, UnsupportedError, film, film_ref
from fusedattn._conditioning import ACTIVATIONS

pytestmark = pytest.mark.levels

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NAMES = ("x", "gamma", "beta", "residual")

# Shape and channel dimension: runs along the channel, rows of channels, tails below and above a vector.
EVERY_KERNEL = [
    ((2, 3, 63), 1),
    ((2, 129, 63), 2),
    ((1, 2, 5000 if INTERPRETED else 40000), 1),  # several pieces of a run
    ((2, 300 if INTERPRETED else 3000, 17), 2),  # several pieces of rows
    ((2, 5, 14, 14), 1),  # runs and rows of a multiple of 4
    ((2, 7, 20), 2),
]
SHAPES = [
    *EVERY_KERNEL,
    ((1, 1), 1),
    ((2, 63), 1),
    ((3, 129), -1),
    ((2, 5, 1), 1),
    ((1, 7, 129), 1),
    ((2, 33, 7, 5), 1),
    ((2, 7, 5, 33), -1),
    ((2, 3, 4, 5, 6), 2),
    ((20 if INTERPRETED else 300, 40), 1),  # rows of one sample each
    ((3, 5000), 1),
]


def numbers(shape, generator):
    """The same on every device."""
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return drawn.to(torch.get_default_device())


def stored_in(order):
    """A layout: the dimensions in this order in memory."""
    inverse = sorted(range(len(order)), key=lambda d: order[d])
    return lambda t: t.permute(order).contiguous().permute(inverse)


def make_inputs(shape, channel_dim, dtype=torch.float32, shared=(), seed=0, spread=2.0):
    """x, gamma, beta and residual; the parameters named in ``shared`` are (C,), the others (B, C)."""
    generator = torch.Generator().manual_seed(seed)
    B, C = shape[0], shape[channel_dim]
    shapes = {"x": shape, "gamma": (B, C), "beta": (B, C), "residual": shape}
    shapes |= {name: (C,) for name in shared}
    return {name: (numbers(s, generator) * spread).to(dtype) for name, s in shapes.items()}


def run(function, inputs, dtype=None, layout=lambda t: t, **options):
    """The output and the gradients of all inputs for a random gradient of the output."""
    leaves = {k: None if t is None else t.to(dtype or t.dtype).requires_grad_() for k, t in inputs.items()}
    x, gamma, beta, residual = (leaves[name] for name in NAMES)
    y = function(layout(x), gamma, beta, residual=None if residual is None else layout(residual), **options)
    generator = torch.Generator().manual_seed(1)
    grad = numbers(y.shape, generator).to(x.dtype if dtype is None else y.dtype)
    if dtype is not None:  # the same numbers as in the dtype under test
        grad = grad.to(inputs["x"].dtype).to(dtype)
    given = {k: t for k, t in leaves.items() if t is not None}
    grads = torch.autograd.grad(y, list(given.values()), grad)
    return {"y": y} | {f"grad_{name}": g for name, g in zip(given, grads, strict=True)}


def check(inputs, kernel=film, eager=film_ref, **options):
    actual = run(kernel, inputs, **options)
    plain = run(eager, inputs, **options)
    exact = run(film_ref, inputs, torch.float64, **options)
    x = inputs["x"]
    terms = x.numel() // max(x.shape[options.get("channel_dim", 1)], 1)
    biggest = {name: t.abs().max().item() if t is not None and t.numel() else 0.0 for name, t in inputs.items()}
    z = (biggest["gamma"] + 1) * biggest["x"] + biggest["beta"]  # magnitude of the terms of z
    grad = 6.0  # largest |dy| of a normal sample of these sizes, times the largest slope
    scales = {
        "y": z + biggest["residual"],
        # The slope is a function of z: an error of z moves it by at most its curvature, below 1.
        "grad_x": grad * (biggest["gamma"] + 1) * (1 + z),
        "grad_gamma": grad * biggest["x"] * (1 + z) * terms**0.5,
        "grad_beta": grad * (1 + z) * terms**0.5,
        "grad_residual": grad,
    }
    for name, result in actual.items():
        n = terms if name in ("grad_gamma", "grad_beta") else 1
        assert_close_to_reference(result, plain[name], exact[name], terms=n, name=name, scale=scales[name])
    return actual


@pytest.mark.interpreted
@in_dtypes(SHAPES, EVERY_KERNEL if INTERPRETED else SHAPES, DTYPES)
def test_matches_the_reference(sizes, dtype):
    shape, channel_dim = sizes
    check(make_inputs(shape, channel_dim, dtype), channel_dim=channel_dim, activation="silu")


@not_on_the_standin("large, and asks nothing new of it")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape, channel_dim", [((4, 16, 256, 528), 1), ((4, 4224, 512), 2)])
def test_tensors_beyond_the_caches(shape, channel_dim, dtype):
    """From 32 MiB up, results are written past the caches; those of one element of the batch are not."""
    torch.manual_seed(0)
    x, residual, grad = (torch.randn(shape).to(dtype) for _ in range(3))
    gamma, beta = (torch.randn(shape[0], shape[channel_dim]).to(dtype) for _ in range(2))

    def run(part):
        inputs = [t[part].requires_grad_() for t in (x, gamma, beta, residual)]
        y = film(*inputs[:3], channel_dim=channel_dim, activation="silu", residual=inputs[3])
        return y.detach(), torch.autograd.grad(y, inputs[0], grad[part])[0]

    whole = run(slice(None))
    size = whole[0].numel() * whole[0].element_size()
    assert size >= 32 << 20 > size // shape[0]
    for b in range(shape[0]):
        for all_of_them, one in zip(whole, run(slice(b, b + 1)), strict=True):
            assert torch.equal(all_of_them[b], one[0])


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", DTYPES[:2] if INTERPRETED else DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, dtype):
    for shape, channel_dim in (((2, 5, 67), 1), ((2, 67, 5), 2)):
        inputs = make_inputs(shape, channel_dim, dtype)
        check(inputs, channel_dim=channel_dim, activation=activation, gamma_offset=1.0)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    "shared", [(), ("gamma",), ("beta",), ("gamma", "beta")], ids=lambda s: "+".join(s) or "none"
)
@pytest.mark.parametrize(
    "absent", [(), ("gamma",), ("beta",), ("residual",), NAMES[1:]], ids=lambda s: "+".join(s)
)
def test_optional_and_shared_parameters(absent, shared):
    for shape, channel_dim in (((3, 6, 35), 1), ((3, 35, 6), 2)):
        inputs = make_inputs(shape, channel_dim, shared=shared) | dict.fromkeys(absent)
        check(inputs, channel_dim=channel_dim, activation="tanh")


@pytest.mark.interpreted
def test_offset_is_not_rounded_to_float32():
    check(make_inputs((2, 3, 5), 1, torch.float64), gamma_offset=0.1)


def test_offset_belongs_to_gamma():
    """Without gamma the factor is 1, whatever gamma_offset."""
    x, beta = torch.randn(2, 3, 4), torch.randn(2, 3)
    assert torch.equal(film(x, beta=beta, gamma_offset=5.0), film(x, beta=beta))


@pytest.mark.interpreted
@pytest.mark.parametrize("size", [6, 1])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_layouts_are_kept_without_a_copy(dtype, size, monkeypatch):
    inputs = make_inputs((3, 35, size, 7), 1, dtype)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t: pytest.fail("copied"))
    actual = check(inputs, layout=lambda t: t.to(memory_format=torch.channels_last), activation="gelu")
    assert actual["y"].stride()[1] == 1


@pytest.mark.interpreted
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
    actual = check(inputs, layout=layout, activation="relu")
    assert actual["y"].stride() == torch.empty_like(layout(inputs["x"])).stride()


@pytest.mark.interpreted
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(shape):
    actual = run(film, make_inputs(shape, 1), activation="silu")
    exact = run(film_ref, make_inputs(shape, 1), activation="silu")
    for name, result in actual.items():
        assert torch.equal(result, exact[name]), name


@pytest.mark.interpreted
@pytest.mark.filterwarnings("ignore:.*encountered in")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_infinity_and_huge_values_behave_as_in_the_reference(activation):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 90.0, -90.0, 20.0, -20.0, 0.0])
    x = x.repeat(4).view(1, 1, 40)
    one = torch.ones(1, 1)
    actual = film(x, one, activation=activation)
    # In float64: GELU of inf is NaN in some builds of float32.
    expected = film_ref(x.double(), one.double(), activation=activation)
    torch.testing.assert_close(actual, expected.float(), equal_nan=True, atol=1e-30, rtol=1e-6)


def check_slopes_of_any_number(function, activation, dtype=torch.float32):
    magnitudes = torch.tensor([float("inf"), 3e38, 1e35, 1e30, 1e20, 1e13, 1e5, 100, 90, 50, 20, 0, float("nan")])
    x = torch.cat([magnitudes, -magnitudes]).view(1, 1, 1, -1)
    slopes = []
    for f, of in ((function, dtype), (film_ref, dtype), (film_ref, torch.float64)):
        leaf = x.to(of).requires_grad_()
        y = f(leaf, torch.ones(1, 1, dtype=of), None, residual=None, channel_dim=2, activation=activation)
        slopes += torch.autograd.grad(y.sum(), leaf)
    # PyTorch's slope of silu takes x (1 - sigmoid(x)) with 1 - sigmoid(20) rounded to the precision of 1.
    assert_close_to_reference(*slopes, name="slopes", scale=20 if activation == "silu" else None)


@pytest.mark.interpreted
@pytest.mark.filterwarnings("ignore:.*encountered in")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_huge_values(activation):
    x = torch.tensor([1e4, -1e4, 90.0, -90.0, 20.0, -20.0, 0.0]).view(1, 1, 7)
    check({"x": x, "gamma": torch.ones(1, 1), "beta": None, "residual": None}, activation=activation)


@pytest.mark.interpreted
@pytest.mark.filterwarnings("ignore:.*encountered in")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slopes_of_any_number_are_those_of_the_reference(activation, dtype):
    check_slopes_of_any_number(film, activation, dtype)


@settings(max_examples=examples(60))
@given(data=st.data())
def test_any_shape(data):
    rank = data.draw(st.integers(2, 5))
    shape = tuple(data.draw(st.lists(st.integers(1, 20), min_size=rank, max_size=rank)))
    channel_dim = data.draw(st.integers(1, rank - 1))
    dtype = data.draw(st.sampled_from(DTYPES))
    order = data.draw(st.permutations(range(rank)))
    shared = data.draw(st.sets(st.sampled_from(["gamma", "beta"])))
    inputs = make_inputs(shape, channel_dim, dtype, shared)
    activation = data.draw(st.sampled_from(list(ACTIVATIONS)))
    options = {"channel_dim": channel_dim, "gamma_offset": data.draw(st.sampled_from([0.0, 1.0]))}
    off_the_kink(activation, film_ref(*(inputs[name].double() for name in NAMES[:3]), **options))
    check(inputs, layout=stored_in(order), activation=activation, **options)


def test_bitwise_reproducible():
    inputs = make_inputs((3, 17, 5000), 1)
    first, second = (run(film, inputs, activation="gelu") for _ in range(2))
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


@not_on_the_standin("threads are the CPU's")
@pytest.mark.parametrize("shared", [(), ("gamma", "beta")], ids=["per-sample", "shared"])
@pytest.mark.parametrize(
    "shape, channel_dim", [((2100, 96), 1), ((16, 9000), 1), ((64, 60, 7, 7), 1), ((4, 1000, 96), 2)]
)
def test_the_number_of_threads_changes_no_bit(shape, channel_dim, shared):
    inputs = make_inputs(shape, channel_dim, shared=shared)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(run(film, inputs, channel_dim=channel_dim, activation="silu"))
    finally:
        torch.set_num_threads(threads)
    for name, result in results[0].items():
        assert all(torch.equal(result, other[name]) for other in results[1:]), name


def test_what_pads_a_row_is_in_no_sum():
    """A row of 5 is computed as a longer one: there z would be inf * 0."""
    for shape, channel_dim in (((1, 2, 5), 1), ((2, 3, 5), 2)):
        x = torch.ones(shape, requires_grad=True)
        gamma = torch.full((shape[channel_dim],), float("inf")).requires_grad_()
        y = film(x, gamma, channel_dim=channel_dim, activation="sigmoid")
        (found,) = torch.autograd.grad(y.sum(), gamma)
        assert torch.equal(found, torch.zeros_like(gamma))


@pytest.mark.machinery
@pytest.mark.interpreted
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_first_and_second_derivatives(activation):
    inputs = make_inputs((2, 3, 5), 1, torch.float64, shared=("beta",))
    leaves = [inputs[name].requires_grad_() for name in NAMES]

    def function(x, gamma, beta, residual):
        return film(x, gamma, beta, residual=residual, activation=activation, gamma_offset=1.0)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=INTERPRETED)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=INTERPRETED)


@pytest.mark.machinery
@pytest.mark.interpreted
@pytest.mark.parametrize("channels_last", [False, True])
def test_raw_ops_pass_opcheck(channels_last):
    x = torch.randn(2, 3, 4, 5)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    gamma, beta = torch.randn(2, 3), torch.randn(3)
    places, table = torch.randn(2, 1, 4, 5), torch.randn(1, 3, 1, 5)
    pairs = [(x, gamma, table, beta, places, x, 1, 1.0, 3), (x, x, beta, None, x, None, 1, 0.0, 3)]
    if INTERPRETED or DEVICE != "cpu":  # kernels of GPUs take one value per channel
        pairs = []
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for args in (
        (x, gamma, beta, None, None, x, 1, 1.0, 3),
        (x, None, None, None, None, None, 1, 0.0, 0),
        (x[:, :, ::2], gamma, None, None, None, None, 1, 0.0, 1),
        *pairs,
    ):
        torch.library.opcheck(raw_op("film_fwd").default, args, test_utils=utils)
        backward = (torch.randn_like(args[0]), *args[:5], *args[6:])
        for output_mask in (0b11111, 0b00010, 0b11101):
            arguments = (*backward, output_mask)
            torch.library.opcheck(raw_op("film_bwd").default, arguments, test_utils=utils)


@pytest.mark.interpreted
@pytest.mark.parametrize("wrong", NAMES[1:])
def test_raw_ops_refuse_shapes_that_do_not_fit(wrong):
    inputs, absent, options = make_inputs((2, 3, 5), 1), (None, None), (1, 0.0, 0)
    inputs[wrong] = inputs[wrong][:, :2]
    x, gamma, beta, residual = (inputs[name] for name in NAMES)
    with pytest.raises(RuntimeError, match=f"film: .*{wrong}.*expected"):
        raw_op("film_fwd")(x, gamma, beta, *absent, residual, *options)
    message = f"film: .*{'grad_output' if wrong == 'residual' else wrong}.*expected"
    with pytest.raises(RuntimeError, match=message):
        raw_op("film_bwd")(residual, x, gamma, beta, *absent, *options, 0b111)
    with pytest.raises(RuntimeError, match="film: .*grad_output.*expected"):
        raw_op("film_bwd")(x.double(), x, None, None, *absent, *options, 0b111)


@not_on_the_standin("Inductor makes no code for it")
def test_compile_without_graph_breaks():
    def function(x, gamma, beta):
        return film(x * 2, gamma, beta, activation="gelu", gamma_offset=1.0).sin()

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for n in (5, 6):
        leaves = [torch.randn(2, n, 7), torch.randn(2, n), torch.randn(n)]
        results = []
        for f in (function, compiled):
            inputs = [t.clone().requires_grad_() for t in leaves]
            y = f(*inputs)
            results.append([y, *torch.autograd.grad(y.sum(), inputs)])
        torch.testing.assert_close(*results)


@pytest.mark.interpreted
def test_compile_of_gradient():
    def loss(x, gamma, beta):
        return film(x, gamma, beta, activation="silu").square().sum()

    gradient = torch.func.grad(loss, (0, 1, 2))
    compiled = torch.compile(lambda *inputs: gradient(*inputs), fullgraph=True, backend="aot_eager")
    inputs = torch.randn(2, 3, 5), torch.randn(2, 3), torch.randn(3)
    torch.testing.assert_close(compiled(*inputs), gradient(*inputs))


@pytest.mark.interpreted
def test_function_transforms():
    x, gamma, beta = torch.randn(4, 2, 3, 5), torch.randn(4, 3), torch.randn(2, 3)

    def loss(function, x, gamma, beta):
        return function(x, gamma, beta, activation="silu").square().sum()

    for dims in ((0, 0, None), (0, None, None), (None, 0, None)):
        args = [t if d == 0 else t[0] if t is not beta else t for t, d in zip((x, gamma, beta), dims, strict=True)]
        results = [
            torch.func.vmap(torch.func.grad(lambda *a, f=f: loss(f, *a), argnums=(0, 1, 2)), in_dims=dims)(*args)
            for f in (film, film_ref)
        ]
        torch.testing.assert_close(*results)
    jacobians = [
        torch.func.jacrev(lambda t, f=f: f(t, gamma[0], activation="tanh"))(x[0]) for f in (film, film_ref)
    ]
    torch.testing.assert_close(*jacobians)


def test_export():
    module = FiLM(4, 3, activation="silu")
    torch.nn.init.normal_(module.conditioner.weight)
    x, condition = torch.randn(2, 3, 5), torch.randn(2, 4)
    exported = torch.export.export(module, (x, condition)).module()
    torch.testing.assert_close(exported(x, condition), module(x, condition))


@pytest.mark.parametrize("function", [film, film_ref])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_autocast_keeps_the_precision_of_features(function, half):
    """As for x * gamma + beta: only the layer that makes gamma and beta runs in half precision."""
    x, gamma = torch.full((2, 3, 5), 1e5), torch.full((2, 3), 2.0)
    with torch.autocast(DEVICE, half):
        y = function(x, gamma.to(half), gamma.to(half), residual=x)
        assert y.dtype == (x * gamma.to(half)[..., None]).dtype == torch.float32
        torch.testing.assert_close(y, x * 2 + 2 + x)
        assert function(x.to(half) / 1e5, gamma, gamma).dtype == half
        doubles = x.double(), gamma.double()
        assert function(*doubles).dtype == torch.float64
    torch.manual_seed(0)
    module = FiLM(4, 3)
    torch.nn.init.normal_(module.conditioner.weight)
    x, condition = torch.randn(2, 3, 5), torch.randn(2, 4)
    with torch.autocast(DEVICE, half):
        modulated = module(x, condition)
    assert modulated.dtype == torch.float32
    torch.testing.assert_close(modulated, module(x, condition), atol=0.1, rtol=0.05)


@pytest.mark.parametrize("gamma_offset", [0.0, 1.0])
def test_module_starts_as_the_identity_and_can_be_copied(gamma_offset):
    module = FiLM(4, 3, channel_dim=2, gamma_offset=gamma_offset)
    x, condition = torch.randn(2, 5, 3), torch.randn(2, 4)
    assert torch.equal(module(x, condition), x)
    torch.nn.init.normal_(module.conditioner.weight)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(module), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x, condition), module(x, condition))
    fresh = FiLM(4, 3, channel_dim=2, gamma_offset=gamma_offset)
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(x, condition), module(x, condition))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (lambda x, g: {"x": [1.0]}, TypeError, ["x", "Tensor", "list"]),
        (lambda x, g: {"x": x.long()}, ValueError, ["x", "floating-point", "int64"]),
        (lambda x, g: {"x": x[0, 0]}, ValueError, ["x", "rank 2", "(4,)"]),
        (lambda x, g: {"gamma": g[:, :2]}, ValueError, ["gamma", "(3,) or (2, 3)", "(2, 2)"]),
        (lambda x, g: {"gamma": g[0, :2]}, ValueError, ["gamma", "(3,) or (2, 3)", "1 in place", "(2,)"]),
        (lambda x, g: {"gamma": x[:, :, :2]}, ValueError, ["gamma", "(2, 3, 4)", "(2, 3, 2)"]),
        (lambda x, g: {"gamma": x[None]}, ValueError, ["gamma", "(2, 3, 4)", "(1, 2, 3, 4)"]),
        (lambda x, g: {"gamma": 2.0}, TypeError, ["gamma", "a pair", "float"]),
        (lambda x, g: {"gamma": (g, None)}, TypeError, ["gamma[1]", "Tensor", "NoneType"]),
        (lambda x, g: {"gamma": (g, (g, g))}, TypeError, ["gamma[1]", "Tensor", "tuple"]),
        (lambda x, g: {"beta": (g, g, g)}, ValueError, ["beta", "pair", "3"]),
        (lambda x, g: {"beta": (g, g.T)}, ValueError, ["beta[1]", "(2, 3)", "(3, 2)"]),
        (lambda x, g: {"beta": g.T}, ValueError, ["beta", "(3,) or (2, 3)", "(3, 2)"]),
        (lambda x, g: {"gamma": g.double()}, ValueError, ["gamma", "float32", "float64"]),
        (lambda x, g: {"gamma": g.to("meta")}, ValueError, ["gamma", DEVICE, "meta"]),
        (lambda x, g: {"residual": x[:1]}, ValueError, ["residual", "(2, 3, 4)", "(1, 3, 4)"]),
        (lambda x, g: {"channel_dim": 0}, ValueError, ["channel_dim", "got 0"]),
        (lambda x, g: {"channel_dim": 3}, ValueError, ["channel_dim", "got 3"]),
        (lambda x, g: {"activation": "swish"}, ValueError, ["activation", "'silu'", "'swish'"]),
        (lambda x, g: {"backend": "gpu"}, ValueError, ["backend", "'cpu'", "'gpu'"]),
        (lambda x, g: {"x": x.to("meta"), "backend": "cpu"}, UnsupportedError, ["(2, 3, 4)", "meta"]),
    ],
)
def test_bad_input_is_named(changes, error, words):
    x, gamma = torch.randn(2, 3, 4), torch.randn(2, 3)
    with pytest.raises(error) as caught:
        film(**{"x": x} | changes(x, gamma))
    for word in words:
        assert word in str(caught.value)
