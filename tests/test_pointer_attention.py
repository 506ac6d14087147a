"""PointerAttention against the formulas of Vinyals et al. and Bello et al. written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from device import cpu_alone, not_on_the_standin

from fusedattn import PointerAttention

CLIPS = [None, 10.0]


def make(clip=None, dtype=torch.float64, **options):
    torch.manual_seed(0)
    module = PointerAttention(5, 6, 4, clip=clip, dtype=dtype, **options)
    query, key = (torch.randn(2, *s, dtype=dtype).requires_grad_() for s in ((3, 5), (7, 6)))
    return module, query, key


def written_out(module, query, key, visible):
    phi = getattr(torch, module.activation)
    u = phi(module.query_proj(query).unsqueeze(2) + module.key_proj(key).unsqueeze(1)) @ module.weight[0]
    u = u if module.softcap is None else module.softcap * torch.tanh(u)
    return u.masked_fill(~visible, -math.inf)


def hiding():
    mask, lengths = torch.rand(2, 3, 7) > 0.4, torch.tensor([7, 4])
    mask[..., 0] = True
    return mask, lengths, mask & (torch.arange(7) < lengths[:, None, None])


@pytest.mark.parametrize("clip, activation", zip(CLIPS, ["tanh", "relu"], strict=True))
def test_the_formula_and_its_gradients(clip, activation):
    module, query, key = make(clip, activation=activation)
    mask, lengths, visible = hiding()
    leaves, target = [query, key, *module.parameters()], torch.tensor([0, 0, 0, 0, 0, 0])
    logits, expected = module(query, key, mask=mask, key_lengths=lengths), written_out(module, query, key, visible)
    torch.testing.assert_close(logits, expected)
    losses = [F.cross_entropy(u.flatten(0, 1), target) for u in (logits, expected)]
    torch.testing.assert_close(*(torch.autograd.grad(loss, leaves) for loss in losses))
    torch.testing.assert_close(module(query, key), written_out(module, query, key, torch.tensor(True)))


@pytest.mark.parametrize("normalize", [False, True])
def test_steps_are_the_sequence(normalize):
    module, query, key = make(normalize=normalize)
    mask, lengths, _ = hiding()
    expected = module(query, key, mask=mask, key_lengths=lengths)
    for keys, options in (
        (key, {"key_lengths": lengths}),
        (module.project_keys(key), {"key_lengths": lengths}),
        (module.project_keys(key, key_lengths=lengths), {}),
    ):
        steps = [module(query[:, t], keys, mask=mask[:, t], **options) for t in range(3)]
        torch.testing.assert_close(torch.stack(steps, 1), expected)
    of_keys = module(query[:, 0], module.project_keys(key, mask=mask[:, 0], key_lengths=lengths))
    torch.testing.assert_close(of_keys, expected[:, 0])


def test_padding_may_hold_anything():
    module, query, key = make()
    lengths = torch.tensor([7, 4])
    filled = key.detach().clone()
    filled[1, 4:] = math.nan
    filled.requires_grad_()
    found = []
    for of in (key, filled):
        logits = module(query, of, key_lengths=lengths)
        loss = F.cross_entropy(logits.flatten(0, 1), torch.zeros(6, dtype=torch.int64))
        found.append((logits, *torch.autograd.grad(loss, (query, of, module.weight))))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    assert (module(query, key, mask=torch.zeros(1, 1, 7, dtype=torch.bool)) == -math.inf).all()


@not_on_the_standin("Dynamo does not trace a tensor that is a subclass of its kind")
def test_compiles_as_one_graph():
    torch.compiler.reset()
    module, query, key = make(10.0)
    mask, lengths, _ = hiding()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    options = {"mask": mask, "key_lengths": lengths}
    torch.testing.assert_close(compiled(query, key, **options), module(query, key, **options))


def test_state_dict():
    module, query, key = make()
    other = make()[0]
    other.reset_parameters()
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(other(query, key), module(query, key), rtol=0, atol=0)
    assert set(module.state_dict()) == {"weight", "query_proj.weight", "key_proj.weight"}


@cpu_alone
def test_errors():
    with pytest.raises(ValueError, match="PointerAttention: clip: expected a positive number or None, got 0.0"):
        PointerAttention(5, 6, 4, clip=0.0)
    module, query, key = make()
    for call, message in (
        (lambda: module(query[..., :4], key), r"PointerAttention: query: expected shape \(B, Tq, 5\)"),
        (
            lambda: module(query[:, 0], key, mask=torch.ones(7) > 0),
            r"PointerAttention: mask: .*\(B, T\), got \(7,\)",
        ),
        (lambda: module(query, key, mask=torch.ones(3, 7)), "mask: expected a bool Tensor .*got torch.float32"),
        (lambda: module(query, key[..., :4]), r"key: expected shape \(B, Tk, 6\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
