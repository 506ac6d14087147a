"""MultiHopAttention against its reads written out."""

import math

import pytest
import torch
from device import cpu_alone, not_on_the_standin

from fusedattn import MultiHopAttention


def make(update="add", shared=True, hops=3, **options):
    torch.manual_seed(0)
    module = MultiHopAttention(5, 5, 4, hops, update=update, shared=shared, dtype=torch.float64, **options)
    return module, *(torch.randn(2, *s, dtype=torch.float64).requires_grad_() for s in ((5,), (7, 5)))


def written_out(module, query, memory, visible):
    of_hops = []
    for hop in range(module.hops):
        layer = module.attention[hop % len(module.attention)]
        hidden = torch.tanh(layer.query_proj(query).unsqueeze(1) + layer.key_proj(memory))
        weights = (hidden @ layer.weight[0]).masked_fill(~visible, -math.inf).softmax(-1)
        read = (weights.unsqueeze(-1) * memory).sum(1)
        query = query + read if module.update == "add" else read
        of_hops.append(weights)
    return query, torch.stack(of_hops, 1)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("update", ["add", "replace"])
def test_the_formula_and_its_gradients(update, shared):
    module, query, memory = make(update, shared)
    mask, lengths = torch.rand(2, 7) > 0.4, torch.tensor([7, 4])
    mask[:, 0] = True
    leaves = [query, memory, *module.parameters()]
    actual = module(query, memory, mask=mask, key_lengths=lengths)
    expected = written_out(module, query, memory, mask & (torch.arange(7) < lengths[:, None]))
    torch.testing.assert_close(actual, expected)
    grads = [torch.randn_like(t) for t in actual]
    torch.testing.assert_close(*(torch.autograd.grad(of, leaves, grads) for of in (actual, expected)))
    assert len(module.attention) == (1 if shared else 3)


def test_one_glimpse_of_another_width():
    module = MultiHopAttention(5, 6, 4, 1, update="replace")
    query, weights = module(torch.randn(2, 5), torch.randn(2, 7, 6))
    assert query.shape == (2, 6) and weights.shape == (2, 1, 7)


def test_padding_and_memories_of_nothing():
    module, query, memory = make()
    lengths, filled = torch.tensor([4, 0]), memory.detach().clone()
    filled[0, 4:], filled[1] = math.nan, math.nan
    torch.testing.assert_close(
        module(query, filled, key_lengths=lengths), module(query, memory, key_lengths=lengths), rtol=0, atol=0
    )
    read, weights = module(query, memory, key_lengths=lengths)
    assert torch.equal(read[1], query[1]) and (weights[1] == 0).all()


@not_on_the_standin("Dynamo does not trace a tensor that is a subclass of its kind")
def test_compiles_as_one_graph():
    torch.compiler.reset()
    module, query, memory = make()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, memory), module(query, memory))


def test_state_dict_and_options():
    module, query, memory = make(normalize=True, softcap=3.0)
    other = make(normalize=True, softcap=3.0)[0]
    torch.nn.init.zeros_(other.attention[0].weight)
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(other(query, memory), module(query, memory), rtol=0, atol=0)
    assert "hops=3, update='add'" in repr(module) and "softcap=3.0" in repr(module)


@cpu_alone
def test_errors():
    for arguments, options, message in (
        ((5, 5, 4, 0), {}, "hops: expected 1 or more, got 0"),
        ((5, 5, 4, 1), {"update": "mean"}, "update: expected 'add' or 'replace', got 'mean'"),
        ((5, 6, 4, 2), {"update": "replace"}, "memory_dim: expected query_dim=5 for more than one read, got 6"),
    ):
        with pytest.raises(ValueError, match=f"MultiHopAttention: {message}"):
            MultiHopAttention(*arguments, **options)
    with pytest.raises(ValueError, match=r"query: expected shape \(B, 5\), got \(2, 1, 5\)"):
        make()[0](torch.randn(2, 1, 5).double(), torch.randn(2, 7, 5).double())
