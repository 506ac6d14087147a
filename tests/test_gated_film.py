"""gated_film against plain compositions of PyTorch's functions, within tests/tolerance.py."""

import functools
import math

import pytest
import torch
from device import DEVICE, not_on_the_standin, raw_op
from pairwise import pairwise
from test_film import numbers
from tolerance import assert_close_to_reference

from fusedattn import UnsupportedError, gated_film, gated_film_ref

pytestmark = [
    pytest.mark.levels,
    pytest.mark.filterwarnings("ignore:fusedattn. no kernel of gated_film can run:UserWarning"),
]
FUNCTIONS = pytest.mark.parametrize("function", [gated_film, gated_film_ref])
HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, torch.float64, *HALF)


def plain(x, condition, added, channel_dim):
    def along(t):
        shape = [1] * x.dim()
        shape[channel_dim] = t.shape[-1] if t.dim() else 1
        if t.dim() == 2:
            shape[0] = t.shape[0]
        return t if t.dim() == x.dim() else t.view(shape)

    for t in (condition, added):
        x = x if t is None else x + along(t)
    a, b = x.chunk(2, channel_dim)
    return torch.tanh(a) * torch.sigmoid(b)


def ours(x, condition, added, channel_dim, function=gated_film):
    return function(x, condition if added is None else (condition, added), channel_dim=channel_dim)


def run(function, tensors, channel_dim, dtype=None):
    leaves = [None if t is None else t.to(dtype or t.dtype).requires_grad_() for t in tensors]
    y = function(*leaves, channel_dim)
    grad = numbers(y.shape, torch.Generator().manual_seed(1)).to(tensors[0].dtype).to(y.dtype)
    present = [t for t in leaves if t is not None]
    return y, *torch.autograd.grad(y, present, grad)


def in_layout(t, layout, channel_dim):
    """The same numbers in another order of memory."""
    if layout == "channels_last":
        return t.movedim(channel_dim, -1).contiguous().movedim(-1, channel_dim)
    return t.transpose(0, -1).contiguous().transpose(0, -1) if layout == "permuted" else t


