"""attention_pool against plain compositions of PyTorch's functions, within tests/tolerance.py."""

import pytest
import torch
from device import DEVICE, not_on_the_standin, raw_op
from pairwise import pairwise
from test_film import numbers
from tolerance import assert_close_to_reference

from fusedattn import GatedAttentionPool, UnsupportedError, attention_pool, attention_pool_ref

pytestmark = [
    pytest.mark.levels,
    pytest.mark.filterwarnings("ignore:fusedattn. no kernel of attention_pool can run:UserWarning"),
]
HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, torch.float64, *HALF)
NAMES = ("hidden", "value", "weight", "gate")
FUNCTIONS = pytest.mark.parametrize("function", [attention_pool, attention_pool_ref])


def make_inputs(B=2, T=7, D=5, Dv=3, K=None, gated=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return numbers(shape, generator).to(dtype)

    weight = normal(D) if K is None else normal(K, D)
    return normal(B, T, D), normal(B, T, Dv), weight, normal(B, T, D) if gated else None


def plain(hidden, value, weight, gate, lengths=None):
    """context, scores and weights, bag by bag."""
    features = torch.tanh(hidden) if gate is None else torch.tanh(hidden) * torch.sigmoid(gate)
    scores = features @ weight.mT if weight.dim() == 2 else (features @ weight)[..., None]
    scores = scores.mT
    found = []
    for b in range(hidden.shape[0]):
        n = hidden.shape[1] if lengths is None else int(lengths[b])
        rest = hidden.shape[1] - n
        weights = scores[b, :, :n].softmax(-1)
        padded = torch.nn.functional.pad
        bag = (
            weights @ value[b, :n],
            padded(scores[b, :, :n], (0, rest), value=-torch.inf),
            padded(weights, (0, rest)),
        )
        found.append(bag)
    results = [torch.stack(t) for t in zip(*found, strict=True)]
    return results if weight.dim() == 2 else [t.squeeze(1) for t in results]


def ours(hidden, value, weight, gate, lengths=None, function=attention_pool):
    return function(hidden, value, weight, gate, lengths=lengths, return_scores=True, return_weights=True)


def run(function, inputs, dtype, lengths):
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in inputs]
    outputs = function(*leaves, lengths)
    generator = torch.Generator().manual_seed(1)
    grads = [numbers(t.shape, generator) for t in outputs]
    grads = [
        g.masked_fill(t == -torch.inf, 0.0).to(inputs[0].dtype).to(t.dtype)
        for g, t in zip(grads, outputs, strict=True)
    ]
    return *outputs, *torch.autograd.grad(outputs, [t for t in leaves if t is not None], grads)


def check(inputs, lengths=None, function=attention_pool):
    dtype = inputs[0].dtype
    kernel = lambda *given: ours(*given, function=function)  # noqa: E731
    of = run(kernel, inputs, dtype, lengths), run(plain, inputs, dtype, lengths)
    exact = run(plain, inputs, torch.float64, lengths)
    names = ["context", "scores", "weights", *(n for n, t in zip(NAMES, inputs, strict=True) if t is not None)]
    (B, T, D), Dv = inputs[0].shape, inputs[1].shape[-1]
    for name, actual, eager, right in zip(names, *of, exact, strict=True):
        visible = right != -torch.inf
        assert torch.equal(visible, actual != -torch.inf), name
        of_all = (t.masked_fill(~visible, 0.0) for t in (actual, eager, right))
        terms = B * T * D if name == "weight" else max(D, T, Dv)
        assert_close_to_reference(*of_all, terms=terms, name=name, scale=30.0)


@pytest.mark.interpreted
@pairwise(
    shape=[(2, 7, 5, 3), (1, 40, 33, 16), (3, 1, 1, 1), (2, 300, 16, 70)],
    dtype=DTYPES,
    K=[None, 1, 3],
    gated=[True, False],
    ragged=[True, False],
)
def test_values_and_gradients(shape, dtype, K, gated, ragged):
    inputs = make_inputs(*shape, K=K, gated=gated, dtype=dtype)
    B, T = shape[:2]
    lengths = torch.tensor([max(T - 2 * b, 1) for b in range(B)]) if ragged else None
    check(inputs, lengths)


