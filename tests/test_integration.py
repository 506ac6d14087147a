"""Additive attention inside PyTorch: autograd of any order, torch.func, compile, export, autocast, opcheck."""

import itertools

import pytest
import torch
from choose import TESTS
from device import DEVICE, not_on_the_standin, raw_op
from pairwise import pairwise
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from fusedattn import AdditiveAttention, BahdanauAttention, additive_attention, additive_attention_ref
from fusedattn._options import AdditiveAttentionOptions as Options
from fusedattn.ops.additive_attention import attend

INPUTS = ("query", "key", "value", "weight")
EVERYTHING = {"return_weights": True, "return_lse": True, "scale": 0.7}


def make_inputs(B=2, Tq=3, Tk=4, D=5, Dv=3, H=None, N=(), dtype=torch.float64, requires_grad=True, seed=0):
    """query, key, value and weight, with leading dimensions N."""
    torch.manual_seed(seed)
    lead = (*N, B) if H is None else (*N, B, H)
    shapes = ((*lead, Tq, D), (*lead, Tk, D), (*lead, Tk, Dv), (*N, D) if H is None else (*N, H, D))
    return [torch.randn(s, dtype=dtype, requires_grad=requires_grad) for s in shapes]


INF = torch.inf
CASES = {
    "plain": {},
    "softcap_causal": {"softcap": 2.0, "is_causal": True},
    "lengths": {"key_lengths": [4, 2]},
    "window": {"window_size": (1, 0), "window_center": [[0, 3, 5], [2, -1, 1]]},
    "sigmoid": {"activation": "sigmoid", "softcap": 2.0},
    "leaky_relu": {"activation": "leaky_relu"},
    "mask": {"mask": [[True, False, True, True], [False, True, False, False], [True] * 4]},
    "empty_row": {"mask": [[True] * 4, [False] * 4, [False, True, True, False]]},
    "bias": {"bias": [[0.5, -1.0, 2.0, -INF], [-INF] * 4, [0.0, 0.3, -0.7, 1.0]], "softcap": 2.0},
}


COMPILED = (
    "plain",
    "softcap_causal",
    "lengths",
    "mask",
    "window",
)  # each takes seconds; other numbers change no graph


def options_of(case, H=None):
    """The options of a case, its tensors made on the device under test."""
    options = {name: torch.tensor(x) if isinstance(x, list) else x for name, x in CASES[case].items()}
    if H is not None and "window_center" in options:
        options["window_center"] = options["window_center"].unsqueeze(1)
    return {name: x.double() if name == "bias" else x for name, x in options.items()}


def finite(outputs):
    return tuple(t.masked_fill(t == -torch.inf, 0.0) for t in outputs)


# Autograd


@pytest.mark.parametrize("H", [None, 2])
@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case, H):
    options = options_of(case, H)

    def function(*inputs):
        return finite(additive_attention(*inputs, **options, **EVERYTHING))

    assert torch.autograd.gradcheck(function, make_inputs(H=H))


@pytest.mark.parametrize("sizes", [{}, {"Tq": 6, "Tk": 6, "D": 2}], ids=["kept", "recomputed"])
@pytest.mark.parametrize("case", ["plain", "softcap_causal", "lengths"])
def test_gradcheck_with_and_without_kept_scores(case, sizes):
    options = options_of(case)

    def function(*inputs):
        return finite(additive_attention(*inputs, **options, **EVERYTHING))

    assert torch.autograd.gradcheck(function, make_inputs(**sizes))


@pytest.mark.machinery
@pytest.mark.parametrize("case", CASES)
def test_gradgradcheck(case):
    options = options_of(case)

    def function(*inputs):
        return finite(additive_attention(*inputs, **options, **EVERYTHING))

    assert torch.autograd.gradgradcheck(function, make_inputs(Tq=3, Tk=4, D=2, Dv=2))


@pytest.mark.machinery
@pytest.mark.parametrize("case", CASES)
def test_the_reference_passes_gradcheck_to_second_order(case):
    options = options_of(case)

    def function(*inputs):
        return finite(additive_attention_ref(*inputs, **options, **EVERYTHING))

    inputs = make_inputs(Tq=3, Tk=4, D=2, Dv=2)
    assert torch.autograd.gradcheck(function, inputs) and torch.autograd.gradgradcheck(function, inputs)


# By the dimensions that a bias of (B, H, Tq, Tk) has, or of (B, Tq, Tk).
BIASES = {"all": (2, 2, 3, 4), "queries_keys": (3, 4), "keys": (4,), "queries": (3, 1), "heads": (1, 2, 1, 1)}


