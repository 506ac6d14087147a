"""What replace and restore do to a model, whatever is in it; test_dropin_adapters.py has each adapter."""

import copy
import io
import pickle
import re
import runpy
import subprocess
import sys
from contextvars import ContextVar
from pathlib import Path

import pytest
import torch
from originals.gnmt import BahdanauAttention
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations

import fusedattn
from fusedattn import dropin
from fusedattn.dropin import _small, gnmt

ROOT = Path(__file__).parents[1]


def attention(**options):
    return BahdanauAttention(4, 3, 5, batch_first=True, **options)


def inputs(batch=2):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, n, width, generator=generator) for n, width in ((3, 4), (6, 3))]


@pytest.fixture(autouse=True)
def always_fused():
    """What is tested here is small."""
    with _small.always_fused():
        yield


def is_fused(module):
    return type(module).__mro__[1] is BahdanauAttention


def assert_same_answers(a, b):
    torch.testing.assert_close(a(*inputs()), b(*inputs()))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = attention()
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

    def forward(self, query, keys):
        return self.layers[0](self.attention(query, keys)[0])


def test_a_replaced_module_is_its_class_with_all_that_it_had_and_restore_undoes_it():
    model = Decoder().eval()
    before = model.attention
    calls = []
    before.register_forward_hook(lambda *_: calls.append("hook"))
    before.note = "kept"
    state, answer = copy.deepcopy(model.state_dict()), model(*inputs())
    report = dropin.replace(model)
    assert model.attention is before and isinstance(before, BahdanauAttention) and is_fused(before)
    assert type(before).__name__ == "BahdanauAttention" and not before.training and before.note == "kept"
    torch.testing.assert_close(model(*inputs()), answer)
    assert len(calls) == 2
    assert model.state_dict().keys() == state.keys() and model.load_state_dict(state)
    assert [entry.name for entry in report.replaced] == ["attention"] and not report.not_replaced
    assert report.unknown == 6
    assert dropin.restore(model) == ["attention"]
    assert type(before) is BahdanauAttention and torch.equal(model(*inputs()), answer)
    assert dropin.restore(model) == []


def test_copies_and_pickles_are_fused_and_answer_the_same():
    model = Decoder()
    dropin.replace(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [
        copy.deepcopy(model),
        copy.copy(model.attention),
        pickle.loads(pickle.dumps(model, protocol=0)),
        torch.load(file, weights_only=False),
    ]
    for made in copies:
        module = getattr(made, "attention", made)
        assert type(module) is type(model.attention)
        assert_same_answers(module, model.attention)
    assert copies[0].attention.linear_att is not model.attention.linear_att
    dropin.restore(copies[0])
    assert not is_fused(copies[0].attention) and is_fused(model.attention)


def test_compiled_in_one_graph_and_traced_by_autograd_alike():
    model = Decoder()
    expected = torch.autograd.grad(model(*inputs()).sum(), list(model.parameters())[:3])
    dropin.replace(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs()), model(*inputs()))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*inputs()).sum(), list(model.parameters())[:3]), expected
    )


