"""Inputs of additive attention that are refused, how errors name them, a weight wider than the others, and
exponentials of keys at hand."""

import math

import pytest
import torch
from device import BACKEND, DEVICE, INTERPRETED, cpu_alone, not_on_the_standin, raw_op
from pairwise import in_dtypes, pairwise
from test_additive_attention import INPUTS, check, make_inputs, shape

from fusedattn import AdditiveAttention, additive_attention, additive_attention_ref
from fusedattn._options import AdditiveAttentionOptions as Options
from fusedattn.ops.additive_attention import attend


def tensor(*shape, dtype=torch.float32, device=None):
    """Makes a tensor later, inside the test: on the device under test."""
    return lambda: torch.ones(shape, dtype=dtype, device=device)


# Which argument is wrong, with what, and what is said of it.
BAD_INPUTS = {
    "query_list": ("query", [[1.0]], TypeError, "query: expected a Tensor, got list"),
    "weight_none": ("weight", None, TypeError, "weight: expected a Tensor, got NoneType"),
    "query_rank": ("query", tensor(3, 4), ValueError, r"query: expected shape .*got \(3, 4\)"),
    "query_rank5": ("query", tensor(1, 1, 1, 3, 4), ValueError, "query: expected shape"),
    "query_integers": ("query", tensor(2, 3, 4, dtype=torch.int64), ValueError, "query: expected a floating"),
    "query_complex": ("query", tensor(2, 3, 4, dtype=torch.complex64), ValueError, "query: expected a float"),
    "key_rank": ("key", tensor(5, 4), ValueError, r"key: expected shape \(2, Tk, 4\), got \(5, 4\)"),
    "key_batch": ("key", tensor(3, 5, 4), ValueError, r"key: expected shape \(2, Tk, 4\)"),
    "key_width": ("key", tensor(2, 5, 3), ValueError, r"key: expected shape \(2, Tk, 4\)"),
    "key_dtype": (
        "key",
        tensor(2, 5, 4, dtype=torch.float64),
        ValueError,
        f"key: expected torch.float32 on {DEVICE}.* like query",
    ),
    "value_keys": ("value", tensor(2, 6, 6), ValueError, r"value: expected shape \(2, 5, Dv\)"),
    "value_rank": ("value", tensor(2, 5), ValueError, r"value: expected shape \(2, 5, Dv\)"),
    "value_device": ("value", tensor(2, 5, 6, device="meta"), ValueError, f"value: expected .* on {DEVICE}"),
    "weight_width": ("weight", tensor(5), ValueError, r"weight: expected shape \(4,\) or \(1, 4\), got \(5,\)"),
    "weight_heads": ("weight", tensor(2, 4), ValueError, r"weight: expected shape \(4,\) or \(1, 4\)"),
    "weight_dtype": (
        "weight",
        tensor(4, dtype=torch.float64),
        ValueError,
        f"weight: expected torch.float32 on {DEVICE}.* like query, got torch.float64",
    ),
    "weight_scalar": ("weight", tensor(), ValueError, "weight: expected shape"),
    "mask_float": ("mask", tensor(3, 5), ValueError, "mask: expected a bool Tensor .*got torch.float32"),
    "mask_list": ("mask", [True], ValueError, "mask: expected a bool Tensor .*got list"),
    "mask_shape": (
        "mask",
        tensor(3, 4, dtype=torch.bool),
        ValueError,
        r"mask: expected a shape broadcastable to \(2, 3, 5\), got \(3, 4\)",
    ),
    "mask_rank": (
        "mask",
        tensor(1, 2, 3, 5, dtype=torch.bool),
        ValueError,
        "mask: expected a shape broadcastable",
    ),
    "bias_bool": (
        "bias",
        tensor(3, 5, dtype=torch.bool),
        ValueError,
        r"bias: expected a Tensor of torch.float32, got torch.bool \(what is True .* is mask\)",
    ),
    "bias_integers": (
        "bias",
        tensor(3, 5, dtype=torch.int64),
        ValueError,
        "bias: expected a Tensor of torch.float32, got torch.int64",
    ),
    "bias_dtype": ("bias", tensor(3, 5, dtype=torch.float64), ValueError, "bias: .*float32, got torch.float64"),
    "bias_number": ("bias", 1.0, ValueError, "bias: expected a Tensor of torch.float32, got float"),
    "bias_shape": (
        "bias",
        tensor(3, 4),
        ValueError,
        r"bias: expected a shape broadcastable to \(2, 3, 5\), got \(3, 4\)",
    ),
    "bias_rank": ("bias", tensor(1, 2, 3, 5), ValueError, "bias: expected a shape broadcastable"),
    "bias_device": ("bias", tensor(3, 5, device="meta"), ValueError, f"bias: expected a Tensor on {DEVICE}"),
    "mask_device": ("mask", tensor(3, 5, dtype=torch.bool, device="meta"), ValueError, "mask: expected"),
    "lengths_shape": (
        "key_lengths",
        tensor(1, dtype=torch.int64),
        ValueError,
        r"key_lengths: expected shape \(2,\)",
    ),
    "lengths_rank": (
        "key_lengths",
        tensor(2, 1, dtype=torch.int64),
        ValueError,
        r"key_lengths: expected shape \(2,\)",
    ),
    "lengths_float": ("key_lengths", tensor(2), ValueError, "key_lengths: expected a Tensor of integers"),
    "lengths_bool": (
        "key_lengths",
        tensor(2, dtype=torch.bool),
        ValueError,
        "key_lengths: expected a Tensor of integers",
    ),
    "lengths_list": ("key_lengths", [1, 2], ValueError, "key_lengths: .*got list"),
    "scale_tensor": ("scale", tensor(), ValueError, "scale: expected a number, got a Tensor"),
    "softcap_zero": ("softcap", 0.0, ValueError, "softcap: expected a positive number or None, got 0.0"),
    "softcap_negative": ("softcap", -1.0, ValueError, "softcap: expected a positive number"),
    "softcap_nan": ("softcap", math.nan, ValueError, "softcap: expected a positive number"),
    "activation": ("activation", "gelu", ValueError, "activation: expected one of .* got 'gelu'"),
    "normalizer": ("normalizer", "sparsemax", ValueError, "normalizer: expected one of .*got 'sparsemax'"),
    "normalizer_none": ("normalizer", None, ValueError, "normalizer: expected one of 'softmax', .*got None"),
    "normalizer_shape": (
        "normalizer",
        lambda: lambda scores: scores[0],
        ValueError,
        r"normalizer: expected one that returns weights of shape \(2, 3, 5\), got \(3, 5\)",
    ),
    "dropout_negative": ("dropout_p", -0.1, ValueError, r"dropout_p: expected a number in \[0, 1\), got -0.1"),
    "dropout_of_all": ("dropout_p", 1.0, ValueError, "dropout_p: expected"),
    "dropout_nan": ("dropout_p", math.nan, ValueError, "dropout_p: expected"),
    "dropout_tensor": ("dropout_p", tensor(), ValueError, "dropout_p: expected a number .* got a Tensor"),
    "generator": ("generator", 7, ValueError, "generator: expected a torch.Generator on .* got int"),
    "backend": ("backend", "tpu", ValueError, "backend: expected one of .*got 'tpu'"),
}


