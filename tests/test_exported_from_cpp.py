"""The example of a C++ program that runs an exported model: it compiles, loads the operators, and agrees."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pairwise import EVERYTHING

from fusedattn import _library

FOLDER = Path(__file__).parent.parent / "examples" / "cpp"


@pytest.mark.skipif(not EVERYTHING, reason="compiles a package and a program, half a minute: make test-all")
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
@pytest.mark.skipif(_library.EXTENSION_ERROR is not None, reason="there is no extension")
def test_a_cpp_program_runs_an_exported_model(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import export

    package, program = str(tmp_path / "model.pt2"), str(tmp_path / "main")
    printed = subprocess.check_output([sys.executable, str(FOLDER / "export.py"), package], text=True)
    expected = torch.tensor(json.loads(printed.splitlines()[-1]))
    subprocess.run(export.build_command(program), check=True)
    ran = subprocess.run([program, package, export.library()], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    torch.testing.assert_close(torch.tensor([float(line) for line in ran.stdout.split()]), expected)
    without = subprocess.run([program, package, str(tmp_path / "no_library.so")], capture_output=True, text=True)
    assert without.returncode == 1 and "no_library.so" in without.stderr
