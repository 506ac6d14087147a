"""Packed sequences are a loop over their segments: to the bit on the CPU, within tests/tolerance.py elsewhere."""

import functools

import hypothesis.strategies as st
import pytest
import torch
from device import BACKEND, DEVICE, cpu_alone, examples, not_on_the_standin, raw_op
from hypothesis import given, settings
from pairwise import pairwise
from tolerance import assert_close_to_reference

from fusedattn import (
    UnsupportedError,
    additive_attention,
    additive_attention_ref,
    additive_attention_varlen,
    additive_attention_varlen_ref,
)

pytestmark = pytest.mark.levels
IS_A_LOOP = BACKEND == "auto" and DEVICE == "cpu"  # to the bit
TAKES_THE_SAME_TILES = IS_A_LOOP or BACKEND == "triton"  # for segments of similar lengths
NAMES = ("query", "key", "value", "weight")
BOTH = pytest.mark.parametrize("function", [additive_attention_varlen, additive_attention_varlen_ref])
# Lengths of queries and keys by segment; keys of the last are split among tasks, rows of some are none.
LENGTHS = {
    "uneven": ([3, 1, 0, 18, 2], [5, 1, 4, 20, 0]),
    "one": ([7], [9]),
    "long": ([70, 1, 20], [33, 150, 200]),
}


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def make_inputs(q_lengths, k_lengths, D=5, Dv=3, H=None, dtype=torch.float64, requires_grad=True):
    torch.manual_seed(0)
    heads = () if H is None else (H,)
    shapes = [
        (sum(n), *heads, width) for n, width in zip((q_lengths, k_lengths, k_lengths), (D, D, Dv), strict=True)
    ]
    return [torch.randn(s, dtype=dtype).requires_grad_(requires_grad) for s in (*shapes, (*heads, D))]


def packed(function, lengths, **options):
    """The function of query, key, value and weight, and (context, lse)."""
    q, k = lengths
    longest = {"max_seqlen_q": max(q, default=0), "max_seqlen_k": max(k, default=0)}
    cu = offsets(q), offsets(k)
    return lambda *inputs: function(*inputs, *cu, **longest, return_lse=True, **options)


def looped(function, lengths, **options):
    """The same, by a call for each segment."""

    def call(query, key, value, weight):
        H = None if query.dim() == 2 else query.shape[1]
        contexts, lses = [], []
        parts = (
            t.split(n) for t, n in zip((query, key, value), (lengths[0], lengths[1], lengths[1]), strict=True)
        )
        for rows in zip(*parts, strict=True):
            rows = (t.unsqueeze(0) if H is None else t.transpose(0, 1).unsqueeze(0) for t in rows)
            context, lse = function(*rows, weight, return_lse=True, **options)
            contexts.append(context[0] if H is None else context[0].transpose(0, 1))
            lses.append(lse[0])
        return torch.cat(contexts), torch.cat(lses, -1)

    return call