def check_refused(argument, value, error, message):
    arguments = dict(zip(INPUTS, make_inputs(shape(2, 3, 5, 4, 6)), strict=True)) | {argument: value}
    for function in (additive_attention, additive_attention_ref):
        if argument != "backend" or function is additive_attention:
            with pytest.raises(error, match=message):
                function(**arguments)


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_inputs(case):
    argument, value, *expected = BAD_INPUTS[case]
    check_refused(argument, value() if callable(value) else value, *expected)


@cpu_alone  # on a GPU, looking at the values would wait for it
@pytest.mark.parametrize(("lengths", "got"), [([1, -1], "-1, 1"), ([6, 1], "1, 6")], ids=["negative", "large"])
def test_lengths_out_of_range_are_refused(lengths, got):
    message = rf"key_lengths: expected values in \[0, 5\] .*got values in \[{got}\]"
    check_refused("key_lengths", torch.tensor(lengths), ValueError, message)


def test_the_reference_is_a_backend():
    inputs = make_inputs(shape(2, 3, 5, 4))
    torch.testing.assert_close(
        additive_attention(*inputs, backend="reference"), additive_attention_ref(*inputs), rtol=0, atol=0
    )


def raw_arguments():
    query, key, value, weight = make_inputs(shape(2, 3, 5, 4, 6, H=2))
    bias = torch.zeros(1, 2, 3, 1)
    arguments = {"query": query, "key": key, "value": value, "weight": weight, "bias": bias}
    arguments |= {"mask": torch.ones(2, 2, 3, 5, dtype=torch.bool), "key_lengths": torch.tensor([5, 5])}
    arguments["window_center"] = torch.zeros(2, 2, 3, dtype=torch.int64)
    arguments |= {"key_exp": torch.exp(2 * key), "key_bound": key.abs().max().view(1)}
    return arguments | {"dropout_seed": None}