def check(
    shape,
    channel_dim,
    condition,
    added,
    dtypes=(torch.float32, torch.float32),
    layout="contiguous",
    condition_layout="contiguous",
    function=gated_film,
):
    """By what the condition and what is added to it are given for; dtypes: that of x and that of the condition."""
    B, C = shape[0], shape[channel_dim]
    of_places = tuple(1 if d == channel_dim % len(shape) else n for d, n in enumerate(shape))
    shapes = {None: None, (): (), "C": (C,), "BC": (B, C), "full": shape, "place": of_places}
    generator = torch.Generator().manual_seed(0)
    of = [shape, shapes[condition], shapes[added if condition is not None else None]]
    tensors = [None if s is None else numbers(tuple(s), generator) for s in of]
    tensors = [None if t is None else t.to(dtypes[n > 0]) for n, t in enumerate(tensors)]
    tensors[0] = in_layout(tensors[0], layout, channel_dim)
    if condition == "full":
        tensors[1] = in_layout(tensors[1], condition_layout, channel_dim)
    kernel = functools.partial(ours, function=function)
    actual, eager = run(kernel, tensors, channel_dim), run(plain, tensors, channel_dim, dtypes[0])
    exact = run(plain, tensors, channel_dim, torch.float64)
    present = [tensors[0], *(t for t in tensors if t is not None)]
    for found, t, e, source in zip(actual, eager, exact, present, strict=True):
        terms = max(tensors[0].numel() // max(source.numel(), 1), 1)
        assert_close_to_reference(found, t.to(found.dtype), e, terms=terms, scale=6.0 * terms**0.5)
    assert actual[1].dtype == dtypes[0] and all(g.dtype == dtypes[1] for g in actual[2:])


@pytest.mark.interpreted
@pairwise(
    shape=[((2, 6, 4, 5), 1), ((3, 5, 6), 2), ((2, 6, 33), 1), ((5, 2), -1), ((1, 4, 1, 1), 1), ((2, 3, 4, 2), 3)],
    dtypes=[*((dtype, dtype) for dtype in DTYPES), *((dtype, torch.float32) for dtype in HALF)],
    condition=[None, (), "C", "BC", "full", "place"],
    added=[None, "C", "full"],
    layout=["contiguous", "channels_last", "permuted"],
    condition_layout=["contiguous", "channels_last", "permuted"],
)
def test_values_and_gradients(shape, dtypes, condition, added, layout, condition_layout):
    check(*shape, condition, added, dtypes, layout, condition_layout)


LARGE = [((3, 6, 50, 60), 1), ((2, 1300, 12), 2), ((2, 4, 3000), 1), ((2100, 16), 1), ((1, 4, 200, 130), 1)]


@pytest.mark.skipif(DEVICE == "standin", reason="has no kernels of it")
@pairwise(
    shape=LARGE,
    dtypes=[(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
    condition=[None, "C", "BC", "full", "place"],
    added=[None, "C", "full"],
)
def test_sums_over_many_rows_and_pieces(shape, dtypes, condition, added):
    check(*shape, condition, added, dtypes)


@not_on_the_standin("threads are the CPU's")
@pytest.mark.parametrize("condition", ["C", "BC", "full", "place"])
@pytest.mark.parametrize("shape, channel_dim", LARGE)
def test_the_number_of_threads_changes_no_bit(shape, channel_dim, condition):
    of_places = tuple(1 if d == channel_dim else n for d, n in enumerate(shape))
    C = shape[channel_dim]
    shapes = {"C": (C,), "BC": (shape[0], C), "full": shape, "place": of_places}
    tensors = [numbers(s, torch.Generator().manual_seed(0)) for s in (shape, shapes[condition])]
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(run(ours, [*tensors, None], channel_dim))
    finally:
        torch.set_num_threads(threads)
    for first, *others in zip(*results, strict=True):
        assert all(torch.equal(first, other) for other in others)


def arguments(shape, channel_dim, condition, added, dtype=torch.float32):
    tensors = [None if s is None else torch.randn(s, dtype=dtype) for s in (shape, condition, added)]
    return (*tensors, channel_dim)


@pytest.mark.machinery
@pytest.mark.interpreted
@pytest.mark.skipif(DEVICE == "standin", reason="has no kernels of it")
@pytest.mark.parametrize(
    "shape, channel_dim, condition, added",
    [
        ((2, 6, 4, 3), 1, None, None),
        ((2, 6, 4, 3), 1, (2, 6), (6,)),
        ((2, 5, 6), 2, (2, 5, 6), ()),
        ((2, 3, 2), 2, (2, 3, 1), None),
    ],
)
def test_raw_ops_pass_opcheck(shape, channel_dim, condition, added):
    forward, backward = (raw_op(f"gated_film_{direction}").default for direction in ("fwd", "bwd"))
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for strided in (False, True):
        x, *others = arguments(shape, channel_dim, condition, added)
        x = torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2] if strided else x
        torch.library.opcheck(forward, (x, *others), test_utils=utils)
        y = forward(x, *others)
        for mask in (0b111, 0b010):
            torch.library.opcheck(backward, (torch.randn_like(y), x, *others, mask), test_utils=utils)


@pytest.mark.interpreted
@pytest.mark.skipif(DEVICE == "standin", reason="has no kernels of it")
def test_raw_ops_refuse_what_does_not_fit():
    forward, backward = raw_op("gated_film_fwd"), raw_op("gated_film_bwd")
    with pytest.raises(RuntimeError, match="gated_film: x: expected an even number of channels, got 3"):
        forward(*arguments((2, 3, 4), 1, None, None))
    with pytest.raises(RuntimeError, match="gated_film: condition: expected"):
        forward(*arguments((2, 4, 4), 1, (2, 2), None))
    with pytest.raises(RuntimeError, match="gated_film: grad_output: expected"):
        backward(torch.ones(2, 4, 4), *arguments((2, 4, 4), 1, None, None), 0b111)


def test_nothing_in_it():
    x, condition = torch.ones(0, 4, 3, requires_grad=True), torch.ones(4, requires_grad=True)
    y = gated_film(x, condition)
    assert y.shape == (0, 2, 3)
    of_x, of_condition = torch.autograd.grad(y.sum(), (x, condition))
    assert of_x.shape == x.shape and torch.equal(of_condition, torch.zeros(4))


@FUNCTIONS
def test_large_numbers_and_what_is_none(function):
    x = torch.tensor([[1e30, -1e30, 3.0, math.nan], [-1e30, 1e30, 1e30, -1e30]]).reshape(1, 8)
    y = function(x)
    expected = torch.tensor([[0.0, -1.0, math.tanh(3.0), math.nan]])
    torch.testing.assert_close(y, expected, equal_nan=True)


def test_derivatives():
    torch.manual_seed(0)
    x, condition = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    leaves = x.requires_grad_(), condition.requires_grad_()
    assert torch.autograd.gradcheck(gated_film, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(gated_film, leaves)
    mapped = torch.vmap(gated_film, in_dims=(None, 0))(x, torch.stack([condition, 2 * condition]))
    torch.testing.assert_close(mapped[1], gated_film(x, 2 * condition))


@not_on_the_standin("compiles nothing")
def test_compiles_as_one_graph_and_exports():
    x, condition = torch.randn(2, 4, 3), torch.randn(2, 4)
    expected = gated_film(x, condition)
    compiled = torch.compile(gated_film, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, condition), expected)

    class Module(torch.nn.Module):
        def forward(self, x, condition):
            return gated_film(x, condition)

    exported = torch.export.export(Module(), (x, condition)).module()
    torch.testing.assert_close(exported(x, condition), expected)


def test_autocast_keeps_the_precision_of_features():
    x, condition = torch.randn(2, 4, 3), torch.randn(2, 4)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = gated_film(x, condition.bfloat16())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, gated_film(x, condition.bfloat16().float()))


def test_a_wider_condition_is_not_rounded():
    x, condition = torch.zeros(1, 2).half(), torch.tensor([[1e-6, 1e-6]])
    assert gated_film(x, condition).item() == pytest.approx(5e-7, rel=0.1)


@FUNCTIONS
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (lambda: {"x": [1.0]}, TypeError, "x: expected a Tensor, got list"),
        (lambda: {"x": torch.ones(2, 3, 4)}, ValueError, r"x: expected an even number of channels .*\(2, 3, 4\)"),
        (
            lambda: {"x": torch.ones(2, 4).long()},
            ValueError,
            "x: expected a floating-point dtype, got torch.int64",
        ),
        (
            lambda: {"condition": torch.ones(2, 2)},
            ValueError,
            r"condition: expected shape .*\(2, 4\).*, got \(2, 2\)",
        ),
        (lambda: {"condition": torch.ones(2, 4).double()}, ValueError, "condition: expected dtype torch.float32"),
        (lambda: {"condition": 1.0}, TypeError, "condition: expected a Tensor"),
        (lambda: {"channel_dim": 0}, ValueError, "channel_dim: expected a dimension of x other than the batch's"),
    ],
)
def test_errors(function, changes, error, message):
    arguments = {"x": torch.ones(2, 4, 3), "condition": torch.ones(2, 4)} | changes()
    with pytest.raises(error, match=f"gated_film: {message}"):
        function(**arguments)


def test_cuda_has_no_kernels():
    with pytest.raises(UnsupportedError, match="cuda: .*it has no kernels of gated_film"):
        gated_film(torch.ones(2, 4), backend="cuda")
