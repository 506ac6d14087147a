"""hard_additive_attention: keys sampled by the softmax, and the derivatives of log_prob and entropy."""

import math

import pytest
import torch
from device import DEVICE, INTERPRETED, cpu_alone, not_on_the_standin, raw_op
from pairwise import pairwise
from tolerance import assert_close_to_reference

from fusedattn import (
    UnsupportedError,
    _philox,
    additive_attention,
    hard_additive_attention,
    hard_additive_attention_ref,
    merge_attention,
)
from fusedattn._philox import EVERYTHING, Place
from fusedattn.ops.hard_additive_attention import Part, attend

pytestmark = [
    pytest.mark.levels,
    pytest.mark.filterwarnings("ignore:fusedattn. no kernel of hard_additive_attention can run:UserWarning"),
]
HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, torch.float64, *HALF)
NAMES = ("query", "key", "value", "weight")
FUNCTIONS = pytest.mark.parametrize("function", [hard_additive_attention, hard_additive_attention_ref])


def make_inputs(B=2, Tq=3, Tk=7, D=5, Dv=4, H=None, dtype=torch.float64):
    torch.manual_seed(0)
    lead = (B,) if H is None else (B, H)
    rows = [torch.randn(*lead, *shape, dtype=torch.float64) for shape in ((Tq, D), (Tk, D), (Tk, Dv))]
    return [t.to(dtype) for t in (*rows, 2 * torch.randn(*lead[1:], D, dtype=torch.float64))]


def sampled(function, inputs, seed=5, **options):
    torch.manual_seed(seed)
    return function(*inputs, **options)


def plain(query, key, value, weight, *bias, index, visible=None, scale=1.0):
    """context, log_prob and entropy for keys that are chosen already, written out; there is a visible key."""
    scores = scale * (torch.tanh(query.unsqueeze(-2) + key.unsqueeze(-3)) * weight[..., None, None, :]).sum(-1)
    scores = sum(bias, scores)
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    log_p = scores.log_softmax(-1)
    p_log_p = torch.where(log_p == -math.inf, 0.0, log_p.exp() * log_p.clamp_min(-1e4))
    chosen = torch.nn.functional.one_hot(index, key.shape[-2]).to(value.dtype)
    return chosen @ value, log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1), -p_log_p.sum(-1)


def with_gradients(function, inputs, dtype=None):
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    outputs = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(t.shape, generator=generator, device="cpu").to(t.device, t.dtype) for t in outputs]
    return *outputs, *torch.autograd.grad(outputs, leaves, grads)


def check(inputs, visible=None, **options):
    """Against the formulas for the same keys, results and gradients; returns the keys. A fifth input is a bias."""

    def call(*given):
        return sampled(hard_additive_attention, given[:4], **options, bias=given[4] if given[4:] else None)

    output = call(*inputs)
    scale = options.get("scale", 1.0)

    def ours(*given):
        found = call(*given)
        assert torch.equal(found.index, output.index)
        return found.context, found.log_prob, found.entropy

    def written_out(*given):
        return plain(*given, index=output.index, visible=visible, scale=scale)

    wide = inputs[0].dtype in HALF
    rounded = lambda *given: tuple(  # noqa: E731  # eager makes its scores in half precision, ours in float32
        t.to(torch.float32) if wide and n else t for n, t in enumerate(written_out(*given))
    )
    found = with_gradients(ours, inputs), with_gradients(rounded, inputs)
    exact = with_gradients(written_out, inputs, torch.float64)
    Tq, Tk, D = inputs[0].shape[-2], inputs[1].shape[-2], inputs[0].shape[-1]
    # Scores are off by the rounding of their terms, and so are log_prob, entropy and, relative to itself, p.
    w = inputs[3].double().abs()
    noise = 1 + 2 * scale * w.sum(-1).max().item()
    steep = 12 * noise * max(w.max().item(), 1)
    bounds = {
        "context": (1, 1.0),
        "log_prob": (D, noise),
        "entropy": (max(D, Tk), noise),
        "grad_query": (Tk, steep),
        "grad_key": (Tq, steep),
        "grad_value": (Tq, 1.0),
        "grad_weight": (math.prod(inputs[0].shape[:-1]) * Tk, steep),
        "grad_bias": (math.prod(inputs[0].shape[:-2]), noise),
    }
    for (name, (terms, magnitude)), actual, eager, right in zip(bounds.items(), *found, exact, strict=False):
        sums = magnitude * (math.sqrt(terms) if name.startswith("grad") else 1.0)
        assert_close_to_reference(actual, eager, right, terms=terms, name=name, scale=sums)
    return output


