"""What holds for every public function, whatever it computes: shapes on meta, refused layouts, subclasses."""

import numpy
import pytest
import torch

import fusedattn

OFFSETS = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([0, 4, 9], dtype=torch.int32)
PACKED = {"cu_seqlens_q": OFFSETS[0], "cu_seqlens_k": OFFSETS[1], "max_seqlen_q": 3, "max_seqlen_k": 5}
ATTENTION = {"query": (2, 3, 8), "key": (2, 5, 8), "value": (2, 5, 6), "weight": (8,)}
LOCATION = {"previous": (2, 2, 5), "conv_weight": (4, 2, 3), "location_weight": (8, 4)}
OPS = {  # shapes of the tensors, and what else is given
    "additive_attention": (ATTENTION, {"window_size": (1, 1)}),
    "additive_attention_varlen": (
        {"query": (5, 8), "key": (9, 8), "value": (9, 6), "weight": (8,)},
        {**PACKED, "return_lse": True},
    ),
    "additive_scores": ({"query": (2, 3, 8), "key": (2, 5, 8), "weight": (8,)}, {}),
    "hard_additive_attention": (ATTENTION, {"sample": False}),
    "location_attention": (ATTENTION | LOCATION | {"query": (2, 8)}, {}),
    "attention_pool": (
        {"hidden": (2, 5, 8), "value": (2, 5, 6), "weight": (8,), "gate": (2, 5, 8)},
        {"return_scores": True, "return_weights": True},
    ),
    "film": ({"x": (2, 3, 4), "gamma": (2, 3), "beta": (3,), "residual": (2, 3, 4)}, {}),
    "norm_film": (
        {"x": (2, 3, 8), "gamma": (2, 8), "beta": (8,), "weight": (8,), "pre_residual": (2, 3, 8)},
        {"norm": "layer", "channel_dim": 2},
    ),
    "gated_film": ({"x": (2, 6, 4), "condition": (2, 6)}, {}),
}
EVERY = pytest.mark.parametrize("op", OPS)


def inputs_of(op):
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in OPS[op][0].items()}


def call(op, inputs):
    """All results, as a list."""
    results = getattr(fusedattn, op)(**inputs, **OPS[op][1])
    return list(results) if isinstance(results, tuple) else [results]


def test_this_list_is_complete():
    exported = [name for name in fusedattn.__all__ if getattr(getattr(fusedattn, name), "__wrapped__", None)]
    assert {name for name in exported if not name.endswith("_ref")} - {"merge_attention"} == set(OPS)


@EVERY
def test_shapes_on_meta_are_those_of_the_real_call(op):
    inputs = inputs_of(op)
    options = {n: t.to("meta") if isinstance(t, torch.Tensor) else t for n, t in OPS[op][1].items()}
    found = getattr(fusedattn, op)(**{name: t.to("meta") for name, t in inputs.items()}, **options)
    for meta, real in zip(found if isinstance(found, tuple) else [found], call(op, inputs), strict=True):
        assert (meta.shape, meta.dtype, meta.device.type) == (real.shape, real.dtype, "meta")


LAYOUTS = {
    "sparse": lambda t: t.to_sparse(),
    "nested": lambda t: torch.nested.nested_tensor(list(t.expand(2, *t.shape)), layout=torch.strided),
    "mkldnn": lambda t: t.to_mkldnn(),
}


@EVERY
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage")
def test_other_layouts_are_refused_by_name(op, layout):
    inputs = inputs_of(op)
    for name, t in inputs.items():
        named = r"\w+" if layout == "nested" else name  # of jagged ones a dense one may be to blame
        with pytest.raises(ValueError, match=f"^{op}: {named}: expected a (dense|nested) Tensor"):
            call(op, inputs | {name: LAYOUTS[layout](t)})


@EVERY
def test_arrays_are_refused_by_name(op):
    inputs = inputs_of(op)
    for name, t in inputs.items():
        with pytest.raises(TypeError, match=f"^{op}: {name}: expected .*, got ndarray"):
            call(op, inputs | {name: numpy.asarray(t)})


class Tagged(torch.Tensor):
    """A subclass with PyTorch's default behaviour."""


@pytest.mark.parametrize(
    "op", [op for op in OPS if op != "hard_additive_attention"]
)  # PyTorch converts no NamedTuple
def test_subclasses_of_tensor_come_back(op):
    inputs = inputs_of(op)
    first = next(iter(inputs))
    tagged = call(op, inputs | {first: inputs[first].as_subclass(Tagged)})
    assert all(type(t) is Tagged for t in tagged)
    torch.testing.assert_close([t.as_subclass(torch.Tensor) for t in tagged], call(op, inputs), rtol=0, atol=0)
