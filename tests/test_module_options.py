"""Modules under PyTorch's machinery for parameters, and what they refuse when they are made or called."""

import pytest
import torch
from torch.nn.utils import parametrizations, parametrize

from fusedattn import AdditiveAttention, BahdanauAttention, FiLM

BAD_OPTIONS = {
    "num_heads": (lambda: AdditiveAttention(5, 6, 8, num_heads=0), "AdditiveAttention: num_heads: .*got 0"),
    "divisible": (lambda: AdditiveAttention(5, 6, 8, num_heads=3), "attention_dim: .*num_heads=3, got 8"),
    "softcap": (lambda: BahdanauAttention(5, 6, 8, softcap=-1.0), "softcap: expected a positive number.*got -1"),
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