# Values and gradients


@pytest.mark.interpreted
@pairwise(
    shape=[(2, 3, 7, 5, 4), (1, 1, 1, 1, 1), (2, 1, 130, 3, 2), *[(1, 9, 1100, 2, 3)] * (not INTERPRETED)],
    dtype=DTYPES,
    H=[None, 3],
    sample=[True, False],
    hidden=[None, "mask", "lengths", "causal", *["window", "bias"] * (not INTERPRETED)],
)
def test_values_and_gradients(shape, dtype, H, sample, hidden):
    B, Tq, Tk = shape[:3]
    inputs = make_inputs(*shape, H=H, dtype=dtype)
    full = (B, *([] if H is None else [H]), Tq, Tk)
    options, visible = {}, None
    if hidden == "mask":
        visible = torch.rand(full) > 0.5
        visible[..., 0] = True
        options = {"mask": visible}
    elif hidden == "lengths":
        lengths = torch.tensor([1 + Tk // (b + 2) for b in range(B)]).clamp(max=Tk)
        visible = (torch.arange(Tk) < lengths[:, None]).view(B, *[1] * (len(full) - 2), Tk).expand(full)
        options = {"key_lengths": lengths}
    elif hidden == "causal":
        visible = torch.ones(Tq, Tk, dtype=torch.bool).tril().expand(full)
        options = {"is_causal": True}
    elif hidden == "window":
        center = torch.randint(0, Tk, full[:-1])
        offset = torch.arange(Tk) - center.unsqueeze(-1)
        visible = (offset >= -2) & (offset <= 1)
        options = {"window_size": (2, 1), "window_center": center}
    elif hidden == "bias":
        bias = 2 * torch.randn(Tq, Tk)
        bias[:, 1::3] = -math.inf
        visible = (bias > -math.inf).expand(full)
        inputs.append(bias.to(dtype))
    output = check(inputs, visible, sample=sample, scale=0.7, **options)
    if visible is not None:
        assert visible.gather(-1, output.index.unsqueeze(-1)).all()


@pytest.mark.interpreted
@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"activation": "relu"}, {"activation": "sigmoid"}], ids=str)
def test_options_of_the_score(options):
    inputs = [t.requires_grad_() for t in make_inputs(dtype=torch.float32)]
    both = []
    for function in (hard_additive_attention, hard_additive_attention_ref):
        output = sampled(function, inputs, **options)
        loss = output.context.sum() + output.log_prob.sin().sum() + output.entropy.cos().sum()
        both.append([*output, *torch.autograd.grad(loss, inputs)])
    torch.testing.assert_close(*both)


@pytest.mark.interpreted
def test_the_most_likely_key_is_the_first_of_several():
    query, key, value, weight = make_inputs(2, 3, 40, dtype=torch.float32)
    key[:, 20:] = key[:, :20]
    found = hard_additive_attention(query, key, value, weight, sample=False)
    _, weights = additive_attention(query, key, value, weight, return_weights=True)
    assert torch.equal(found.index, weights.argmax(-1)) and (found.index < 20).all()


@pytest.mark.interpreted
@FUNCTIONS
def test_rows_without_a_visible_key(function):
    query, key, value, weight = (t.requires_grad_() for t in make_inputs())
    mask = torch.ones(2, 3, 7, dtype=torch.bool)
    mask[0, 1], mask[1] = False, False
    found = function(query, key, value, weight, mask=mask)
    empty = ~mask.any(-1)
    assert (found.index[empty] == -1).all() and (found.index[~empty] >= 0).all()
    for t in (found.context, found.log_prob, found.entropy):
        assert (t[empty] == 0).all() and (t[~empty] != 0).all()
    grads = torch.autograd.grad(sum(t.sum() for t in (found.context, *found[2:])), (query, key, value, weight))
    assert all(torch.isfinite(g).all() for g in grads)
    assert (grads[0][empty] == 0).all() and not any(g[1].any() for g in grads[:3])


