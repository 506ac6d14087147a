"""Dropout of attention: the bits of ``fusedattn/_philox.py`` in every kernel, gradients, who decides the bits."""

from functools import partial

import pytest
import torch
from device import INTERPRETED, cpu_alone, not_on_the_standin, raw_op
from pairwise import in_dtypes
from test_additive_attention import DTYPES, check, make_inputs, run, shape
from torch.utils.checkpoint import checkpoint

from fusedattn import (
    AdditiveAttention,
    BahdanauAttention,
    _philox,
    additive_attention,
    additive_attention_ref,
)
from fusedattn._options import AdditiveAttentionOptions as Options
from fusedattn._steps import Shared
from fusedattn.ops.additive_attention import attend

pytestmark = pytest.mark.levels

P = 0.4


@pytest.fixture
def same_seed(monkeypatch):
    """Every call draws it."""
    seed = torch.tensor([0x123456789ABCDEF])
    monkeypatch.setattr(_philox, "draw_seed", lambda device, generator=None: seed)
    return seed


SHAPES = [
    shape(2, 1, 37, 9, 5),  # one query
    shape(2, 5, 70, 6, 3, H=3),  # few queries
    shape(1, 40, 33, 7, 9),  # scores are recomputed
    shape(1, 1100, 1000, 3, 2),  # queries in several chunks
]
if INTERPRETED:
    SHAPES = [shape(2, 2, 17, 3, 5, H=2), shape(1, 33, 40, 2, 3)]


@pytest.mark.interpreted
@in_dtypes(SHAPES, SHAPES[: 1 if INTERPRETED else 2], DTYPES)
def test_matches_the_reference(same_seed, sizes, dtype):
    check(make_inputs(sizes, dtype), dropout_p=P)


@pytest.mark.interpreted
@pytest.mark.parametrize("masked", [False, True])
def test_beside_other_options(same_seed, masked):
    sizes = SHAPES[1]
    mask = torch.rand(sizes["Tq"], sizes["Tk"]) > 0.3
    mask[:, 5], mask[1] = False, False
    inputs, options = make_inputs(sizes), {"mask": mask, "activation": "relu"}
    if not masked:
        inputs, options = [*inputs, torch.randn(sizes["Tk"])], {"window_size": (6, 2), "softcap": 2.0}
    check(inputs, dropout_p=P, **options)


@pytest.mark.interpreted
def test_equals_an_explicit_mask(same_seed):
    sizes = shape(2, 3, 17, 4, 3, H=2)
    inputs = make_inputs(sizes, torch.float64)
    keep = _philox.words(same_seed, (2, 2, 3, 17)) >= P * 2**32

    def composed(query, key, value, weight, dropout_p, return_weights, return_lse):
        _, weights, lse = additive_attention_ref(query, key, value, weight, return_weights=True, return_lse=True)
        return (weights * keep / (1 - dropout_p)) @ value, weights, lse

    found, expected = (run(function, inputs, dropout_p=P) for function in (additive_attention, composed))
    torch.testing.assert_close(found, expected)


@pytest.mark.interpreted
@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid"])
def test_weights_and_lse_are_those_before_dropout(normalizer):
    inputs = make_inputs(shape(2, 3, 17, 4, 3))
    options = {"return_weights": True, "return_lse": normalizer == "softmax", "normalizer": normalizer}
    plain, dropped = (additive_attention(*inputs, dropout_p=p, **options) for p in (0.0, P))
    torch.testing.assert_close(plain[1:], dropped[1:])  # perhaps of another backend
    assert not torch.allclose(plain[0], dropped[0])


def kept_by_kernels(query, key, weight, dropout_p=P, **options):
    """Which weights count in the context: it is the weights themselves, of values that are the unit matrix."""
    value = torch.eye(key.shape[-2], dtype=key.dtype).expand(*key.shape[:-1], -1)
    return additive_attention(query, key, value, weight, dropout_p=dropout_p, **options) != 0


@pytest.mark.interpreted
@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_are_those_of_the_seed(same_seed, dtype, normalizer):
    query, key, _, weight = make_inputs(shape(2, 5, 37, 3, H=2), dtype)
    kept = kept_by_kernels(query, key, weight, normalizer=normalizer)
    assert torch.equal(kept, _philox.words(same_seed, kept.shape) >= P * 2**32)


@cpu_alone
def test_the_bits_are_the_same_with_any_number_of_threads(same_seed):
    query, key, _, weight = make_inputs(shape(2, 300, 400, 3))
    threads = torch.get_num_threads()
    try:
        found = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(kept_by_kernels(query, key, weight))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.interpreted