def bias_of(kind, H=2, N=()):
    sizes = BIASES[kind]
    if H is None and len(sizes) == 4:
        sizes = sizes[:1] + sizes[2:]
    return torch.randn(*N, *sizes, dtype=torch.float64)


@pytest.mark.parametrize(("kind", "H"), [*zip(BIASES, itertools.cycle((2, None)), strict=False)])
def test_gradients_of_a_bias(kind, H):
    def function(bias, *inputs):
        return additive_attention(*inputs, bias=bias, softcap=2.0, **EVERYTHING)

    inputs = [bias_of(kind, H).requires_grad_(), *make_inputs(H=H, D=2, Dv=2)]
    assert torch.autograd.gradcheck(function, inputs) and torch.autograd.gradgradcheck(function, inputs)
    alone = (inputs[0], *(t.detach() for t in inputs[1:]))
    actual = torch.autograd.grad(function(*alone)[0].sin().sum(), alone[0])
    expected = torch.autograd.grad(function(*inputs)[0].sin().sum(), inputs[0])
    torch.testing.assert_close(actual, expected)


def test_third_derivative():
    def third(function):
        inputs = make_inputs(D=2)
        loss = function(*inputs).sin().sum()
        for _ in range(2):
            loss = sum(g.square().sum() for g in torch.autograd.grad(loss, inputs, create_graph=True))
        return torch.autograd.grad(loss, inputs)

    torch.testing.assert_close(third(additive_attention), third(additive_attention_ref))


def test_gradient_penalty_reaches_every_input():
    def penalty(function):
        inputs = make_inputs(dtype=torch.float32)
        (grad,) = torch.autograd.grad(function(*inputs).sum(), inputs[0], create_graph=True)
        return torch.autograd.grad(grad.norm(), inputs)

    torch.testing.assert_close(penalty(additive_attention), penalty(additive_attention_ref))


@pytest.mark.parametrize("name", INPUTS)
def test_gradient_of_one_input_alone(name):
    inputs = make_inputs(requires_grad=False)
    leaf = inputs[INPUTS.index(name)].requires_grad_()
    (actual,) = torch.autograd.grad(additive_attention(*inputs).sin().sum(), leaf)
    (expected,) = torch.autograd.grad(additive_attention_ref(*inputs).sin().sum(), leaf)
    torch.testing.assert_close(actual, expected)


def test_no_graph_without_gradients():
    inputs = make_inputs()
    with torch.no_grad():
        assert not additive_attention(*inputs).requires_grad
    with torch.inference_mode():
        assert additive_attention(*make_inputs(requires_grad=False)).is_inference()
    assert not additive_attention(*(t.detach() for t in inputs)).requires_grad


def test_checkpointing():
    inputs = make_inputs()
    expected = torch.autograd.grad(additive_attention(*inputs).sin().sum(), inputs)
    context = torch.utils.checkpoint.checkpoint(additive_attention, *inputs, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(context.sin().sum(), inputs), expected)


# torch.func


def loss(*inputs, function=additive_attention, **options):
    context, weights, _ = function(*inputs, **options, **EVERYTHING)
    return context.sin().sum() + weights.square().sum()


def reference_loss(*inputs, **options):
    return loss(*inputs, function=additive_attention_ref, **options)


ALL = (0, 1, 2, 3)


@pytest.mark.parametrize("case", CASES)
def test_func_grad(case):
    inputs = make_inputs(requires_grad=False)
    options = options_of(case)
    actual = torch.func.grad(loss, ALL)(*inputs, **options)
    torch.testing.assert_close(actual, torch.func.grad(reference_loss, ALL)(*inputs, **options))


@pytest.mark.parametrize("argument", range(4), ids=INPUTS)
def test_jacrev(argument):
    inputs = make_inputs(requires_grad=False)
    actual = torch.func.jacrev(additive_attention, argument)(*inputs)
    torch.testing.assert_close(actual, torch.func.jacrev(additive_attention_ref, argument)(*inputs))


def test_hessian():
    inputs = make_inputs(requires_grad=False)
    actual = torch.func.jacrev(torch.func.jacrev(loss, 3), 0)(*inputs)
    torch.testing.assert_close(actual, torch.func.jacrev(torch.func.jacrev(reference_loss, 3), 0)(*inputs))


