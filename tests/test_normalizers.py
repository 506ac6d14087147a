"""Additive attention with normalisers other than the softmax, against their formulas written out."""

import math

import pytest
import torch
from device import DEVICE
from pairwise import pairwise
from test_additive_attention import shape
from test_masked_keys import FORMS, PLACES, SPECIALS, check_absent

from fusedattn import AdditiveAttention, additive_attention, additive_attention_ref

FUNCTIONS = pytest.mark.parametrize("function", [additive_attention, additive_attention_ref])


def sparsemax(scores):
    """The projection onto the simplex (Martins and Astudillo 2016, arXiv:1602.02068)."""
    ordered = scores.sort(-1, descending=True).values
    number = torch.arange(1, scores.shape[-1] + 1, device=scores.device)
    sums = ordered.cumsum(-1)
    support = (1 + number * ordered > sums).sum(-1, keepdim=True)
    threshold = (sums.gather(-1, support - 1) - 1) / support
    return (scores - threshold).clamp(min=0)


NORMALIZERS = {"sigmoid": "sigmoid", "sparsemax": sparsemax, "softmax": lambda e: e.softmax(-1)}
SIZES = [shape(2, 3, 5, 4, 6), shape(2, 3, 5, 4, 6, H=2), shape(2, 1, 7, 3, 2)]


def make_inputs(sizes, dtype=torch.float64, N=()):
    torch.manual_seed(0)
    lead = (*N, sizes["B"]) + (() if sizes["H"] is None else (sizes["H"],))
    Tq, Tk, D, Dv = (sizes[name] for name in ("Tq", "Tk", "D", "Dv"))
    weight = (*N, D) if sizes["H"] is None else (*N, sizes["H"], D)
    return [torch.randn(s, dtype=dtype) for s in ((*lead, Tq, D), (*lead, Tk, D), (*lead, Tk, Dv), weight)]


def of_each_row(scores, visible, normalizer):
    """Weights row by row, of the visible scores alone."""
    weights = torch.zeros_like(scores)
    for row in torch.cartesian_prod(*map(torch.arange, scores.shape[:-1])).tolist():
        seen = visible[tuple(row)]
        e = scores[tuple(row)][seen]
        if normalizer == "sigmoid":
            p = torch.sigmoid(e) / torch.sigmoid(e).sum()
        else:
            p = normalizer(e) if len(e) else e
        weights[tuple(row)] = weights[tuple(row)].masked_scatter(seen, p)
    return weights


def written_out(query, key, value, weight, *bias, normalizer, visible, scale, softcap):
    w = weight if weight.dim() == 1 else weight[:, None, None]
    scores = scale * (torch.tanh(query.unsqueeze(-2) + key.unsqueeze(-3)) * w).sum(-1)
    scores = sum(bias, softcap * torch.tanh(scores / softcap))
    weights = of_each_row(scores, visible, normalizer)
    return weights @ value, weights


FORM = [*FORMS, "none"]


def options_of(form, sizes):
    """(options that hide keys, bool (B, [H,] Tq, Tk) of those seen)"""
    of = [sizes[name] for name in ("B", "H", "Tq", "Tk")]
    options = {} if form == "none" else FORMS[form](*of)
    B, H, Tq, Tk = of
    visible = torch.ones(*((B, Tq, Tk) if H is None else (B, H, Tq, Tk)), dtype=torch.bool)
    visible &= options.get("mask", visible)
    if "is_causal" in options:
        visible = visible.tril()
    if "window_size" in options:
        left, right = options["window_size"]
        visible = visible.triu(-left).tril(right)
    lengths = options.get("key_lengths", torch.full((B,), Tk))
    return options, visible & (torch.arange(Tk) < lengths.view(-1, *(1,) * (visible.dim() - 1)))


