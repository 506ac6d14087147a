"""Modules under PyTorch's machinery for parameters, and what they refuse when they are made or called."""

import pytest
import torch
from torch.nn.utils import parametrizations, parametrize

from fusedattn import (
    AdditiveAttention,
    BahdanauAttention,
    ConcatAttention,
    CoverageAttention,
    FiLM,
    ForwardAttention,
    GatedAttentionPool,
    HardAttention,
    LocationSensitiveAttention,
    MultiHopAttention,
    PointerAttention,
    SpatialAttention,
    additive_attention,
    film,
)

BAD_OPTIONS = {
    "num_heads": (lambda: AdditiveAttention(5, 6, 8, num_heads=0), "AdditiveAttention: num_heads: .*got 0"),
    "divisible": (lambda: AdditiveAttention(5, 6, 8, num_heads=3), "attention_dim: .*num_heads=3, got 8"),
    "softcap": (lambda: BahdanauAttention(5, 6, 8, softcap=-1.0), "softcap: expected a positive number.*got -1"),
    "activation": (
        lambda: BahdanauAttention(5, 6, 8, activation="gelu"),
        "activation: expected one of .*got 'gelu'",
    ),
    "normalizer": (lambda: BahdanauAttention(5, 6, 8, normalizer="max"), "normalizer: expected one of .*'max'"),
    "dropout": (lambda: BahdanauAttention(5, 6, 8, dropout=1.0), r"dropout: expected a number in \[0, 1\), got 1"),
    "backend": (lambda: AdditiveAttention(5, 6, 8, backend="tpu"), "backend: expected one of .*got 'tpu'"),
    "film_backend": (lambda: FiLM(4, 3, backend="tpu"), "FiLM: backend: expected one of .*got 'tpu'"),
    "film_activation": (lambda: FiLM(4, 3, activation="swish"), "FiLM: activation: expected one of .*'swish'"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options_are_errors_when_the_module_is_made(case):
    make, message = BAD_OPTIONS[case]
    with pytest.raises(ValueError, match=message):
        make()


def test_a_wrong_width_is_named():
    attention, bahdanau, film = AdditiveAttention(5, 6, 8, value_dim=7), BahdanauAttention(5, 6, 8), FiLM(4, 3)
    query, key, value = torch.randn(2, 3, 5), torch.randn(2, 4, 6), torch.randn(2, 4, 7)
    for call, message in (
        (lambda: attention(key, key, value), r"query: expected shape \(B, Tq, 5\), got \(2, 4, 6\)"),
        (lambda: attention(query, value, value), r"key: expected shape \(B, Tk, 6\), got \(2, 4, 7\)"),
        (lambda: attention(query, key), r"value: expected shape \(B, Tk, 7\), got \(2, 4, 6\)"),
        (lambda: bahdanau(key[:, 0], key), r"query: expected shape \(B, 5\), got \(2, 6\)"),
        (lambda: film(torch.randn(2, 3), torch.randn(2, 5)), r"condition: expected shape \(B, 4\), got \(2, 5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# Not the old form with normalize=True: it would take the name weight_g, which is the module's own.
@pytest.mark.parametrize(
    ("form", "normalize"), [("parametrization", False), ("parametrization", True), ("hook", False)]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_weight_norm_of_the_score_weight(form, normalize):
    torch.manual_seed(0)
    module = BahdanauAttention(5, 6, 8, normalize=normalize)
    query, memory = torch.randn(2, 5), torch.randn(2, 4, 6)
    expected = module(query, memory)
    if form == "parametrization":
        parametrizations.weight_norm(module, "weight")
    else:
        torch.nn.utils.weight_norm(module, "weight")
    actual = module(query, memory)
    torch.testing.assert_close(actual, expected)
    actual[0].sum().backward()
    assert all(p.grad is not None for p in module.parameters())


class Doubled(torch.nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("name", ["weight", "weight_g"])
def test_parametrizations_of_own_parameters(name):
    torch.manual_seed(0)
    module = AdditiveAttention(5, 6, 8, normalize=True)
    query, key = torch.randn(2, 3, 5), torch.randn(2, 4, 6)
    parametrize.register_parametrization(module, name, Doubled())
    parametrized = module(query, key)
    parametrize.remove_parametrizations(module, name)
    torch.testing.assert_close(parametrized, module(query, key))


def test_parametrizations_of_the_layers():
    torch.manual_seed(0)
    attention, film = AdditiveAttention(5, 6, 8, context_dim=4, out_dim=3), FiLM(4, 3)
    for layer in (attention.query_proj, attention.key_proj, attention.value_proj, film.conditioner):
        parametrizations.weight_norm(layer, "weight")
    parametrizations.spectral_norm(attention.out_proj)
    attention(torch.randn(2, 3, 5), torch.randn(2, 4, 6)).sum().backward()
    film(torch.randn(2, 3, 5), torch.randn(2, 4)).sum().backward()
    assert all(p.grad is not None for module in (attention, film) for p in module.parameters())


def test_without_normalization_there_is_no_weight_g():
    module = AdditiveAttention(5, 6, 8)
    assert "weight_g" not in module.state_dict() and module.weight_g is None


class Decoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.bahdanau = (
            AdditiveAttention(5, 6, 8, num_heads=2, out_dim=6),
            BahdanauAttention(6, 6, 8),
        )
        self.film = FiLM(6, 6, channel_dim=2)

    def forward(self, query, memory, mask, lengths):
        x = self.attention(query, memory, mask=mask)
        context, _ = self.bahdanau(x[:, 0], memory, key_lengths=lengths)
        x = self.film(x, context, residual=x)
        return film(x, context, channel_dim=2) + additive_attention(x, memory, memory, context[0])


def test_symbolic_trace():
    torch.manual_seed(0)
    model = Decoder()
    traced = torch.fx.symbolic_trace(model)
    called = {node.target for node in traced.graph.nodes if node.op == "call_function"}
    assert {film, additive_attention} <= called
    inputs = torch.randn(2, 3, 5), torch.randn(2, 4, 6), torch.rand(2, 3, 4) > 0.3, torch.tensor([4, 2])
    torch.testing.assert_close(traced(*inputs), model(*inputs))
    with pytest.raises(ValueError, match=r"query: expected shape \(B, Tq, 5\)"):
        traced(inputs[1], *inputs[1:])


STATE, MEMORY, MAP = (2, 5), (2, 4, 6), (2, 6, 2, 2)
BY_SIZES = {  # modules whose way depends on sizes
    "concat": (lambda: ConcatAttention(5, 6, 8), STATE, MEMORY),
    "coverage": (lambda: CoverageAttention(5, 6, 8), STATE, MEMORY),
    "forward": (lambda: ForwardAttention(5, 6, 8), STATE, MEMORY, (2, 4)),
    "hard": (lambda: HardAttention(5, 6, 8).eval(), STATE, MAP),
    "location": (lambda: LocationSensitiveAttention(5, 6, 8), STATE, MEMORY),
    "hops": (lambda: MultiHopAttention(6, 6, 8, 2), (2, 6), MEMORY),
    "pointer": (lambda: PointerAttention(5, 6, 8), STATE, MEMORY),
    "pool": (lambda: GatedAttentionPool(6, 8), MEMORY),
    "spatial": (lambda: SpatialAttention(5, 6, 8), STATE, MAP),
}


class Reader(torch.nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x, y, z):
        return self.attention(*(t for t in (x, y, z) if t is not None))


@pytest.mark.parametrize("name", BY_SIZES)
def test_symbolic_trace_of_a_model_with(name):
    torch.manual_seed(0)
    make, *shapes = BY_SIZES[name]
    model, inputs = Reader(make()), [torch.rand(shape) for shape in shapes]
    inputs += [None] * (3 - len(inputs))
    traced = torch.fx.symbolic_trace(
        model, {name: None for name, t in zip("xyz", inputs, strict=True) if t is None}
    )
    torch.testing.assert_close(traced(*inputs), model(*inputs))


class Tagged(torch.Tensor):
    """A subclass with PyTorch's default behaviour."""


def test_subclasses_of_tensor_come_back():
    torch.manual_seed(0)
    inputs = [torch.randn(2, T, 5) for T in (3, 4, 4)] + [torch.randn(5)]
    tagged = [inputs[0].as_subclass(Tagged), *inputs[1:]]
    context, weights = additive_attention(*tagged, return_weights=True)
    assert type(context) is type(weights) is type(film(tagged[0])) is Tagged
    torch.testing.assert_close(torch.Tensor(context), additive_attention(*inputs))
