"""What real inputs seldom are: of no width at all, of more rows than any memory holds, with weights of e^-400."""

import pytest
import torch
from device import INTERPRETED

from fusedattn import additive_attention, additive_attention_ref

pytestmark = pytest.mark.levels


@pytest.mark.interpreted
# Up to 16 queries the CPU's backward pass walks whole rows of keys, up to 4 Triton's forward does.
@pytest.mark.parametrize("Tq", [1, 5] if INTERPRETED else [1, 16, 17, 70])
@pytest.mark.parametrize("D, Dv", [(0, 4), (4, 0), (0, 0)])
def test_width_zero(D, Dv, Tq):
    for Tk in (0, 5) if INTERPRETED else (0, 5, 200):
        results = []
        for function in (additive_attention, additive_attention_ref):
            generator = torch.Generator().manual_seed(0)
            shapes = ((2, Tq, D), (2, Tk, D), (2, Tk, Dv), (D,))
            inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
            context = function(*inputs)
            results.append([context, *torch.autograd.grad(context.sum(), inputs, materialize_grads=True)])
        torch.testing.assert_close(*results)


@pytest.mark.interpreted
@pytest.mark.parametrize("Tq, Tk", [(1, 2**62), (2**62, 1), (2**31, 2**31)])
@pytest.mark.parametrize("D, Dv", [(0, 1), (1, 0), (1, 1)])
def test_products_of_sizes_beyond_64_bits(D, Dv, Tq, Tk):
    """Expanded tensors may have any size."""

    def expanded(T, D):
        return torch.ones(1, 1, D).expand(1, T, D)

    inputs = expanded(Tq, D), expanded(Tk, D), expanded(Tk, Dv), torch.ones(D)
    message = rf"query, key and value: expected sizes .* Tq = {Tq}, Tk = {Tk}, D = {D}, Dv = {Dv}"
    for return_weights in (False, True):
        with pytest.raises(RuntimeError, match=message):
            additive_attention(*inputs, return_weights=return_weights)


@pytest.mark.interpreted
def test_the_smallest_weights_of_float64():
    """Down to e^-708, and not to e^-87 as in float32."""
    query, key = (
        torch.zeros(1, 1, 1, dtype=torch.float64),
        torch.tensor([[[20.0], [1.0], [0.0]]], dtype=torch.float64),
    )
    weight, value = torch.full((1,), 400.0, dtype=torch.float64), torch.ones_like(key, requires_grad=True)
    context, weights = additive_attention(query, key, value, weight, return_weights=True)
    expected = torch.softmax(400 * torch.tanh(key), 1).mT
    assert 0 < expected.min() < 1e-170
    torch.testing.assert_close(weights, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.autograd.grad(context.sum(), value)[0], expected.mT, rtol=1e-13, atol=0)
