"""Every adapter against its original: the package where it is installed, and the formula of its source.

A case makes an original and uses it as people do. Answers, state_dict, and the gradients of all parameters and
inputs of the replaced module are compared with float64, beside the original in the same dtype.
"""

import collections
import copy
import importlib
import pickle

import pytest
import torch
from dropin_cases import CASES, lengths_mask
from tolerance import assert_close_to_reference
from torch.utils import _pytree

from fusedattn import dropin
from fusedattn.dropin import _small

# Where the packages keep the classes that tests/originals has as formulas.
PACKAGES = {
    "diffusers": "diffusers.models.normalization",
    "diffusers.BasicTransformerBlock": "diffusers.models.attention",
    "diffusers.FluxSingleTransformerBlock": "diffusers.models.transformers.transformer_flux",
    "diffusers.FluxTransformerBlock": "diffusers.models.transformers.transformer_flux",
    "diffusers.JointTransformerBlock": "diffusers.models.attention",
    "diffusers.ResnetBlock2D": "diffusers.models.resnet",
    "espnet": "espnet.nets.pytorch_backend.rnn.attentions",
    "speechbrain": "speechbrain.nnet.attention",
    "torch_geometric": "torch_geometric.nn.conv.film_conv",
    "torchmil": "torchmil.nn.attention.attention_pool",
}


@pytest.fixture(autouse=True)
def always_fused():
    """Cases are small, which would leave most of them to the originals."""
    with _small.always_fused():
        yield


def sources():
    """Where the original is, which case of which adapter, and in which dtype: half precision once for each."""
    for name, cases in CASES.items():
        package = name.partition(".")[0]
        for case in cases:
            yield pytest.param(f"originals.{package}", name, case, torch.float32, id=f"{name}-{case}")
            if where := PACKAGES.get(name, PACKAGES.get(package)):
                yield pytest.param(where, name, case, torch.float32, id=f"{name}-{case}-package")
        yield pytest.param(f"originals.{package}", name, next(iter(cases)), torch.bfloat16, id=f"{name}-bfloat16")


def original(source, name, case):
    """A module, in training, whose parameters are none of the special values that it may start with."""
    if source.startswith("originals."):
        classes = importlib.import_module(source)
    else:
        classes = pytest.importorskip(source, reason=f"{source} cannot be imported (CONTRIBUTING.md)")
    torch.manual_seed(0)
    module = CASES[name][case].make(classes)
    with torch.no_grad():
        for t in module.parameters():
            t.normal_(std=CASES[name][case].std)
    return module


def flat(answers):
    return [t for t in _pytree.tree_leaves(answers) if isinstance(t, torch.Tensor)]


def run(module, case, dtype, is_training):
    """Answers, buffers, and the gradients of inputs and parameters, each by a name."""
    module.train(is_training)
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in case.shapes]
    torch.manual_seed(2)  # of dropout
    answers = flat(case.use(module, *inputs))
    wanted = {f"input {n}": t for n, t in enumerate(inputs)} | dict(module.named_parameters())
    made = [t for t in answers if t.requires_grad]
    grads = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in made]
    found = torch.autograd.grad(made, list(wanted.values()), grads, allow_unused=True)
    named = dict(zip(wanted, found, strict=True))
    answers += [t for t in module.buffers() if t.is_floating_point()]
    return {f"answer {n}": t.detach() for n, t in enumerate(answers)} | {
        f"gradient of {n}": t for n, t in named.items()
    }


def is_fused(module):
    return any(hasattr(type(m), "_fusedattn_adapter") for m in module.modules())


@pytest.mark.parametrize("source, name, case, dtype", list(sources()))
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
        # Of the terms of sums, and in half precision what lies between two products is rounded, too.
        size = max(t.abs().max().item() for t in wide.values() if t is not None)
        rounded = torch.finfo(dtype).eps if dtype is torch.bfloat16 else 0.0
        for what, t in found.items():
            assert (t is None) == (eager[what] is None), what
            if t is not None:
                assert_close_to_reference(
                    t, eager[what], wide[what], terms=64, scale=size, factor_eps=rounded, name=what
                )
    dropin.restore(fused)
    assert not is_fused(fused) and type(fused) is type(module) and fused.__dict__.keys() == module.__dict__.keys()


def formula(name):
    """Of the first case."""
    return original(f"originals.{name.partition('.')[0]}", name, next(iter(CASES[name])))


