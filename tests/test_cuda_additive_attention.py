"""Additive attention's CUDA kernels, run on the CPU (tests/cuda_emulator), within tests/tolerance.py.

Kernels and launchers are tested here, and how they cut a problem; tests/test_cuda.py runs the whole op on a GPU.
The cases, the reference and the tolerance are those of test_additive_attention.py.
"""

import functools
import math

import pytest
import test_activations as activations
import test_additive_attention as cases
import test_additive_attention_window as windows
import test_masked_keys as masked
import torch
from cuda_emulator.arrays import array, name, poisoned
from pairwise import in_dtypes, pairwise
from test_additive_attention import ACTIVATIONS, DTYPES, INPUTS, MAGNITUDES, MASKS, STRIDES, make_inputs, shape
from test_additive_attention_bias import BIAS_VIEWS, BIASES, check_lowest_bias
from tolerance import TF32_EPS
from torch.autograd import Function

from fusedattn import _philox, _scores, _windows
from fusedattn._dtypes import accumulation_dtype
from fusedattn._options import AdditiveAttentionOptions as Options

CHUNK = 1 << 24  # BACKWARD_CHUNK of cuda_bwd.cuh


@pytest.fixture(scope="module")
def module(emulated):
    return emulated("additive_attention")


def with_heads(t):
    """(B, H, T, width), or None."""
    return t if t is None or t.dim() == 4 else t.detach().unsqueeze(1)


def rows(t):
    """As the launchers want it: with heads, the last dimension contiguous."""
    t = with_heads(t)
    if t is None:
        return None
    return t if t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous()


class EmulatedAttention(Function):
    @staticmethod
    def forward(
        module, query, key, value, weight, bias, mask, key_lengths, center, seed, options, keep_scores, chunk, tf32
    ):  # fmt: skip
        lead, Tk, dtype = query.shape[:-1], key.shape[-2], query.dtype
        context, lse = poisoned((*lead, value.shape[-1]), dtype), poisoned(lead, accumulation_dtype(dtype))
        scores, weights = poisoned((*lead, Tk), lse.dtype), poisoned((*lead, Tk), dtype)
        arrays = arguments(query, key, value, weight, bias, mask, key_lengths, center, seed)
        outputs = [array(rows(context)), array(lse), array(rows(scores)), array(rows(weights))]
        module.additive_attention_fwd(name(dtype), *arrays, options, *outputs, tf32)
        return context, weights, lse, scores if keep_scores else torch.empty(0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.module, *tensors, ctx.options, ctx.keep_scores, ctx.chunk, _ = inputs
        context, _, lse, scores = output
        ctx.save_for_backward(*tensors, context, lse, scores)
        ctx.mark_non_differentiable(scores)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_context, grad_weights, grad_lse, _):
        *tensors, context, lse, scores = ctx.saved_tensors
        query = tensors[0]
        outputs = [None if t is None else poisoned(t.shape, t.dtype) for t in tensors[:5]]
        contiguous = [None if t is None else t.contiguous() for t in (grad_lse, grad_weights)]
        ctx.module.additive_attention_bwd(
            name(context.dtype),
            array(rows(grad_context)),
            *(array(t) for t in contiguous),
            *arguments(*tensors),
            ctx.options,
            *(array(t) for t in (rows(context), lse, scores if ctx.keep_scores else None)),
            *(array(t) for t in outputs[:4]),
            array(scores_of_heads(outputs[4], query.dim())),
            ctx.chunk,
        )
        return None, *outputs, *(None,) * 8


def scores_of_heads(bias, rank):
    """A bias, or its gradient, of four dimensions."""
    return bias if bias is None or rank == 4 else bias.detach().unsqueeze(1)


def arguments(query, key, value, weight, bias, mask, key_lengths, center, seed):
    if mask is not None:
        mask = with_heads(mask.expand(*query.shape[:-1], key.shape[-2]))
    weight = weight.detach() if query.dim() == 4 else weight.detach().unsqueeze(0)
    weight = weight if weight.stride(-1) == 1 else weight.contiguous()
    if center is not None and query.dim() == 3:
        center = center.unsqueeze(1)
    bias = scores_of_heads(bias, query.dim())
    tensors = (rows(query), rows(key), rows(value), weight, bias, mask, key_lengths, center, seed)
    return [array(t) for t in tensors]