DIMS = {
    "all": (0, 0, 0, 0),
    "query": (0, None, None, None),
    "keys": (None, 0, 0, None),
    "weight": (None, None, None, 0),
    "last": (-1, 1, 2, 1),
}


def moved(inputs, batched, dims):
    """Inputs as vmap wants them, and what it should compute one by one."""
    args = [t if d is None else t.movedim(0, d) for t, d in zip((inputs, batched)[1], dims, strict=True)]
    args = [i if d is None else t for i, t, d in zip(inputs, args, dims, strict=True)]
    singles = [[i if d is None else t[n] for i, t, d in zip(inputs, batched, dims, strict=True)] for n in range(4)]
    return args, singles


@pytest.mark.parametrize("H", [None, 2])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dims", DIMS)
def test_vmap(dims, case, H):
    shared, batched = (make_inputs(H=H, N=N, requires_grad=False) for N in ((), (4,)))
    args, singles = moved(shared, batched, DIMS[dims])

    options = options_of(case, H)

    def function(*inputs):
        return additive_attention(*inputs, **options, **EVERYTHING)

    actual = torch.vmap(function, in_dims=DIMS[dims])(*args)
    expected = [torch.stack(outputs) for outputs in zip(*(function(*inputs) for inputs in singles), strict=True)]
    torch.testing.assert_close(actual, tuple(expected))


@pytest.mark.parametrize("dim", [None, 0, -1])
@pytest.mark.parametrize(("kind", "H"), [*zip(BIASES, itertools.cycle((2, None)), strict=False)])
def test_vmap_with_a_bias(kind, H, dim):
    query, *inputs = make_inputs(H=H, requires_grad=False)
    queries = torch.stack([query, 2 * query, -query])
    biases, centers = bias_of(kind, H, N=(3,)), torch.randint(0, 4, (3, *query.shape[:-1]))
    lengths = torch.tensor([[4, 2], [1, 3], [0, 4]])

    def gradients(function):
        def loss(query, bias, center, lengths):
            options = {"window_size": (1, 1), "window_center": center, "key_lengths": lengths, "scale": 0.7}
            return function(query, *inputs, bias=bias, **options).sin().sum()

        return torch.func.grad(loss, (0, 1))

    bias = biases[0] if dim is None else biases.movedim(0, dim)
    mapped = torch.vmap(gradients(additive_attention), in_dims=(0, dim, 0, 0))
    actual = mapped(queries, bias, centers, lengths)
    own = [biases[0 if dim is None else n] for n in range(3)]
    expected = list(map(gradients(additive_attention_ref), queries, own, centers, lengths))
    torch.testing.assert_close(actual, tuple(torch.stack(g) for g in zip(*expected, strict=True)))


@pytest.mark.parametrize("dims", DIMS)
def test_vmap_of_grad(dims):
    shared, batched = (make_inputs(N=N, requires_grad=False) for N in ((), (4,)))
    args, singles = moved(shared, batched, DIMS[dims])
    actual = torch.vmap(torch.func.grad(loss, ALL), in_dims=DIMS[dims])(*args)
    expected = [torch.stack(g) for g in zip(*(torch.func.grad(loss, ALL)(*i) for i in singles), strict=True)]
    torch.testing.assert_close(actual, tuple(expected))


def test_grad_of_vmap():
    inputs = make_inputs(N=(4,), requires_grad=False)

    def total(function):
        return lambda *i: torch.vmap(function)(*i).sin().sum()

    actual = torch.func.grad(total(additive_attention), ALL)(*inputs)
    torch.testing.assert_close(actual, torch.func.grad(total(additive_attention_ref), ALL)(*inputs))


def test_vmap_within_vmap():
    inputs = make_inputs(N=(2, 3), requires_grad=False)
    actual = torch.vmap(torch.vmap(additive_attention))(*inputs)
    expected = torch.vmap(torch.vmap(additive_attention_ref))(*inputs)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dims", [(0, None), (None, 0), (0, 0), (1, 1)], ids=str)
@pytest.mark.parametrize("H", [None, 2])
def test_vmap_over_mask_and_lengths(dims, H):
    inputs = make_inputs(H=H, requires_grad=False)
    masks = torch.rand(5, 3, 4) > 0.4
    lengths = torch.randint(0, 5, (5, 2))

    def function(mask, key_lengths):
        return additive_attention(*inputs, mask=mask, key_lengths=key_lengths, **EVERYTHING)

    args = [t[0] if d is None else t.movedim(0, d) for t, d in zip((masks, lengths), dims, strict=True)]
    actual = torch.vmap(function, in_dims=dims)(*args)
    singles = [
        function(masks[0 if dims[0] is None else n], lengths[0 if dims[1] is None else n]) for n in range(5)
    ]
    torch.testing.assert_close(actual, tuple(torch.stack(outputs) for outputs in zip(*singles, strict=True)))