def without_its_end(t):
    if t.dim() == 4 and t.shape[0] == 1:  # a bias may have a single one
        return t[:, :, :2]
    return t[:, :1] if t.dim() > 1 else t[:0]


of_cpu_kernels = pytest.mark.skipif(
    DEVICE != "cpu" or BACKEND == "triton", reason="GPUs use no exponentials at hand"
)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    "wrong",
    [
        "key",
        "value",
        "weight",
        "bias",
        "mask",
        "key_lengths",
        "window_center",
        *(pytest.param(n, marks=of_cpu_kernels) for n in ("key_exp", "key_bound")),
    ],
)
def test_raw_ops_refuse_shapes_that_do_not_fit(wrong):
    arguments = raw_arguments()
    options = Options(1, 1, 1.0, 0.0, 0, 0.2)
    forward, backward = raw_op("additive_attention_fwd"), raw_op("additive_attention_bwd")
    context, lse, weights, scores = forward(*arguments.values(), *options, True, True)
    arguments[wrong] = without_its_end(arguments[wrong])
    with pytest.raises(RuntimeError, match=wrong):
        forward(*arguments.values(), *options, True, True)
    with pytest.raises(RuntimeError, match=wrong):
        backward(context, lse, weights, *arguments.values(), *options, context, lse, scores, 0b1111)


reads_context = pytest.mark.skipif(DEVICE != "cuda" and BACKEND != "triton", reason="the CPU does not read it")


@pytest.mark.interpreted
@pytest.mark.parametrize(
    "wrong",
    ["grad_context", "grad_lse", "grad_weights", pytest.param("context", marks=reads_context), "lse", "scores"],
)
def test_raw_backward_refuses_what_is_not_of_its_forward(wrong):
    arguments, options = raw_arguments(), Options(1, 1, 1.0, 0.0, 0, 0.2)
    context, lse, weights, scores = raw_op("additive_attention_fwd")(*arguments.values(), *options, True, True)
    grads = {"grad_context": context, "grad_lse": lse, "grad_weights": weights}
    kept = {"context": context, "lse": lse, "scores": scores}
    for given in (grads, kept):
        if wrong in given:
            given[wrong] = without_its_end(given[wrong])
    with pytest.raises(RuntimeError, match=wrong):
        raw_op("additive_attention_bwd")(*grads.values(), *arguments.values(), *options, *kept.values(), 0b1111)


# A float32 weight beside half precision: a parameter under manual casts

HALF = (torch.float16, torch.bfloat16)
MIXED = [shape(2, 9, 7, 5, 4), shape(2, 33, 37, 6, 3, H=3), shape(2, 1, 70, 8, 4)]
if INTERPRETED:
    MIXED = [shape(2, 9, 7, 5, 4), shape(1, 17, 9, 3, 3, H=2), shape(2, 1, 20, 3, 4)]