def run(function, inputs, dtype=None):
    """context, lse and the gradients of all inputs."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
    outputs = function(*leaves)
    torch.manual_seed(1)
    grads = [torch.randn(t.shape, dtype=torch.float64).to(inputs[0].dtype).to(t.dtype) for t in outputs]
    grads = [g.masked_fill(t == -torch.inf, 0.0) for g, t in zip(grads, outputs, strict=True)]
    return *outputs, *torch.autograd.grad(outputs, leaves, grads)


def check(inputs, lengths, exactly=IS_A_LOOP, **options):
    dtype = inputs[0].dtype
    found = run(packed(additive_attention_varlen, lengths, **options), inputs, dtype)
    loop = run(looped(additive_attention, lengths, **options), inputs, dtype)
    eager = run(looped(additive_attention_ref, lengths, **options), inputs, dtype)
    exact = run(looped(additive_attention_ref, lengths, **options), inputs, torch.float64)
    terms = max([sum(lengths[0]) * max(lengths[1], default=0), *lengths[0], *lengths[1], inputs[0].shape[-1]])
    for name, *of in zip(("context", "lse", *NAMES), found, loop, eager, exact, strict=True):
        actual, one_by_one, plain, right = of
        if exactly and name != "weight":
            assert torch.equal(actual, one_by_one), name
        finite = right != -torch.inf
        assert torch.equal(finite, actual != -torch.inf), name
        of_all = (t.masked_fill(~finite, 0.0) for t in (actual, plain, right))
        assert_close_to_reference(*of_all, terms=terms, name=name, scale=30.0)


@pairwise(
    lengths=list(LENGTHS),
    dtype=[torch.float32, torch.float64, torch.float16, torch.bfloat16],
    H=[None, 1, 3],
    window=[{}, {"is_causal": True}, {"window_size": (2, 1)}],
    activation=["tanh", "sigmoid", "relu", "leaky_relu"],
    softcap=[None, 2.0],
)
def test_a_loop_over_the_segments(lengths, dtype, H, window, activation, softcap):
    lengths = LENGTHS[lengths]
    inputs = make_inputs(*lengths, D=21, Dv=17, H=H, dtype=dtype)
    check(inputs, lengths, scale=0.7, **window, activation=activation, softcap=softcap)


@pytest.mark.interpreted
@pytest.mark.parametrize("H", [None, 2])
def test_a_loop_over_few_segments(H):
    lengths = [6, 0, 7], [4, 2, 9]
    inputs = make_inputs(*lengths, H=H, dtype=torch.float32)
    check(inputs, lengths, TAKES_THE_SAME_TILES, is_causal=H is None)


@pytest.mark.interpreted
def test_few_queries_of_every_segment():
    lengths = [2, 0, 3], [3, 2, 0]
    check(make_inputs(*lengths, H=2, dtype=torch.float64), lengths, window_size=(1, 0), softcap=2.0)


@pytest.mark.interpreted
@pytest.mark.skipif(BACKEND != "triton", reason="scratch of other backends is not by packed rows")
def test_several_chunks_of_packed_queries(monkeypatch):
    """The second begins within a segment, and the first has none of the last segment's."""
    monkeypatch.setattr("fusedattn.triton.additive_attention_problem.CHUNK", 1)
    monkeypatch.setattr("fusedattn.ops.additive_attention.keeps_scores", lambda *_, **__: False)
    lengths = [28, 6, 3], [20, 7, 2]
    inputs = make_inputs(*lengths, dtype=torch.float32)
    found, expected = (
        run(packed(function, lengths, is_causal=True), inputs, torch.float32)
        for function in (additive_attention_varlen, additive_attention_varlen_ref)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.interpreted
def test_keys_past_the_last_query_and_large_numbers_leave_other_segments_alone():
    lengths = [6, 5], [9, 7]
    inputs = [t.detach() for t in make_inputs(*lengths, dtype=torch.float32)]
    function = packed(additive_attention_varlen, lengths, is_causal=True)
    clean = run(function, inputs, torch.float32)
    for t in inputs[1:3]:
        t[6:9] = torch.nan  # seen by no query of theirs
    inputs[0][6:] *= 100
    for name, actual, expected in zip(("context", "lse", *NAMES[:3]), run(function, inputs), clean, strict=False):
        rows = 9 if name in ("key", "value") else 6
        assert torch.equal(actual[:rows], expected[:rows]), name
        assert actual.isfinite().all(), name


@pytest.mark.parametrize("function", [additive_attention_varlen_ref])
def test_the_reference_is_a_loop_over_that_of_attention(function):
    lengths = LENGTHS["uneven"]
    inputs = make_inputs(*lengths, H=2)
    found = run(packed(function, lengths, softcap=2.0), inputs)
    torch.testing.assert_close(found, run(looped(additive_attention_ref, lengths, softcap=2.0), inputs))


@settings(max_examples=examples(20), deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=9),
    heads=st.sampled_from([None, 2]),
    D=st.integers(1, 24),
    is_causal=st.booleans(),
)
def test_any_offsets(lengths, heads, D, is_causal):
    lengths = [n for n, _ in lengths], [n for _, n in lengths]
    inputs = make_inputs(*lengths, D=D, Dv=4, H=heads, dtype=torch.float32)
    found = run(packed(additive_attention_varlen, lengths, is_causal=is_causal), inputs)
    loop = run(looped(additive_attention, lengths, is_causal=is_causal), inputs)
    for name, actual, expected in zip(("context", "lse", *NAMES), found, loop, strict=True):
        exactly = IS_A_LOOP and name != "weight"
        torch.testing.assert_close(
            actual, expected, **({"rtol": 0, "atol": 0} if exactly else {"rtol": 1e-4, "atol": 1e-4})
        )


