"""FiLM's gamma and beta in every shape, and pairs of them: values, derivatives of every kind, exported programs.

Triton's kernels take the tests marked ``interpreted`` in its interpreter; CUDA's take one value per channel alone.
"""

import itertools

import pytest
import torch
from device import DEVICE, INTERPRETED, examples, not_on_the_standin, off_the_kink
from hypothesis import given, settings
from hypothesis import strategies as st
from test_film import numbers, stored_in
from tolerance import assert_close_to_reference

from fusedattn import FiLM, UnsupportedError, film, film_ref

pytestmark = pytest.mark.levels

kernels_of_any_shape = [
    pytest.mark.interpreted,
    pytest.mark.skipif(DEVICE == "standin", reason="CUDA's kernels take one value per channel"),
]
on_the_cpu = pytest.mark.skipif(INTERPRETED or DEVICE != "cpu", reason="concerns the CPU's kernels alone")


def of_any_shape(test):
    """Of kernels that take every shape: the CPU's and Triton's."""
    for mark in kernels_of_any_shape:
        test = mark(test)
    return test


def parameter_shapes(shape, channel_dim, per_channel):
    """All that PyTorch's broadcasting and the rules of ranks allow."""
    B, C = shape[0], shape[channel_dim]
    if per_channel:
        yield from ((), (1,), (C,))
        if len(shape) > 2:
            yield from itertools.product((1, B), (1, C))
    for full in itertools.product((False, True), repeat=len(shape)):
        if not per_channel or not any(f for d, f in enumerate(full) if d not in (0, channel_dim)):
            yield tuple(n if f else 1 for f, n in zip(full, shape, strict=True))


def tensors(shapes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [None if s is None else numbers(s, generator).to(dtype) for s in shapes]


def parameter(first, second):
    return first if second is None else (first, second)


def modulate(function, **options):
    """A function of x, gamma, gamma's second, beta, beta's second and the residual."""

    def call(x, a, a2, b, b2, residual):
        return function(x, parameter(a, a2), parameter(b, b2), residual=residual, **options)

    return call


def run(function, inputs, dtype):
    leaves = [None if t is None else t.to(dtype).requires_grad_() for t in inputs]
    y = function(*leaves)
    (grad,) = tensors([y.shape], inputs[0].dtype, seed=1)
    return y, *torch.autograd.grad(y, [t for t in leaves if t is not None], grad.to(dtype))


def check(inputs, kernel=film, **options):
    of = [run(modulate(f, **options), inputs, inputs[0].dtype) for f in (kernel, film_ref)]
    exact = run(modulate(film_ref, **options), inputs, torch.float64)
    present = [t for t in inputs if t is not None]
    names = [n for n, t in zip(("x", "a", "a2", "b", "b2", "residual"), inputs, strict=True) if t is not None]
    for name, t, actual, plain, right in zip(["y", *names], [inputs[0], *present], *of, exact, strict=True):
        terms = inputs[0].numel() // max(t.numel(), 1)
        # Of the slope's terms: z has up to five numbers of a normal sample in it, and its error moves the slope.
        scale = 500.0 if actual.dtype != torch.float64 else 1e3
        assert_close_to_reference(actual, plain, right, terms=terms, name=f"{name} {tuple(t.shape)}", scale=scale)


CASES = [((3, 4, 6), 1), ((2, 4, 3, 5), 1), ((2, 4, 3, 5), 3), ((3, 5), 1), ((2, 2, 2), 2)]


@pytest.mark.interpreted
@pytest.mark.parametrize("shape, channel_dim", CASES)
def test_one_value_per_channel(shape, channel_dim):
    shapes = list(parameter_shapes(shape, channel_dim, per_channel=True))
    for n, s in enumerate(shapes):
        others = [None if k == 0 else shapes[(n + k) % len(shapes)] for k in (n % 3, 1 + n % 5, n % 2)]
        inputs = tensors([shape, s, others[0], others[1], others[2], shape], torch.float32)
        check(inputs, channel_dim=channel_dim, activation="silu", gamma_offset=1.0)


@of_any_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape, channel_dim", CASES)
def test_any_dimension(shape, channel_dim, dtype):
    shapes = list(parameter_shapes(shape, channel_dim, per_channel=False))
    for n, s in list(enumerate(shapes))[:: 4 if INTERPRETED else 1]:  # a program takes milliseconds there
        others = [None if k == 0 else shapes[(n + k) % len(shapes)] for k in (n % 3, 1 + n % 5, 2 * (n % 4))]
        check(tensors([shape, s, *others, shape], dtype), channel_dim=channel_dim, activation="silu")


@of_any_shape
@settings(max_examples=examples(10 if INTERPRETED else 100))
@given(data=st.data())
def test_any_combination(data):
    rank = data.draw(st.integers(2, 5))
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=rank, max_size=rank)))
    shape = (*shape[:-1], shape[-1] * data.draw(st.sampled_from([1, 7])))
    channel_dim = data.draw(st.integers(1, rank - 1))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    shapes = [*parameter_shapes(shape, channel_dim, True), *parameter_shapes(shape, channel_dim, False)]

    def some(rate):
        return data.draw(st.sampled_from(shapes)) if data.draw(st.integers(1, 10)) <= rate else None

    gamma, beta = some(9), some(9)
    drawn = [gamma, gamma and some(4), beta, beta and some(4)]
    inputs = tensors([shape, *drawn, data.draw(st.sampled_from([None, shape]))], dtype)
    order = data.draw(st.permutations(range(rank)))
    of_x = [t if t is None or t.dim() < rank else stored_in(order)(t) for t in inputs]
    activation = data.draw(st.sampled_from([None, "relu", "gelu_tanh"]))
    options = {"channel_dim": channel_dim, "gamma_offset": 1.0}
    exact = [None if t is None else t.double() for t in inputs[:-1]]
    off_the_kink(activation, modulate(film_ref, **options)(*exact, None))
    check(of_x, activation=activation, **options)