@pytest.mark.interpreted
def test_strided_inputs():
    hidden, value, weight, gate = make_inputs(2, 9, 8, 6, dtype=torch.float32)
    both = torch.cat([hidden, gate], -1)
    given = both[..., :8], value.transpose(1, 2).contiguous().transpose(1, 2), weight.repeat(2)[::2], both[..., 8:]
    check(given)


@pytest.mark.interpreted
@FUNCTIONS
def test_what_is_past_the_length_does_not_matter(function):
    inputs = make_inputs(3, 6, 4, 5, K=2)
    lengths = torch.tensor([4, 0, 6])
    clean = run(lambda *given: ours(*given, function=function), inputs, torch.float64, lengths)
    poisoned = [t.clone() if t.dim() == 3 else t for t in inputs]
    for t in poisoned:
        if t.dim() == 3:
            t[0, 4:], t[1] = torch.nan, torch.inf
    found = run(lambda *given: ours(*given, function=function), poisoned, torch.float64, lengths)
    torch.testing.assert_close(found, clean)
    context, scores, weights, *grads = found
    assert not context[1].any() and not weights[1].any() and (scores[1] == -torch.inf).all()
    assert all(torch.isfinite(g).all() for g in grads)
    assert not grads[0][1].any() and not grads[0][0, 4:].any()


@pytest.mark.interpreted
@FUNCTIONS
def test_scores_alone(function):
    hidden, value, weight, gate = make_inputs(2, 7, 5, 3)
    leaves = [t.requires_grad_() for t in (hidden, weight, gate)]
    scores = function(hidden, None, weight, gate)
    expected = (torch.tanh(hidden) * torch.sigmoid(gate)) @ weight
    torch.testing.assert_close(scores, expected)
    grad = torch.randn_like(scores)
    torch.testing.assert_close(
        torch.autograd.grad(scores, leaves, grad), torch.autograd.grad(expected, leaves, grad)
    )


@pytest.mark.interpreted
def test_huge_scores_and_no_instances():
    hidden, value, weight, gate = make_inputs(2, 50, 4, 3, dtype=torch.float32)
    check((40 * hidden, value, 1e4 * weight, gate))
    empty = attention_pool(hidden[:, :0], value[:, :0], weight, gate[:, :0])
    assert torch.equal(empty, torch.zeros(2, 3))


def test_derivatives_of_every_order():
    inputs = [t.requires_grad_() for t in make_inputs(2, 4, 3, 2, K=2)]
    lengths = torch.tensor([4, 2])

    def function(*given):
        context, _, weights = ours(*given, lengths)
        return context, weights

    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dims", [(0, 0, 0, 0), (None, None, 0, None), (0, None, None, 1)], ids=str)
def test_vmap_of_grad(dims):
    single, batched = (
        make_inputs(2, 4, 3, 2, K=2),
        [torch.stack([t, 2 * t, -t]) for t in make_inputs(2, 4, 3, 2, K=2)],
    )
    args = [t if d is None else b.movedim(0, d) for t, b, d in zip(single, batched, dims, strict=True)]
    found = []
    for function in (attention_pool, attention_pool_ref):

        def loss(*given, function=function):
            context, scores, weights = ours(*given, function=function)
            return context.sin().sum() + (scores * weights).sum()

        found.append(torch.vmap(torch.func.grad(loss, (0, 1, 2, 3)), in_dims=dims)(*args))
    torch.testing.assert_close(*found)