@cpu_alone
@pytest.mark.parametrize("threads", [2, 5])
def test_the_same_bits_for_any_number_of_threads(threads):
    lengths = [90, 3, 40, 1, 0, 17, 60, 2], [100, 200, 40, 3, 7, 0, 60, 5]
    inputs = make_inputs(*lengths, D=40, H=2, dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(packed(additive_attention_varlen, lengths), inputs)
        torch.set_num_threads(threads)
        assert all(map(torch.equal, alone, run(packed(additive_attention_varlen, lengths), inputs)))
    finally:
        torch.set_num_threads(before)


@BOTH
def test_no_segments(function):
    inputs = make_inputs([], [], H=2)
    context, lse, *grads = run(packed(function, ([], [])), inputs)
    assert context.shape == (0, 2, 3) and lse.shape == (2, 0)
    assert all(torch.equal(grad, torch.zeros_like(t)) for grad, t in zip(grads, inputs, strict=True))


@BOTH
def test_what_other_segments_hold_does_not_matter(function):
    lengths = [3, 4, 2], [5, 6, 3]
    inputs = make_inputs(*lengths, dtype=torch.float32)
    clean = packed(function, lengths)(*inputs)
    poisoned = [t.detach().clone() for t in inputs]
    for t, first, last in zip(poisoned[:3], (3, 5, 5), (7, 11, 11), strict=True):
        t[first:last] = torch.nan
    for actual, expected in zip(packed(function, lengths)(*poisoned), clean, strict=True):
        assert torch.equal(actual[:3], expected[:3]) and torch.equal(actual[7:], expected[7:])
        assert actual[3:7].isnan().all()


def test_strided_rows_and_heads_that_broadcast():
    lengths = LENGTHS["uneven"]
    query, key, value, weight = make_inputs(*lengths, H=3, dtype=torch.float32, requires_grad=False)
    qkv = torch.cat([query, query], -1)[..., 1::2], key[:, :1], value.mT.contiguous().mT, weight[:1]
    assert not qkv[0].is_contiguous() and not qkv[2].is_contiguous()
    lse_of = packed(additive_attention_varlen, lengths)
    expanded = [t.expand(-1, 3, -1).contiguous() for t in qkv[:3]]
    for actual, expected in zip(lse_of(*qkv), lse_of(*expanded, weight[:1].expand(3, -1)), strict=True):
        assert torch.equal(actual, expected)
    assert lse_of(*qkv)[0].is_contiguous()


# Inside PyTorch

OPTIONS = {"softcap": 2.0, "is_causal": True}
FEW = [2, 0, 3], [3, 2, 1]


@pytest.mark.parametrize("H", [None, 2])
def test_derivatives_to_second_order(H):
    def finite(*inputs):
        return tuple(
            t.masked_fill(t == -torch.inf, 0.0) for t in packed(additive_attention_varlen, FEW, **OPTIONS)(*inputs)
        )

    assert torch.autograd.gradcheck(finite, make_inputs(*FEW, H=H))
    assert torch.autograd.gradgradcheck(finite, make_inputs(*FEW, D=1, Dv=1, H=H), fast_mode=True)


@pytest.mark.parametrize("H", [None, 2])
@pytest.mark.parametrize("dims", [(0, 0, 0, 0), (1, None, None, None), (None, 0, 2, 1)], ids=str)
def test_vmap_of_values_and_gradients(dims, H):
    torch.manual_seed(0)
    shared = make_inputs(*FEW, H=H, requires_grad=False)
    args = [
        t if d is None else torch.randn(4, *t.shape, dtype=t.dtype).movedim(0, d)
        for t, d in zip(shared, dims, strict=True)
    ]

    def total(*inputs):
        context, lse = packed(additive_attention_varlen, FEW)(*inputs)
        return context.sin().sum() + lse.square().sum()

    function = torch.func.grad_and_value(total, (0, 1, 2, 3))
    singles = [
        function(*(t if d is None else t.select(d, n) for t, d in zip(args, dims, strict=True))) for n in range(4)
    ]
    found = torch.vmap(function, in_dims=dims)(*args)
    torch.testing.assert_close(
        found,
        (
            (tuple(map(torch.stack, zip(*(g for g, _ in singles), strict=True)))),
            torch.stack([v for _, v in singles]),
        ),
    )


@cpu_alone
def test_vmap_over_offsets_is_an_error():
    inputs = make_inputs(*FEW, requires_grad=False)
    cu = torch.stack([offsets(FEW[0])] * 2)
    longest = {"max_seqlen_q": 3, "max_seqlen_k": 3}
    call = torch.vmap(lambda q: additive_attention_varlen(*inputs, q, offsets(FEW[1]), **longest, backend="cpu"))
    with pytest.raises(UnsupportedError, match="cu_seqlens_q: expected the same offsets"):
        call(cu)


@pytest.mark.machinery
@pytest.mark.parametrize("H", [None, 2])
def test_one_graph_for_all_lengths(H):
    torch.compiler.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def function(q, k, v, w, cu_q, cu_k, longest_q, longest_k):
        return additive_attention_varlen(
            q, k, v, w, cu_q, cu_k, max_seqlen_q=longest_q, max_seqlen_k=longest_k, return_lse=True
        )

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for lengths in (([8, 1, 2, 1], [7, 9, 1, 3]), ([9, 1, 3], [2, 40, 7]), ([30] * 6, [2, 3, 4, 50, 60, 0])):
        inputs = make_inputs(*lengths, D=6, Dv=10, H=H)  # sizes that differ: those that agree are guarded
        arguments = offsets(lengths[0]), offsets(lengths[1]), max(lengths[0]), max(lengths[1])
        found = run(lambda *i, a=arguments: compiled(*i, *a), inputs)
        torch.testing.assert_close(found, run(lambda *i, a=arguments: function(*i, *a), inputs))
    torch.compiler.reset()
    assert len(graphs) == 1


@pytest.mark.machinery
@not_on_the_standin("Inductor makes no code for it")
def test_compile_with_inductor():
    torch.compiler.reset()
    inputs, function = make_inputs(*FEW, H=2), packed(additive_attention_varlen, FEW)
    compiled = torch.compile(lambda *i: function(i[0] * 2, *i[1:]), fullgraph=True)
    torch.testing.assert_close(run(compiled, inputs), run(lambda *i: function(i[0] * 2, *i[1:]), inputs))
    torch.compiler.reset()


@pytest.mark.machinery
@cpu_alone
@pairwise(H=[None, 2], dtype=[torch.float32, torch.bfloat16], kept=[False, True])
def test_opcheck(kept, dtype, H):
    lengths = [2, 0, 3], [3, 3, 3]  # all that is kept is written
    inputs = make_inputs(*lengths, H=H, dtype=dtype, requires_grad=False)
    inputs = [(t if H is None else t.transpose(0, 1)).unsqueeze(0) for t in inputs[:3]] + inputs[3:]
    inputs += [offsets(lengths[0]), offsets(lengths[1]), 3, 3, 1, 0, 0.5, 3.0, 0, 0.2]
    forward, backward = raw_op("additive_attention_varlen_fwd"), raw_op("additive_attention_varlen_bwd")
    torch.library.opcheck(forward.default, (*inputs, kept))
    context, lse, scores = forward(*inputs, kept)
    grads = torch.randn_like(context), torch.randn_like(lse) if kept else None
    for output_mask in (0b1111, 0b0001, 0b1110):
        torch.library.opcheck(backward.default, (*grads, *inputs, context, lse, scores, output_mask))


# Errors


@BOTH
def test_bad_input_is_named(function):
    query, key, value, weight = make_inputs(*FEW, requires_grad=False)
    cu_q, cu_k = offsets(FEW[0]), offsets(FEW[1])

    def call(q=query, k=key, v=value, w=weight, cq=cu_q, ck=cu_k, longest=(3, 3), **options):
        return function(q, k, v, w, cq, ck, max_seqlen_q=longest[0], max_seqlen_k=longest[1], **options)

    call()
    bad = {
        r"query: expected shape \(total_q, D\) or \(total_q, H, D\), got \(1, 5, 1, 5\)": {
            "q": query[None, :, None]
        },
        r"key: expected shape \(total_k, 5\), got \(6, 4\)": {"k": key[:, :4]},
        r"value: expected shape \(6, Dv\), got \(5, 3\)": {"v": value[:5]},
        r"key: expected torch.float64 on .* like query, got torch.float32": {"k": key.float()},
        r"weight: expected shape \(5,\) or \(1, 5\), got \(4,\)": {"w": weight[:4]},
        r"cu_seqlens_q: expected a Tensor of int32, got torch.int64": {"cq": cu_q.long()},
        r"cu_seqlens_k: expected a Tensor of int32, got list": {"ck": [0, 3, 5, 6]},
        r"cu_seqlens_k: expected shape \(segments \+ 1,\) on .*, got \(1, 4\)": {"ck": cu_k[None]},
        r"cu_seqlens_k: expected 4 offsets as cu_seqlens_q, got 3": {
            "ck": torch.tensor([0, 3, 6]).int(),
            "longest": (3, 6),
        },
        r"max_seqlen_q: expected an int, got Tensor": {"longest": (torch.tensor(3), 3)},
        r"activation: expected one of": {"activation": "gelu"},
        r"softcap: expected a positive number": {"softcap": -1.0},
    }
    if DEVICE == "cpu":
        bad |= {
            r"cu_seqlens_q: expected offsets from 0 to 5, .* got 1 to 5": {"cq": torch.tensor([1, 2, 2, 5]).int()},
            r"cu_seqlens_k: expected offsets from 0 to 6, .* got 0 to 5": {"ck": torch.tensor([0, 3, 4, 5]).int()},
            r"cu_seqlens_q: expected offsets that do not decrease, got 2 after 4": {
                "cq": torch.tensor([0, 4, 2, 5]).int()
            },
            r"max_seqlen_k: expected at least 3, the longest segment, got 2": {"longest": (3, 2)},
        }
    for message, arguments in bad.items():
        with pytest.raises(ValueError, match=f"^additive_attention_varlen: {message}"):
            call(**arguments)
    with pytest.raises(TypeError, match="key: expected a Tensor, got NoneType"):
        call(k=None)


@cpu_alone
@pytest.mark.parametrize(
    ("cu", "longest", "message"),
    [
        ([0, 4, 2, 5], 4, "do not decrease, got 2 after 4"),
        ([0, 2, 2, 9], 7, "from 0 to 5, got 0 to 9"),
        ([0, 2, 2, 5], 2, "max_seqlen_q: expected at least the longest segment, got 2 for one of 3"),
    ],
)
def test_kernels_do_not_follow_bad_offsets(cu, longest, message):
    """Where nobody looks at values beforehand, as in a compiled program."""
    inputs = make_inputs(*FEW, requires_grad=False)
    inputs = [t[None] for t in inputs[:3]] + inputs[3:]
    arguments = torch.tensor(cu).int(), offsets(FEW[1]), longest, 3, -1, -1, 1.0, 0.0, 0, 0.2
    with pytest.raises(RuntimeError, match=message):
        raw_op("additive_attention_varlen_fwd")(*inputs, *arguments, True)


# Nested tensors


def nested(rows, lengths, H=None):
    made = torch.nested.nested_tensor_from_jagged(rows, offsets(lengths).long())
    return made if H is None else made.transpose(1, 2)


@not_on_the_standin("PyTorch has no nested tensors there")
@pytest.mark.parametrize("H", [None, 2])
def test_nested_tensors(H):
    lengths = [3, 1, 4], [5, 1, 2]
    inputs = make_inputs(*lengths, H=H)

    def function(query, key, value, weight):
        jagged = [nested(t, n, H) for t, n in zip((query, key, value), (*lengths, lengths[1]), strict=True)]
        context, lse = additive_attention(*jagged, weight, return_lse=True, softcap=2.0)
        assert context.is_nested and context.shape[:-1] == jagged[0].shape[:-1] == lse.shape
        return context.values() if H is None else context.values().transpose(0, 1), lse.values()

    found, expected = run(function, inputs), run(packed(additive_attention_varlen, lengths, softcap=2.0), inputs)
    assert all(map(torch.equal, found, expected))
    jagged = nested(inputs[0], lengths[0], H)
    assert additive_attention(jagged, jagged, jagged, inputs[3]).is_nested


@pytest.mark.machinery
@not_on_the_standin("PyTorch has no nested tensors there")
def test_nested_tensors_compile():
    torch.compiler.reset()
    lengths = [3, 1, 4], [5, 1, 2]
    made = functools.partial(torch.nested.nested_tensor_from_jagged, max_seqlen=5)  # it cannot look at offsets
    compiled = torch.compile(additive_attention, fullgraph=True, backend="aot_eager")

    def function(query, key, value, weight):
        query, key = (made(t, offsets(n).long()) for t, n in zip((query, key), lengths, strict=True))
        return (compiled(query, key, made(value, key.offsets()), weight).values(),)

    inputs, expected = make_inputs(*lengths), packed(additive_attention_varlen, lengths)
    torch.testing.assert_close(run(function, inputs), run(lambda *i: expected(*i)[:1], inputs))
    torch.compiler.reset()


@not_on_the_standin("PyTorch has no nested tensors there")
def test_nested_tensors_that_do_not_fit_are_named():
    lengths = [3, 1, 4], [5, 1, 2]
    *rows, weight = make_inputs(*lengths, Dv=5, requires_grad=False)
    q, k, v = (nested(t, n) for t, n in zip(rows, (*lengths, lengths[1]), strict=True))
    strided = torch.nested.nested_tensor(list(rows[0].split(lengths[0])))
    heads = torch.nested.nested_tensor_from_jagged(rows[0][:, None].expand(-1, 2, -1), offsets(lengths[0]))
    for message, inputs, options in (
        (
            "key: expected a nested Tensor of layout torch.jagged, as the others, got a dense one",
            (q, rows[1][None], v),
            {},
        ),
        (
            "query: expected a nested Tensor of layout torch.jagged.*got a nested one of layout torch.strided",
            (strided, k, v),
            {},
        ),
        (r"query: expected shape \(B, ragged, D\) or \(B, H, ragged, D\)", (heads, k, v), {}),
        ("key: expected 3 sequences, as query, got 2", (q, nested(rows[1], [5, 3]), nested(rows[2], [5, 3])), {}),
        ("value: expected the offsets of key, got others", (q, k, nested(rows[2], [2, 1, 5])), {}),
        (
            "mask: expected its default with nested tensors, got a Tensor",
            (q, k, v),
            {"mask": torch.ones(1, 1).bool()},
        ),
        (
            "return_weights: expected its default with nested tensors, got True",
            (q, k, v),
            {"return_weights": True},
        ),
        (
            "normalizer: expected 'softmax' with nested tensors, got 'sigmoid'",
            (q, k, v),
            {"normalizer": "sigmoid"},
        ),
    ):
        with pytest.raises(ValueError, match=f"^additive_attention: {message}"):
            additive_attention(*inputs, weight, **options)
