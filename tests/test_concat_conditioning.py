"""ConcatConditioning against the layer of the concatenation itself."""

import pytest
import torch
from device import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fusedattn import ConcatConditioning

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def concatenated(layer, x, condition, condition_first):
    """By the layer, of the tiled condition."""
    channel_dim = -1 if isinstance(layer, nn.Linear) else 1
    places = list(x.shape)
    places[channel_dim] = condition.shape[channel_dim if condition.dim() == x.dim() else 1]
    if condition.dim() < x.dim():
        between = [1] * (x.dim() - 2)
        ends = condition.shape[:1], condition.shape[1:]
        shape = (*ends[0], *between, *ends[1]) if channel_dim == -1 else (*condition.shape, *between)
        condition = condition.view(shape)
    both = [x, condition.expand(places)]
    return layer(torch.cat(both[::-1] if condition_first else both, channel_dim))


def check(layer, x, condition, condition_first=False):
    Z = condition.shape[-1 if isinstance(layer, nn.Linear) or condition.dim() == 2 else 1]
    module = ConcatConditioning(layer, Z, condition_first=condition_first)
    assert module.state_dict().keys() == layer.state_dict().keys()
    leaves = [x.requires_grad_(), condition.requires_grad_(), *layer.parameters()]
    outputs = module(x, condition), concatenated(layer, x, condition, condition_first)
    grad = torch.randn_like(outputs[1])
    found = [(y, *torch.autograd.grad(y, leaves, grad)) for y in outputs]
    torch.testing.assert_close(*found)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@settings(max_examples=examples(60))
@given(data=st.data())
def test_convolutions(data):
    def draw(*values):
        return data.draw(st.sampled_from(values))

    dims = draw(1, 2, 2, 3)
    groups = draw(1, 1, 1, 2, 3, 4)
    inputs = groups * data.draw(st.integers(2 if groups == 1 else 1, 4))
    Z = data.draw(st.integers(1, inputs - 1))
    kernel = [data.draw(st.integers(1, 4)) for _ in range(dims)]
    dilation = [draw(1, 1, 2) for _ in range(dims)]
    mode = draw("zeros", "zeros", "zeros", "reflect", "replicate", "circular")
    places = [
        data.draw(st.integers(d * (k - 1) + 1, d * (k - 1) + 6)) for k, d in zip(kernel, dilation, strict=True)
    ]
    padding = [data.draw(st.integers(0, min(3, n - 1))) for n in places]
    stride = [draw(1, 1, 2) for _ in range(dims)]
    if draw(True, False, False):
        padding, stride = draw("same", "valid"), 1
        places = [n + 3 * k for n, k in zip(places, kernel, strict=True)]  # reflection pads by less than a place
    torch.manual_seed(data.draw(st.integers(0, 9)))
    layer = CONVOLUTIONS[dims - 1](
        inputs,
        groups * data.draw(st.integers(1, 3)),
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(True, False),
        padding_mode=mode,
        dtype=torch.float64,
    )
    B = data.draw(st.integers(1, 3))
    x = torch.randn(B, inputs - Z, *places, dtype=torch.float64)
    if dims == 2 and draw(True, False):
        x = x.to(memory_format=torch.channels_last)
    condition = torch.randn(draw(1, B), Z, *(places if draw(True, False, False) else ()), dtype=torch.float64)
    check(layer, x, condition, draw(True, False))


@pytest.mark.parametrize("condition_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lead", [(), (3,), (3, 2), "same"], ids=str)
def test_linear_layers(lead, bias, condition_first):
    layer = nn.Linear(7, 4, bias=bias, dtype=torch.float64)
    places, lead = ((3,), (3,)) if lead == "same" else (lead, ())
    condition = torch.randn(2, *lead, 5, dtype=torch.float64)
    check(layer, torch.randn(2, *places, 2, dtype=torch.float64), condition, condition_first)


def test_the_condition_of_half_precision_is_as_exact_as_the_concatenation():
    torch.manual_seed(0)
    layer = nn.Conv2d(20, 6, 3, padding=1).bfloat16()
    x, condition = torch.randn(2, 4, 9, 7).bfloat16(), torch.randn(2, 16).bfloat16()
    y = ConcatConditioning(layer, 16)(x, condition)
    plain = concatenated(layer, x, condition, False)
    exact = concatenated(layer.double(), x.double(), condition.double(), False)
    # The sums of x, of the condition and of both are rounded, each to its own size.
    error, allowed = ((t.double() - exact).abs().max() for t in (y, plain))
    assert y.dtype == torch.bfloat16 and error <= 3 * allowed


class Largest(TorchDispatchMode):
    """The largest result of any operator."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for t in results if isinstance(results, (tuple, list)) else (results,):
            self.elements = max(self.elements, t.numel() if isinstance(t, torch.Tensor) else 0)
        return results


@pytest.mark.parametrize("places", [(), (9, 8)], ids=["vector", "map"])
def test_nothing_is_as_large_as_the_concatenation(places):
    layer = nn.Conv2d(40, 4, 3, padding=1)
    x, condition = torch.randn(8, 20, 9, 8, requires_grad=True), torch.randn(8, 20, *places, requires_grad=True)
    module = ConcatConditioning(layer, 20)
    with Largest() as ours:
        module(x, condition).sum().backward()
    with Largest() as plain:
        concatenated(layer, x, condition, False).sum().backward()
    assert ours.elements == x.numel() and plain.elements == 2 * x.numel()


def test_parameters_are_the_layers_own():
    layer = nn.Conv2d(5, 4, 3)
    module = ConcatConditioning(layer, 2)
    assert module.weight is layer.weight and module.bias is layer.bias
    torch.manual_seed(0)
    module.reset_parameters()
    torch.manual_seed(0)
    fresh = nn.Conv2d(5, 4, 3)
    assert torch.equal(module.weight, fresh.weight) and torch.equal(module.bias, fresh.bias)
    assert repr(module).startswith("ConcatConditioning(Conv2d, weight=(4, 5, 3, 3), condition_dim=2,")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ConcatConditioning(nn.ReLU(), 2), TypeError, "layer: expected nn.Linear, .*got ReLU"),
        (lambda: ConcatConditioning(nn.Linear(5, 2), 5), ValueError, "condition_dim: expected 1 to 4, .*got 5"),
        (
            lambda: ConcatConditioning(nn.Linear(5, 2), 2)(torch.randn(2, 4), torch.randn(2, 2)),
            ValueError,
            r"x: expected 3 channels, got shape \(2, 4\)",
        ),
        (
            lambda: ConcatConditioning(nn.Linear(5, 2), 2)(torch.randn(2, 7, 3), torch.randn(2, 3)),
            ValueError,
            r"condition: expected shape \(2, 2\) or \(2, 7, 2\), got \(2, 3\)",
        ),
        (
            lambda: ConcatConditioning(nn.Conv1d(5, 2, 3), 2)(torch.randn(3, 7), torch.randn(2, 2)),
            ValueError,
            r"x: expected rank 3, got shape \(3, 7\)",
        ),
        (
            lambda: ConcatConditioning(nn.Conv1d(5, 2, 3), 2)(torch.randn(4, 3, 7), torch.randn(2, 2, 7)),
            ValueError,
            r"condition: expected shape \(4, 2\) or \(4, 2, 7\), got \(2, 2, 7\)",
        ),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=f"ConcatConditioning: {message}"):
        make()
