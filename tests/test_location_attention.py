"""location_attention against plain compositions of PyTorch's functions, within tests/tolerance.py."""

import pytest
import torch
import torch.nn.functional as F
from device import BACKEND, DEVICE, INTERPRETED, cpu_alone, not_on_the_standin, raw_op
from pairwise import pairwise
from tolerance import assert_close_to_reference

from fusedattn import UnsupportedError, location_attention, location_attention_ref
from fusedattn.ops.location_attention import prepared

pytestmark = [
    pytest.mark.levels,
    pytest.mark.filterwarnings("ignore:fusedattn. no kernel of location_attention can run:UserWarning"),
]
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NAMES = ("query", "key", "value", "weight", "previous", "conv_weight", "location_weight")
FUNCTIONS = pytest.mark.parametrize("function", [location_attention, location_attention_ref])
TWO_STEPS, FOLDED = 2, 40  # filters: few are projected, many are folded with their projection


def make_inputs(B=2, Tk=9, D=5, Dv=3, C=2, N=TWO_STEPS, K=3, dtype=torch.float64, spread=1.0):
    torch.manual_seed(0)
    shapes = ((B, D), (B, Tk, D), (B, Tk, Dv), (D,), (B, C, Tk), (N, C, K), (D, N))
    drawn = [spread * torch.randn(s, dtype=torch.float64) for s in shapes]
    drawn[4] = drawn[4].softmax(-1)
    return [t.to(dtype) for t in drawn]


ACTIVATIONS = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "leaky_relu": lambda z: F.leaky_relu(z, 0.2),
}


