"""Projected keys as values: chosen, expanded, moved, cast, edited, mapped, exported."""

import copy
import dataclasses
import pickle

import pytest
import torch
from device import DEVICE, not_on_the_standin
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from fusedattn import AdditiveAttention, BahdanauAttention, ProjectedKeys


@pytest.fixture
def step():
    """(module, a decoder state (3, 5), a memory (3, 7, 6), lengths)."""
    torch.manual_seed(0)
    module = BahdanauAttention(5, 6, 8)
    return module, torch.randn(3, 5), torch.randn(3, 7, 6), torch.tensor([7, 4, 2])


# Kept on the CPU alone, whose kernels use them.
KEPT = DEVICE == "cpu"


def at_hand(keys):
    return keys.exponentials(keys.key.dtype)[0] is not None


INDICES = {
    "beams": [2, 0, 0],
    "tensor": torch.tensor([1, 2, 1]),
    "slice": slice(0, 2),
    "step": slice(None, None, 2),
    "mask": torch.tensor([True, False, True]),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("index", INDICES)
def test_batch_elements_are_chosen(step, index, masked):
    module, query, memory, lengths = step
    index, mask = INDICES[index], torch.rand(3, 7) > 0.3 if masked else None
    keys = module.project_keys(memory.requires_grad_(), key_lengths=lengths, mask=mask)
    chosen = keys[index]
    assert at_hand(keys) == at_hand(chosen) == KEPT
    expected = module(
        query[index], memory[index], key_lengths=lengths[index], mask=mask[index] if masked else None
    )
    actual = module(query[index], chosen)
    torch.testing.assert_close(actual, expected)
    gradients = [torch.autograd.grad(context.sin().sum(), memory)[0] for context, _ in (actual, expected)]
    torch.testing.assert_close(*gradients)


def test_one_element_is_expanded(step):
    module, query, memory, _ = step
    keys = module.project_keys(memory[:1], key_lengths=torch.tensor([4])).expand(3)
    assert keys.key.untyped_storage().nbytes() == keys.key[:1].numel() * 4  # no copy
    expected = module(query, memory[:1].expand(3, -1, -1), key_lengths=torch.tensor([4, 4, 4]))
    torch.testing.assert_close(module(query, keys), expected)


@pytest.mark.parametrize("index", [1, torch.tensor(1), (slice(None), 0)], ids=str)
def test_an_index_that_drops_the_batch_is_an_error(step, index):
    module, _, memory, _ = step
    with pytest.raises(IndexError, match="ProjectedKeys: expected a slice or a list of batch elements"):
        module.project_keys(memory)[index]


def test_only_a_batch_of_1_expands(step):
    module, _, memory, _ = step
    with pytest.raises(ValueError, match="expected a batch of 1 to expand to 6, got 3"):
        module.project_keys(memory).expand(6)


def test_keys_that_were_replaced_do_without_exponentials(step):
    module, query, memory, _ = step
    keys = module.project_keys(memory)
    order = torch.tensor([2, 0, 1])
    replaced = dataclasses.replace(keys, key=keys.key[order], value=keys.value[order])
    assert not at_hand(replaced)
    torch.testing.assert_close(module(query, replaced), module(query, memory[order]))


def test_keys_edited_in_place_do_without_exponentials(step):
    module, query, memory, _ = step
    with torch.no_grad():
        keys = module.project_keys(memory)
        keys.key.mul_(-1)
        assert not at_hand(keys)
        expected = module(query, ProjectedKeys(keys.key.clone(), keys.value))
        torch.testing.assert_close(module(query, keys), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_cast(step, dtype):
    module, query, memory, _ = step
    keys = module.project_keys(memory).to(dtype)
    assert keys.key.dtype == keys.value.dtype == dtype and not at_hand(keys)
    expected = module.to(dtype)(query.to(dtype), keys)
    plain = module(query.to(dtype), ProjectedKeys(keys.key, keys.value))
    torch.testing.assert_close(expected, plain)


def test_the_same_dtype_keeps_everything(step):
    module, _, memory, _ = step
    keys = module.project_keys(memory)
    assert at_hand(keys.to(torch.float32)) == at_hand(keys.to(DEVICE)) == KEPT


def test_keys_projected_within_autocast_serve_a_step_outside(step):
    module, query, memory, lengths = step
    with torch.autocast(DEVICE, torch.bfloat16):
        keys = module.project_keys(memory, key_lengths=lengths)
    assert keys.key.dtype == torch.bfloat16
    context, _ = module(query, keys)
    assert context.dtype == torch.float32
    torch.testing.assert_close(context, module(query, memory, key_lengths=lengths)[0], atol=0.05, rtol=0.05)
    keys = module.project_keys(memory, key_lengths=lengths)
    with torch.autocast(DEVICE, torch.bfloat16):
        context, _ = module(query, keys)
    assert context.dtype == torch.bfloat16


def test_zeros_in_what_is_hidden_are_made_once_and_edits_noticed(step):
    module, _, memory, lengths = step
    memory[1, 4:] = float("nan")
    keys = module.project_keys(memory.requires_grad_(), key_lengths=lengths)
    zeroed = keys.without_unseen()
    assert keys.without_unseen() is zeroed and module.project_keys(memory).without_unseen().key.isnan().any()
    hidden = torch.arange(7) >= lengths[:, None]
    for t in (zeroed.key, zeroed.value):
        assert (t[hidden] == 0).all() and t.isfinite().all() and t.requires_grad
    with torch.no_grad():
        assert not keys.without_unseen().key.requires_grad
        keys.key_lengths.clamp_(max=2)
    assert (keys.without_unseen().key[:, 2:] == 0).all()


def test_mixed_precision_that_casts_every_tensor_of_the_inputs(step):
    """What fully sharded training does with dataclasses among the inputs of a module."""
    distributed = pytest.importorskip("torch.distributed.utils")
    module, query, memory, lengths = step
    keys = distributed._apply_to_tensors(
        lambda t: t.bfloat16() if t.is_floating_point() else t, module.project_keys(memory, key_lengths=lengths)
    )
    context, _ = module.bfloat16()(query.bfloat16(), keys)
    assert context.dtype == torch.bfloat16


def test_a_pytree_of_its_tensors(step):
    module, query, memory, lengths = step
    keys = module.project_keys(memory, key_lengths=lengths)
    leaves, spec = pytree.tree_flatten(keys)
    assert {id(leaf) for leaf in leaves} == {id(t) for t in (keys.key, keys.value, keys.key_lengths)}
    again = pytree.tree_unflatten(leaves, spec)
    torch.testing.assert_close(module(query, again), module(query, keys))
    doubled = pytree.tree_map_only(torch.Tensor, lambda t: t * 2 if t.is_floating_point() else t, keys)
    torch.testing.assert_close(doubled.key, 2 * keys.key)


def test_vmap_over_keys():
    torch.manual_seed(0)
    module = AdditiveAttention(5, 6, 8, num_heads=2)
    query, memory = torch.randn(2, 3, 5), torch.randn(4, 2, 7, 6)
    keys = [module.project_keys(m) for m in memory]
    stacked = pytree.tree_map(lambda *t: torch.stack(t), *keys)
    actual = torch.vmap(module, in_dims=(None, 0))(query, stacked)
    torch.testing.assert_close(actual, torch.stack([module(query, k) for k in keys]))


def test_export_of_a_step(step):
    module, query, memory, lengths = step
    keys = module.project_keys(memory, key_lengths=lengths)
    exported = torch.export.export(module, (query, keys)).module()
    torch.testing.assert_close(exported(query, keys), module(query, keys))


def test_no_number_is_read_from_the_keys(step):
    """So that projecting traces, and works on fake tensors."""
    module, query, memory, lengths = step
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        keys = module.project_keys(mode.from_tensor(memory))
        assert keys.key.shape == (3, 7, 8)
    graph = make_fx(lambda m: module.project_keys(m).key)(memory)
    torch.testing.assert_close(graph(memory), module.project_keys(memory).key)
    graph = make_fx(lambda q, m, n: module(q, module.project_keys(m, key_lengths=n)))(query, memory, lengths)
    torch.testing.assert_close(graph(query, memory, lengths), module(query, memory, key_lengths=lengths))


@not_on_the_standin("Dynamo does not trace a tensor that is a subclass of its kind")
def test_a_compiled_step_is_compiled_once_for_all_batches(step):
    module, query, memory, _ = step
    torch.compiler.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for n in range(1, 12):
        keys = module.project_keys(n * memory)
        torch.testing.assert_close(compiled(query, keys), module(query, keys))
    assert len(graphs) == 1


def test_a_deep_copy_attends_like_its_original(step):
    module, query, memory, lengths = step
    with torch.no_grad():
        keys = module.project_keys(memory, key_lengths=lengths)
        torch.testing.assert_close(module(query, copy.deepcopy(keys)), module(query, keys))


# Keys that no query sees

HIDING = {
    "lengths": {"key_lengths": torch.tensor([7, 4, 2])},
    "mask": {"mask": torch.arange(7) < torch.tensor([[7], [4], [2]])},
    "holes": {
        "mask": torch.arange(7) % 2 == torch.tensor([[0], [1], [0]]),
        "key_lengths": torch.tensor([7, 4, 3]),
    },
}


def visible(hiding):
    """(3, 7) of the hiding above."""
    lengths = hiding.get("key_lengths", torch.tensor([7] * 3))
    return hiding.get("mask", torch.tensor(True)) & (torch.arange(7) < lengths[:, None])


@pytest.mark.parametrize("content", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("num_heads, width", [(1, 8), (1, 32), (2, 64)])
@pytest.mark.parametrize("hiding", HIDING)
def test_hidden_keys_may_hold_anything(hiding, num_heads, width, content):
    torch.manual_seed(0)
    hiding = {name: t.to(DEVICE) for name, t in HIDING[hiding].items()}
    module = AdditiveAttention(5, 6, width, num_heads=num_heads)
    query, memory = torch.randn(3, 4, 5), torch.randn(3, 7, 6)
    seen = visible(hiding).unsqueeze(-1)
    given = {name: t.unsqueeze(1) if name == "mask" else t for name, t in hiding.items()}
    results = []
    for hidden in (0.0, content):
        leaf = torch.where(seen, memory, hidden).requires_grad_()
        keys = module.project_keys(leaf, **given)
        bound = keys.exponentials(torch.float32)[1]
        assert (bound is not None) == KEPT
        if KEPT:
            assert bound == torch.where(seen, module.key_proj(leaf), 0.0).abs().max()
        context = module(query, keys)
        gradients = torch.autograd.grad(context.sin().sum(), (module.weight, module.query_proj.weight))
        results.append([context, *gradients])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@pytest.mark.skipif(not KEPT, reason="exponentials are kept on the CPU alone")
@pytest.mark.parametrize("edited", ["mask", "key_lengths"])
def test_keys_shown_later_do_without_exponentials(step, edited):
    """Of them nothing is known."""
    module, query, memory, lengths = step
    memory[:, -1] = 1e4
    mask = torch.arange(7) < lengths[:, None]
    keys = module.project_keys(memory, **{"mask": {"mask": mask}, "key_lengths": {"key_lengths": lengths}}[edited])
    assert at_hand(keys)
    (mask if edited == "mask" else lengths).fill_(7)
    assert not at_hand(keys)
    torch.testing.assert_close(module(query, keys), module(query, memory))


@pytest.mark.skipif(not KEPT, reason="exponentials are kept on the CPU alone")
def test_inference_mode_notices_edits_too(step):
    """Its tensors have no versions."""
    module, query, memory, lengths = step
    with torch.inference_mode():
        keys = module.project_keys(memory, key_lengths=lengths)
        assert at_hand(keys)
        torch.testing.assert_close(module(query, keys), module(query, memory, key_lengths=lengths))
        for index in ([2, 0, 1], slice(0, 3)):
            chosen = keys[index]
            assert at_hand(chosen)
            chosen.key.add_(1)
            assert not at_hand(chosen)
            chosen.key.sub_(1)
        expected = module(query, memory[[2, 0, 1]], key_lengths=lengths)
        keys = module.project_keys(memory, key_lengths=lengths)
        keys.key.copy_(keys.key[[2, 0, 1]])
        keys.value.copy_(keys.value[[2, 0, 1]])
        assert not at_hand(keys)
        torch.testing.assert_close(module(query, keys), expected)
        hidden = torch.where(torch.arange(7)[:, None] < lengths[:, None, None], memory, 1e4)
        keys = module.project_keys(hidden, key_lengths=lengths.clone())  # what they hide might be shown unnoticed
        assert keys.exponentials(torch.float32)[1] > 1e3


WAYS = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda t: pickle.loads(pickle.dumps(t))}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_copies_of_edited_keys_do_without_exponentials(step, way):
    module, query, memory, _ = step
    with torch.no_grad():
        keys = module.project_keys(memory)
        keys.key.mul_(-1)
        copied = way(keys)
        assert not at_hand(copied)
        torch.testing.assert_close(module(query, copied), module(query, ProjectedKeys(keys.key, keys.value)))


def test_masks_that_do_not_fit_are_named_when_keys_are_projected(step):
    module, _, memory, _ = step
    if KEPT:
        with pytest.raises(
            ValueError, match=r"additive_attention: mask: expected a shape broadcastable to \(3, 1, 7\)"
        ):
            module.project_keys(memory, mask=torch.ones(3, 6, dtype=torch.bool))
