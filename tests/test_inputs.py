"""Which tensors the ops take: sizes of 1 that broadcast, kinds that they do not know."""

import numpy as np
import pytest
import torch
from device import cpu_alone

from fusedattn import FiLM, UnsupportedError, additive_attention, additive_attention_ref, film, norm_film


def gradients(function, inputs, **options):
    leaves = [t.clone().requires_grad_() for t in inputs]
    output = function(*leaves, **options)
    return [output, *torch.autograd.grad(output.sin().sum(), leaves)]


@pytest.mark.parametrize(
    "leads",
    [
        [(1,), (2,), (2,)],
        [(2,), (1,), (1,)],
        [(1,), (1,), (2,)],
        [(1, 3), (2, 1), (2, 1)],
        [(2, 1), (1, 3), (1, 1)],
        [(1, 1), (2, 3), (1, 1)],
    ],
    ids=str,
)
def test_batch_and_heads_of_1_broadcast(leads):
    torch.manual_seed(0)
    inputs = [torch.randn(*lead, T, 5) for lead, T in zip(leads, (3, 4, 4), strict=True)]
    inputs.append(torch.randn(1, 5) if len(leads[0]) == 2 else torch.randn(5))
    lead = torch.broadcast_shapes(*leads)

    def expanded(query, key, value, weight, **options):
        q, k, v = (t.expand(*lead, -1, -1) for t in (query, key, value))
        return additive_attention_ref(q, k, v, weight, **options)

    options = {"key_lengths": torch.tensor([4, 2])}
    torch.testing.assert_close(
        gradients(additive_attention, inputs, **options), gradients(expanded, inputs, **options)
    )


def test_sizes_that_do_not_broadcast_are_named():
    query, key, weight = torch.randn(3, 2, 5), torch.randn(2, 4, 5), torch.randn(5)
    with pytest.raises(ValueError, match=r"key: expected shape \(3, Tk, 5\), got \(2, 4, 5\)"):
        additive_attention(query, key, key, weight)
    with pytest.raises(ValueError, match=r"value: expected shape \(3, 4, Dv\), got \(2, 4, 5\)"):
        additive_attention(query, key[:1], key, weight)


KINDS = {
    "numpy": (lambda t: t.cpu().numpy(), TypeError, "ndarray"),
    "sparse": (lambda t: t.cpu().to_sparse(), ValueError, "sparse"),
    "nested": (lambda t: torch.nested.nested_tensor(list(t), layout=torch.jagged), ValueError, "nested"),
    "mkldnn": (lambda t: t.cpu().to_mkldnn(), ValueError, "mkldnn"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_tensors_that_are_not_known_are_named(kind):
    convert, error, word = KINDS[kind]
    query, key, weight = torch.randn(2, 3, 5), torch.randn(2, 4, 5), torch.randn(5)
    for name, arguments in (
        ("query", (convert(query), key, key, weight)),
        ("key", (query, convert(key), key, weight)),
        ("value", (query, key, convert(key), weight)),
    ):
        if kind == "nested":  # attention takes them: tests/test_additive_attention_varlen.py
            continue
        with pytest.raises(error, match=f"additive_attention: {name}: expected .*{word}"):
            additive_attention(*arguments)
    with pytest.raises(error, match=f"film: x: expected .*{word}"):
        film(convert(query))
    with pytest.raises(error, match=f"film: residual: expected .*{word}"):
        film(query, residual=convert(query))


class Opaque(torch.Tensor):
    """A subclass that has no rule for our operators."""

    @staticmethod
    def __new__(cls, t):
        return torch.Tensor._make_wrapper_subclass(cls, t.shape, dtype=t.dtype, device=t.device)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"no rule for {func}")


@pytest.mark.parametrize("grad", [False, True])
def test_a_subclass_of_tensor_without_a_rule_is_named(grad):
    query, key, weight = torch.randn(2, 3, 5), torch.randn(2, 4, 5), torch.randn(5, requires_grad=grad)
    for name, arguments in (
        ("query", (Opaque(query), key, key, weight)),
        ("value", (query, key, Opaque(key), weight)),
    ):
        with pytest.raises(
            UnsupportedError, match=f"attention: {name}: expected a plain Tensor, got Opaque.*no rule"
        ):
            additive_attention(*arguments)


@cpu_alone  # on GPUs PyTorch's operators bring the parameters into shape first, and they are what has no rule
def test_a_subclass_of_tensor_without_a_rule_is_named_by_film():
    x = torch.randn(2, 3, 5)
    with pytest.raises(
        UnsupportedError, match="film: gamma: expected a plain Tensor, got Opaque, .*no rule for fused"
    ):
        film(x, Opaque(torch.randn(3)))
    with pytest.raises(UnsupportedError, match="norm_film: x: expected a plain Tensor, got Opaque"):
        norm_film(Opaque(x), norm="layer")


def test_scale_of_nan_is_an_error():
    inputs = [torch.randn(2, T, 5) for T in (3, 4, 4)] + [torch.randn(5)]
    with pytest.raises(ValueError, match="scale: expected a number, got nan"):
        additive_attention(*inputs, scale=float("nan"))
    for number in ("scale", "softcap"):
        with pytest.raises(ValueError, match=f"{number}: expected a number, got a Tensor"):
            additive_attention(*inputs, **{number: torch.tensor(1.0, requires_grad=True)})
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="gamma_offset: expected a number, got a Tensor"):
        film(x, x, gamma_offset=torch.tensor(1.0, requires_grad=True))
    with pytest.raises(TypeError, match="channel_dim: expected an int, got float"):
        film(x, x, channel_dim=1.0)


def test_softcap_of_infinity_is_no_cap():
    inputs = [torch.randn(2, T, 5) for T in (3, 4, 4)] + [torch.randn(5)]
    expected = gradients(additive_attention, inputs)
    torch.testing.assert_close(gradients(additive_attention, inputs, softcap=float("inf")), expected)
    torch.testing.assert_close(gradients(additive_attention_ref, inputs, softcap=np.inf), expected)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("batch", ["named", "auto"])
def test_film_is_exported_with_a_batch_that_changes(batch, strict):
    """Also where the example has as many batch elements as channels: these sizes are never compared."""
    module = FiLM(4, 3, activation="silu")
    torch.nn.init.normal_(module.conditioner.weight)
    dim = torch.export.Dim("batch", min=2) if batch == "named" else torch.export.Dim.AUTO
    example = torch.randn(3, 3, 5), torch.randn(3, 4)
    exported = torch.export.export(module, example, dynamic_shapes=({0: dim}, {0: dim}), strict=strict).module()
    inputs = torch.randn(7, 3, 5), torch.randn(7, 4)
    torch.testing.assert_close(exported(*inputs), module(*inputs))
