"""A key that no query of its batch element and head sees is absent, whatever it and its value hold.

Results and gradients are those, bit for bit, of a run with zeros in its place, and its own gradients are zero.
"""

import math

import pytest
import torch
from device import INTERPRETED, cpu_alone
from pairwise import pairwise
from test_additive_attention import make_inputs, run, shape

from fusedattn import additive_attention, additive_attention_ref
from fusedattn.ops.additive_attention import attend

pytestmark = pytest.mark.levels


def some(*sizes):
    return torch.rand(*sizes) > 0.4


def batch(H, *sizes):
    """A mask that is the same for all heads."""
    return sizes if H is None else (sizes[0], 1, *sizes[1:])


# Ways to hide keys, for (B, Tq, Tk) and (B, H, Tq, Tk).
FORMS = {
    "keys": lambda B, H, Tq, Tk: {"mask": some(Tk)},
    "last_keys": lambda B, H, Tq, Tk: {"mask": torch.arange(Tk) < Tk // 3},
    "first_keys": lambda B, H, Tq, Tk: {"mask": torch.arange(Tk) > Tk // 2},
    "batch_keys": lambda B, H, Tq, Tk: {"mask": some(*batch(H, B, 1, Tk))},
    "queries_keys": lambda B, H, Tq, Tk: {"mask": some(Tq, Tk) & some(Tk)},
    "full": lambda B, H, Tq, Tk: {"mask": some(*(B, H or 1)[: 1 if H is None else 2], Tq, Tk) & some(Tk)},
    "heads": lambda B, H, Tq, Tk: {"mask": some(H or 1, Tq, Tk) & some(H or 1, 1, Tk)},
    "transposed": lambda B, H, Tq, Tk: {"mask": (some(Tk, Tq) & some(Tk, 1)).T},
    "all_masked": lambda B, H, Tq, Tk: {"mask": torch.zeros(1, 1, dtype=torch.bool)},
    "lengths": lambda B, H, Tq, Tk: {"key_lengths": torch.tensor([Tk - 5, 0, Tk][:B])},
    "causal": lambda B, H, Tq, Tk: {"is_causal": True},
    # Some key is hidden by neither alone.
    "causal_and_mask": lambda B, H, Tq, Tk: {
        "is_causal": True,
        "mask": some(Tq, Tk).triu(1) | (some(Tk) & some(Tq, Tk)),
    },
    "window": lambda B, H, Tq, Tk: {"window_size": (3, 2)},
    "window_and_mask": lambda B, H, Tq, Tk: {"window_size": (3, 2), "mask": some(Tq, Tk) & some(Tk)},
    "causal_and_keys": lambda B, H, Tq, Tk: {"is_causal": True, "mask": some(Tk)},
    "lengths_and_mask": lambda B, H, Tq, Tk: {
        "key_lengths": torch.tensor([Tk - 5, 3, Tk][:B]),
        "mask": some(*batch(H, B, Tq, Tk)) & some(Tk),
    },
    "everything": lambda B, H, Tq, Tk: {
        "is_causal": True,
        "key_lengths": torch.tensor([Tk, Tk // 2, 4][:B]),
        "mask": some(*batch(H, B, Tq, Tk)) & some(Tk),
    },
}


def hidden_keys(sizes, mask=None, key_lengths=None, is_causal=False, window_size=(-1, -1)):
    """bool (B, [H,] Tk): True where no query sees a key."""
    B, H, Tq, Tk = (sizes[name] for name in ("B", "H", "Tq", "Tk"))
    visible = torch.ones(*((B, Tq, Tk) if H is None else (B, H, Tq, Tk)), dtype=torch.bool)
    if mask is not None:
        visible &= mask
    if is_causal:
        visible &= torch.ones(Tq, Tk, dtype=torch.bool).tril()
    if window_size != (-1, -1):
        visible &= torch.ones(Tq, Tk, dtype=torch.bool).triu(-window_size[0]).tril(window_size[1])
    if key_lengths is not None:
        visible &= torch.arange(Tk) < key_lengths.view(-1, *(1,) * (visible.dim() - 1))
    return ~visible.any(-2)


def filled(inputs, hidden, places, number):
    """The inputs with `number` in the hidden rows of key and value, or zero in the one that is not of `places`."""
    query, key, value, weight = inputs
    key, value = (
        t.masked_fill(hidden.unsqueeze(-1), number if place in places else 0.0)
        for t, place in ((key, "key"), (value, "value"))
    )
    return [query, key, value, weight]


def check_absent(sizes, dtype, form, places, special, kernel=additive_attention, same=torch.equal):
    inputs = make_inputs(sizes, dtype)
    options = FORMS[form](*(sizes[name] for name in ("B", "H", "Tq", "Tk")))
    hidden = hidden_keys(sizes, **options)
    assert hidden.any()
    number = min(special, torch.finfo(dtype).max) if special == 1e38 else special
    actual = run(kernel, filled(inputs, hidden, places, number), **options)
    expected = run(kernel, filled(inputs, hidden, places, 0.0), **options)
    for name, result in expected.items():
        assert same(actual[name], result), name
    assert (actual["grad_key"][hidden] == 0).all() and (actual["grad_value"][hidden] == 0).all()
    assert (actual["weights"].mT[hidden] == 0).all()


# One query, few of them and many; scores kept and recomputed; one weight, and one for each head.
SIZES = [
    shape(2, 1, 61, 5, 4),
    shape(2, 3, 37, 40, 18, H=2),
    shape(2, 20, 37, 40, 18, H=2),
    shape(3, 70, 83, 6, 7),
]
SPECIALS = [math.nan, math.inf, -math.inf, 1e38]
if INTERPRETED:  # where a case takes seconds, and kernels see a mask as strides: forms that differ in these
    SIZES = [shape(2, 1, 37, 3, 4), shape(1, 6, 37, 2, 4, H=2), shape(1, 17, 67, 2, 3)]
    SPECIALS = SPECIALS[:2]
    FORMS = {form: FORMS[form] for form in ("batch_keys", "full", "transposed", "all_masked", "everything")}
PLACES = [("key",), ("value",), ("key", "value")]


@pytest.mark.interpreted
@pairwise(
    sizes=SIZES, dtype=[torch.float32, torch.float16, torch.float64], form=FORMS, places=PLACES, special=SPECIALS
)
def test_what_a_hidden_key_holds_does_not_matter(sizes, dtype, form, places, special):
    check_absent(sizes, dtype, form, places, special)


@pairwise(sizes=SIZES[:3], form=FORMS, places=PLACES, special=SPECIALS)
def test_what_a_hidden_key_holds_does_not_matter_to_the_reference(sizes, form, places, special):
    check_absent(sizes, torch.float32, form, places, special, additive_attention_ref)


@pytest.mark.interpreted
@pytest.mark.parametrize(("Tq", "form"), [(2, "full"), (5 if INTERPRETED else 17, "batch_keys")])
def test_keys_split_over_threads_or_programs(Tq, form):
    sizes = shape(1, Tq, 270 if INTERPRETED else 700, 2, 3)
    check_absent(sizes, torch.float32, form, ("key", "value"), math.nan)


@cpu_alone  # GPUs use no exponentials at hand
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("special", SPECIALS)
@pytest.mark.parametrize("of_all", [True, False])
def test_exponentials_of_hidden_keys_do_not_matter(sizes, special, of_all):
    """Whether or not the bound that comes with them is one of hidden keys, too."""

    def kernel(query, key, value, weight, **options):
        with torch.no_grad():
            bounded = key if of_all else key.masked_fill(hidden_keys(sizes, options["mask"]).unsqueeze(-1), 0.0)
            key_exp, key_bound = torch.exp(2 * key), torch.linalg.vector_norm(bounded, torch.inf)
        return attend(query, key, value, weight, key_exp=key_exp, key_bound=key_bound, **options)

    same = torch.equal if not of_all else lambda actual, expected: torch.allclose(actual, expected, atol=1e-5)
    check_absent(sizes, torch.float32, "batch_keys", ("key", "value"), special, kernel, same)


@pytest.mark.parametrize("form", ["keys", "lengths", "causal_and_mask"])
@pytest.mark.parametrize("special", SPECIALS)
def test_hidden_keys_do_not_matter_to_derivatives_of_any_order_and_mode(form, special):
    sizes = shape(2, 3, 9, 4, 5)
    inputs = make_inputs(sizes, torch.float64)
    options = FORMS[form](*(sizes[name] for name in ("B", "H", "Tq", "Tk")))
    hidden = hidden_keys(sizes, **options)
    assert hidden.any()

    def function(*inputs):
        return additive_attention(*inputs, return_lse=True, **options)

    def derivatives(number):
        leaves = [t.requires_grad_() for t in filled(inputs, hidden, ("key", "value"), number)]
        context, lse = function(*leaves)
        loss = context.sin().sum() + lse.masked_fill(lse.isinf(), 0.0).sin().sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum(grad.sin().sum() for grad in first), leaves)
        primals = tuple(t.detach() for t in leaves)
        _, forward = torch.func.jvp(function, primals, tuple(torch.ones_like(t) for t in primals))
        return [*first, *second, *forward]

    for actual, expected in zip(derivatives(special), derivatives(0.0), strict=True):
        assert torch.equal(actual, expected) and actual.isfinite().all()


@pytest.mark.parametrize("function", [additive_attention, additive_attention_ref])
def test_a_query_that_does_not_see_a_nan_key_keeps_its_results(function):
    """Of a key that others see: the scores of the query are its own."""
    query, key, value, weight = make_inputs(shape(1, 20, 20, 6))
    clean = function(query, key, value, weight, is_causal=True, return_weights=True, return_lse=True)
    key[:, 7] = math.nan
    results = function(query, key, value, weight, is_causal=True, return_weights=True, return_lse=True)
    for result, expected in zip(results, clean, strict=True):
        torch.testing.assert_close(result[:, :7], expected[:, :7])
        assert result[:, 7:].isnan().any(-1).all() if result.dim() > 2 else result[:, 7:].isnan().all()


@pytest.mark.parametrize("sizes", [(0, 3, 7), (0, 2, 3, 7), (2, 0, 3, 7), (2, 0, 7), (2, 3, 0)])
def test_a_mask_of_nothing(sizes):
    """It is expanded from one that is not empty, but has no memory."""
    *lead, Tq, Tk = sizes
    inputs = [torch.randn(*lead, T, 4, requires_grad=True) for T in (Tq, Tk, Tk)]
    context = additive_attention(*inputs, torch.ones(4), mask=torch.ones(Tq, Tk, dtype=torch.bool))
    assert context.shape == (*lead, Tq, 4) and context.count_nonzero() == 0
    for grad, t in zip(torch.autograd.grad(context.sum(), inputs), inputs, strict=True):
        assert grad.shape == t.shape
