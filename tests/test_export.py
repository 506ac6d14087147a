"""Programs that leave Python: TorchScript traces, ONNX, plain ATen."""

import importlib.util

import pytest
import torch

import fusedattn
from fusedattn import AdditiveAttention, BahdanauAttention, FiLM

MODULES = {
    "attention": (
        lambda: AdditiveAttention(5, 6, 8, num_heads=2, out_dim=3, normalize=True),
        [(2, 3, 5), (2, 4, 6)],
    ),
    "bahdanau": (lambda: BahdanauAttention(5, 6, 8, softcap=3.0), [(2, 5), (2, 4, 6)]),
    "film": (lambda: FiLM(4, 3, activation="gelu"), [(2, 3, 7), (2, 4)]),
}


@pytest.fixture(params=MODULES)
def case(request):
    """(module, inputs)"""
    torch.manual_seed(0)
    make, shapes = MODULES[request.param]
    module = make()
    for parameter in module.parameters():  # FiLM starts as the identity
        torch.nn.init.normal_(parameter)
    return module, tuple(torch.randn(shape) for shape in shapes)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_passes_its_own_check(case, training):
    module, inputs = case
    with torch.set_grad_enabled(training):
        traced = torch.jit.trace(module, inputs, check_trace=True)
    torch.testing.assert_close(traced(*inputs), module(*inputs))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripting_says_what_to_use_instead(case):
    module, _ = case
    for scripted in (module, torch.nn.Sequential(module)):
        with pytest.raises(NotImplementedError, match=f"{type(module).__name__}: torch.jit.script.*torch.export"):
            torch.jit.script(scripted)


def test_decomposed_into_aten(case):
    module, inputs = case
    exported = torch.export.export(module, inputs)
    decomposed = exported.run_decompositions(fusedattn.decompositions())
    names = [str(node.target) for node in decomposed.graph.nodes if node.op == "call_function"]
    assert any(str(node.target).startswith("fusedattn") for node in exported.graph.nodes)
    assert not [name for name in names if name.startswith("fusedattn")]
    torch.testing.assert_close(decomposed.module()(*inputs), module(*inputs))


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs the extra fusedattn[test]",
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx_runs_in_its_own_runtime(case, tmp_path):
    import onnxruntime

    module, inputs = case
    program = torch.onnx.export(module.eval(), inputs, dynamo=True, verbose=False)
    program.save(tmp_path / "module.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "module.onnx"), providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    found = session.run(None, {name: t.numpy() for name, t in zip(names, inputs, strict=True)})
    expected = module(*inputs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    torch.testing.assert_close(tuple(map(torch.from_numpy, found)), expected, atol=1e-5, rtol=1e-5)