@pytest.mark.interpreted
@FUNCTIONS
def test_what_nobody_sees_or_chooses_does_not_matter(function):
    clean = make_inputs()
    mask = torch.ones(2, 3, 7, dtype=torch.bool)
    mask[:, :, 4:], mask[0, 0] = False, False
    poisoned = [t.clone() for t in clean]
    poisoned[1][:, 4:] = math.nan
    poisoned[2][:, 4:] = math.inf
    index = sampled(function, clean, mask=mask).index
    for b in range(2):
        for j in set(range(4)) - set(index[b].tolist()):
            poisoned[2][b, j] = math.nan

    def call(*given):
        found = sampled(function, given, mask=mask)
        return found.context, found.log_prob, found.entropy

    torch.testing.assert_close(with_gradients(call, poisoned), with_gradients(call, clean))


@pytest.mark.interpreted
@FUNCTIONS
def test_no_keys_and_no_queries(function):
    query, key, value, weight = (t.requires_grad_() for t in make_inputs())
    found = function(query, key[:, :0], value[:, :0], weight)
    assert (found.index == -1).all() and found.context.shape == (2, 3, 4)
    assert not any(t.any() for t in (found.context, found.log_prob, found.entropy))
    (found.context.sum() + found.log_prob.sum() + found.entropy.sum()).backward()
    assert function(query[:, :0], key, value, weight).index.shape == (2, 0)


@pytest.mark.interpreted
@pytest.mark.parametrize("spread", [1e-20, 50.0, 1e4])
def test_magnitudes(spread):
    """Equal scores, scores of which one is all, and scores far below the exponential's range."""
    inputs = make_inputs(2, 4, 33, dtype=torch.float32)
    inputs[3] *= spread
    check(inputs)


@pytest.mark.interpreted
@FUNCTIONS
def test_a_nan_that_is_seen_stays_in_its_row(function):
    query, key, value, weight = make_inputs(dtype=torch.float32)
    query[0, 1] = math.nan
    found = function(query, key, value, weight)
    for t in (found.log_prob, found.entropy):
        assert t[0, 1].isnan() and t.isnan().sum() == 1
    assert ((found.index >= 0) & (found.index < 7)).all()


# Samples


def test_frequencies_are_the_softmax():
    """Chi-square of 40,000 samples, below what chance exceeds once in 10,000 times for 12 degrees of freedom."""
    query, key, value, weight = make_inputs(1, 1, 13, dtype=torch.float32)
    n = 2000
    samples = [
        sampled(hard_additive_attention, (query.expand(1, n, -1), key, value, weight), s) for s in range(20)
    ]
    index = torch.cat([found.index.flatten() for found in samples])
    _, p = additive_attention(query, key, value, weight, return_weights=True)
    expected = p.flatten().double() * len(index)
    counts = torch.bincount(index, minlength=13)
    assert ((counts - expected).square() / expected).sum() < 39.1


def test_the_score_function_estimator_has_the_gradient_of_the_expectation():
    """Mean over 4,000 samples of the gradient of f(c) log_prob, against d/dq of sum_j p_j f(x_j)."""
    query, key, value, weight = make_inputs(1, 1, 6, D=3)
    n = 4000

    def f(context):
        return context.square().sum(-1)

    leaves = [t.clone().requires_grad_() for t in (query, key, weight)]
    _, p = additive_attention(leaves[0], leaves[1], value, leaves[2], return_weights=True)
    exact = torch.autograd.grad((p * f(value).unsqueeze(1)).sum(), leaves[0])[0].flatten()
    many = query.repeat(1, n, 1).requires_grad_()
    found = sampled(hard_additive_attention, (many, key, value, weight))
    estimates = torch.autograd.grad((f(found.context).detach() * found.log_prob).sum(), many)[0][0]
    error = estimates.std(0) / math.sqrt(n)
    assert ((estimates.mean(0) - exact).abs() < 4 * error).all() and (exact.abs() > 4 * error).any()


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_and_reference_sample_the_same_keys(dtype):
    inputs = make_inputs(1, 37, 70, 4, 2, H=2, dtype=dtype)
    found, expected = (sampled(f, inputs) for f in (hard_additive_attention, hard_additive_attention_ref))
    assert (found.index != expected.index).sum() <= 1  # of 74, where two perturbed scores are next to equal
    assert not torch.equal(found.index, sampled(hard_additive_attention, inputs, seed=6).index)