@pytest.mark.levels
@pytest.mark.interpreted
@in_dtypes(MIXED, MIXED[: 1 if INTERPRETED else 3], HALF)
def test_float32_weight_beside_half_precision(sizes, dtype):
    """Results and gradients in each one's dtype; the weight is not rounded: lse and its gradient are float32's."""
    *rows, weight = make_inputs(sizes)
    rows = [t.to(dtype) for t in rows]
    actual = check([*rows, weight], softcap=4.0, is_causal=True)
    assert actual["grad_weight"].dtype == torch.float32 and actual["grad_query"].dtype == dtype

    def lse_and_gradient(dtype):
        leaf = weight.clone().requires_grad_()
        _, lse = additive_attention(*(t.to(dtype) for t in rows), leaf, return_lse=True)
        return lse, *torch.autograd.grad(lse.sum(), leaf)

    torch.testing.assert_close(lse_and_gradient(dtype), lse_and_gradient(torch.float32))


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_weight_of_another_dtype_is_refused(dtype):
    *rows, weight = make_inputs(shape(1, 2, 3, 4, 5), dtype)
    expected = "torch.float32" if dtype == torch.float32 else f"{dtype} or torch.float32"
    with pytest.raises(ValueError, match=f"weight: expected {expected} on .* like query, got torch.float64"):
        additive_attention(*rows, weight.double())


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_float32_weight_inside_pytorch(backend):
    *rows, weight = (t.requires_grad_() for t in make_inputs(shape(2, 3, 4, 5, 6, H=2), torch.bfloat16))
    inputs = [*rows, weight.detach().float().requires_grad_()]

    def step(*inputs):
        context, weights = additive_attention(*inputs, return_weights=True, backend=backend)
        return (
            context,
            weights,
            *torch.autograd.grad(context.float().sum() + weights.float().square().sum(), inputs),
        )

    expected = step(*inputs)
    assert [t.dtype for t in expected[-4:]] == [*[torch.bfloat16] * 3, torch.float32]
    leaf = inputs[3]
    compiled = torch.compile(
        lambda *inputs: additive_attention(*inputs, backend=backend), fullgraph=True, backend="aot_eager"
    )
    (found,) = torch.autograd.grad(compiled(*inputs).float().sum(), leaf)
    (wanted,) = torch.autograd.grad(additive_attention(*inputs, backend=backend).float().sum(), leaf)
    torch.testing.assert_close(found, wanted)
    penalty = torch.autograd.grad(
        additive_attention(*inputs, backend=backend).float().square().sum(), leaf, create_graph=True
    )
    assert torch.autograd.grad(penalty[0].square().sum(), inputs[0])[0].dtype == torch.bfloat16


@not_on_the_standin("of gradients opcheck knows the devices of PyTorch alone")
def test_float32_weight_passes_opcheck():
    *rows, weight = make_inputs(shape(2, 3, 4, 5, 6), torch.bfloat16)
    inputs = [t.requires_grad_() for t in (*rows, weight.float())]
    forward = raw_op("additive_attention_fwd")
    options = Options(-1, -1, 1.0, 0.0, 0, 0.2)
    torch.library.opcheck(forward, (*inputs, *[None] * 7, *options, True, False))


@pytest.mark.parametrize("normalize", [False, True])
def test_module_whose_weight_stays_float32(normalize):
    module = AdditiveAttention(4, 5, 6, num_heads=2, normalize=normalize).bfloat16()
    module.weight.data = torch.randn(module.weight.shape)  # what bfloat16 would round
    query, key = torch.randn(2, 3, 4).bfloat16(), torch.randn(2, 7, 5).bfloat16()
    module(query, key).sum().backward()
    assert module.weight.grad.dtype == torch.float32 and module.query_proj.weight.grad.dtype == torch.bfloat16
    context, weights = module(query, module.project_keys(key), return_weights=True)
    assert context.dtype == weights.dtype == torch.bfloat16


# Exponentials of keys at hand


@pytest.mark.levels
@pairwise(
    sizes=[shape(2, 1, 40, 64), shape(2, 5, 17, 33), shape(1, 40, 33, 18)],
    dtype=[torch.float32, torch.float64, torch.bfloat16],
    query_size=[1.0, 12.0, 300.0],
)
def test_key_exponentials_at_hand(sizes, dtype, query_size):
    inputs = make_inputs(sizes | {"H": 2}, dtype)
    inputs[0] *= query_size
    inputs[1].clamp_(-20, 20)

    def kernel(query, key, value, weight, **options):
        with torch.no_grad():
            wide = key.to(torch.promote_types(key.dtype, torch.float32))
            key_exp, bound = torch.exp(2 * wide), wide.abs().max()
        return attend(query, key, value, weight, key_exp=key_exp, key_bound=bound, **options)

    check(inputs, kernel)
    check(inputs, kernel, key_lengths=torch.tensor([13, 0][: sizes["B"]]))


@pytest.mark.levels
@cpu_alone  # GPUs use no exponentials at hand
@pytest.mark.parametrize("bound, used", [(20.0, True), (20.5, False), (math.nan, False)])
def test_key_exponentials_are_used_within_a_bound(bound, used):
    query, key, value, weight = make_inputs(shape(1, 2, 5, 8))
    key_exp = torch.full_like(key, math.nan)
    context = attend(query / 8, key, value, weight, key_exp=key_exp, key_bound=torch.tensor(bound))
    assert context.isnan().all() if used else context.isfinite().all()
