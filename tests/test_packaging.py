"""The package around the kernels: version, `python -m fusedattn.info`, the CPU level, choosing a backend."""

import importlib.metadata
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import fusedattn
from fusedattn import _library, info
from fusedattn._dispatch import UnsupportedError, choose, cuda_reasons

ROOT = Path(__file__).parent.parent


def run_python(*arguments, **variables):
    environment = {**os.environ, **variables}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def test_public_names_exist_and_have_a_docstring():
    for name in fusedattn.__all__:
        assert getattr(fusedattn, name).__doc__, name


def test_version_is_that_of_the_installed_package():
    try:
        installed = importlib.metadata.version("fusedattn")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("fusedattn is imported from the tree, not installed")
    assert installed == fusedattn.__version__


def test_changelog_starts_with_this_version():
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == fusedattn.__version__


def test_readme_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})


def test_fresh_memory_is_poisoned():
    assert torch.empty(64).isnan().all()
    assert torch.ops.aten.empty.memory_format([64]).isnan().all()  # what C++ outputs are allocated by


def test_info_names_everything():
    result = run_python("-m", "fusedattn.info")
    assert result.returncode == 0, result.stderr
    expected = ["fusedattn", fusedattn.__version__, torch.__version__, "python", "extension", "threads"]
    expected += ["CPU level", _library.cpu_capability(), info.VARIABLE]
    expected += ["additive_attention", "film", "cpu", "cuda", "triton", "reference"]
    assert [text for text in expected if text not in result.stdout] == []


def test_info_reports_an_extension_that_did_not_load(monkeypatch):
    monkeypatch.setattr(_library, "EXTENSION_ERROR", ImportError("no such symbol"))
    text = info.report()
    assert text.count("no such symbol") == 1 + 2 * len(info.OPS)  # and for the CPU and CUDA kernels of each


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_info_and_the_refusal_say_why_cuda_cannot_run():
    words = "there are no CUDA kernels here: this torch is built without CUDA"
    text = info.report()
    assert text.count(words) == len(info.OPS)
    with pytest.raises(UnsupportedError, match=words):
        fusedattn.film(torch.ones(2, 3), backend="cuda")
    with pytest.raises(UnsupportedError, match=words):
        fusedattn.additive_attention(*torch.ones(3, 1, 2, 4), torch.ones(4), backend="cuda")


def test_cuda_reasons_name_every_obstacle(monkeypatch):
    """As on a machine with a torch for CUDA: what is on the CPU, of another dtype, or on an old GPU is refused."""
    monkeypatch.setattr(_library, "CUDA_ERROR", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu = types.SimpleNamespace(name="Tesla T4", major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    cuda = torch.device("cuda", 0)
    assert cuda_reasons(cuda, torch.float32) == ["Tesla T4 has compute capability 7.5, below 8.0"]
    gpu.major, gpu.minor = 9, 0
    assert cuda_reasons(cuda, torch.float32) == []
    assert cuda_reasons(torch.device("cpu"), torch.float32) == ["inputs are on cpu, not on a CUDA device"]
    (reason,) = cuda_reasons(cuda, torch.int8)
    assert "torch.int8" in reason
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda_reasons(cuda, torch.float32) == ["torch finds no CUDA device"]


@pytest.mark.parametrize("level", info.LEVELS)
def test_cpu_level_can_be_lowered(level):
    result = run_python("-c", "import fusedattn.info as i; print(i._cpu_level())", FUSEDATTN_CPU_CAPABILITY=level)
    assert result.returncode == 0, result.stderr
    supported = info.supported_levels()
    in_use = level if level in supported else supported[0]
    assert result.stdout.strip() == f"{in_use}; this machine supports {', '.join(supported)}"


def test_levels_are_listed_best_first():
    result = run_python("-m", "fusedattn.info", "--levels", FUSEDATTN_CPU_CAPABILITY="default")
    levels = result.stdout.split()
    assert levels == info.supported_levels()
    assert levels[-1] == "default"


def test_unknown_cpu_level_is_a_clear_error():
    code = "import torch, fusedattn; t = torch.ones(1, 1, 4); fusedattn.additive_attention(t, t, t, t[0, 0])"
    result = run_python("-c", code, FUSEDATTN_CPU_CAPABILITY="avx3")
    assert result.returncode != 0
    assert "FUSEDATTN_CPU_CAPABILITY: expected default, avx2 or avx512, got 'avx3'" in result.stderr
    report = run_python("-m", "fusedattn.info", FUSEDATTN_CPU_CAPABILITY="avx3")
    assert report.returncode == 0, report.stderr
    assert "got 'avx3'" in report.stdout


def backends(**reasons):
    return {name: lambda found=found: found for name, found in reasons.items()}


def describe():
    return "x (2, 3), torch.int8 on meta"


def test_auto_takes_the_first_backend_that_can_run():
    assert choose("film", "auto", backends(cuda=["no GPU"], cpu=[], slow=[]), describe) == "cpu"


def test_the_inputs_are_described_only_for_an_error():
    assert choose("film", "cpu", backends(cpu=[]), lambda: pytest.fail("described")) == "cpu"


def test_reference_runs_only_by_name():
    assert choose("film", "reference", backends(cpu=["no"]), describe) == "reference"
    with pytest.raises(UnsupportedError, match="no backend can run"):
        choose("film", "auto", backends(cpu=["no"]), describe)


@pytest.mark.parametrize("requested", ["cuda", "auto"])
def test_refusal_lists_inputs_and_every_reason(requested):
    found = backends(cuda=["inputs are on meta", "dtype torch.int8"], cpu=["inputs are not on the CPU"])
    with pytest.raises(UnsupportedError) as error:
        choose("film", requested, found, describe)
    assert str(error.value).splitlines()[1:] == [
        "  cuda: inputs are on meta; dtype torch.int8",
        "  cpu: inputs are not on the CPU",
        "  reference: can run (plain PyTorch, backend='reference')",
    ]
    assert describe() in str(error.value).splitlines()[0]


def test_unknown_backend_names_the_choices():
    with pytest.raises(ValueError, match="backend: expected one of 'auto', 'cpu', 'reference', got 'gpu'"):
        choose("film", "gpu", backends(cpu=[]), describe)


def test_unsupported_error_is_a_value_error():
    assert issubclass(fusedattn.UnsupportedError, ValueError)


def test_choosing_compiles_without_a_graph_break():
    def f(x):
        backend = choose("film", "auto", {"cuda": lambda: ["no GPU"], "cpu": lambda: []}, lambda: f"x {x.shape}")
        return x + 1 if backend == "cpu" else x

    compiled = torch.compile(f, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.zeros(2)), torch.ones(2))
