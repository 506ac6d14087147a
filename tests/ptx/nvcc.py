"""CUDA C++ kernels as nvcc compiles them, launched by their own launchers and run by the executor of PTX.

``load("film")`` compiles the bindings of the emulator (tests/cuda_emulator/bind_film.cpp) once more, with nvcc,
and links them with a runtime that hands every launch over (cudart/cudart.cpp). The module has the functions of
the emulated one; pointers are addresses of this process, known by the arrays among the arguments.
"""

import ctypes
import functools
import importlib.util
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
from cuda_emulator.build import locked

from .executor import launch
from .memory import GlobalMemory
from .parser import PtxError, parse

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BINDINGS = ROOT / "tests" / "cuda_emulator"
# What tests/test_ptx_cuda.py does not run.
DTYPES_LEFT_OUT = {"additive_attention": ("FLOAT64", "HALF"), "film": ("HALF",)}
_UNSIGNED = ctypes.POINTER(ctypes.c_uint)
_CALLBACK = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, _UNSIGNED, _UNSIGNED, ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t
)
_VISITOR = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t)


def missing() -> str | None:
    """Why kernels cannot be compiled here; None if they can."""
    for tool in ("nvcc", "g++"):
        if shutil.which(tool) is None:
            return f"{tool} was not found"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    return None


def build(name: str) -> tuple[Path, Path]:
    """The module and its PTX, made anew where they are older than what they are made of."""
    import pybind11

    folder = ROOT / "build" / "ptx" / name
    folder.mkdir(parents=True, exist_ok=True)
    module, ptx = folder / f"{name}.so", folder / f"{name}.ptx"
    sources = [*(ROOT / "csrc").rglob("*"), *BINDINGS.glob("bind*"), *(HERE / "cudart").iterdir(), Path(__file__)]
    with locked(folder):
        if module.exists() and module.stat().st_mtime > max(f.stat().st_mtime for f in sources):
            return module, ptx
        # Copies, so that a header beside them does not win over the one of the folder cudart.
        for file in ("bind.h", f"bind_{name}.cpp"):
            shutil.copy(BINDINGS / file, folder / file.replace(f"bind_{name}.cpp", f"{name}.cu"))
        includes = [HERE / "cudart", ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
        command = ["nvcc", "-std=c++17", "--keep", "--keep-dir", folder, "-shared", "-o", module]
        command += ["-gencode", "arch=compute_80,code=compute_80", "-cudart", "none"]
        command += [f"-I{path}" for path in includes]
        command += [f"-DKERNELS_WITHOUT_{t}" for t in DTYPES_LEFT_OUT[name]]
        # Kernels are optimised whatever this says; without it, the host's part asks for more of a runtime.
        command += ["-O1", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xlinker", "-Bsymbolic"]
        command += [folder / f"{name}.cu", HERE / "cudart" / "cudart.cpp"]
        result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"bind_{name}.cpp does not compile:\n{result.stdout}{result.stderr}")
    return module, ptx


class Module:
    """Functions of the bindings; while one runs, its launches are executed."""

    def __init__(self, name: str):
        file, ptx = build(name)
        self.text = ptx.read_text()
        spec = importlib.util.spec_from_file_location(f"{name}_ptx", file)
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self.runtime = ctypes.CDLL(str(file))
        self.kernels, self.executed = {}, {}

    def __getattr__(self, name: str):
        return functools.partial(self._call, getattr(self.module, name))

    def _call(self, function, *arguments):
        errors = []

        def on_launch(kernel, grid, block, values, shared_bytes):
            if not errors:
                try:
                    self._launch(kernel.decode(), grid[:3], block[:3], values, shared_bytes, arguments)
                except PtxError as error:  # it must not pass through C++
                    errors.append(error)

        callback = _CALLBACK(on_launch)
        self.runtime.ptx_on_launch(callback)
        function(*arguments)
        if errors:
            raise errors[0]

    def _launch(self, name, grid, block, values, shared_bytes, arguments) -> None:
        if name not in self.kernels:
            self.kernels[name] = parse(self.text, name)
        kernel, memory = self.kernels[name], GlobalMemory()
        self.runtime.ptx_visit_memory(_VISITOR(lambda at, size: memory.add_host(at, size, "working memory")))
        for array in arguments:
            if isinstance(array, np.ndarray) and array.size:
                first, end = np.lib.array_utils.byte_bounds(array)
                memory.add_host(first, end - first, f"an array {array.shape}")
        data = [ctypes.string_at(values[i], size) for i, size in enumerate(kernel.parameters.values())]
        executed = launch(kernel, grid, block, data, shared_bytes, memory=memory)
        name = re.search(r"[a-z_]+_kernel[a-z_]*", name)[0]
        self.executed[name] = self.executed.get(name, 0) + executed


load = functools.cache(Module)