@not_on_the_standin("has no generators")
def test_the_generators_decide():
    inputs = make_inputs(2, 30, 50)
    torch.manual_seed(5)
    first, second = (hard_additive_attention(*inputs).index for _ in range(2))
    assert torch.equal(first, sampled(hard_additive_attention, inputs).index) and not torch.equal(first, second)
    generators = [torch.Generator(DEVICE).manual_seed(3) for _ in range(2)]
    by_generator = [hard_additive_attention(*inputs, generator=generator).index for generator in generators]
    assert torch.equal(*by_generator) and not torch.equal(by_generator[0], first)


@pytest.mark.interpreted
def test_parts_of_the_keys_are_joined_to_the_whole():
    query, key, value, weight = make_inputs(2, 5, 21, H=2)
    seed = _philox.draw_seed(query.device)
    mask = torch.rand(2, 2, 5, 21) > 0.3
    mask[0, 0, 0], mask[0, 0, 1, :9] = False, False
    whole = attend(query, key, value, weight, seed, mask=mask)
    parts = [
        attend(
            *(query, key[..., at, :], value[..., at, :], weight, seed),
            **{"mask": mask[..., at], "place": Place(first_key=at.start)},
        )
        for at in (slice(0, 9), slice(9, 21))
    ]
    joined = Part(*(None if t[0] is None else torch.stack(t) for t in zip(*parts, strict=True)))
    winner = joined.best.argmax(0, keepdim=True)
    lse = joined.lse.logsumexp(0)
    empty = lse == -math.inf
    context = joined.context.gather(0, winner.unsqueeze(-1).expand(1, *whole.context.shape)).squeeze(0)
    torch.testing.assert_close(context, whole.context)
    first = torch.tensor([0, 9])[winner]
    index = (joined.index.gather(0, winner) + first).squeeze(0).masked_fill(empty, -1)
    assert torch.equal(index, whole.index) and empty.sum() == 1
    shift = (joined.lse - lse).nan_to_num(-math.inf, neginf=-math.inf)
    log_prob = (joined.log_prob + shift).gather(0, winner).squeeze(0).masked_fill(empty, 0.0)
    torch.testing.assert_close(log_prob, whole.log_prob)
    p = shift.exp()
    entropy = torch.where(p > 0, p * (joined.entropy - shift), 0.0).sum(0)
    torch.testing.assert_close((entropy, lse, joined.best.amax(0)), (whole.entropy, whole.lse, whole.best))
    _, merged = merge_attention(joined.context, joined.lse)
    torch.testing.assert_close(merged, whole.lse)


@pytest.mark.interpreted
def test_a_part_of_batch_heads_and_queries_is_that_of_the_whole():
    query, key, value, weight = make_inputs(3, 6, 40, H=4)
    seed = _philox.draw_seed(query.device)
    whole = attend(query, key, value, weight, seed)
    place = Place(first_head=2 * 4 + 1, heads=4, first_query=2)
    part = attend(query[2:, 1:3, 2:5], key[2:, 1:3], value[2:, 1:3], weight[1:3], seed, place=place)
    assert torch.equal(part.index, whole.index[2:, 1:3, 2:5])


# Inside PyTorch


def differentiable(function):
    def call(*inputs):
        found = sampled(function, inputs)
        return found.context, found.log_prob, found.entropy

    return call


@FUNCTIONS
def test_derivatives_of_every_order(function):
    inputs = [t.requires_grad_() for t in make_inputs(2, 2, 4, 2, 2, H=2)]
    mask = torch.tensor([[True, False, True, True], [False] * 4])

    def call(*given):
        found = sampled(function, given, mask=mask)
        return found.context, found.log_prob, found.entropy

    assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("randomness", ["same", "different"])
@pytest.mark.parametrize("H", [None, 2])
def test_vmap(H, randomness):
    single = make_inputs(2, 9, 30, H=H)
    batched = torch.stack([single[0], single[0], -single[0]])

    def loss(query, key, value, weight):
        found = hard_additive_attention(query, key, value, weight)
        return (found.context.sin().sum() + (found.log_prob * found.entropy).sum()), found.index

    transformed = torch.vmap(torch.func.grad(loss, has_aux=True), (0, None, None, None), randomness=randomness)
    torch.manual_seed(3)
    grads, index = transformed(batched, *single[1:])
    assert torch.equal(index[0], index[1]) == (randomness == "same")
    if randomness == "same":
        for n in range(3):
            torch.manual_seed(3)
            grad, own = torch.func.grad(loss, has_aux=True)(batched[n], *single[1:])
            torch.testing.assert_close((grads[n], index[n]), (grad, own))
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(hard_additive_attention, (0, None, None, None))(batched, *single[1:])


