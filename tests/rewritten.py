"""What tests of graphs share: a form's answers before and after it was rewritten."""

import functools

import torch
import torch.nn.functional as F
from tolerance import assert_close_to_reference
from torch import nn

from fusedattn import dropin

B, TQ, TK, D, DV = 2, 3, 5, 8, 6
STEP = {"q": (B, D), "k": (B, TK, D), "x": (B, TK, DV), "w": (D,)}
fused = functools.partial(dropin.backend, always=True)


def sums_of_a_step(q, k, x, w):
    weights = F.softmax((w * torch.tanh(q.unsqueeze(1) + k)).sum(-1), dim=1)
    return (weights.unsqueeze(-1) * x).sum(dim=1), weights


def made(form, shapes, dtype=torch.float32):
    """A form, as a module or function of a seed, and its inputs."""
    torch.manual_seed(0)
    model = form().to(dtype) if isinstance(form, type) else form
    return model, [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes.values()]


def answers(function, inputs, parameters=()):
    """Results, and the gradients of all inputs and parameters."""
    torch.manual_seed(3)
    results = function(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    total = sum((r * torch.linspace(-1, 1, r.numel(), dtype=r.dtype).view(r.shape)).sum() for r in results)
    leaves = [*inputs, *parameters]
    return [*results, *torch.autograd.grad(total, leaves, materialize_grads=True)]


def parameters(model):
    return list(model.parameters()) if isinstance(model, nn.Module) else []


def functions(graph_module):
    return [node.target for node in graph_module.graph.nodes]


def in_float64(model, inputs):
    wide = type(model)().double() if isinstance(model, nn.Module) else model
    if isinstance(model, nn.Module):
        wide.load_state_dict(model.state_dict())
    return answers(wide, [t.detach().double().requires_grad_() for t in inputs], parameters(wide))


def assert_as_before(found, model, inputs):
    plain, exact = answers(model, inputs, parameters(model)), in_float64(model, inputs)
    for n, (a, b, c) in enumerate(zip(found, plain, exact, strict=True)):
        scale = max(1.0, c.abs().max().item())
        assert_close_to_reference(a, b, c, terms=B * 2 * TQ * TK * D, name=f"answer {n}", scale=scale)


def check_core(form, shapes, patterns, changing):
    """A module's graph in core ATen, of sizes that are known or change, is rewritten and answers as before."""
    torch.manual_seed(0)
    model, inputs = form(), [torch.randn(shape, requires_grad=True) for shape in shapes.values()]
    sizes = {name: {0: torch.export.Dim.AUTO} if len(shape) > 1 else {} for name, shape in shapes.items()}
    sizes = tuple(sizes.values()) if changing else None
    program = torch.export.export(model, tuple(inputs), dynamic_shapes=sizes).run_decompositions().module()
    report = dropin.rewrite(program)
    assert len(report.replaced) == patterns and not report.not_replaced, report
    assert not {torch.ops.aten.tanh.default, torch.ops.aten.native_layer_norm.default} & set(functions(program))
    found, expected = (answers(f, inputs) for f in (program, model))
    torch.testing.assert_close(found, expected)