def emulated_attention(
    module,
    query,
    key,
    value,
    weight,
    *,
    bias=None,
    mask=None,
    key_lengths=None,
    is_causal=False,
    window_size=None,
    window_center=None,
    scale=1.0,
    softcap=None,
    activation="tanh",
    negative_slope=0.2,
    dropout_p=0.0,
    place=_philox.EVERYTHING,
    return_weights=True,
    return_lse=True,
    keep_scores=True,
    chunk=CHUNK,
    tf32=False,
):
    if query.dim() == 4 and weight.dim() == 1:
        weight = weight.expand(query.shape[1], -1)
    window = _windows.sides("emulated_attention", window_size, window_center, is_causal)
    if window_center is not None:
        window_center = _windows.centers("emulated_attention", window_center, query.shape[:-1], query.device)
    options = Options(*window, *_scores.numbers(scale, softcap, activation, negative_slope), dropout_p, *place)
    seed = _philox.draw_seed(query.device) if dropout_p else None
    if bias is not None:
        bias = bias.view((1,) * (query.dim() - bias.dim()) + bias.shape)
    others = (bias, mask, key_lengths, window_center, seed, options, keep_scores, chunk, tf32)
    return EmulatedAttention.apply(module, query, key, value, weight, *others)[:3]


def check(module, inputs, keep_scores=True, chunk=CHUNK, **options):
    kernel = functools.partial(emulated_attention, module, keep_scores=keep_scores, chunk=chunk)
    return cases.check(inputs, kernel, **options)


# One query, few of them, tiles; keys in one part and in several; one tile of channels and of values, and more.
EVERY_KERNEL = [
    shape(2, 1, 129, 129, 63),
    shape(1, 16, 200, 130, 140),
    shape(2, 5, 17, 33, 8, H=3),
    shape(1, 66, 67, 33, 70),
]
SHAPES = [
    *EVERY_KERNEL,
    shape(1, 1, 1, 1),
    shape(2, 3, 17, 16, 33),
    shape(1, 63, 64, 33, 65),
    shape(1, 64, 65, 32, 64),
    shape(2, 129, 63, 7, 31),
    shape(1, 130, 129, 34, 70),
    shape(2, 17, 33, 1, 1),
    shape(1, 1, 1000, 33, 5),  # few queries: keys split over blocks
    shape(1, 8, 70, 12, 4),
    shape(1, 11, 67, 132, 7),
]


@pytest.mark.sanitized
@in_dtypes(SHAPES, EVERY_KERNEL, DTYPES)
def test_matches_the_reference(module, sizes, dtype):
    check(module, make_inputs(sizes, dtype))


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", EVERY_KERNEL)
def test_float32_weight_beside_half_precision(module, sizes, dtype):
    *rows, weight = make_inputs(sizes)
    actual = check(module, [*(t.to(dtype) for t in rows), weight])
    assert actual["grad_weight"].dtype == torch.float32


def test_gradient_of_a_float32_weight_without_keys(module):
    *rows, weight = make_inputs(shape(2, 3, 0, 5, 4, H=2))
    assert (check(module, [*(t.half() for t in rows), weight])["grad_weight"] == 0).all()


@pytest.mark.parametrize(("Tq", "keep_scores"), [(1, True), (2, False)])
def test_several_tiles_in_a_split(module, Tq, keep_scores):
    inputs = make_inputs(shape(1, Tq, 150, 9, 5, H=500))  # as many heads as leave 2 of 660 blocks to each
    inputs[1][0, 0, 140] *= 30
    check(module, inputs, keep_scores, chunk=1 << 20, key_lengths=torch.tensor([145]))


@pairwise(chunk=[1, 64 * 128 * 2, 64 * 128 * 4], dtype=[torch.float32, torch.bfloat16], keep_scores=[True, False])
def test_queries_in_several_chunks(module, chunk, dtype, keep_scores):
    inputs = make_inputs(shape(2, 150, 70, 20, 9, H=2), dtype)
    check(module, inputs, keep_scores, chunk, is_causal=True, key_lengths=torch.tensor([70, 31]))


@pairwise(
    sizes=[shape(2, 70, 83, 6, 7), shape(2, 7, 35, 20, 9, H=3)],
    kind=MASKS,
    lengths=[False, True],
    is_causal=[False, True],
)
def test_masks_and_their_combinations(module, sizes, kind, lengths, is_causal):
    inputs = make_inputs(sizes)
    B, H, Tq, Tk = (sizes[name] for name in ("B", "H", "Tq", "Tk"))
    mask = MASKS[kind](B, H, Tq, Tk)
    key_lengths = torch.tensor([20, 0][:B]) if lengths else None
    actual = check(module, inputs, mask=mask, key_lengths=key_lengths, is_causal=is_causal)
    if lengths:
        assert (actual["weights"][0, ..., 20:] == 0).all() and (actual["context"][1] == 0).all()
        assert (actual["lse"][1] == -math.inf).all()