@not_on_the_standin("compiles nothing")
def test_compiles_as_one_graph_and_exports():
    inputs, lengths = make_inputs(2, 6, 4, 3, dtype=torch.float32), torch.tensor([6, 3])
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs, lengths), ours(*inputs, lengths))
    module = GatedAttentionPool(4, 3)
    exported = torch.export.export(module, (inputs[0],)).module()
    torch.testing.assert_close(exported(inputs[0]), module(inputs[0]))


@pytest.mark.machinery
@pytest.mark.interpreted
@pytest.mark.skipif(DEVICE == "standin", reason="has no kernels of it")
@pytest.mark.parametrize("least", [False, True])
def test_raw_ops_pass_opcheck(least):
    hidden, value, weight, gate = make_inputs(2, 6, 4, 3, K=2, dtype=torch.float32)
    given = (
        (hidden, None, None, weight[None], None)
        if least
        else (hidden, gate, value, weight[None], torch.tensor([6, 2]))
    )
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    forward, backward = (raw_op(f"attention_pool_{direction}").default for direction in ("fwd", "bwd"))
    torch.library.opcheck(forward, given, test_utils=utils)
    context, lse, scores = forward(*given)
    grads = None if least else torch.randn_like(context), None, torch.randn_like(scores)
    for mask in (0b1111, 0b0010):
        torch.library.opcheck(backward, (*grads, *given, context, lse, scores, mask), test_utils=utils)


@not_on_the_standin("threads are the CPU's")
def test_the_number_of_threads_changes_no_bit():
    inputs = make_inputs(2, 3000, 20, 12, K=2, dtype=torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(run(ours, inputs, torch.float32, None))
    finally:
        torch.set_num_threads(threads)
    for first, *others in zip(*results, strict=True):
        assert all(torch.equal(first, other) for other in others)


def test_the_module_is_the_formula():
    torch.manual_seed(0)
    x, lengths = torch.randn(2, 5, 4), torch.tensor([5, 2])
    for heads, gated in ((None, True), (3, False)):
        module = GatedAttentionPool(4, 6, heads, gated=gated)
        gate = module.gate_proj(x) if gated else None
        expected = plain(module.hidden_proj(x), x, module.weight, gate, lengths)
        z, weights = module(x, lengths=lengths, return_weights=True)
        torch.testing.assert_close([z, weights], [expected[0], expected[2]])
    with pytest.raises(ValueError, match="GatedAttentionPool: backend"):
        GatedAttentionPool(4, 6, backend="gpu")


@FUNCTIONS
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": [1.0]}, TypeError, "hidden: expected a Tensor, got list"),
        ({"hidden": torch.ones(2, 5)}, ValueError, r"hidden: expected shape \(B, T, D\), got \(2, 5\)"),
        ({"value": torch.ones(2, 6, 3)}, ValueError, r"value: expected shape \(2, 7, Dv\), got \(2, 6, 3\)"),
        ({"gate": torch.ones(2, 7, 4)}, ValueError, r"gate: expected shape \(2, 7, 5\) like hidden"),
        ({"weight": torch.ones(4)}, ValueError, r"weight: expected shape \(5,\) or \(K, 5\), got \(4,\)"),
        ({"weight": torch.ones(5).half()}, ValueError, "weight: expected torch.float32, got torch.float16"),
        ({"lengths": torch.ones(2)}, ValueError, "lengths: expected integers, got torch.float32"),
        ({"lengths": torch.ones(3).long()}, ValueError, r"lengths: expected shape \(2,\), got \(3,\)"),
        ({"value": None, "return_weights": True}, ValueError, "return_weights: expected False without value"),
    ],
)
def test_errors(function, changes, error, message):
    given = dict(zip(NAMES, make_inputs(2, 7, 5, 3, dtype=torch.float32), strict=True))
    changes = {name: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for name, t in changes.items()}
    with pytest.raises(error, match=f"attention_pool: {message}"):
        function(**(given | changes))


def test_cuda_has_no_kernels():
    with pytest.raises(UnsupportedError, match="cuda: .*it has no kernels of attention_pool"):
        attention_pool(*make_inputs(), backend="cuda")