@pytest.mark.parametrize("H", [None, 2])
def test_vmap_over_centers(H):
    inputs = make_inputs(H=H, requires_grad=False)
    centers = torch.randint(-1, 5, (5, 2, 3) if H is None else (5, 2, 1, 3))

    def function(center):
        return additive_attention(*inputs, window_center=center, window_size=(0, 1), **EVERYTHING)

    expected = [torch.stack(outputs) for outputs in zip(*map(function, centers), strict=True)]
    torch.testing.assert_close(torch.vmap(function)(centers), tuple(expected))


def test_vmap_of_grad_over_lengths():
    inputs, lengths = make_inputs(requires_grad=False), torch.tensor([[4, 2], [0, 1], [3, 0]])

    def gradients(function):
        return torch.func.grad(lambda q, n: loss(q, *inputs[1:], function=function, key_lengths=n))

    actual = torch.vmap(gradients(additive_attention), in_dims=(None, 0))(inputs[0], lengths)
    expected = torch.stack([gradients(additive_attention_ref)(inputs[0], n) for n in lengths])
    torch.testing.assert_close(actual, expected)


def test_vmap_with_key_exponentials():
    query, key, value, weight = make_inputs(requires_grad=False)
    queries, key_exp, bound = torch.stack([query, 2 * query]), torch.exp(2 * key), key.abs().max()

    def function(q):
        return attend(q, key, value, weight, key_exp=key_exp, key_bound=bound)

    expected = torch.stack([additive_attention(q, key, value, weight) for q in queries])
    torch.testing.assert_close(torch.vmap(function)(queries), expected)


def test_lengths_out_of_range_are_clamped_under_transforms():
    inputs, lengths = make_inputs(requires_grad=False), torch.tensor([[-3, 9], [4, 2]])
    actual = torch.vmap(lambda n: additive_attention(*inputs, key_lengths=n))(lengths)
    expected = [additive_attention(*inputs, key_lengths=n) for n in lengths.clamp(0, 4)]
    torch.testing.assert_close(actual, torch.stack(expected))
    shared = torch.vmap(lambda q: additive_attention(q, *inputs[1:], key_lengths=lengths[0]))(
        inputs[0].unsqueeze(0)
    )
    torch.testing.assert_close(shared[0], expected[0])


def test_functional_call_of_a_module():
    module = AdditiveAttention(5, 5, 6, num_heads=2, dtype=torch.float64)
    query, key, *_ = make_inputs(requires_grad=False)
    parameters = dict(module.named_parameters())

    def total(parameters, query):
        return torch.func.functional_call(module, parameters, (query.unsqueeze(0), key[:1])).square().sum()

    per_sample = torch.vmap(torch.func.grad(total), in_dims=(None, 0))(parameters, query)
    for n in range(2):
        expected = torch.autograd.grad(total(parameters, query[n]), list(parameters.values()), allow_unused=True)
        for name, grad in zip(parameters, expected, strict=True):
            torch.testing.assert_close(per_sample[name][n], grad)


# torch.compile and torch.export


@pytest.mark.machinery
@pytest.mark.parametrize(("case", "H"), zip(CASES if TESTS == "all" else COMPILED, itertools.cycle((None, 2))))
def test_compile_without_graph_breaks(case, H, fresh_dynamo):
    options = options_of(case, H)

    def function(*inputs):
        return finite(additive_attention(*inputs, **options, **EVERYTHING))

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for seed, sizes in enumerate(({}, {"D": 9, "Dv": 6})):
        inputs = make_inputs(H=H, seed=seed, **sizes)
        actual, expected = compiled(*inputs), function(*inputs)
        torch.testing.assert_close(actual, expected)
        grads = [torch.randn_like(t) for t in expected]
        torch.testing.assert_close(
            torch.autograd.grad(actual, inputs, grads), torch.autograd.grad(expected, inputs, grads)
        )


@not_on_the_standin("Inductor makes no code for it")
def test_compile_with_inductor(fresh_dynamo):
    def function(query, key, value, weight, lengths):
        return additive_attention(query * 2, key, value, weight, key_lengths=lengths).relu()

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for Tk in (4, 7):
        inputs = make_inputs(Tk=Tk)
        lengths = torch.tensor([Tk, 2])
        actual, expected = compiled(*inputs, lengths), function(*inputs, lengths)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)
        )