@pytest.mark.sanitized
@pairwise(
    sizes=[
        shape(2, 1, 61, 5, 4),
        shape(2, 3, 70, 40, 18, H=2),
        shape(2, 20, 70, 40, 18, H=2),
        shape(3, 70, 83, 6, 7),
    ],
    dtype=[torch.float32, torch.float16, torch.float64],
    form=masked.FORMS,
    places=masked.PLACES,
    special=masked.SPECIALS,
    keep_scores=[True, False],
    activation=["tanh", "relu", "leaky_relu"],
)
def test_what_a_hidden_key_holds_does_not_matter(
    module, sizes, dtype, form, places, special, keep_scores, activation
):
    kernel = functools.partial(emulated_attention, module, keep_scores=keep_scores, activation=activation)
    masked.check_absent(sizes, dtype, form, places, special, kernel)


def test_hidden_keys_with_tensor_cores_for_float32(module):
    kernel = functools.partial(emulated_attention, module, tf32=True)
    masked.check_absent(shape(2, 20, 70, 8, 70), torch.float32, "full", ("key", "value"), math.nan, kernel)


# One query, few of them; tiles, whose backward has columns for all keys, and for those around their windows alone.
@pytest.mark.sanitized
@pairwise(
    sizes=[shape(2, 1, 61, 5, 4), shape(2, 6, 140, 20, 9, H=2), shape(2, 70, 83, 6, 7), shape(1, 129, 250, 3, 2)],
    window=["own", "both", "left", "right", "large", "causal"],
    center=["none", "scattered", "of_heads", "apart", "far"],
    masked=["none", "lengths", "queries_keys", "keys"],
    keep_scores=[True, False],
)
def test_windows(module, sizes, window, center, masked, keep_scores):
    torch.manual_seed(1)
    options = windows.options_of(window, center, sizes)
    B, H, Tq, Tk = (sizes[name] for name in ("B", "H", "Tq", "Tk"))
    if masked == "lengths":
        options["key_lengths"] = torch.tensor([Tk - 3, 9][:B])
    elif masked != "none":
        options["mask"] = MASKS[masked](B, H, Tq, Tk)
    check(module, make_inputs(sizes), keep_scores, chunk=1 << 15, **options)


@pytest.mark.sanitized
@pairwise(
    sizes=[
        shape(2, 1, 61, 5, 4),
        shape(2, 6, 140, 20, 9, H=2),
        shape(2, 70, 83, 6, 7),
        shape(2, 66, 67, 3, 2, H=3),
    ],
    kind=BIASES,
    strides=BIAS_VIEWS,
    dtype=DTYPES,
    is_wide=[False, True],
    others=[
        {},
        {"softcap": 0.7, "scale": -0.3},
        {"window_size": (9, 4)},
        {"mask": "empty_rows"},
        {"key_lengths": True, "is_causal": True},
        {"activation": "leaky_relu"},
    ],
    kept_and_chunk=[(True, CHUNK), (False, CHUNK), (False, 1), (True, 1)],
)
def test_biases(module, sizes, kind, strides, dtype, is_wide, others, kept_and_chunk):
    inputs = make_inputs(sizes, dtype)
    called = [sizes[name] for name in ("B", "H", "Tq", "Tk")]
    wide = accumulation_dtype(dtype)
    bias = BIASES[kind](*called).to(wide if is_wide or kind == "lowest" else dtype)
    full = (*inputs[0].shape[:-1], called[-1])

    def views(leaves):
        return [*leaves[:4], BIAS_VIEWS[strides](leaves[4], full)]

    options = dict(others)
    if "mask" in options:
        options["mask"] = MASKS[options["mask"]](*called)
    if "key_lengths" in options:
        options["key_lengths"] = torch.tensor([called[3] - 3, 9])
    actual = check(module, [*inputs, bias], *kept_and_chunk, views=views, **options)
    assert (actual["grad_bias"][bias == -math.inf] == 0).all()
    empty = (bias == -math.inf).expand(full).all(-1)
    assert (actual["lse"][empty] == -math.inf).all() and (actual["context"][empty] == 0).all()