def plain(query, key, value, weight, previous, conv_weight, location_weight, visible=None, **options):
    """The formula, place by place: no convolution."""
    scale, softcap = options.get("scale", 1.0), options.get("softcap")
    K, Tk = conv_weight.shape[2], key.shape[1]
    padded = F.pad(previous, ((K - 1) // 2,) * 2)
    windows = torch.stack([padded[:, :, j : j + K] for j in range(Tk)], 1)  # (B, Tk, C, K)
    features = (windows.flatten(2) @ conv_weight.flatten(1).T) @ location_weight.T
    z = query[:, None] + key + features
    scores = (ACTIVATIONS[options.get("activation", "tanh")](z) @ weight) * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    if visible is not None:
        value = torch.where(visible[..., None], value, 0.0)
        scores = scores.masked_fill(~visible, -torch.inf)
    weights = scores.softmax(-1)
    if options.get("normalizer") == "sigmoid":
        weights = torch.sigmoid(scores) / torch.sigmoid(scores).sum(-1, keepdim=True)
    if visible is not None:
        weights = torch.where(visible.any(-1, keepdim=True), weights, 0.0)
    return (weights[:, None] @ value).squeeze(1), weights


def run(function, inputs, **options):
    """Outputs and the gradients of all inputs."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    outputs = function(*leaves, **options)
    generator = torch.Generator().manual_seed(1)
    grads = [
        torch.randn(t.shape, generator=generator, dtype=torch.float64, device="cpu").to(t.device, t.dtype)
        for t in outputs
    ]
    return *outputs, *torch.autograd.grad(outputs, leaves, grads)


def check(inputs, hidden=None, function=location_attention, **options):
    """``hidden``: what hides keys, as arguments and as bool (B, Tk), True where visible."""
    arguments, visible = hidden or ({}, None)
    found = run(function, inputs, **arguments, **options)
    eager = run(plain, inputs, visible=visible, **options)
    exact = run(plain, [t.double() for t in inputs], visible=visible, **options)
    B, Tk = inputs[1].shape[:2]
    scale = max(t.abs().max().item() for t in (*inputs, *exact))
    for name, *of in zip(("context", "weights", *NAMES), found, eager, exact, strict=True):
        terms = Tk * (B if name in (NAMES[3], *NAMES[5:]) else 1)
        assert_close_to_reference(*of, terms=terms, name=name, scale=scale)


def hiding(kind, B, Tk):
    if kind is None:
        return None
    lengths = torch.tensor([max(Tk - 3 * b, 1) for b in range(B)])
    visible = torch.arange(Tk) < lengths[:, None]
    if kind == "lengths":
        return {"key_lengths": lengths}, visible
    scattered = visible & (torch.rand(B, Tk) < 0.7)
    scattered[:, 0] = True
    return {"mask": scattered}, scattered


@pytest.mark.interpreted
@pairwise(
    shape=[
        *[(2, 9, 5, 3), (2, 70, 32, 40), (3, 1, 1, 1)],
        *[(1, 300, 33, 16), (131, 2, 3, 2)] * (not INTERPRETED),
    ],
    dtype=DTYPES,
    filters=[(1, TWO_STEPS, 1), (2, TWO_STEPS, 5), (2, FOLDED, 3), (1 if BACKEND == "triton" else 3, 17, 31)],
    activation=list(ACTIVATIONS),
    softcap=[None, 2.0],
    normalizer=["softmax", "sigmoid"],
    hides=[None, "lengths", "mask"],
)
def test_values_and_gradients(shape, dtype, filters, activation, softcap, normalizer, hides):
    C, N, K = filters
    inputs = make_inputs(*shape, C, N, K, dtype)
    options = {"activation": activation, "softcap": softcap, "normalizer": normalizer, "scale": 0.7}
    check(inputs, hiding(hides, *shape[:2]), **options)


@pytest.mark.interpreted
@FUNCTIONS
@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid"])
def test_what_is_hidden_does_not_matter(function, normalizer):
    inputs = make_inputs(3, 70, 5, 4)
    mask = torch.rand(3, 70) < 0.5
    mask[1] = False
    mask[2, 40:] = False
    clean = run(function, inputs, mask=mask, normalizer=normalizer)
    for t in inputs[1:3]:
        t[~mask] = torch.nan
        t[2, 50] = torch.inf
    found = run(function, inputs, mask=mask, normalizer=normalizer)
    torch.testing.assert_close(found, clean, rtol=0, atol=0)
    context, weights, query, key, value, *others = found
    assert all(t.isfinite().all() for t in found)
    assert not any(t[1].any() for t in (context, weights, query, key, value, others[1]))
    assert not key[~mask].any() and not value[~mask].any() and not weights[~mask].any()


@pytest.mark.interpreted
@pytest.mark.machinery
@FUNCTIONS
@pytest.mark.parametrize("N", [TWO_STEPS, FOLDED])
def test_a_loop_has_the_gradients_of_all_its_steps(function, N):
    """Each step convolves the weights of the one before and their sum over all."""
    query, *shared = make_inputs(2, 40, 6, 4, N=N, K=5)
    queries = torch.randn(6, *query.shape, dtype=query.dtype)
    mask = torch.arange(40) < torch.tensor([[40], [23]])

    def loop(attention, queries, *given):
        key, value, weight, _, conv_weight, location_weight = given
        weights = total = torch.zeros(key.shape[:2], dtype=key.dtype)
        contexts = []
        for query in queries:
            previous = torch.stack([weights, total], 1)
            inputs = (query + sum(contexts).sum(-1, keepdim=True) if contexts else query, key, value, weight)
            context, weights = attention(*inputs, previous, conv_weight, location_weight, mask)
            total = total + weights
            contexts.append(context)
        return torch.stack(contexts), total

    def ours(*given):
        return function(*given[:-1], mask=given[-1])

    used = [n for n in range(7) if n != 4]
    leaves = [t.requires_grad_() for t in (queries, *shared)]
    found, expected = loop(ours, *leaves), loop(plain, *leaves)
    torch.testing.assert_close(found, expected)
    grads = [torch.randn_like(t) for t in found]
    wanted = [leaves[n] for n in used]
    torch.testing.assert_close(
        torch.autograd.grad(found, wanted, grads), torch.autograd.grad(expected, wanted, grads)
    )


@pytest.mark.interpreted
def test_strided_expanded_and_mixed_inputs():
    query, key, value, weight, *others = make_inputs(3, 20, 8, 6, N=4, dtype=torch.float32)
    wide = torch.cat([key, value], -1)
    given = [query.T.contiguous().T, wide[..., :8], value.mT.contiguous().mT, weight.repeat(2)[::2], *others]
    check(given)
    shared = [query, key[:1], value[:1], weight, *others]
    found = run(location_attention, shared)
    expected = run(plain, shared)
    torch.testing.assert_close(found, expected)
    half = [t.bfloat16() for t in (query, key, value)] + [weight, *others]
    context, weights = location_attention(*half)
    exact = plain(*(t.double() for t in half))
    assert context.dtype is weights.dtype is torch.bfloat16
    torch.testing.assert_close((context.double(), weights.double()), exact, rtol=2**-8, atol=2**-9)


@pytest.mark.interpreted
@pytest.mark.parametrize("spread", [30.0, 1e18])
def test_huge_magnitudes(spread):
    query, *inputs = make_inputs(2, 40, 6, 3, dtype=torch.float32)
    check([spread * query, inputs[0] * 30, *inputs[1:]])
    key, value, weight, *others = inputs
    check([query, key, value, 1e4 * weight, *others])


@pytest.mark.interpreted
@FUNCTIONS
def test_no_keys_and_no_batch(function):
    for B, Tk in ((2, 0), (0, 4)):
        inputs = make_inputs(B, Tk)
        context, weights, *grads = run(function, inputs)
        assert context.shape == (B, 3) and weights.shape == (B, Tk) and not context.any()
        assert [g.shape for g in grads] == [t.shape for t in inputs] and not any(g.any() for g in grads)


def test_a_callable_normalizer():
    inputs, mask = make_inputs(), torch.rand(2, 9) < 0.6
    check(inputs, ({"mask": mask}, mask), normalizer="softmax")
    found = run(location_attention, inputs, mask=mask, normalizer=lambda e: e.softmax(-1))
    torch.testing.assert_close(found, run(location_attention, inputs, mask=mask))


@pytest.mark.parametrize("dims", [(0, 1, None, None, 0, None, None), (None, 0, 0, 0, 1, 0, 0)], ids=str)
def test_vmap_of_grad(dims):
    single = make_inputs(2, 6, 4, 3)
    batched = [torch.stack([t, 0.5 * t, -t]) for t in single]
    given = [t if d is None else b.movedim(0, d) for t, b, d in zip(single, batched, dims, strict=True)]
    mask = torch.arange(6) < torch.tensor([[6], [4]])

    def loss(function):
        def of(*inputs):
            context, weights = function(*inputs, mask=mask)
            return context.sin().sum() + weights.square().sum()

        return torch.vmap(torch.func.grad(of, tuple(range(7))), in_dims=dims)

    each = []
    for n in range(3):
        one = [t if d is None else t.select(d, n) for t, d in zip(given, dims, strict=True)]
        leaves = [t.clone().requires_grad_() for t in one]
        context, weights = plain(*leaves, visible=mask)
        each.append(torch.autograd.grad(context.sin().sum() + weights.square().sum(), leaves))
    torch.testing.assert_close(loss(location_attention)(*given), tuple(map(torch.stack, zip(*each, strict=True))))


@pytest.mark.interpreted
@pytest.mark.machinery
@pytest.mark.skipif(DEVICE == "standin", reason="has no kernels of it")
@pytest.mark.parametrize("least", [False, True])
def test_raw_ops_pass_opcheck(least):
    query, key, value, weight, previous, conv_weight, location_weight = make_inputs(dtype=torch.float32)
    if least:
        value, location_weight, conv_weight = None, None, torch.randn(5, 2, 3)
    else:
        location_weight = location_weight[None]
    mask = None if least else torch.rand(2, 1, 9) < 0.7
    given = (query[:, None], key, value, weight[None], previous[:, None], conv_weight[None], location_weight, mask)
    given += (0.5, 2.0, 0, 0.2)
    forward, backward = (raw_op(f"location_attention_{direction}").default for direction in ("fwd", "bwd"))
    torch.library.opcheck(forward, given)
    context, weights, scores, lse = forward(*given)
    grads = (None, None) if least else (torch.randn_like(context), torch.randn_like(weights))
    for output_mask in (0b0111011, 0b0010001) if least else (0b1111111, 0b0010001, 0b1101110):
        arguments = (*grads, torch.randn_like(scores), *given, scores, lse, output_mask)
        torch.library.opcheck(
            backward,
            arguments,
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


@pytest.mark.skipif(BACKEND == "triton" or DEVICE != "cpu", reason="is the CPU's")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("N", [TWO_STEPS, FOLDED])
def test_a_step_adds_to_the_gradient_of_the_keys(dtype, N):
    query, key, value, weight, previous, *parameters = make_inputs(2, 50, 6, 4, N=N, K=5, dtype=torch.float32)
    weight, filters, projection = prepared(weight, *parameters, torch.float32)
    mask = (torch.arange(50) < torch.tensor([[50], [33]]))[:, None]
    given = (*(t.to(dtype) for t in (query[:, None], key, value)), weight, previous[:, None], filters, projection)
    given += (mask, 0.5, 0.0, 0, 0.2)
    context, weights, scores, lse = raw_op("location_attention_fwd")(*given)
    arguments = (torch.randn_like(context), torch.randn_like(weights), None, *given, scores, lse)
    expected = raw_op("location_attention_bwd")(*arguments, 0b1111111)
    total = torch.ones(key.shape)
    found = raw_op("location_attention_step_bwd")(*arguments, total, 0b1111101)
    torch.testing.assert_close((total - 1).to(dtype), expected[1], rtol=0.01, atol=1e-5)
    assert found[1].numel() == 0 and all(torch.equal(found[n], expected[n]) for n in (0, 2, 3, 4, 5, 6))
    with pytest.raises(RuntimeError, match="key_sum"):
        raw_op("location_attention_step_bwd")(*arguments, total[:1], 0b1111101)


@not_on_the_standin("compiles nothing")
def test_compiles_as_one_graph():
    inputs = make_inputs(2, 12, 4, 3, dtype=torch.float32)
    lengths = torch.tensor([12, 5])

    def step(*given):
        return location_attention(*given, key_lengths=lengths, softcap=3.0)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, inputs), run(step, inputs))


def test_autocast():
    inputs = make_inputs(dtype=torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        context, weights = location_attention(*inputs)
    assert context.dtype is weights.dtype is torch.bfloat16
    expected = location_attention(*(t.bfloat16() for t in inputs[:3]), *inputs[3:])
    torch.testing.assert_close((context, weights), expected, rtol=0, atol=0)


@cpu_alone
def test_the_number_of_threads_changes_no_bit():
    inputs = make_inputs(3, 700, 20, 12, K=5, dtype=torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(run(location_attention, inputs))
    finally:
        torch.set_num_threads(threads)
    for first, *others in zip(*results, strict=True):
        assert all(torch.equal(first, other) for other in others)


@cpu_alone
@FUNCTIONS
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"previous": [1.0]}, TypeError, "previous: expected a Tensor, got list"),
        ({"query": torch.ones(2, 1, 5)}, ValueError, r"query: expected shape \(B, D\), got \(2, 1, 5\)"),
        ({"key": torch.ones(2, 9, 4)}, ValueError, r"key: expected shape \(2, Tk, 5\), got \(2, 9, 4\)"),
        ({"weight": torch.ones(1, 5)}, ValueError, r"weight: expected shape \(5,\), got \(1, 5\)"),
        ({"previous": torch.ones(2, 9)}, ValueError, r"previous: expected shape \(2, C, 9\), got \(2, 9\)"),
        ({"previous": torch.ones(2, 2, 9).half()}, ValueError, "previous: expected torch.float32 on cpu"),
        (
            {"conv_weight": torch.ones(2, 2, 4)},
            ValueError,
            r"conv_weight: expected shape \(F, 2, K\) with an odd K",
        ),
        ({"location_weight": torch.ones(5, 3)}, ValueError, r"location_weight: expected shape \(5, 2\)"),
        ({"mask": torch.ones(2, 9)}, ValueError, "mask: expected a bool Tensor"),
        ({"mask": torch.ones(3, 9).bool()}, ValueError, r"mask: expected a shape broadcastable to \(2, 9\)"),
        ({"key_lengths": torch.tensor([9, 10])}, ValueError, r"key_lengths: expected values in \[0, 9\]"),
        ({"normalizer": "hardmax"}, ValueError, "normalizer: expected one of"),
        ({"softcap": 0.0}, ValueError, "softcap: expected a positive number"),
    ],
)
def test_errors(function, changes, error, message):
    given = dict(zip(NAMES, make_inputs(dtype=torch.float32), strict=True))
    with pytest.raises(error, match=f"location_attention: {message}"):
        function(**(given | changes))


@pytest.mark.interpreted
def test_what_kernels_do_not_take_is_named():
    wide = make_inputs(D=90, N=33, K=101)
    for backend, inputs, reason in (
        ("cuda", wide, "it has no kernels of location_attention"),
        ("triton", wide, r"its kernels take at most 32 filters: conv_weight is \(33, 2, 101\)"),
        ("triton", make_inputs(N=5, K=17), "its kernels take at most 32 taps, of filters folded"),
    ):
        with pytest.raises(UnsupportedError, match=f"{backend}: .*{reason}"):
            location_attention(*inputs, backend=backend)
