"""Every adapter against its original: the package where it is installed, and the formula of its source.

A case makes an original and uses it as people do. Answers, state_dict, and the gradients of all parameters and
inputs of the replaced module are compared with float64, beside the original in the same dtype.
"""

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from tolerance import assert_close_to_reference
from torch import nn
from torch.utils import _pytree

from fusedattn import dropin

# Where the packages keep the classes that tests/originals has as formulas.
PACKAGES = {"diffusers": "diffusers.models.normalization"}


@dataclass
class Case:
    """``make(classes)`` gives a module, ``use(module, *inputs)`` its answers to random inputs of these shapes."""

    make: Callable
    shapes: tuple
    use: Callable = lambda module, *inputs: module(*inputs)
    in_package: bool = True  # whether the package's class takes these arguments, too


def with_emb(module, x, emb):
    return module(x, emb=emb)


def with_mask(*lengths):
    def use(module, query, keys):
        module.set_mask(torch.tensor(lengths), keys)
        return module(query, keys)

    return use


CASES = {
    "diffusers.AdaLayerNorm": {
        "chunk1": Case(
            lambda c: c.AdaLayerNorm(8, output_dim=12, chunk_dim=1),
            ((2, 5, 6), (2, 8)),
            lambda m, x, temb: m(x, temb=temb),
        ),
        "chunk0-affine": Case(
            lambda c: c.AdaLayerNorm(6, num_embeddings=3, norm_elementwise_affine=True),
            ((2, 5, 6),),
            lambda m, x: m(x, torch.tensor(2)),
        ),
    },
    "diffusers.AdaLayerNormZero": {"emb": Case(lambda c: c.AdaLayerNormZero(6), ((2, 5, 6), (2, 6)), with_emb)},
    "diffusers.AdaLayerNormZeroSingle": {
        "no-bias": Case(lambda c: c.AdaLayerNormZeroSingle(6, bias=False), ((2, 5, 6), (2, 6)), with_emb)
    },
    "diffusers.AdaLayerNormContinuous": {
        "layer": Case(lambda c: c.AdaLayerNormContinuous(6, 4), ((2, 5, 6), (2, 4))),
        "rms": Case(lambda c: c.AdaLayerNormContinuous(6, 4, norm_type="rms_norm"), ((2, 5, 6), (2, 4))),
    },
    "diffusers.AdaGroupNorm": {
        "silu": Case(lambda c: c.AdaGroupNorm(5, 6, 2, act_fn="silu"), ((2, 6, 3, 4), (2, 5))),
    },
    "gnmt.BahdanauAttention": {
        "time-first": Case(lambda c: c.BahdanauAttention(4, 3, 5), ((6, 3, 4), (7, 3, 3)), with_mask(7, 2, 0)),
        "normalized-step": Case(
            lambda c: c.BahdanauAttention(4, 3, 5, normalize=True, batch_first=True),
            ((2, 4), (2, 7, 3)),
            with_mask(5, 7),
        ),
        "unmasked": Case(lambda c: c.BahdanauAttention(4, 3, 5, batch_first=True), ((2, 5, 4), (2, 7, 3))),
    },
}


def sources():
    for name, cases in CASES.items():
        package = name.partition(".")[0]
        for case in cases:
            yield pytest.param(f"originals.{package}", name, case, id=f"{name}-{case}")
            if package in PACKAGES and cases[case].in_package:
                yield pytest.param(PACKAGES[package], name, case, id=f"{name}-{case}-package")


def original(source, name, case):
    """A module, in training, whose parameters are none of the special values that it may start with."""
    if source.startswith("originals."):
        classes = importlib.import_module(source)
    else:
        classes = pytest.importorskip(source, reason=f"{source} is not installed (pip install '.[dropin]')")
    torch.manual_seed(0)
    module = CASES[name][case].make(classes)
    with torch.no_grad():
        for t in module.parameters():
            t.normal_()
    return module


def flat(answers):
    return [t for t in _pytree.tree_leaves(answers) if isinstance(t, torch.Tensor)]


def run(module, case, dtype, is_training):
    """Answers, and the gradients of inputs and parameters, in that order, with names."""
    module.train(is_training)
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in case.shapes]
    torch.manual_seed(2)  # of dropout
    answers = flat(case.use(module, *inputs))
    wanted = {f"input {n}": t for n, t in enumerate(inputs)} | dict(module.named_parameters())
    grads = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in answers]
    found = torch.autograd.grad(answers, list(wanted.values()), grads, allow_unused=True)
    named = dict(zip(wanted, found, strict=True))
    return {f"answer {n}": t.detach() for n, t in enumerate(answers)} | {
        f"gradient of {n}": t for n, t in named.items()
    }


def is_fused(module):
    return any(hasattr(type(m), "_fusedattn_adapter") for m in module.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source, name, case", list(sources()))
def test_answers_and_gradients_are_those_of_the_original(source, name, case, dtype):
    module = original(source, name, case).to(dtype)
    fused, exact, case = copy.deepcopy(module), copy.deepcopy(module).double(), CASES[name][case]
    report = dropin.replace(fused, only=name, strict=True)
    assert report.replaced[0].adapter.name == name
    assert fused.state_dict().keys() == module.state_dict().keys() and fused.load_state_dict(module.state_dict())
    for is_training in (True, False):
        eager, wide = run(module, case, dtype, is_training), run(exact, case, torch.float64, is_training)
        found = run(fused, case, dtype, is_training)
        assert found.keys() == eager.keys()
        for what, t in found.items():
            assert (t is None) == (eager[what] is None), what
            if t is not None:
                size = max(1.0, wide[what].abs().max().item())
                # In half precision what lies between two products is rounded, too.
                rounded = torch.finfo(dtype).eps if dtype is torch.bfloat16 else 0.0
                assert_close_to_reference(
                    t, eager[what], wide[what], terms=64, scale=size, factor_eps=rounded, name=what
                )
    buffers = zip(fused.buffers(), module.buffers(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-2 if dtype is torch.bfloat16 else 1e-5) for a, b in buffers)
    dropin.restore(fused)
    assert not is_fused(fused) and type(fused) is type(module) and fused.__dict__.keys() == module.__dict__.keys()


@pytest.mark.parametrize("name", CASES)
def test_hooks_of_children_are_called(name):
    """Of those that a fused forward calls, and, because the original runs then, of those that it does not."""
    case = next(iter(CASES[name]))
    module = original(f"originals.{name.partition('.')[0]}", name, case)
    children = [
        child for child in module.modules() if child is not module and not isinstance(child, nn.ModuleList)
    ]
    dropin.replace(module, only=name, strict=True)
    for child in children:
        called = []
        handle = child.register_forward_hook(lambda *_, called=called: called.append(1))
        run(module, CASES[name][case], torch.float32, is_training=False)
        before = list(called)
        dropin.restore(module)
        run(module, CASES[name][case], torch.float32, is_training=False)
        assert len(called) == 2 * len(before), type(child).__name__
        handle.remove()
        dropin.replace(module, only=name, strict=True)


def test_every_adapter_is_tested():
    assert CASES.keys() == {adapter.name for adapter in dropin.supported()}
