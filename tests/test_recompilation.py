"""Sizes that change from call to call compile at most twice, the second time for all of them."""

import pytest
import torch

from fusedattn import AdditiveAttention, BahdanauAttention, FiLM, additive_attention, film

SIZES = [(2, 5, 9), (3, 7, 40), (4, 30, 11), (5, 64, 90), (2, 90, 64)]  # B, Tq, Tk


def attention(B, Tq, Tk, lengths):
    weight = torch.randn(6, requires_grad=True)
    inputs = [torch.randn(B, T, 6, requires_grad=True) for T in (Tq, Tk, Tk)]
    key_lengths = torch.randint(1, Tk + 1, (B,)) if lengths else None
    return lambda f: f(*inputs, weight, key_lengths), [*inputs, weight]


def call_attention(query, key, value, weight, key_lengths):
    return additive_attention(query, key, value, weight, key_lengths=key_lengths)


def modulation(B, Tq, Tk, lengths):
    x, gamma = torch.randn(B, 6, Tq, requires_grad=True), torch.randn(B, 6, requires_grad=True)
    beta = torch.randn(6, requires_grad=True) if lengths else gamma
    return lambda f: f(x, gamma, beta), [x, gamma]


def call_film(x, gamma, beta):
    return film(x, gamma, beta, activation="silu", residual=x)


OPS = {"additive_attention": (call_attention, attention), "film": (call_film, modulation)}


@pytest.fixture
def count():
    """(backend, list of what it compiled)."""
    torch.compiler.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    yield backend, graphs
    torch.compiler.reset()


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
@pytest.mark.parametrize("op", OPS)
def test_ops(op, dynamic, training, lengths, count):
    backend, graphs = count
    function, make = OPS[op]
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)
    for n, sizes in enumerate(SIZES):
        torch.manual_seed(n)
        call, leaves = make(*sizes, lengths)
        with torch.set_grad_enabled(training):
            actual, expected = call(compiled), call(function)
            torch.testing.assert_close(actual, expected)
            if training:
                torch.testing.assert_close(
                    torch.autograd.grad(actual.sum(), leaves), torch.autograd.grad(expected.sum(), leaves)
                )
    assert len(graphs) <= (1 if dynamic else 2)


MODULES = {
    "attention": lambda: (AdditiveAttention(5, 6, 8, num_heads=2), lambda B, Tq, Tk: [(B, Tq, 5), (B, Tk, 6)]),
    "bahdanau": lambda: (BahdanauAttention(5, 6, 8), lambda B, Tq, Tk: [(B, 5), (B, Tk, 6)]),
    "film": lambda: (FiLM(4, 3), lambda B, Tq, Tk: [(B, 3, Tq, Tk), (B, 4)]),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name, count):
    backend, graphs = count
    module, shapes = MODULES[name]()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for sizes in SIZES:
        inputs = [torch.randn(shape) for shape in shapes(*sizes)]
        torch.testing.assert_close(compiled(*inputs), module(*inputs))
    assert len(graphs) <= 2
