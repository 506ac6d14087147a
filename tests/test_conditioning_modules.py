"""Modules that condition features, each against a plain composition of PyTorch's functions."""

import copy
import io

import pytest
import torch
from device import not_on_the_standin

from fusedattn import ConditionalBias, ConditionalGate, ConditionalScale

pytestmark = pytest.mark.filterwarnings("ignore:fusedattn. no kernel of .* can run:UserWarning")


def over_places(t, x):
    """A parameter (B, C) along a map x."""
    return t.view(*t.shape, *[1] * (x.dim() - t.dim()))


def bias(module, x, condition, residual=None):
    y = torch.relu(x + over_places(module.conditioner(condition), x))
    return y if residual is None else y + residual


def scale(module, x, condition):
    return x * (1 + module.conditioner(condition))


def gate(module, x, condition):
    return x * over_places(module.conditioner(condition).sigmoid(), x)


# By name: how the module is made, the shapes of its inputs, what it computes.
CASES = {
    "bias": (lambda: ConditionalBias(4, 3, activation="relu"), [(2, 3, 5), (2, 4), (2, 3, 5)], bias),
    "scale": (lambda: ConditionalScale(4, 3, channel_dim=-1), [(2, 5, 3), (2, 5, 4)], scale),
    "gate": (lambda: ConditionalGate(4, 3), [(2, 3, 5, 2), (2, 4)], gate),
}
EVERY = pytest.mark.parametrize("name", CASES)


def inputs_of(name, dtype=torch.float64):
    """Floating-point inputs require gradients; a shape ("index", n, ...) is one of integers below n."""
    made = []
    for shape in CASES[name][1]:
        if shape[0] == "index":
            made.append(torch.randint(0, shape[1], shape[2:]))
        else:
            made.append(torch.randn(shape, dtype=dtype).requires_grad_())
    return made


def trained(name, dtype=torch.float64):
    """With parameters that are nobody's first ones."""
    torch.manual_seed(0)
    module = CASES[name][0]().to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def results(function, module, inputs):
    """Outputs, then the gradients of inputs and parameters."""
    outputs = as_tuple(function(*inputs))
    leaves = [t for t in inputs if t.requires_grad] + list(module.parameters())
    torch.manual_seed(1)
    grads = torch.autograd.grad(outputs, leaves, [torch.randn_like(y) for y in outputs])
    return *outputs, *grads


@EVERY
def test_is_the_plain_composition(name):
    module = trained(name)
    inputs = inputs_of(name)
    plain = copy.deepcopy(module)  # one that counts batches of its own
    expected = results(lambda *args: CASES[name][2](plain, *args), plain, inputs)
    torch.testing.assert_close(results(module, module, inputs), expected)
    torch.testing.assert_close(dict(module.named_buffers()), dict(plain.named_buffers()))


@EVERY
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision(name, half):
    module = trained(name, half)
    inputs = inputs_of(name, half)
    wide = [t.float() if t.is_floating_point() else t for t in inputs]
    expected = as_tuple(CASES[name][2](copy.deepcopy(module).float(), *wide))
    for actual, y in zip(as_tuple(module(*inputs)), expected, strict=True):
        assert actual.dtype == half
        torch.testing.assert_close(actual.float(), y, atol=0.05, rtol=0.05)


@EVERY
@not_on_the_standin("compiles nothing")
def test_compiles_as_one_graph(name):
    module = trained(name, torch.float32)
    inputs = inputs_of(name, torch.float32)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled, compiled, inputs), results(module, module, inputs))


@EVERY
def test_copies_and_state_dicts(name):
    module = trained(name)
    inputs = inputs_of(name)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    fresh = CASES[name][0]().double()
    fresh.load_state_dict(module.state_dict())
    copies = copy.deepcopy(module), torch.load(buffer, weights_only=False), fresh
    expected = module(*inputs)
    for other in copies:
        torch.testing.assert_close(other(*inputs), expected, rtol=0, atol=0)


@EVERY
def test_parameters_are_made_and_reset_anywhere(name):
    with torch.device("meta"):
        module = CASES[name][0]()
    module.to_empty(device=torch.get_default_device())
    other = CASES[name][0]()
    for one in (module, other):
        torch.manual_seed(2)
        one.reset_parameters()
    torch.testing.assert_close(module.state_dict(), other.state_dict(), rtol=0, atol=0)


@EVERY
def test_symbolic_trace(name):
    module = trained(name)
    inputs = inputs_of(name)
    traced = torch.fx.symbolic_trace(copy.deepcopy(module), {"residual": None} if len(inputs) == 2 else None)
    torch.testing.assert_close(traced(*inputs), module(*inputs))


@EVERY
def test_is_shown_and_not_scriptable(name):
    module = CASES[name][0]()
    assert repr(module).startswith(type(module).__name__)
    with pytest.raises(NotImplementedError, match=f"{type(module).__name__}: torch.jit.script"):
        torch.jit.script(module)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ConditionalBias(4, 3),
        lambda: ConditionalScale(4, 3),
        lambda: ConditionalScale(4, 3, gamma_offset=0.0),
    ],
)
def test_starts_as_the_identity(make):
    x = torch.randn(2, 3, 5)
    assert torch.equal(make()(x, torch.randn(2, 4)), x)


def test_starts_as_a_linear_layer_does():
    torch.manual_seed(0)
    gate = ConditionalGate(4, 3).conditioner
    torch.manual_seed(0)
    assert torch.equal(gate.weight, torch.nn.Linear(4, 3).weight)


def call(make, *shapes):
    return lambda: make()(*map(torch.randn, shapes))


ERRORS = {
    "width": (
        call(lambda: ConditionalBias(4, 3), (2, 3, 5), (2, 5)),
        r"ConditionalBias: condition: expected shape \(B, 4\), got \(2, 5\)",
    ),
    "channels": (call(lambda: ConditionalGate(4, 3), (2, 5, 3), (2, 4)), r"gamma: expected shape .*\(2, 3\)"),
    "activation": (lambda: ConditionalScale(4, 3, activation="swish"), "ConditionalScale: activation: .*'swish'"),
    "backend": (lambda: ConditionalGate(4, 3, backend="tpu"), "ConditionalGate: backend: .*'tpu'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    make, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        make()