@pytest.mark.parametrize("kind", ["one", "keys", "queries", "queries_keys", "batch", "heads", "heads_alone"])
@pytest.mark.parametrize(("heads", "chunk"), [(3, 1), (3, 1 << 15), (300, CHUNK)])
def test_gradients_of_a_bias_from_many_tiles(module, kind, heads, chunk):
    """Of several chunks, which begin within a batch element; and with more heads than a part of them has."""
    sizes = shape(2, 130 if heads == 3 else 17, 129 if heads == 3 else 3, 2, 1, H=heads)
    bias = BIASES[kind](*(sizes[name] for name in ("B", "H", "Tq", "Tk")))
    check(module, [*make_inputs(sizes), bias], False, chunk)


@pytest.mark.parametrize("Tq", [1, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_bias_of_the_lowest_number_leaves_its_rows_a_softmax(module, dtype, Tq):
    check_lowest_bias(dtype, Tq, functools.partial(emulated_attention, module))


@pytest.mark.parametrize("center", [None, torch.tensor([100])])
def test_keys_outside_are_not_computed(module, center):
    """Threads switch at every barrier, of which each tile has as many."""
    inputs = make_inputs(shape(1, 64, 640, 33, 5))

    def switches(**options):
        before = module.switch_count()
        cases.run(functools.partial(emulated_attention, module), inputs, **options)
        return module.switch_count() - before

    assert switches(window_size=(8, 8), window_center=center) < 0.5 * switches()


@pytest.mark.parametrize("Tq", [1, 6, 70])
@pytest.mark.parametrize("center", ["none", "apart"])
def test_what_is_in_no_window_is_absent(module, Tq, center):
    windows.check_absent(shape(2, Tq, 250, 5, 4), center, functools.partial(emulated_attention, module))


@pytest.fixture
def seed(monkeypatch):
    """That of every call."""
    seed = torch.tensor([0x123456789ABCDEF])
    monkeypatch.setattr(_philox, "draw_seed", lambda device, generator=None: seed)
    return seed


@pytest.mark.sanitized
@pairwise(
    sizes=[shape(2, 1, 37, 9, 5), shape(2, 5, 70, 20, 3, H=3), shape(1, 66, 67, 7, 9)],
    dtype=DTYPES,
    options=[{}, {"window_size": (6, 2), "softcap": 2.0}, {"activation": "relu"}],
    keep_scores=[True, False],
)
def test_dropout(module, seed, sizes, dtype, options, keep_scores):
    check(module, make_inputs(sizes, dtype), keep_scores, dropout_p=0.4, **options)


@pytest.mark.parametrize("Tq", [1, 5, 18])
@pytest.mark.parametrize("first_key", [0, 4, 7])
def test_dropout_has_the_bits_of_the_whole(module, seed, Tq, first_key):
    """Those that dropout keeps count in the context, which of a unit matrix is the weights."""
    query, key, _, weight = make_inputs(shape(2, Tq, 37, 3, H=2))
    place = _philox.Place(1 << 40, 5, 1 << 20, first_key)
    value = torch.eye(37).expand(2, 2, -1, -1)
    context, *_ = emulated_attention(module, query, key, value, weight, dropout_p=0.4, place=place)
    assert torch.equal(context != 0, _philox.words(seed, context.shape, place) >= _philox.threshold(0.4))


def test_lengths_out_of_range_are_clamped(module):
    inputs = make_inputs(shape(2, 3, 9, 4))
    actual = emulated_attention(module, *inputs, key_lengths=torch.tensor([-5, 1 << 40]))
    expected = emulated_attention(module, *inputs, key_lengths=torch.tensor([0, 9]))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.sanitized
@pairwise(
    scale=[1.0, -1.5],
    softcap=[None, 0.3, 5.0],
    dtype=DTYPES,
    activation=ACTIVATIONS,
    queries=[(1, True), (9, True), (9, False), (19, False)],
)
def test_what_a_score_is_made_of(module, scale, softcap, dtype, activation, queries):
    Tq, keep_scores = queries
    inputs = make_inputs(shape(2, Tq, 35, 24, 9), dtype)
    options = {"scale": scale, "softcap": softcap, "activation": activation, "key_lengths": torch.tensor([35, 6])}
    check(module, inputs, keep_scores, **options)


@pytest.mark.parametrize("Tq, negative_slope", [(1, 0.0), (3, -0.5), (18, 3.0)])
def test_negative_slopes_and_kinks(module, Tq, negative_slope):
    query, key, value, weight = make_inputs(shape(1, Tq, 19, 5, 3), torch.float64)
    inputs = [query.round(), key.round(), value, weight]  # q + k is 0 here and there
    check(module, inputs, activation="leaky_relu", negative_slope=negative_slope)
    check(module, inputs, activation="relu")


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("opposite", [False, True])
@pytest.mark.parametrize("Tq", [1, 5, 20])
def test_magnitudes_without_exponentials(module, Tq, opposite, activation):
    activations.check_magnitudes(Tq, opposite, activation, functools.partial(emulated_attention, module))


def check_tf32(module, sizes):
    inputs, lengths = make_inputs(sizes), torch.tensor([sizes["Tk"], 3][: sizes["B"]])
    kernel = functools.partial(emulated_attention, module, tf32=True)
    actual = cases.check(inputs, kernel, factor_eps=TF32_EPS, key_lengths=lengths)
    exact = cases.run(functools.partial(emulated_attention, module), inputs, key_lengths=lengths)
    assert torch.equal(actual["weights"], exact["weights"]) and torch.equal(actual["lse"], exact["lse"])
    assert (actual["context"] != exact["context"]).float().mean() > 0.9


@pytest.mark.sanitized
@pytest.mark.parametrize("sizes", [shape(2, 70, 83, 17, 70), shape(2, 17, 5, 9, 3)])
def test_tf32_rounds_the_factors_of_the_context_alone(module, sizes):
    check_tf32(module, sizes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tf32_changes_nothing_but_float32(module, dtype):
    inputs = make_inputs(shape(1, 20, 30, 9, 6), dtype)
    results = [emulated_attention(module, *inputs, tf32=tf32) for tf32 in (False, True)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.fixture
def module_75(module):
    """Kernels and launches as on compute capability 7.5: what it does not have is an error of the emulator."""
    module.set_architecture(75)
    yield module
    module.set_architecture(80)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_on_7_5(module_75, dtype):
    check(module_75, make_inputs(shape(1, 17, 70, 17, 66), dtype), keep_scores=False)


def test_few_queries_that_need_too_much_memory_on_7_5(module_75):
    check(module_75, make_inputs(shape(1, 16, 5, 400, 3), torch.float64), keep_scores=False)


def test_tf32_is_left_out_on_7_5(module_75):
    inputs = make_inputs(shape(1, 17, 5, 9, 6))
    results = [emulated_attention(module_75, *inputs, tf32=tf32) for tf32 in (False, True)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("empty", ["B", "Tq", "Tk", "D", "Dv", "H"])
def test_zero_sizes(module, empty):
    inputs = make_inputs(shape(2, 3, 5, 4, 6, H=2) | {empty: 0})
    check(module, inputs)
    check(module, [*inputs, torch.randn(3, 1)[: inputs[0].shape[2]]])


@pairwise(
    magnitude=MAGNITUDES,
    queries=[(5, True), (5, False), (17, False)],
    dtype=[torch.float32, torch.float64],
)
def test_magnitudes(module, magnitude, queries, dtype):
    Tq, keep_scores = queries
    query, key, value, weight = make_inputs(shape(1, Tq, 21, 37, 3), dtype)
    q, k = MAGNITUDES[magnitude]
    query = q + 0.25 * query if abs(q) < 1e6 else q * query.sign()
    key = k + 0.25 * key if abs(k) < 1e6 else k * key.sign()
    check(module, [query, key, value, weight], keep_scores)


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", DTYPES)
def test_magnitudes_mixed_within_tiles(module, dtype):
    query, key, value, weight = make_inputs(shape(2, 40, 143, 37, 5), dtype)
    sizes = torch.tensor([0.1, 1.0, 3.0, 8.0, 30.0, 100.0, 1000.0])
    query *= sizes[torch.arange(40) % 7].to(dtype)[:, None]
    key[:, :70] *= sizes[torch.arange(70) % 5].to(dtype)[:, None]
    query[0, 0, 0], key[0, 1, 0] = 60, -59.5
    check(module, [query, key, value, weight])


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e15, 1e30])
def test_magnitudes_of_the_weight(module, size):
    query, key, value, weight = make_inputs(shape(2, 5, 21, 18, 3))
    check(module, [query, key, value, weight * size])


@pairwise(
    sizes=[shape(2, 3, 9, 5, 4), shape(2, 20, 75, 40, 18)],
    of=INPUTS,
    special=[math.nan, math.inf, -math.inf],
    activation=ACTIVATIONS,
)
def test_nan_and_infinity_behave_as_in_the_reference(module, sizes, of, special, activation):
    inputs = make_inputs(sizes)
    inputs[INPUTS.index(of)].view(-1)[1] = special
    cases.check_infinite(inputs, functools.partial(emulated_attention, module), activation=activation)


@pytest.mark.parametrize(("Tq", "Tk"), [(3, 9), (20, 75), (3, 700)])
def test_minus_infinity_is_not_a_mask(module, Tq, Tk):
    cases.check_minus_infinity(Tq, Tk, torch.float32, functools.partial(emulated_attention, module))


@pytest.mark.parametrize("Tq", [1, 20])
def test_weights_whose_sum_overflows(module, Tq):
    cases.check_overflowing_weights(Tq, functools.partial(emulated_attention, module))


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("sizes", [shape(2, 5, 33, 20, 7), shape(2, 18, 19, 24, 9, H=3)])
def test_non_contiguous_inputs(module, sizes, strides):
    check(module, make_inputs(sizes), views=lambda leaves: [STRIDES[strides](t) for t in leaves])


def test_expanded_inputs(module):
    def views(leaves):
        sizes = ((2, 3, 7, 10), (2, 3, 19, 10), (2, 3, 19, 6), (3, 10))
        return [t.expand(size) for t, size in zip(leaves, sizes, strict=True)]

    check(module, make_inputs(shape(1, 1, 1, 10, 6, H=1)), views=views)


@pytest.mark.parametrize(
    "outputs", [("weights",), ("lse",), ("context", "weights"), ("context", "lse")], ids="-".join
)
@pytest.mark.parametrize("keep_scores", [True, False])
def test_gradients_of_each_output_alone(module, outputs, keep_scores):
    inputs = [t.requires_grad_() for t in make_inputs(shape(2, 5, 70, 33, 6), torch.float64)]
    lengths = torch.tensor([70, 0])

    def gradients(function):
        results = function(*inputs, key_lengths=lengths, return_weights=True, return_lse=True)
        results = dict(zip(("context", "weights", "lse"), results, strict=True))
        loss = sum(results[name].masked_fill(results[name] == -math.inf, 0).sin().sum() for name in outputs)
        return torch.autograd.grad(loss, inputs, materialize_grads=True)

    kernel = functools.partial(emulated_attention, module, keep_scores=keep_scores)
    torch.testing.assert_close(gradients(kernel), gradients(cases.additive_attention_ref))


# Few queries over two splits of keys; two tiles of queries and of keys, two steps over channels and columns.
@pytest.mark.races
@pytest.mark.parametrize(
    ("sizes", "dtype", "keep_scores", "bias"),
    [
        (shape(1, 2, 70, 35, 9), torch.float32, True, None),
        (shape(1, 66, 67, 33, 65), torch.float32, False, None),
        (shape(1, 66, 67, 33, 65), torch.bfloat16, True, None),
        (shape(1, 17, 67, 17, 9), torch.float64, False, None),
        (shape(1, 2, 70, 3, 1), torch.float32, True, "queries"),
        (shape(1, 17, 67, 3, 1), torch.float32, False, "keys"),
        (shape(1, 17, 67, 3, 1), torch.float32, False, "one"),
    ],
    ids=["few-float32", "tiles-float32", "tiles-bfloat16", "tiles-float64", "bias-few", "bias-keys", "bias-one"],
)
def test_no_thread_relies_on_luck(module, sizes, dtype, keep_scores, bias, thread_order):
    """Under ThreadSanitizer a missing barrier is reported, and in other orders it changes the result."""
    inputs = make_inputs(sizes, dtype)
    inputs[1][0, 65] *= 30  # its tile takes the exponential of the sum
    if bias is not None:
        inputs.append(BIASES[bias](*(sizes[name] for name in ("B", "H", "Tq", "Tk"))))
    module.set_order(thread_order)
    try:
        check(module, inputs, keep_scores)
    finally:
        module.set_order(0)


@pytest.mark.parametrize("Tq", [3, 70])
def test_the_order_of_threads_changes_no_bit(module, Tq, thread_order):
    inputs = [*make_inputs(shape(2, Tq, 130, 35, 9)), torch.randn(130)]
    kernel = functools.partial(emulated_attention, module, chunk=1)
    expected = cases.run(kernel, inputs)
    module.set_order(thread_order)
    try:
        actual = cases.run(kernel, inputs)
    finally:
        module.set_order(0)
    assert all(torch.equal(actual[output], expected[output]) for output in expected)
