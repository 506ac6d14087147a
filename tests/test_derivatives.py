"""What fusedattn/_autograd.py makes of every op's declaration: forward mode, exported programs that train."""

import pytest
import torch
from torch.autograd import forward_ad

from fusedattn import (
    additive_attention,
    additive_attention_ref,
    additive_attention_varlen,
    additive_attention_varlen_ref,
    additive_scores,
    additive_scores_ref,
    attention_pool,
    attention_pool_ref,
    film,
    film_ref,
    gated_film,
    gated_film_ref,
    hard_additive_attention,
    hard_additive_attention_ref,
    location_attention,
    location_attention_ref,
    norm_film,
    norm_film_ref,
)


def attention_inputs():
    shapes = {"query": (2, 3, 5), "key": (2, 4, 5), "value": (2, 4, 3), "weight": (5,)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def film_inputs():
    shapes = {"x": (2, 3, 4), "gamma": (2, 3), "beta": (3,), "residual": (2, 3, 4)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def attend(function):
    lengths = torch.tensor([4, 2])

    def call(query, key, value, weight):
        context, weights = function(
            query, key, value, weight, key_lengths=lengths, softcap=3.0, return_weights=True
        )
        return torch.cat([context.flatten(), weights.flatten()])

    return call


def varlen_inputs():
    shapes = {"query": (5, 2, 4), "key": (6, 2, 4), "value": (6, 2, 3), "weight": (2, 4)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def attend_segments(function):
    queries, keys = (torch.tensor(offsets, dtype=torch.int32) for offsets in ([0, 2, 2, 5], [0, 3, 4, 6]))

    def call(query, key, value, weight):
        options = {"max_seqlen_q": 3, "max_seqlen_k": 3, "softcap": 3.0, "return_lse": True}
        context, lse = function(query, key, value, weight, queries, keys, **options)
        return torch.cat([context.flatten(), lse.flatten()])

    return call


def scores_inputs():
    return {name: t for name, t in attention_inputs().items() if name != "value"}


def score(function):
    return lambda query, key, weight: function(query, key, weight, scale=0.5, softcap=3.0)


def modulate(function):
    def call(x, gamma, beta, residual):
        return function(x, gamma, beta, residual=residual, gamma_offset=1.0, activation="gelu")

    return call


def gated_film_inputs():
    shapes = {"x": (2, 6, 4), "condition": (2, 6), "added": (6,)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def gate(function):
    return lambda x, condition, added: function(x, (condition, added))


def pool_inputs():
    shapes = {"hidden": (2, 4, 3), "value": (2, 4, 5), "weight": (2, 3), "gate": (2, 4, 3)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def pool(function):
    lengths = torch.tensor([4, 2])

    def call(hidden, value, weight, gate):
        context, weights = function(hidden, value, weight, gate, lengths=lengths, return_weights=True)
        return torch.cat([context.flatten(), weights.flatten()])

    return call


def choose(function):
    lengths = torch.tensor([4, 2])

    def call(query, key, value, weight):
        found = function(query, key, value, weight, key_lengths=lengths, softcap=3.0, sample=False)
        return torch.cat([t.flatten() for t in (found.context, found.log_prob, found.entropy)])

    return call


def location_inputs():
    shapes = {"query": (2, 3), "key": (2, 4, 3), "value": (2, 4, 2), "weight": (3,), "previous": (2, 2, 4)}
    shapes |= {"conv_weight": (2, 2, 3), "location_weight": (3, 2)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def locate(function):
    lengths = torch.tensor([4, 2])

    def call(*inputs):
        context, weights = function(*inputs, key_lengths=lengths, softcap=3.0)
        return torch.cat([context.flatten(), weights.flatten()])

    return call


def norm_film_inputs():
    shapes = {"x": (2, 3, 4), "gamma": (2, 3), "weight": (3,), "pre_gate": (2, 3), "pre_residual": (2, 3, 4)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def modulate_the_norm(function):
    def call(x, gamma, weight, pre_gate, pre_residual):
        options = {"norm": "layer", "channel_dim": 1, "eps": 0.1, "activation": "gelu"}
        y, h = function(x, gamma, weight=weight, pre_gate=pre_gate, pre_residual=pre_residual, **options)
        return torch.cat([y.flatten(), h.flatten()])

    return call


# op: (call with the kernels, call with the reference, inputs by name)
OPS = {
    "additive_attention": (attend, additive_attention, additive_attention_ref, attention_inputs),
    "additive_attention_varlen": (
        attend_segments,
        additive_attention_varlen,
        additive_attention_varlen_ref,
        varlen_inputs,
    ),
    "additive_scores": (score, additive_scores, additive_scores_ref, scores_inputs),
    "attention_pool": (pool, attention_pool, attention_pool_ref, pool_inputs),
    "film": (modulate, film, film_ref, film_inputs),
    "gated_film": (gate, gated_film, gated_film_ref, gated_film_inputs),
    "hard_additive_attention": (choose, hard_additive_attention, hard_additive_attention_ref, attention_inputs),
    "location_attention": (locate, location_attention, location_attention_ref, location_inputs),
    "norm_film": (modulate_the_norm, norm_film, norm_film_ref, norm_film_inputs),
}


@pytest.fixture(params=OPS)
def op(request):
    """(fused, reference, inputs): two functions of the same tensors."""
    torch.manual_seed(0)
    wrap, fused, reference, inputs = OPS[request.param]
    return wrap(fused), wrap(reference), tuple(inputs().values())


# First derivatives


def test_gradients_of_some_inputs_are_the_same_bits(op):
    fused, _, inputs = op
    inputs = [t.requires_grad_() for t in inputs]
    grad = torch.randn_like(fused(*inputs))
    every = torch.autograd.grad(fused(*inputs), inputs, grad)
    for mask in range(1, 1 << len(inputs)):
        asked = [bool(mask >> n & 1) for n in range(len(inputs))]
        some = [t if a else t.detach() for t, a in zip(inputs, asked, strict=True)]
        wanted = [t for t, a in zip(some, asked, strict=True) if a]
        found = torch.autograd.grad(fused(*some), wanted, grad)
        assert all(map(torch.equal, found, (g for g, a in zip(every, asked, strict=True) if a)))


# Forward mode


def test_jvp(op):
    fused, reference, inputs = op
    tangents = tuple(torch.randn_like(t) for t in inputs)
    torch.testing.assert_close(
        torch.func.jvp(fused, inputs, tangents), torch.func.jvp(reference, inputs, tangents)
    )


def test_jvp_of_one_argument(op):
    fused, reference, (first, *others) = op
    tangent = torch.randn_like(first)
    actual = torch.func.jvp(lambda t: fused(t, *others), (first,), (tangent,))
    torch.testing.assert_close(actual, torch.func.jvp(lambda t: reference(t, *others), (first,), (tangent,)))


def test_jacfwd(op):
    fused, reference, inputs = op
    every = tuple(range(len(inputs)))
    actual = torch.func.jacfwd(fused, every)(*inputs)
    torch.testing.assert_close(actual, torch.func.jacrev(reference, every)(*inputs))


@pytest.mark.machinery
def test_hessian(op):
    fused, reference, inputs = op

    def loss(function):
        return lambda *tensors: function(*tensors).sin().sum()

    actual = torch.func.hessian(loss(fused), (0, 1))(*inputs)
    torch.testing.assert_close(actual, torch.func.hessian(loss(reference), (0, 1))(*inputs))


def test_dual_numbers(op):
    fused, reference, inputs = op
    tangents = [torch.randn_like(t) for t in inputs]
    found = []
    for function in (fused, reference):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, tangent) for t, tangent in zip(inputs, tangents, strict=True)]
            found.append(forward_ad.unpack_dual(function(*duals)))
    torch.testing.assert_close(*(tuple(dual) for dual in found))


def test_forward_over_reverse_with_dual_numbers(op):
    """The backward pass of a call made outside the level, for a cotangent that is dual."""
    fused, reference, inputs = op
    found = []
    for function in (fused, reference):
        leaves = [t.clone().requires_grad_() for t in inputs]
        output = function(*leaves)
        cotangent = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(cotangent, cotangent.cos())
            grads = torch.autograd.grad(output, leaves, dual)
            found.append([tuple(forward_ad.unpack_dual(g)) for g in grads])
    torch.testing.assert_close(*found)


@pytest.mark.machinery
def test_compiled_jvp(op):
    torch.compiler.reset()  # every op is a recompilation of the same function
    fused, _, inputs = op
    tangents = tuple(torch.randn_like(t) for t in inputs)

    def push(*tensors):
        return torch.func.jvp(fused, tensors, tangents)

    compiled = torch.compile(push, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), push(*inputs))


def test_a_raw_operator_refuses_forward_mode():
    """Without the reference at hand; a derivative of zero would be silent."""
    x = torch.randn(2, 3, 4)
    operator = torch.ops.fusedattn.film_fwd
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="film_fwd.*forward-mode"):
        operator(forward_ad.make_dual(x, x), None, None, None, None, None, 1, 0.0, 0)


# Programs without the public function


class Calls(torch.nn.Module):
    """An op whose first input comes from a layer and whose others are parameters."""

    def __init__(self, function, inputs):
        super().__init__()
        self.function = function
        first, *others = inputs
        self.layer = torch.nn.Linear(first.shape[-1], first.shape[-1], dtype=first.dtype)
        self.others = torch.nn.ParameterList(t.clone() for t in others)

    def forward(self, x):
        return self.function(self.layer(x), *self.others)


@pytest.mark.machinery
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_trains_like_its_module(op, strict):
    fused, _, inputs = op
    module = Calls(fused, inputs)
    x = inputs[0]
    exported = torch.export.export(module, (x,), strict=strict).module()
    for program in (module, exported):
        program(x).sin().sum().backward()
    for (name, parameter), other in zip(module.named_parameters(), exported.parameters(), strict=True):
        assert other.grad is not None, name
        torch.testing.assert_close(other.grad, parameter.grad)


@pytest.mark.machinery
def test_an_exported_program_has_second_derivatives(op):
    fused, _, inputs = op
    module = Calls(fused, inputs)
    exported = torch.export.export(module, (inputs[0],)).module()
    penalties = []
    for program in (module, exported):
        x = inputs[0].clone().requires_grad_()
        (grad,) = torch.autograd.grad(program(x).sin().sum(), x, create_graph=True)
        penalties.append(torch.autograd.grad(grad.square().sum(), list(program.parameters())))
    torch.testing.assert_close(*penalties)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_raw_operator_has_its_derivative(compiled):
    x, gamma, beta, residual = (t.requires_grad_() for t in film_inputs().values())

    def call(x, gamma, beta, residual):
        return torch.ops.fusedattn.film_fwd(x, gamma, beta, None, None, residual, 1, 1.0, 4).sin()

    function = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    actual = torch.autograd.grad(function(x, gamma, beta, residual).sum(), (x, gamma, beta, residual))
    expected = film_ref(x, gamma, beta, residual=residual, gamma_offset=1.0, activation="gelu").sin()
    torch.testing.assert_close(actual, torch.autograd.grad(expected.sum(), (x, gamma, beta, residual)))