@FUNCTIONS
@pairwise(sizes=SIZES, normalizer=NORMALIZERS, form=FORM, is_biased=[False, True])
def test_the_formula_and_its_gradients(function, sizes, normalizer, form, is_biased):
    inputs = [t.requires_grad_() for t in make_inputs(sizes)]
    options, visible = options_of(form, sizes)
    leaves = inputs
    if is_biased:
        bias = torch.randn(sizes["Tq"], sizes["Tk"], dtype=torch.float64)
        bias[0], bias[-1, 0] = -math.inf, -math.inf
        options["bias"] = bias.requires_grad_()
        leaves, visible = [*inputs, bias], visible & (bias != -math.inf)
    normalizer = NORMALIZERS[normalizer]
    context, weights = function(
        *inputs, normalizer=normalizer, scale=1.5, softcap=2.0, return_weights=True, **options
    )
    expected, expected_weights = written_out(
        *leaves, normalizer=normalizer, visible=visible, scale=1.5, softcap=2.0
    )
    torch.testing.assert_close(context, expected)
    torch.testing.assert_close(weights, expected_weights)
    grads = [torch.randn_like(context), torch.randn_like(weights)]
    actual = torch.autograd.grad((context, weights), leaves, grads)
    torch.testing.assert_close(actual, torch.autograd.grad((expected, expected_weights), leaves, grads))
    torch.testing.assert_close(
        function(*inputs, normalizer=normalizer, scale=1.5, softcap=2.0, **options), context
    )


@pairwise(
    sizes=[shape(2, 6, 37, 4, 4), shape(2, 3, 37, 4, 4, H=2)],
    normalizer=NORMALIZERS,
    form=FORMS,
    places=PLACES,
    special=SPECIALS,
)
def test_what_a_hidden_key_holds_does_not_matter(sizes, normalizer, form, places, special):
    def kernel(*inputs, return_lse=False, **options):
        context, weights = additive_attention(*inputs, normalizer=NORMALIZERS[normalizer], **options)
        return context, weights, weights.sum(-1)

    check_absent(sizes, torch.float64, form, places, special, kernel)


@pytest.mark.machinery
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_derivatives(normalizer):
    inputs = [t.requires_grad_() for t in make_inputs(shape(2, 2, 3, 2, 2))]
    mask = torch.tensor([[True, False, True], [False] * 3])

    def function(*inputs):
        return additive_attention(
            *inputs, mask=mask, normalizer=NORMALIZERS[normalizer], scale=0.5, return_weights=True
        )

    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "sigmoid"])
def test_activations(activation):
    inputs = make_inputs(SIZES[0])
    options = {"activation": activation, "negative_slope": 0.3}
    actual = additive_attention(*inputs, normalizer=NORMALIZERS["softmax"], **options)
    torch.testing.assert_close(actual, additive_attention(*inputs, **options))


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_broadcasting(normalizer):
    query, key, value, weight = make_inputs(shape(2, 3, 5, 4, 6, H=2))
    query, key, value = query[:1], key[:, :1], value
    actual = additive_attention(query, key, value, weight[0], normalizer=NORMALIZERS[normalizer])
    full = query.expand(2, -1, -1, -1), key.expand(-1, 2, -1, -1), value, weight[:1].expand(2, -1)
    torch.testing.assert_close(actual, additive_attention(*full, normalizer=NORMALIZERS[normalizer]))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("H", [None, 2])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_vmap(normalizer, H, masked):
    inputs = make_inputs(shape(2, 3, 5, 4, 6, H=H), N=(3,))
    options = {"mask": torch.rand(3, 3, 5) > 0.4, "key_lengths": torch.randint(0, 6, (3, 2))} if masked else {}

    def loss(inputs, options):
        return additive_attention(*inputs, normalizer=NORMALIZERS[normalizer], **options).sin().sum()

    actual = torch.vmap(torch.func.grad(loss))(tuple(inputs), options)
    for n in range(3):
        one = torch.func.grad(loss)(tuple(t[n] for t in inputs), {name: t[n] for name, t in options.items()})
        torch.testing.assert_close(tuple(t[n] for t in actual), one)