def test_compile_does_not_recompile_for_every_length(fresh_dynamo):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(additive_attention, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for Tk in (7, 9, 11, 30, 100):  # none of them equal to another size
            inputs = make_inputs(Tk=Tk, Tq=Tk + 1)
            torch.testing.assert_close(compiled(*inputs), additive_attention(*inputs))
    assert len(graphs) == 1


@pytest.mark.machinery
@pytest.mark.parametrize("H", [None, 2])
def test_compile_of_transforms(H, fresh_dynamo):
    inputs = make_inputs(H=H, requires_grad=False)
    gradient = torch.func.grad(loss, ALL)
    compiled = torch.compile(lambda *i: gradient(*i), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), gradient(*inputs))
    batched = make_inputs(H=H, N=(3,), requires_grad=False)
    compiled = torch.compile(lambda *i: torch.vmap(additive_attention)(*i), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*batched), torch.vmap(additive_attention)(*batched))


@pytest.mark.machinery
@pytest.mark.parametrize("module", ["attention", "bahdanau", "projected_keys"])
def test_compile_of_modules(module, fresh_dynamo):
    torch.manual_seed(0)
    if module == "bahdanau":
        layer, inputs = BahdanauAttention(5, 6, 8), (torch.randn(2, 5), torch.randn(2, 4, 6))
        function = layer
    else:
        layer, inputs = AdditiveAttention(5, 6, 8, num_heads=2, out_dim=3, normalize=True), None
        inputs = torch.randn(2, 3, 5), torch.randn(2, 4, 6)
        function = layer if module == "attention" else lambda q, k: layer(q, layer.project_keys(k))
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.set_default_device(None)  # under one, Dynamo cannot trace Tensor.unflatten
    torch.testing.assert_close(compiled(*inputs), function(*inputs))


class Attention(torch.nn.Module):
    def __init__(self, D=5):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(D, dtype=torch.float64))

    def forward(self, query, key, value, key_lengths):
        return additive_attention(query, key, value, self.weight, key_lengths=key_lengths, return_weights=True)


TF32_SETTINGS = {
    "set_float32_matmul_precision": lambda on: torch.set_float32_matmul_precision("high" if on else "highest"),
    "allow_tf32": lambda on: setattr(torch.backends.cuda.matmul, "allow_tf32", on),
    "fp32_precision": lambda on: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32" if on else "none"),
}


@pytest.fixture(params=TF32_SETTINGS)
def set_tf32(request):
    yield TF32_SETTINGS[request.param]
    for setting in TF32_SETTINGS.values():
        setting(False)


def allows_tf32(arguments):
    """What the raw op is told; an argument that has its default is left out."""
    names = [argument.name for argument in raw_op("additive_attention_fwd").default._schema.arguments]
    return dict(zip(names, arguments, strict=False)).get("allow_tf32", False)


