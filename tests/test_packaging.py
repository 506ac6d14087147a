"""The package around the kernels: version, `python -m fusedattn.info`, the CPU level, choosing a backend."""

import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
import setuptools
import torch
from needed_symbols import of_library, too_new
from torch.fx.experimental.proxy_tensor import make_fx

import fusedattn
from fusedattn import _dispatch, _library, info
from fusedattn._dispatch import UnsupportedError, choose, cuda_reasons, triton_reasons

ROOT = Path(__file__).parent.parent


def run_python(*arguments, cwd=None, **variables):
    environment = {**os.environ, **variables}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


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


def test_readme_examples_run():
    names: dict = {}  # a later one goes on from those before
    for example in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        exec(compile(example, "README.md", "exec"), names)


def test_fresh_memory_is_poisoned():
    assert torch.empty(64).isnan().all()
    assert torch.ops.aten.empty.memory_format([64]).isnan().all()  # what C++ outputs are allocated by


def test_info_names_everything():
    result = run_python("-m", "fusedattn.info")
    assert result.returncode == 0, result.stderr
    expected = ["fusedattn", fusedattn.__version__, torch.__version__, "python", "extension", "threads"]
    expected += ["CPU level", _library.cpu_capability(), info.VARIABLE]
    expected += ["cpu", "cuda", "triton", "reference"]
    assert [text for text in expected if text not in result.stdout] == []


def test_info_reports_an_extension_that_did_not_load(monkeypatch):
    monkeypatch.setattr(_library, "EXTENSION_ERROR", ImportError("no such symbol"))
    text = info.report()
    assert text.count("no such symbol") == 3  # and for the CPU and CUDA kernels


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_info_and_the_refusal_say_why_cuda_cannot_run():
    words = "there are no CUDA kernels here: this torch is built without CUDA"
    text = info.report()
    assert text.count(words) == 1
    with pytest.raises(UnsupportedError, match=words):
        fusedattn.film(torch.ones(2, 3), backend="cuda")
    with pytest.raises(UnsupportedError, match=words):
        fusedattn.additive_attention(*torch.ones(3, 1, 2, 4), torch.ones(4), backend="cuda")


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that torch for CUDA would find; ``error`` is what CUDA says of our kernels there."""
    gpu = types.SimpleNamespace(name="Tesla T4", major=7, minor=5, error="")
    monkeypatch.setattr(_library, "CUDA_ERROR", None)
    monkeypatch.setattr(_library, "TRITON_ERROR", None)
    monkeypatch.setattr(_library, "triton_driver_error", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(_dispatch, "_cuda_error", lambda index: gpu.error)
    return gpu


def test_cuda_reasons_name_every_obstacle(monkeypatch, gpu):
    """What is on the CPU, of another dtype, or on a GPU that no kernel was compiled for is refused."""
    cuda = torch.device("cuda", 0)
    assert cuda_reasons(cuda, torch.float32) == cuda_reasons(torch.device("cuda"), torch.float32) == []
    gpu.name, gpu.major, gpu.minor, gpu.error = "Tesla V100", 7, 0, "no kernel image is available"
    described = "the CUDA kernels do not run on Tesla V100 (compute capability 7.0): no kernel image is available"
    assert cuda_reasons(cuda, torch.float32) == [described]
    gpu.error = ""
    assert cuda_reasons(torch.device("cpu"), torch.float32) == ["inputs are on cpu, not on a CUDA device"]
    (reason,) = cuda_reasons(cuda, torch.int8)
    assert "torch.int8" in reason
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda_reasons(cuda, torch.float32) == ["torch finds no CUDA device"]


def test_triton_needs_what_it_supports(monkeypatch, gpu):
    monkeypatch.setattr(torch.version, "hip", None)
    cuda = torch.device("cuda", 0)
    needed = "Triton needs compute capability 8.0, this is Tesla T4 (compute capability 7.5)"
    assert triton_reasons(cuda, torch.float32) == [needed]
    gpu.major = 8
    assert triton_reasons(cuda, torch.float32) == []


def test_auto_goes_on_to_triton_where_cuda_has_no_kernels(gpu):
    gpu.name, gpu.major, gpu.error = "NVIDIA H100", 9, "the driver is one of CUDA 12.8"

    def chosen():
        return choose("film", "auto", torch.device("cuda", 0), torch.float32, lambda: pytest.fail("an error"))

    assert chosen() == "triton"
    gpu.error = ""
    assert chosen() == "cuda"


def test_cpu_level_can_be_lowered():
    """And the levels are listed best first, whichever is in use."""
    code = """