def test_data_parallel_sees_a_gradient_of_every_parameter(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = Decoder()
        del model.layers[1]  # which forward does not call
        dropin.replace(model)
        parallel = DistributedDataParallel(model)
        for _ in range(2):
            parallel(*inputs()).sum().backward()
    finally:
        torch.distributed.destroy_process_group()


def test_replaced_twice_and_shared_in_two_places():
    model = nn.ModuleList([attention(), nn.Sequential()])
    model[1].append(model[0])
    first, second = dropin.replace(model, only="0"), dropin.replace(model, only="0")
    assert [entry.names for entry in first] == [("0", "1.0")] and "0 = 1.0" in str(first)
    assert second.replaced[0].reason == "it was before" and not second.not_replaced
    assert_same_answers(model[0], model[1][0])
    dropin.restore(model)
    assert type(model[0]) is BahdanauAttention


def test_the_model_itself_can_be_replaced():
    module = attention()
    assert dropin.replace(module).replaced[0].names == ("",)
    assert is_fused(module)


@pytest.mark.parametrize("where", ["meta", "half", "tied"])
def test_what_a_module_is_made_of_does_not_hide_how_it_answers(where):
    module = attention(normalize=True)
    if where == "meta":
        module.to("meta")
    elif where == "half":
        module.bfloat16()
    else:
        module.normalize_bias = module.linear_att
    before = {name: (id(t), t._version) for name, t in module.named_parameters()}
    dropin.replace(module, strict=True)
    assert {name: (id(t), t._version) for name, t in module.named_parameters()} == before
    if where == "meta":
        assert module.to_empty(device="cpu")(*inputs())[0].shape == (2, 3, 3)
    if where == "tied":
        module(*inputs())[0].sum().backward()
        assert module.linear_att.grad is not None


def test_small_calls_are_the_originals(monkeypatch):
    """On the CPU, where a fused one would be slower; compiled code has no such calls."""
    module, calls, scores = attention(), [], gnmt.scores
    monkeypatch.setattr(gnmt, "scores", lambda *args: calls.append("fused") or scores(*args))
    monkeypatch.setattr(_small, "_IS_OFF", ContextVar("always_fused", default=False))
    assert "below 32,768 elements on the CPU, 65,536 in training, the original" in str(dropin.replace(module))

    def are_fused(method, *lengths):
        for Tk in lengths:  # (1, 64, Tk, 5) elements
            calls.clear()
            method(torch.randn(1, 64, 5), torch.randn(1, Tk, 5))
            yield bool(calls)

    assert list(are_fused(module.calc_score, 204, 205)) == [False, True]
    with torch.no_grad():
        assert list(are_fused(module.calc_score, 102, 103)) == [False, True]
    compiled = torch.compile(module.calc_score, backend="eager", fullgraph=True)
    assert list(are_fused(compiled, 2)) == [True]


# What is not replaced, and why


def drifted(**changes):
    """An attention whose class was copied and changed."""
    module = attention()
    module.__class__ = type("BahdanauAttention", (BahdanauAttention,), changes)
    return module


def relu(self, att_query, att_keys):
    return torch.relu(att_query[:, :, None] + att_keys[:, None]) @ self.linear_att


def dropout(self, att_query, att_keys):
    e = BahdanauAttention.calc_score(self, att_query, att_keys)
    return nn.functional.dropout(e, 0.5, self.training)


def masked(self, att_query, att_keys, mask=None):
    return BahdanauAttention.calc_score(self, att_query, att_keys)


def renamed(self, q, k):
    return BahdanauAttention.calc_score(self, q, k)


class Louder(BahdanauAttention):
    def calc_score(self, att_query, att_keys):
        return 2 * super().calc_score(att_query, att_keys)


class Quiet(BahdanauAttention):
    pass


def set_on_the_instance():
    module = attention()
    module.calc_score = module.calc_score
    return module


def with_another_shape():
    module = attention()
    module.linear_att = nn.Parameter(torch.randn(1, 5))
    return module


def with_a_bias():
    module = attention()
    module.linear_k = nn.Linear(3, 5)
    return module


def without_keys():
    module = attention()
    del module.linear_k
    return module


def lazy():
    module = attention()
    module.linear_k = nn.LazyLinear(5, bias=False)
    return module


LEFT = {
    "relu": (lambda: drifted(calc_score=relu), "answers a probe differently: by"),
    "dropout": (lambda: drifted(calc_score=dropout), "answers a probe differently: by"),
    "mask": (
        lambda: drifted(calc_score=masked),
        "calc_score takes (self, att_query, att_keys, mask=None), that of the known",
    ),
    "subclass": (lambda: Louder(4, 3, 5), "Louder overrides the calc_score of BahdanauAttention"),
    "instance": (set_on_the_instance, "its calc_score was set on the instance"),
    "shape": (with_another_shape, "linear_att has shape (1, 5), expected (D)"),
    "bias": (with_a_bias, "has linear_k.bias, which the known source has not"),
    "missing": (without_keys, "has no linear_k.weight"),
    "lazy": (lazy, "linear_k.weight is not initialised yet: call the module once before"),
    "raises": (lambda: drifted(calc_score=lambda self, q, k: 1 / 0), "it fails on a probe: ZeroDivisionError"),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_differs_from_the_known_source_is_left_alone_and_the_report_says_why(case):
    make, reason = LEFT[case]
    module = make()
    cls, state = type(module), dict(module.__dict__)
    report = dropin.replace(module)
    assert type(module) is cls and module.__dict__ == state
    assert reason in report.not_replaced[0].reason and reason in str(report)
    with pytest.raises(fusedattn.UnsupportedError, match="strict: nothing was changed"):
        dropin.replace(module, strict=True)


def test_arguments_of_other_names_and_subclasses_that_change_nothing_are_replaced():
    for module in (drifted(calc_score=renamed), Quiet(4, 3, 5)):
        expected = copy.deepcopy(module)
        dropin.replace(module, strict=True)
        q, k = torch.randn(2, 3, 5), torch.randn(2, 4, 5)
        torch.testing.assert_close(module.calc_score(q, k), expected.calc_score(q, k))
    module = drifted(calc_score=renamed)
    dropin.replace(module)
    torch.testing.assert_close(module.calc_score(k=k, q=q), renamed(module, q, k))


def test_nothing_known_and_no_module():
    report = dropin.replace(nn.Sequential(nn.Linear(2, 2)))
    assert not report.entries and "none of the 2 modules is known" in str(report)
    with pytest.raises(fusedattn.UnsupportedError, match="strict: nothing to replace"):
        dropin.replace(nn.Linear(2, 2), strict=True)
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got dict"):
        dropin.replace({})


def test_namesakes_and_modules_of_our_own_are_not_known():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(4, 12)

    model = nn.ModuleList([Attention(), fusedattn.BahdanauAttention(4, 3, 5), fusedattn.AdaLayerNorm(4, 6)])
    model.append(fusedattn.FiLM(4, 3))
    assert not dropin.replace(model).entries


@pytest.mark.parametrize(
    "selection", ["a.*", "gnmt", "gnmt.BahdanauAttention", "BahdanauAttention", Quiet, ["b", "a.?"]], ids=str
)
def test_only_and_exclude_take_paths_names_and_classes(selection):
    def model():
        return nn.ModuleDict({"a": nn.ModuleList([Quiet(4, 3, 5)]), "b": attention()})

    both = selection not in ("a.*", Quiet)
    only, excluded = model(), model()
    dropin.replace(only, only=selection, strict=True)
    report = dropin.replace(excluded, exclude=selection)
    fused = [hasattr(type(m), "_fusedattn_adapter") for m in (only["a"][0], only["b"])]
    assert fused == [True, both]
    fused = [hasattr(type(m), "_fusedattn_adapter") for m in (excluded["a"][0], excluded["b"])]
    assert fused == [False, not both] and report.not_replaced[0].reason == "excluded"


def test_a_name_in_only_that_is_nowhere_is_an_error():
    with pytest.raises(ValueError, match="only: expected the path of a known module .* got 'attnetion'"):
        dropin.replace(Decoder(), only="attnetion")
    with pytest.raises(TypeError, match="exclude: expected names and classes, got int"):
        dropin.replace(Decoder(), exclude=[1])


def test_a_class_given_afterwards_is_not_taken_away():
    module = attention()
    dropin.replace(module)
    parametrizations.weight_norm(module, "linear_att", dim=None)
    assert_same_answers(module, copy.deepcopy(module))
    with pytest.raises(fusedattn.UnsupportedError, match="was made a ParametrizedBahdanauAttention after replace"):
        dropin.restore(module)


# The report and the command line


def test_numbered_layers_share_a_line_of_the_report():
    model = nn.ModuleList([attention() for _ in range(12)] + [Louder(4, 3, 5)])
    lines = str(dropin.replace(model)).splitlines()
    assert lines[0] == "fusedattn.dropin: 12 of 13 known modules are fused"
    assert lines[1].split()[:3] == ["fused", "*", "(12)"] and lines[2].split()[:2] == ["left", "12"]


def test_the_command_prints_the_report_of_a_file_and_imports_no_package_itself(tmp_path):
    (tmp_path / "model.py").write_text(
        f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from originals.gnmt import BahdanauAttention
def build():
    return BahdanauAttention(4, 3, 5)
import atexit
atexit.register(lambda: print([m for m in ("diffusers", "keras", "espnet", "speechbrain") if m in sys.modules]))
"""
    )
    command = [sys.executable, "-m", "fusedattn.dropin", f"{tmp_path}/model.py:build"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout.splitlines() == [*str(dropin.replace(attention())).splitlines(), "[]"]


@pytest.mark.parametrize(
    "example, known, sizes",
    [
        ("translation", "gnmt.BahdanauAttention", {"width": 8}),
        ("tacotron2", "tacotron2.Attention", {"width": 8, "length": 4, "batch": 2}),
        ("captioning", "captioning.Attention", {"width": 8, "places": 16, "encoder_dim": 8, "batch": 3}),
        ("diffusers", "Block: norms", {"width": 32, "heads": 1, "layers": 1, "size": 4, "batch": 2}),
    ],
)
def test_the_examples_train_alike_before_and_after(example, known, sizes, capsys, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    runpy.run_path(str(ROOT / "examples" / f"dropin_{example}.py"))["main"](**sizes, steps=2)
    *report, before, after = capsys.readouterr().out.splitlines()
    assert known in "".join(report)
    losses = [[float(loss) for loss in re.findall(r"\d+\.\d{4}", line)] for line in (before, after)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-4) and losses[0][0] != losses[0][1]


def test_the_list_of_what_is_known_names_each_once():
    names = [adapter.name for adapter in dropin.supported()]
    assert len(set(names)) == len(names) and "gnmt.BahdanauAttention" in names