class RecordsTf32(TorchDispatchMode):
    """Whether the last call of the raw op was allowed TF32."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is raw_op("additive_attention_fwd").default:
            self.allowed = allows_tf32(args)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tf32_follows_the_setting_of_pytorch(set_tf32, dtype, requires_grad):
    inputs = make_inputs(dtype=dtype, requires_grad=requires_grad)
    for on in (False, True, False):
        set_tf32(on)
        with RecordsTf32() as record:
            additive_attention(*inputs)
        assert record.allowed == (on and dtype == torch.float32)


@pytest.mark.machinery
def test_tf32_follows_the_setting_when_compiled(set_tf32, fresh_dynamo):
    allowed = []

    def record(graph, inputs):
        op = raw_op("additive_attention_fwd").default
        allowed.extend(allows_tf32(node.args) for node in graph.graph.nodes if node.target is op)
        return graph

    inputs = make_inputs(dtype=torch.float32)
    compiled = torch.compile(additive_attention, fullgraph=True, backend=aot_autograd(fw_compiler=record))
    for on in (False, True, True, False):
        set_tf32(on)
        compiled(*inputs)
    assert allowed == [False, True]  # a graph for each


@pytest.mark.machinery
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, fresh_dynamo):
    module = Attention()
    *inputs, _ = make_inputs(requires_grad=False)
    B, Tq, Tk = (torch.export.Dim(name, min=2) for name in ("B", "Tq", "Tk"))
    shapes = ({0: B, 1: Tq}, {0: B, 1: Tk}, {0: B, 1: Tk}, {0: B})
    exported = torch.export.export(module, (*inputs, torch.tensor([4, 2])), dynamic_shapes=shapes, strict=strict)
    *inputs, _ = make_inputs(B=3, Tq=6, Tk=9, requires_grad=False)
    lengths = torch.tensor([9, 0, 5])
    torch.testing.assert_close(exported.module()(*inputs, lengths), module(*inputs, lengths))
    assert f"{raw_op('additive_attention_fwd')}." in exported.graph_module.print_readable(print_output=False)


# Autocast


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, backend):
    inputs = make_inputs(dtype=torch.float32)
    with torch.autocast(DEVICE, dtype):
        context, weights, lse = additive_attention(*inputs, backend=backend, return_weights=True, return_lse=True)
    assert (context.dtype, weights.dtype, lse.dtype) == (dtype, dtype, torch.float32)
    expected = additive_attention(*(t.to(dtype) for t in inputs), backend=backend)
    torch.testing.assert_close(context, expected, rtol=0, atol=0)
    grads = torch.autograd.grad(context.sum(), inputs)
    assert all(g.dtype == torch.float32 for g in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast_leaves_a_float32_bias(dtype):
    inputs, bias = make_inputs(dtype=torch.float32), torch.randn(3, 4, dtype=dtype, requires_grad=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        context = additive_attention(*inputs, bias=bias)
    used = bias if dtype == torch.float32 else bias.bfloat16()
    expected = additive_attention(*(t.bfloat16() for t in inputs), bias=used)
    torch.testing.assert_close(context, expected, rtol=0, atol=0)
    assert torch.autograd.grad(context.sum(), bias)[0].dtype == dtype


def test_autocast_of_mixed_dtypes():
    query, key, value, weight = make_inputs(dtype=torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        context = additive_attention(query.bfloat16(), key, value.half(), weight)
        assert context.dtype == torch.bfloat16
        with pytest.raises(ValueError, match="key: expected torch.bfloat16"):
            additive_attention(query, key.double(), value, weight)
        with pytest.raises(ValueError, match="query: expected a floating-point dtype"):
            additive_attention(query.long(), key, value, weight)
        doubles = [t.double() for t in (query, key, value, weight)]
        assert additive_attention(*doubles).dtype == torch.float64


# Raw operators


@pytest.mark.machinery
@pairwise(H=[1, 2], dtype=[torch.float32, torch.bfloat16], kept=[False, True])
def test_opcheck(kept, dtype, H):
    query, key, value, weight = make_inputs(H=H, dtype=dtype, requires_grad=False)
    mask = (torch.rand(3, 4) > 0.3).expand(2, H, 3, 4)
    bias = torch.randn(2, 1, 3, 1, dtype=dtype) if kept and DEVICE != "cuda" else None
    center = torch.randint(0, 4, (2, H, 3))
    options = (bias, mask, torch.tensor([4, 2]), center, None, None, None, *Options(1, 0, 0.5, 3.0, 1, 0.2))
    forward, backward = raw_op("additive_attention_fwd"), raw_op("additive_attention_bwd")
    inputs = (query, key, value, weight, *options)
    torch.library.opcheck(forward.default, (*inputs, kept, kept))
    context, lse, weights, scores = forward(*inputs, kept, kept)
    grads = (torch.randn_like(context), torch.randn_like(lse) if kept else None, torch.randn_like(weights))
    saved = (context, lse, scores)
    for output_mask in (0b11111, 0b00001, 0b01110, 0b10000):
        arguments = (*grads[:2], grads[2] if kept else None, *inputs, *saved, output_mask)
        torch.library.opcheck(backward.default, arguments)


def test_opcheck_of_the_least():
    inputs = make_inputs(H=1, requires_grad=False)
    inputs = (*inputs, *[None] * 7, *Options(-1, -1, 1.0, 0.0, 0, 0.2))
    torch.library.opcheck(raw_op("additive_attention_fwd").default, (*inputs, False, False))


def test_meta_inputs_under_fake_mode():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        inputs = make_inputs(dtype=torch.bfloat16)
        lengths = torch.ones(2, dtype=torch.int64)
        context, weights, lse = additive_attention(
            *inputs, key_lengths=lengths, return_weights=True, return_lse=True
        )
        assert context.shape == (2, 3, 3) and weights.shape == (2, 3, 4) and lse.dtype == torch.float32
        assert [g.shape for g in torch.autograd.grad(context.sum(), inputs)] == [t.shape for t in inputs]