@not_on_the_standin("compiles nothing")
def test_compiles_as_one_graph():
    inputs = [t.requires_grad_() for t in make_inputs(2, 5, 9)]

    def model(query, key, value, weight, sample):
        found = hard_additive_attention(query * 2, key, value, weight, sample=sample)
        return (found.context.sum() + found.log_prob.sin().sum() + found.entropy.sum()), found.index

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss, index = compiled(*inputs, False)
    expected, own = model(*inputs, False)
    assert torch.equal(index, own)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs))
    first, second = (compiled(*inputs, True)[1] for _ in range(2))
    assert not torch.equal(first, second)


@not_on_the_standin("exports nothing")
def test_exports():
    class Model(torch.nn.Module):
        def forward(self, query, key, value, weight):
            return tuple(hard_additive_attention(query, key, value, weight, sample=False))

    inputs = tuple(make_inputs(2, 5, 9, dtype=torch.float32))
    exported = torch.export.export(Model(), inputs).module()
    torch.testing.assert_close(exported(*inputs), Model()(*inputs))


@pytest.mark.interpreted
@pytest.mark.skipif(DEVICE == "standin", reason="has no kernels of it")
@pytest.mark.parametrize("least", [False, True])
def test_raw_ops_pass_opcheck(least):
    scores = torch.randn(*((2, 3, 9) if least else (2, 2, 3, 9)))
    mask = None if least else torch.rand(2, 2, 3, 9) > 0.3
    given = scores, mask, None if least else torch.tensor([1, 2]), *EVERYTHING
    forward, backward = (raw_op(f"hard_additive_attention_{direction}").default for direction in ("fwd", "bwd"))
    torch.library.opcheck(forward, given)
    log_prob, entropy, lse, index, _ = forward(*given)
    grads = (torch.randn_like(log_prob), None, None) if least else (None, log_prob.sin(), lse.cos())
    torch.library.opcheck(backward, (*grads, *given, entropy, lse, index, 1))


def test_autocast():
    inputs = make_inputs(dtype=torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = sampled(hard_additive_attention, inputs)
    assert found.context.dtype == torch.bfloat16 and found.log_prob.dtype == torch.float32
    torch.testing.assert_close(found, sampled(hard_additive_attention, [t.bfloat16() for t in inputs]))


@cpu_alone
def test_the_number_of_threads_changes_no_bit():
    inputs, threads, results = make_inputs(2, 64, 300, H=2, dtype=torch.float32), torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(with_gradients(differentiable(hard_additive_attention), inputs))
    finally:
        torch.set_num_threads(threads)
    for first, *others in zip(*results, strict=True):
        assert all(torch.equal(first, other) for other in others)


@FUNCTIONS
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": [1.0]}, TypeError, "query: expected a Tensor, got list"),
        (
            {"value": torch.ones(2, 6, 3).double()},
            ValueError,
            r"value: expected shape \(2, 7, Dv\), got \(2, 6, 3\)",
        ),
        ({"weight": torch.ones(4).double()}, ValueError, r"weight: expected shape \(5,\) or \(1, 5\), got \(4,\)"),
        ({"mask": torch.ones(3, 7)}, ValueError, "mask: expected a bool Tensor .*, got torch.float32"),
        ({"mask": torch.ones(3, 6) > 0}, ValueError, r"mask: expected a shape broadcastable to \(2, 3, 7\)"),
        ({"key_lengths": torch.ones(2)}, ValueError, "key_lengths: expected a Tensor of integers"),
        ({"softcap": -1.0}, ValueError, "softcap: expected a positive number or None, got -1.0"),
        ({"activation": "gelu"}, ValueError, "activation: expected one of"),
        ({"generator": 3}, ValueError, "generator: expected a torch.Generator on .* like query, or None, got int"),
        ({"backend": "gpu"}, ValueError, "backend: expected one of"),
    ],
    ids=str,
)
def test_errors(function, changes, error, message):
    given = dict(zip(NAMES, make_inputs(), strict=True))
    changes = {name: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for name, t in changes.items()}
    with pytest.raises(error, match=f"hard_additive_attention: {message}"):
        function(**(given | changes))


def test_cuda_has_no_kernels():
    with pytest.raises(UnsupportedError, match="cuda: .*hard attention has no kernels in CUDA C"):
        hard_additive_attention(*make_inputs(), backend="cuda")