def test_a_part_has_the_bits_of_the_whole(same_seed):
    """Raw operators count from the numbers of their first head, query and key."""
    inputs = make_inputs(shape(2, 6, 21, 4, 21, H=4))
    query, key, value, weight = inputs
    value = torch.eye(21).expand(2, 4, -1, -1)

    def context(query, key, value, weight, *place):
        options = (*[None] * 6, same_seed, *Options(-1, -1, 1.0, 0.0, 0, 0.2, P, *place), False, False)
        return raw_op("additive_attention_fwd")(query, key, value, weight, *options)[0]

    whole = context(query, key, value, weight)
    part = context(query[1:, 1:3, 2:5], key[1:, 1:3], value[1:, 1:3], weight[1:3], 1 * 4 + 1, 4, 2, 0)
    torch.testing.assert_close(part, whole[1:, 1:3, 2:5])
    part = context(query, key[..., 9:, :], value[..., 9:, 9:], weight, 0, 0, 0, 9)
    assert torch.equal(part != 0, whole[..., 9:] != 0)


@pytest.mark.parametrize("p", [0.1, 0.9])
def test_keeps_as_many_as_it_says(p):
    query, key, _, weight = make_inputs(shape(2, 200, 300, 3))
    n, kept = 2 * 200 * 300, kept_by_kernels(query, key, weight, dropout_p=p).count_nonzero()
    assert abs(kept - (1 - p) * n) <= 4 * (n * p * (1 - p)) ** 0.5


@not_on_the_standin("has no generators")
def test_the_generators_decide():
    inputs = make_inputs(shape(2, 3, 17, 4))

    def drawn(seed, generator=None):
        (generator or torch).manual_seed(seed)
        return additive_attention(*inputs, dropout_p=P, generator=generator)

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))
    generator = torch.Generator(inputs[0].device)
    assert torch.equal(drawn(1, generator), drawn(1, generator))
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    drawn(1, generator)
    assert torch.equal(state, torch.random.get_rng_state())


