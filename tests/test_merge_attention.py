"""merge_attention: parts of the keys, joined, are attention over all of them."""

import math

import pytest
import torch
from test_additive_attention import make_inputs, shape

from fusedattn import additive_attention, merge_attention, merge_attention_ref

SIZES = [shape(2, 3, 7, 4, 5), shape(2, 3, 7, 4, 5, H=2)]
CUTS = [[7], [2, 5], [1, 3, 3], [0, 4, 3]]


def in_parts(inputs, cut, mask):
    """(contexts, lses) of the keys cut into parts."""
    query, key, value, weight = inputs
    parts = zip(key.split(cut, -2), value.split(cut, -2), mask.split(cut, -1), strict=True)
    found = [additive_attention(query, k, v, weight, mask=m, return_lse=True) for k, v, m in parts]
    return [list(of) for of in zip(*found, strict=True)]


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("sizes", SIZES)
def test_parts_are_the_whole(sizes, cut, stacked):
    inputs = [t.requires_grad_() for t in make_inputs(sizes, torch.float64)]
    mask = torch.rand(3, 7) > 0.4
    mask[1] = False  # sees nothing
    mask[2] = torch.arange(7) == 6  # sees nothing in most parts
    contexts, lses = in_parts(inputs, cut, mask)
    if stacked:
        contexts, lses = torch.stack(contexts), torch.stack(lses)
    context, lse = merge_attention(contexts, lses)
    expected, expected_lse = additive_attention(*inputs, mask=mask, return_lse=True)
    torch.testing.assert_close((context, lse), (expected, expected_lse))
    assert (lse[..., 1] == -math.inf).all() and (context[..., 1, :] == 0).all()
    grad = torch.randn_like(context), torch.randn_like(lse)
    actual = torch.autograd.grad((context, lse), inputs, grad)
    torch.testing.assert_close(actual, torch.autograd.grad((expected, expected_lse), inputs, grad))


def parts(dtype=torch.float64):
    """Three parts; query 0 sees all, 1 the second alone, 2 nothing."""
    torch.manual_seed(0)
    contexts, lses = torch.randn(3, 2, 3, 4, dtype=dtype), torch.randn(3, 2, 3, dtype=torch.float64)
    lses = lses.to(torch.promote_types(dtype, torch.float32))
    lses[0, :, 1], lses[2, :, 1], lses[:, :, 2] = -math.inf, -math.inf, -math.inf
    return contexts, lses


def finite(contexts, lses):
    context, lse = merge_attention(contexts, lses)
    return context, lse.masked_fill(lse == -math.inf, 0.0)


def test_derivatives():
    contexts, lses = (t.requires_grad_() for t in parts())

    def function(contexts, deltas):  # of finite numbers: gradcheck moves each
        return finite(contexts, lses.detach() + deltas)

    inputs = contexts, torch.zeros_like(lses, requires_grad=True)
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)
    torch.testing.assert_close(torch.vmap(finite)(*(t.unsqueeze(0) for t in inputs))[0][0], finite(*inputs)[0])


def test_an_absent_part_may_hold_anything():
    contexts, lses = (t.requires_grad_() for t in parts())
    absent = (lses == -math.inf).unsqueeze(-1)
    found = []
    for number in (0.0, math.nan, math.inf):
        context, lse = finite(contexts.masked_fill(absent, number), lses)
        found.append((context, lse, *torch.autograd.grad(context.sin().sum() + lse.sum(), (contexts, lses))))
    for of in found[1:]:
        torch.testing.assert_close(of, found[0], rtol=0, atol=0)
    assert all(t.isfinite().all() for t in found[0])


def test_large_log_sum_exps():
    contexts = torch.eye(3).view(3, 1, 3)
    context, lse = merge_attention(contexts, torch.tensor([[1e4], [1e4 - 1], [-1e4]]))
    torch.testing.assert_close(context, torch.tensor([[1.0, math.exp(-1), 0.0]]) / (1 + math.exp(-1)))
    torch.testing.assert_close(lse, torch.tensor([1e4 + math.log1p(math.exp(-1))]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_are_made_in_float32(dtype):
    contexts, lses = parts(dtype)
    context, lse = merge_attention(contexts, lses)
    assert context.dtype == dtype and lse.dtype == torch.float32
    exact, exact_lse = merge_attention(contexts.double(), lses.double())
    torch.testing.assert_close(context, exact.to(dtype))
    torch.testing.assert_close(lse, exact_lse.float())
    torch.testing.assert_close(merge_attention_ref(contexts, lses), (context, lse), rtol=0, atol=0)


def test_compiles_as_one_graph():
    torch.compiler.reset()
    contexts, lses = parts()
    compiled = torch.compile(merge_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(list(contexts), list(lses)), merge_attention(contexts, lses))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (lambda c, s: ([], []), ValueError, "lses: expected one of each context, of 1 or more"),
        (lambda c, s: (c, s[:2]), ValueError, r"lses: expected one of each context, .*\(3\), got 2 of them"),
        (lambda c, s: (c, [*s[:2], 1.0]), TypeError, r"lses\[2\]: expected a Tensor, got float"),
        (lambda c, s: ([c[0], c[1, 0], c[2]], s), ValueError, r"contexts\[1\]: expected .*\(2, 3, 4\) on"),
        (lambda c, s: (c, s[..., :1]), ValueError, r"lses\[0\]: expected torch.float64 \(2, 3\) .*\(2, 1\)"),
        (lambda c, s: (c, s.float()), ValueError, r"lses\[0\]: expected torch.float64 .*got torch.float32"),
        (lambda c, s: (c.long(), s), ValueError, r"contexts\[0\]: expected floating-point .*got torch.int64"),
    ],
)
def test_errors(changes, error, message):
    with pytest.raises(error, match=f"merge_attention: {message}"):
        merge_attention(*changes(*parts()))
