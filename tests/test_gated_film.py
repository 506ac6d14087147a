"""gated_film against plain compositions of PyTorch's functions, within tests/tolerance.py."""

import math

import pytest
import torch
from device import DEVICE, not_on_the_standin
from pairwise import pairwise
from test_film import numbers
from tolerance import assert_close_to_reference

from fusedattn import UnsupportedError, gated_film, gated_film_ref

pytestmark = [
    pytest.mark.levels,
    pytest.mark.filterwarnings("ignore:fusedattn. no kernel of gated_film can run:UserWarning"),
]
FUNCTIONS = pytest.mark.parametrize("function", [gated_film, gated_film_ref])
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


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


def ours(x, condition, added, channel_dim):
    return gated_film(x, condition if added is None else (condition, added), channel_dim=channel_dim)


def run(function, tensors, channel_dim, dtype=None):
    leaves = [None if t is None else t.to(dtype or t.dtype).requires_grad_() for t in tensors]
    y = function(*leaves, channel_dim)
    grad = numbers(y.shape, torch.Generator().manual_seed(1)).to(tensors[0].dtype).to(y.dtype)
    present = [t for t in leaves if t is not None]
    return y, *torch.autograd.grad(y, present, grad)


@pairwise(
    shape=[((2, 6, 4, 5), 1), ((3, 5, 6), 2), ((2, 6, 33), 1), ((5, 2), -1), ((1, 4, 1, 1), 1)],
    dtype=DTYPES,
    condition=[None, (), "C", "BC", "full", "place"],
    added=[None, "C", "full"],
    layout=["contiguous", "permuted"],
)
def test_values_and_gradients(shape, dtype, condition, added, layout):
    shape, channel_dim = shape
    B, C = shape[0], shape[channel_dim]
    of_places = [1 if d == channel_dim % len(shape) else n for d, n in enumerate(shape)]
    shapes = {None: None, (): (), "C": (C,), "BC": (B, C), "full": shape, "place": of_places}
    generator = torch.Generator().manual_seed(0)
    of = [shape, shapes[condition], shapes[added if condition is not None else None]]
    tensors = [None if s is None else numbers(tuple(s), generator).to(dtype) for s in of]
    if layout == "permuted":
        tensors[0] = tensors[0].transpose(0, -1).contiguous().transpose(0, -1)
    actual, eager = run(ours, tensors, channel_dim), run(plain, tensors, channel_dim)
    exact = run(plain, tensors, channel_dim, torch.float64)
    present = [tensors[0], *(t for t in tensors if t is not None)]
    for found, t, e, source in zip(actual, eager, exact, present, strict=True):
        terms = max(tensors[0].numel() // max(source.numel(), 1), 1)
        assert_close_to_reference(found, t, e, terms=terms, scale=6.0 * terms**0.5)


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


def test_no_backend_has_kernels():
    with pytest.raises(UnsupportedError, match="gated_film: backend 'cpu' cannot run"):
        gated_film(torch.ones(2, 4), backend="cpu")
