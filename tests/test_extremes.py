"""What real inputs seldom are: with weights of e^-400."""

import pytest
import torch

from fusedattn import additive_attention

pytestmark = pytest.mark.levels


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