@on_the_cpu
@pytest.mark.parametrize(
    "shape, channel_dim, gamma, added, beta",
    [
        ((8, 300, 96), 2, (8, 300, 96), (96,), (8, 1, 96)),  # a transformer's: everything once
        ((6, 700, 33), 2, (1, 700, 33), (6, 1, 33), (1, 700, 1)),  # each sums over what the other does not
        ((5, 12, 40, 60), 1, (5, 1, 40, 60), None, (12,)),  # a gate per place
        ((5, 12, 40, 60), 1, (1, 12, 1, 60), None, ()),
        ((40, 5000), 1, (40, 5000), (1,), (5000,)),
        ((3, 2, 40000), 1, (), None, (3, 1, 1)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_tasks_and_any_number_of_threads(shape, channel_dim, gamma, added, beta, dtype):
    inputs = tensors([shape, gamma, added, beta, None, shape], dtype)
    check(inputs, channel_dim=channel_dim, activation="silu")
    call = modulate(film, channel_dim=channel_dim, activation="silu")
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(run(call, inputs, dtype))
    finally:
        torch.set_num_threads(threads)
    for first, *others in zip(*results, strict=True):
        assert all(torch.equal(first, other) for other in others)


@on_the_cpu
def test_a_pair_is_not_made():
    """16 MiB of it would be: the sum of a row and a column."""
    x, rows, columns = torch.ones(1, 2048, 2048), torch.ones(1, 2048, 1), torch.ones(1, 1, 2048)
    with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
        film(x, (rows, columns), channel_dim=2)
    assert sum(max(e.self_cpu_memory_usage, 0) for e in profile.key_averages()) < 24 << 20


@of_any_shape
def test_expanded_and_strided_parameters():
    x = torch.randn(3, 4, 6)
    for gamma in (
        torch.randn(3, 1, 1).expand(3, 4, 6),
        torch.randn(3, 8, 6)[:, ::2],
        torch.randn(6, 4, 3).permute(2, 1, 0),
        torch.randn(3, 4, 12)[..., ::2],
        torch.randn(4).expand(3, 4),
        torch.randn(1).expand(4),
    ):
        check([x, gamma, None, gamma, gamma, None], activation="gelu")


SHAPES = {
    "places": [(2, 3, 4, 5), (2, 1, 4, 5), None, (1, 3, 1, 5), None],
    "pairs": [(2, 3, 4, 5), (2, 3, 4, 5), (3,), (), (2, 3)],
    "channels": [(2, 3, 4, 5), (1, 3), (2, 3, 1, 1), (1, 3, 1, 1), (1,)],
}
shapes_of_all_kinds = pytest.mark.parametrize(
    "shapes",
    [
        pytest.param(s, id=name, marks=[pytest.mark.interpreted] if name == "channels" else kernels_of_any_shape)
        for name, s in SHAPES.items()
    ],
)


@pytest.mark.machinery
@pytest.mark.skipif(INTERPRETED, reason="the second ones go through the reference, whatever the backend")
@shapes_of_all_kinds
def test_derivatives(shapes):
    leaves = [None if t is None else t.requires_grad_() for t in tensors([*shapes, shapes[0]])]
    call = modulate(film, activation="gelu", gamma_offset=1.0)
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)
    given = [t for t in leaves if t is not None]

    def of_given(function):
        def run_given(*values):
            values = iter(values)
            return modulate(function, activation="gelu")(*(None if t is None else next(values) for t in leaves))

        return run_given

    tangents = [torch.randn_like(t) for t in given]
    pushed = [torch.func.jvp(of_given(f), tuple(given), tuple(tangents)) for f in (film, film_ref)]
    torch.testing.assert_close(*pushed)


@shapes_of_all_kinds
def test_vmap(shapes):
    shapes = [s for s in shapes if s is not None][:4]

    def loss(function, x, *parameters):
        gamma, *added = parameters[: len(parameters) - 1]
        return function(x, (gamma, added[0]) if added else gamma, parameters[-1], activation="silu").square().sum()

    for pattern in itertools.product((True, False), repeat=len(shapes)):
        alone = sum(pattern) == 1 and pattern[0]
        if not any(pattern) or (INTERPRETED and not (alone or all(pattern))):
            continue
        args = tensors([(3, *s) if p else s for s, p in zip(shapes, pattern, strict=True)])
        dims = tuple(0 if p else None for p in pattern)
        numbers_of = tuple(range(len(args)))
        results = [
            torch.func.vmap(torch.func.grad(lambda *a, f=f: loss(f, *a), argnums=numbers_of), in_dims=dims)(*args)
            for f in (film, film_ref)
        ]
        torch.testing.assert_close(*results)


class Modulated(torch.nn.Module):
    def forward(self, x, *parameters):
        gamma, gamma_added, beta, *added = parameters
        return film(x, (gamma, gamma_added), (beta, *added) if added else beta, activation="silu")


@on_the_cpu
@pytest.mark.parametrize("make", ["Dim", "auto"])
def test_export_with_a_dynamic_batch_as_large_as_the_channels(make):
    batch = torch.export.Dim("batch") if make == "Dim" else torch.export.Dim.AUTO
    x, gamma, places, beta = tensors([(3, 3, 4, 5), (3, 3), (3, 1, 4, 5), (3,)], torch.float32)
    dynamic = {0: batch}
    exported = torch.export.export(
        Modulated(), (x, gamma, places, beta), dynamic_shapes=((dynamic, (dynamic, dynamic, None)))
    ).module()
    for B in (3, 7):
        inputs = tensors([(B, 3, 4, 5), (B, 3), (B, 1, 4, 5), (3,)], torch.float32)
        torch.testing.assert_close(exported(*inputs), Modulated()(*inputs))


@not_on_the_standin("Inductor makes no code for it, and its kernels take one value per channel")
def test_compile():
    compiled = torch.compile(Modulated(), fullgraph=True, dynamic=True)
    for B in (2, 5):
        inputs = tensors([(B, 3, 4, 5), (B, 3), (B, 1, 4, 5), (1, 3, 1, 5), (B, 3, 4, 5)], torch.float32)
        results = []
        for f in (compiled, Modulated()):
            leaves = [t.clone().requires_grad_() for t in inputs]
            y = f(*leaves)
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        torch.testing.assert_close(*results)


def test_a_kernel_that_is_forced_says_what_it_does_not_take():
    x = torch.randn(2, 3, 4)
    with pytest.raises(UnsupportedError, match=r"cuda: .*one per channel, \(C,\) or \(B, C\)"):
        film(x, x, backend="cuda")
    try:
        film(x, x[:, :, :1], backend="cuda")
    except UnsupportedError as error:
        assert "one per channel" not in str(error)


@of_any_shape
def test_the_module_takes_a_condition_for_each_place():
    module = FiLM(6, 5, channel_dim=-1, activation="silu")
    torch.nn.init.normal_(module.conditioner.weight)
    x = torch.randn(2, 4, 5)
    for shape in ((2, 6), (2, 1, 6), (1, 6), (6,), (2, 4, 6), (1, 4, 6)):
        condition = torch.randn(shape)
        gamma, beta = module.conditioner(condition).chunk(2, -1)
        if len(shape) == 2:
            gamma, beta = gamma[:, None], beta[:, None]
        expected = torch.nn.functional.silu((gamma + 1) * x + beta)
        torch.testing.assert_close(module(x, condition), expected)


# float32 gamma and beta beside half precision: parameters under manual casts


@of_any_shape
@pytest.mark.parametrize("function", [film, film_ref])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shapes", [((3,), (2, 3)), ((2, 3, 1), (2, 3, 50)), ((2, 1, 50), ())])
def test_float32_parameters_are_not_rounded(function, half, shapes):
    x, gamma, beta, grad = tensors([(2, 3, 50), *shapes, (2, 3, 50)])
    x, grad = x.to(half), grad.to(half)
    inputs = [x.requires_grad_(), *(t.float().requires_grad_() for t in (gamma, beta))]
    y = function(*inputs, activation="silu")
    grads = torch.autograd.grad(y, inputs, grad)
    assert y.dtype == grads[0].dtype == half
    assert grads[1].dtype == grads[2].dtype == torch.float32
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    y64 = film_ref(*doubles, activation="silu")
    grads64 = torch.autograd.grad(y64, doubles, grad.double())
    for name, found, exact in zip(("y", "x", "gamma", "beta"), (y, *grads), (y64, *grads64), strict=True):
        # No worse than one rounding to its dtype of what is exact.
        assert_close_to_reference(found, exact.to(found.dtype), exact, terms=300, name=name)


def test_parameters_of_other_dtypes_are_named():
    x, gamma = torch.randn(2, 3, 4, dtype=torch.bfloat16), torch.randn(3)
    with pytest.raises(ValueError, match=r"gamma: expected dtype torch.bfloat16 or torch.float32"):
        film(x, gamma.double())
    with pytest.raises(ValueError, match=r"gamma: expected dtype torch.float32 on"):
        film(x.float(), gamma.bfloat16())