@pytest.mark.machinery
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_compiles_as_one_graph(normalizer):
    inputs = [t.requires_grad_() for t in make_inputs(shape(2, 3, 5, 4, 6))]
    torch.compiler.reset()

    def function(*inputs):
        return additive_attention(
            *inputs, key_lengths=torch.tensor([3, 0]), normalizer=NORMALIZERS[normalizer], return_weights=True
        )

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(*inputs), function(*inputs)
    torch.testing.assert_close(actual, expected)
    grads = [torch.autograd.grad(context.sin().sum(), inputs) for context, _ in (actual, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("alpha", [1.5, 2.0])
def test_entmax(alpha):
    entmax = pytest.importorskip("entmax")
    inputs = [t.requires_grad_() for t in make_inputs(shape(2, 3, 7, 4, 6))]
    normalizer = entmax.entmax15 if alpha == 1.5 else entmax.sparsemax
    lengths = torch.tensor([7, 4])
    context = additive_attention(*inputs, key_lengths=lengths, scale=2.0, normalizer=normalizer)
    for b, n in enumerate(lengths):
        query, key, value, weight = (t[b] if t.dim() == 3 else t for t in inputs)
        scores = 2 * torch.tanh(query.unsqueeze(1) + key[:n]) @ weight
        expected = normalizer(scores) @ value[:n]
        torch.testing.assert_close(context[b], expected)
        grad = torch.randn_like(expected)
        actual = torch.autograd.grad(context[b], inputs[0], grad, retain_graph=True)
        torch.testing.assert_close(actual, torch.autograd.grad(expected, inputs[0], grad))


def test_sharp_and_flat_scores():
    """Every sigma(e) underflows, or is 1."""
    query, key, value, weight = make_inputs(shape(1, 2, 5, 4, 6), torch.float32)
    for scale, limit in ((-1e4, 0.0), (1e4, 1.0)):
        weights = additive_attention(
            query, key.abs() + 3, value, weight.abs(), scale=scale, normalizer="sigmoid", return_weights=True
        )[1]
        assert weights.isfinite().all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2))
        if limit:
            torch.testing.assert_close(weights, torch.full((1, 2, 5), 0.2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_the_weights_alone(dtype):
    inputs = make_inputs(shape(2, 3, 50, 8, 6), dtype)
    seen = []

    def normalizer(scores):
        seen.append(scores)
        return scores.softmax(-1)

    context, weights = additive_attention(*inputs, normalizer=normalizer, return_weights=True)
    assert context.dtype == weights.dtype == dtype and seen[0].dtype == torch.float32
    exact = additive_attention(*(t.float() for t in inputs), return_weights=True)[1]
    torch.testing.assert_close(weights, exact.to(dtype))


def test_autocast():
    inputs = make_inputs(shape(2, 3, 5, 4, 6), torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        context = additive_attention(*inputs, normalizer="sigmoid")
    expected = additive_attention(*(t.bfloat16() for t in inputs), normalizer="sigmoid")
    torch.testing.assert_close(context, expected, rtol=0, atol=0)


@FUNCTIONS
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_the_log_sum_exp_is_one_of_softmax(function, normalizer):
    inputs = make_inputs(SIZES[0])
    with pytest.raises(ValueError, match="return_lse: expected False with a normalizer other than 'softmax'"):
        function(*inputs, normalizer=NORMALIZERS[normalizer], return_lse=True)


def test_a_normalizer_with_parameters():
    class Tempered(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.logit = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

        def forward(self, scores):
            return (scores * self.logit.exp()).softmax(-1)

    inputs, module = make_inputs(SIZES[0]), Tempered()
    context = additive_attention(*inputs, normalizer=module)
    torch.testing.assert_close(context, additive_attention(*inputs, scale=math.exp(0.3)))
    (grad,) = torch.autograd.grad(context.sum(), module.logit)
    assert grad.abs() > 0
    attention = AdditiveAttention(4, 4, 3, normalizer=module, dtype=torch.float64)
    assert "normalizer.logit" in attention.state_dict()
    plain = AdditiveAttention(4, 4, 3, scale=math.exp(0.3), dtype=torch.float64)
    plain.load_state_dict(attention.state_dict(), strict=False)
    torch.testing.assert_close(attention(*inputs[:2]), plain(*inputs[:2]))
    assert "scale=1.35, normalizer='sigmoid'" in repr(AdditiveAttention(4, 4, 3, scale=1.35, normalizer="sigmoid"))