import functools
from fusedattn import info
info.supported_levels = functools.cache(info.supported_levels)  # it asks a process
print(info._cpu_level())
info.main()
"""
    result = run_python("-c", code, "--levels", FUSEDATTN_CPU_CAPABILITY="default")
    assert result.returncode == 0, result.stderr
    supported = info.supported_levels()
    in_use, listed = result.stdout.splitlines()
    assert in_use == f"default; this machine supports {', '.join(supported)}"
    assert listed.split() == supported and supported[-1] == "default"


def test_unknown_cpu_level_is_a_clear_error():
    """At every use, from a thread of a parallel loop too."""
    code = """
import torch, fusedattn
t = torch.ones(64, 100, 100)
for call in (lambda: fusedattn.additive_attention(t, t, t, t[0, 0]), lambda: fusedattn.film(t)):
    try:
        call()
    except RuntimeError as error:
        print(error)
import fusedattn.info
print("report", fusedattn.info.report())
"""
    result = run_python("-c", code, FUSEDATTN_CPU_CAPABILITY="avx3", OMP_NUM_THREADS="2")
    assert result.returncode == 0, result.stderr
    calls, report = result.stdout.split("report", 1)
    message = "FUSEDATTN_CPU_CAPABILITY: expected default, avx2 or avx512, got 'avx3'"
    assert calls.count(message) == 2 and message in report


@pytest.fixture
def setup_arguments(monkeypatch):
    """What setup.py passes to setuptools."""

    def run():
        passed = {}
        monkeypatch.setattr(setuptools, "setup", lambda **arguments: passed.update(arguments))
        runpy.run_path(str(ROOT / "setup.py"))
        return passed

    return run


def pure_python_wheel(folder, **variables):
    tree = folder / "tree"
    shutil.copytree(ROOT / "fusedattn", tree / "fusedattn", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    built = run_python("setup.py", "-q", "bdist_wheel", "--dist-dir", str(folder), cwd=tree, **variables)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    assert wheel.name == f"fusedattn-{fusedattn.__version__}-py3-none-any.whl"
    return wheel


def test_without_a_compiler_the_wheel_is_pure_python(monkeypatch, setup_arguments, capsys):
    monkeypatch.delenv("FUSEDATTN_SKIP_BUILD", raising=False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert setup_arguments() == {}
    assert "no C++ compiler (no-such-compiler): the CPU kernels are left out" in capsys.readouterr().err


def test_pure_python_installation(tmp_path):
    """No extension is built; the CPU then runs the reference, and one warning says so."""
    wheel, outside = pure_python_wheel(tmp_path, FUSEDATTN_SKIP_BUILD="1"), tmp_path / "outside"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(outside)
    assert {"fusedattn/triton/film.py", "fusedattn/py.typed"} <= {*names} and not any(
        name.endswith(".so") for name in names
    )
    # An editable installation beside it would lend the wheel its extension.
    isolated = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in f.__module__]\n"
    code = """
import torch, fusedattn
leaves = [torch.randn(2, n, 4, requires_grad=True) for n in (3, 5, 5)] + [torch.randn(4, requires_grad=True)]
for function, inputs in ((fusedattn.additive_attention, leaves), (fusedattn.film, [leaves[0]])):
    for f in (function, torch.compile(function, fullgraph=True, backend="eager")):
        torch.autograd.grad(f(*inputs).sum(), inputs)
        torch.testing.assert_close(f(*inputs), function(*inputs, backend="reference"))
try:
    fusedattn.film(leaves[0], backend="cpu")
except fusedattn.UnsupportedError as error:
    print(error)
import runpy
runpy.run_module("fusedattn.info", run_name="__main__")
"""
    result = run_python("-c", isolated + code, cwd=outside, PYTHONPATH=str(outside))
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("UserWarning: fusedattn: the compiled extension did not load") == 1
    assert "cpu: the compiled extension did not load" in result.stdout
    assert "runs where no other can" in result.stdout


def test_a_broken_choice_of_build_is_an_error(monkeypatch, setup_arguments):
    monkeypatch.setenv("FUSEDATTN_SKIP_BUILD", "yes")
    with pytest.raises(ValueError, match="FUSEDATTN_SKIP_BUILD: expected 0 or 1, got 'yes'"):
        setup_arguments()


def test_on_windows_the_installation_is_pure_python(monkeypatch, setup_arguments, capsys):
    monkeypatch.delenv("FUSEDATTN_SKIP_BUILD", raising=False)
    assert [e.name for e in setup_arguments()["ext_modules"]][:1] == ["fusedattn._C"]
    monkeypatch.setattr(sys, "platform", "win32")
    assert setup_arguments() == {}
    assert "not by Windows' compiler: they are left out" in capsys.readouterr().err
    monkeypatch.setenv("FUSEDATTN_SKIP_BUILD", "0")
    with pytest.raises(OSError, match="built by GCC and Clang, not by Windows' compiler"):
        setup_arguments()


def test_symbols_of_late_libraries_are_found():
    table = """