class Louder(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_child_that_is_exchanged_afterwards_is_called():
    """As adapters of low rank and quantisation do."""
    name, case = "fairseq.MLPAttention", CASES["fairseq.MLPAttention"]["all"]
    module = formula(name)
    fused = copy.deepcopy(module)
    dropin.replace(fused, strict=True)
    for made in (module, fused):
        made.to_scores = Louder(*reversed(made.to_scores.weight.shape), bias=False)
        torch.nn.init.ones_(made.to_scores.weight)
    found, expected = (run(made, case, torch.float32, is_training=True) for made in (fused, module))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", CASES)
def test_under_autocast_answers_have_the_dtypes_of_the_original(name):
    module, case = formula(name).eval(), next(iter(CASES[name].values()))
    fused = copy.deepcopy(module)
    dropin.replace(fused, only=name, strict=True)
    inputs = [torch.randn(s) for s in case.shapes]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for expected, found in zip(flat(case.use(module, *inputs)), flat(case.use(fused, *inputs)), strict=True):
            torch.testing.assert_close(
                found, expected, rtol=0.05, atol=0.05 * max(1.0, expected.abs().max().item())
            )


@pytest.mark.parametrize(
    "name", ["espnet.AttAdd", "espnet.AttLoc", "espnet.AttMultiHeadLoc", "tacotron2.Attention"]
)
def test_steps_leave_the_gradients_of_keys_to_one_node_and_copies_are_without_them(name):
    module, case = formula(name), CASES[name]["steps"]
    dropin.replace(module, only=name, strict=True)
    nodes = [t.grad_fn for t in flat(case.use(module, *(torch.randn(s, requires_grad=True) for s in case.shapes)))]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [before for before, _ in node.next_functions]
    steps = [node for node in seen if "attention_fwd_step" in node.name()]
    assert len(steps) >= 2 and len({node.next_functions[-1][0] for node in steps}) < len(steps)
    (adapter,) = [entry.adapter for entry in dropin.replace(module).replaced]
    assert adapter.state[0] in module.__dict__
    assert adapter.state[0] not in pickle.loads(pickle.dumps(module)).__dict__


def test_features_are_projected_once_for_the_steps_of_a_loop_and_anew_where_something_changed(monkeypatch):
    module, linear, called = formula("captioning.Attention"), torch.nn.functional.linear, []
    dropin.replace(module, strict=True)
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, *layer: called.append(x) or linear(x, *layer))
    features, state = torch.randn(2, 6, 3), torch.randn(2, 4)

    def projections(*memories):
        called.clear()
        loss = sum(module(memory, state[: len(memory)])[0].sum() for memory in memories)
        return loss, sum(x.dim() == 3 for x in called)

    loss, count = projections(features[:2], features, features[:1])
    assert count == 1
    loss.backward()  # with the graph of the projection goes what was kept
    loss, count = projections(features, features[:1])
    assert count == 1
    loss.backward()
    assert projections(features, features[1:], features[:, :3])[1] == 3
    assert projections(features)[1] == 1 and projections(features)[1] == 0
    for t in (features, module.encoder_att.weight):
        with torch.no_grad():
            t += 1
        assert projections(features)[1] == 1
    with torch.no_grad():
        assert projections(features)[1] == 1 and projections(features[:1])[1] == 0
    module.encoder_att.register_forward_hook(lambda *_: None)
    assert projections(features, features)[1] == 2


@pytest.mark.parametrize("name", ["dit.DiTBlock", "espnet.AttAdd"])
def test_a_replaced_module_compiles_in_one_graph(name):
    module, case = formula(name).eval(), next(iter(CASES[name].values()))
    dropin.replace(module, only=name, strict=True)
    inputs = [torch.randn(s) for s in case.shapes]
    expected = flat(case.use(module, *inputs))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for found, answer in zip(flat(case.use(compiled, *inputs)), expected, strict=True):
        torch.testing.assert_close(found, answer)


@pytest.mark.parametrize("name", CASES)
def test_hooks_of_children_are_called_as_often_as_by_the_original(name):
    """Of those that the fused module calls, and, because the original runs then, of those that it does not."""
    module, case = formula(name), next(iter(CASES[name].values()))
    adapter = dropin.replace(module, strict=True).replaced[0].adapter
    children = dict(module.named_modules())
    bypassed = {child for child in children if child.partition(".")[0] in adapter.inside}
    for watched in (children.keys() - {""} - bypassed, children.keys() - {""}):
        called = collections.Counter()

        def count(child, *_, called=called):
            called[id(child)] += 1

        handles = [children[child].register_forward_hook(count) for child in watched]
        run(module, case, torch.float32, is_training=False)
        by_the_fused = called.copy()
        dropin.restore(module)
        run(module, case, torch.float32, is_training=False)
        assert called == by_the_fused + by_the_fused
        if watched & bypassed:
            assert "has hooks" in dropin.replace(module, only=name).not_replaced[0].reason
        for handle in handles:
            handle.remove()
        dropin.replace(module, only=name, strict=True)


def test_the_layer_of_keras_keeps_its_masks_dropout_and_scores(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras", reason="keras cannot be imported (CONTRIBUTING.md)")
    if keras.backend.backend() != "torch":
        pytest.skip(f"keras has the {keras.backend.backend()} backend")
    for use_scale in (True, False):
        layer = keras.layers.AdditiveAttention(use_scale=use_scale, dropout=0.0)
        inputs = [torch.randn(2, n, 4).requires_grad_() for n in (3, 5, 5)]
        layer.build([tuple(t.shape) for t in inputs])
        masks = [lengths_mask((2, 3), 3), lengths_mask((5, 0), 5)]

        def answers(layer=layer, inputs=inputs, masks=masks):
            found = layer(inputs, mask=masks, return_attention_scores=True, use_causal_mask=True)
            wanted = [*inputs, *layer.parameters()]
            return *found, *torch.autograd.grad([t.sin().sum() for t in found], wanted)

        expected = answers()
        dropin.replace(layer, strict=True)
        torch.testing.assert_close(answers(), expected)
        dropin.restore(layer)
        assert type(layer) is keras.layers.AdditiveAttention


def test_the_report_has_limits_beside_the_smallest_size():
    report = str(dropin.replace(formula("captioning.Attention")))
    assert "do not see edits of encoder_att through .data in between; below 65,536 elements" in report


def test_what_is_known_and_no_faster_is_left_and_the_report_says_why():
    module = importlib.import_module("originals.han").WordAttention(9, 3, 2, 1, 5, 0.5)
    (left,) = dropin.replace(module).not_replaced
    assert left.adapter.name == "han.WordAttention" and "recurrent networks take nearly all" in left.reason


def test_every_adapter_is_tested():
    left = {"han.WordAttention", "han.SentenceAttention"}
    assert CASES.keys() | left == {adapter.name for adapter in dropin.supported()}