def test_autocast_draws_once(monkeypatch):
    draw, drawn = _philox.draw_seed, []
    monkeypatch.setattr(_philox, "draw_seed", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    inputs = make_inputs(shape(2, 3, 17, 4))
    with torch.autocast(inputs[0].device.type, dtype=torch.bfloat16):
        additive_attention(*inputs, dropout_p=P)
    assert len(drawn) == 1


@pytest.mark.machinery
@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid"])
@pytest.mark.parametrize("H", [None, 2])
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_draws_as_randomness_says(randomness, H, normalizer):
    query, key, value, weight = make_inputs(shape(2, 3, 17, 4, 5, H=H))
    samples = 3

    def attended(query):
        return additive_attention(query, key, value, weight, dropout_p=P, normalizer=normalizer)

    batch = query.expand(samples, *query.shape)
    found = torch.vmap(attended, randomness=randomness)(batch)
    assert torch.allclose(found[0], found[1]) == (randomness == "same")
    if randomness == "same":
        torch.manual_seed(5)
        found = torch.vmap(attended, randomness="same")(batch)
        torch.manual_seed(5)
        torch.testing.assert_close(found[2], attended(query))
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(attended)(batch)


def test_vmap_of_seeds_has_the_bits_and_gradients_of_a_loop(monkeypatch):
    query, key, value, weight = make_inputs(shape(2, 3, 17, 4, 5, H=2), torch.float64)
    seeds = torch.tensor([[3], [2**60]])

    def gradient(query, seed):
        monkeypatch.setattr(_philox, "draw_seed", lambda device, generator=None: seed)
        context = additive_attention(query, key, value, weight, dropout_p=P)
        return context.square().sum()

    queries = torch.stack([query, query + 1])
    found = torch.vmap(torch.func.grad(gradient))(queries, seeds)
    loop = [torch.func.grad(gradient)(q, seed) for q, seed in zip(queries, seeds, strict=True)]
    torch.testing.assert_close(found, torch.stack(loop))


@pytest.mark.machinery
def test_checkpointing_repeats_the_bits():
    *rows, weight = make_inputs(shape(2, 3, 17, 4))
    leaves = [t.requires_grad_() for t in rows]

    def attended(*rows):
        return additive_attention(*rows, weight, dropout_p=P)

    def gradients(function):
        torch.manual_seed(4)
        return torch.autograd.grad(function(*leaves).square().sum(), leaves)

    plain = gradients(attended)
    again = gradients(partial(checkpoint, attended, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.machinery
def test_derivatives_of_second_order(same_seed):
    inputs = [t.requires_grad_() for t in make_inputs(shape(1, 2, 5, 3, 2), torch.float64)]
    function = partial(additive_attention, dropout_p=P)
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.machinery
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_calls_follow_the_seed():
    query, key, value, weight = (t.requires_grad_() for t in make_inputs(shape(2, 3, 17, 4)))
    compiled = torch.compile(additive_attention, fullgraph=True, backend="aot_eager")

    def outputs():
        torch.manual_seed(6)
        context = compiled(query, key, value, weight, dropout_p=P)
        return context, *torch.autograd.grad(context.square().sum(), (query, value))

    first, second = outputs(), outputs()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.allclose(first[0], compiled(query, key, value, weight, dropout_p=P))


@pytest.mark.machinery
@cpu_alone
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_by_inductor():
    query, key, value, weight = make_inputs(shape(2, 20, 30, 4))
    value = torch.eye(30).expand(2, -1, -1).clone().requires_grad_()
    context = torch.compile(additive_attention, fullgraph=True)(query, key, value, weight, dropout_p=P)
    rate = (context != 0).double().mean()
    assert abs(rate - (1 - P)) < 4 * (P * (1 - P) / context.numel()) ** 0.5
    (grad,) = torch.autograd.grad(context.sum(), value)
    torch.testing.assert_close(grad, context.sum(-2).unsqueeze(-1).expand_as(grad))


@pytest.mark.machinery
@not_on_the_standin("of gradients opcheck knows the devices of PyTorch alone")
def test_opcheck(same_seed):
    inputs = make_inputs(shape(2, 3, 5, 4, 6, H=2))
    options = (*[None] * 6, same_seed, *Options(-1, -1, 1.0, 0.0, 0, 0.2, P, 1, 4, 5, 6))
    forward, backward = raw_op("additive_attention_fwd"), raw_op("additive_attention_bwd")
    torch.library.opcheck(forward, (*[t.requires_grad_() for t in inputs], *options, True, True))
    with torch.no_grad():
        context, lse, weights, scores = forward(*inputs, *options, True, True)
        torch.library.opcheck(backward, (context, lse, weights, *inputs, *options, context, lse, scores, 0b1111))


def test_raw_operators_refuse_seeds_that_do_not_fit():
    inputs = make_inputs(shape(2, 3, 5, 4, 6, H=3))
    for seed in (torch.tensor([1, 2]), torch.tensor([1], dtype=torch.int32), torch.tensor(1)):
        with pytest.raises(RuntimeError, match="dropout_seed: expected an int64 Tensor"):
            options = Options(-1, -1, 1.0, 0.0, 0, 0.2, P)
            raw_op("additive_attention_fwd")(*inputs, *[None] * 6, seed, *options, False, False)


def test_a_step_of_a_loop_drops_as_any_call(same_seed):
    query, key, value, weight = (t.requires_grad_() for t in make_inputs(shape(2, 1, 17, 4)))
    _, token = Shared(key, value).with_weight((weight,), lambda: weight)
    step, call = (attend(query, key, value, weight, dropout_p=P, token=t) for t in (token, None))
    for a, b in zip(
        torch.autograd.grad(step.square().sum(), (query, key, value, weight)),
        torch.autograd.grad(call.square().sum(), (query, key, value, weight)),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_modules_drop_in_training_alone():
    module = AdditiveAttention(5, 6, 8, num_heads=2, dropout=0.5)
    query, key = torch.randn(2, 3, 5), torch.randn(2, 4, 6)
    first, second = module(query, key), module(query, key)
    assert not torch.allclose(first, second) and "dropout=0.5" in repr(module)
    module.eval()
    assert torch.equal(module(query, key), module(query, key))


def test_gradients_of_a_loop_with_dropout():
    """Over projected keys, each step with bits of its own."""
    torch.manual_seed(0)
    module = BahdanauAttention(5, 6, 8, dropout=0.5).double()
    queries, memory = torch.randn(3, 2, 5).double(), torch.randn(2, 7, 6).double()

    def gradients(memory_of_step):
        torch.manual_seed(1)
        contexts = [module(query, memory_of_step(), return_weights=False) for query in queries]
        return torch.autograd.grad(torch.stack(contexts).square().sum(), list(module.parameters()))

    keys = module.project_keys(memory)
    torch.testing.assert_close(gradients(lambda: keys), gradients(lambda: memory))