0000000000000000      DF *UND*\t0000000000000000 (GLIBC_2.3.2) __register_atfork
0000000000000000      DO *UND*\t0000000000000000 (GLIBC_2.32) __libc_single_threaded
0000000000000000  w   D  *UND*\t0000000000000000  Base        __cxa_finalize
0000000000000000      DF *UND*\t0000000000000000  GLIBCXX_3.4.29 _ZSt28__throw_bad_array_new_lengthv
0000000000090200 g    DF .text\t0000000000000034  GLIBC_2.34  sem_init
0000000000000000      DF *UND*\t0000000000000000 (CXXABI_1.3.11) _ZdlPvmSt11align_val_t
"""
    late = ["_ZSt28__throw_bad_array_new_lengthv (GLIBCXX_3.4.29)", "__libc_single_threaded (GLIBC_2.32)"]
    assert too_new(table) == late


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump was not found")
@pytest.mark.skipif(_library.EXTENSION_ERROR is not None, reason="there is no extension")
def test_the_extension_needs_no_late_glibc():
    assert [symbol for symbol in of_library(_library._C.__file__) if "GLIBC_" in symbol] == []


def test_triton_says_why_it_cannot_run(monkeypatch):
    for device, error, words in (
        ("cpu", None, "inputs are on the CPU"),
        ("meta", None, "inputs are on meta"),
        ("cuda", "Triton is not installed", "Triton is not installed"),
    ):
        monkeypatch.setattr(_library, "TRITON_ERROR", error)
        reasons = triton_reasons(torch.device(device), torch.float32)
        assert any(words in reason for reason in reasons), reasons
    assert any("int32" in reason for reason in triton_reasons(torch.device("cpu"), torch.int32))


def test_triton_that_cannot_make_its_driver_says_so(monkeypatch):
    triton = pytest.importorskip("triton")

    def fail():
        raise RuntimeError("Failed to find C compiler.")

    gpu = types.SimpleNamespace(name="GPU", major=9, minor=0)
    monkeypatch.setattr(_library, "TRITON_ERROR", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(sys.modules["triton.runtime.driver"], "_create_driver", fail)
    monkeypatch.setattr(triton.runtime.driver, "_active", None)
    monkeypatch.setattr(triton.runtime.driver, "_default", None)
    _library._triton_driver_error.cache_clear()
    try:
        reasons = triton_reasons(torch.device("cuda"), torch.float32)
    finally:
        _library._triton_driver_error.cache_clear()
    assert reasons == ["Triton does not start: RuntimeError: Failed to find C compiler."]


@pytest.mark.parametrize("op", ["additive_attention", "film"])
def test_triton_schemas_are_those_of_the_library(op):
    pytest.importorskip("triton")
    importlib.import_module(f"fusedattn.triton.{op}")
    for name in (f"{op}_fwd", f"{op}_bwd"):
        expected, found = (getattr(torch.ops.fusedattn, n).default._schema for n in (name, f"{name}_triton"))
        assert str(found) == str(expected).replace(f"{name}(", f"{name}_triton(")


@pytest.mark.parametrize("error", ["", "no kernel image is available"])
def test_asking_cuda_compiles_without_a_graph_break(monkeypatch, error):
    monkeypatch.setattr(_dispatch, "_cuda_error", lambda index: error if index == 3 else pytest.fail("asked for"))

    def f(x):
        return x if _dispatch.cuda_error(torch.device("cuda", 3)) else x + 1

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.zeros(2)), torch.zeros(2) if error else torch.ones(2))


@pytest.mark.skipif(_library.CUDA_ERROR is None, reason="the operator has its kernel")
def test_asking_cuda_leaves_nothing_in_a_graph():
    library = torch.library.Library("fusedattn", "IMPL")  # what it registers lives as long as it
    library.impl("cuda_error", lambda device: f"asked for {device}", "CompositeExplicitAutograd")
    _dispatch._cuda_error.cache_clear()
    found = []

    def f(x):
        found.append(_dispatch.cuda_error(torch.device("cuda", 3)))
        return x + 1

    nodes = make_fx(f, tracing_mode="fake")(torch.ones(2)).graph.nodes
    _dispatch._cuda_error.cache_clear()
    assert found == ["asked for 3"]
    assert [node.target for node in nodes if node.op == "call_function"] == [torch.ops.aten.add.Tensor]
