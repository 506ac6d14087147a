"""Compiles the CUDA kernels for the CPU (cuda_emulator.h) into a Python module, and runs Python with it.

    python tests/cuda_emulator/build.py plain|address|thread [arguments of python]

Variants: ``plain``; ``address``, with AddressSanitizer and UndefinedBehaviorSanitizer; ``thread``, with
ThreadSanitizer. A sanitizer must be loaded before everything else, so it needs a Python process of its own: given
arguments, the script starts one. Modules are kept in ``build/cuda_emulator``, and ninja compiles what has changed.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SANITIZERS = {"plain": "", "address": "-fsanitize=address,undefined", "thread": "-fsanitize=thread"}
LIBRARIES = {"plain": (), "address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}
# Which variant this process was started for; only that one can be imported.
VARIABLE = "FUSEDATTN_EMULATOR_VARIANT"


def toolkit_headers() -> Path | None:
    """The folder with ``cuda_bf16.h``, of a toolkit or of NVIDIA's wheels; None if there is none."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", nvcc and Path(nvcc).resolve().parents[1]]
    wheels = [Path(p) / "nvidia" for p in sys.path]
    folders = [Path(home) / "include" for home in homes if home]
    folders += [f for w in wheels if w.is_dir() for f in (*w.glob("cu*/include"), *w.glob("cuda_runtime/include"))]
    return next((f for f in folders if (f / "cuda_bf16.h").exists()), None)


def missing() -> str | None:
    """Why the emulator cannot be built here; None if it can."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the emulator's fibers need x86-64, this is {platform.machine()}"
    if toolkit_headers() is None:
        return "cuda_bf16.h was not found: set CUDA_HOME to a CUDA toolkit"
    for tool in ("g++", "ninja"):
        if shutil.which(tool, path=_path()) is None:
            return f"{tool} was not found"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    return None


def _path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def build(variant: str = "plain", sources: dict[str, Path] | None = None, folder: Path | None = None) -> Path:
    """The module of a variant, compiled where it is older than a source.

    Args:
        variant: a key of ``SANITIZERS``.
        sources: bindings by name of their object file; default: every ``bind_*.cpp``.
        folder: where to build; default: ``build/cuda_emulator/<variant>``.
    """
    import pybind11

    folder = folder or ROOT / "build" / "cuda_emulator" / variant
    folder.mkdir(parents=True, exist_ok=True)
    if sources is None:
        sources = {path.stem: path for path in sorted(HERE.glob("bind_*.cpp"))}
    includes = [ROOT / "csrc", HERE, toolkit_headers(), pybind11.get_include(), sysconfig.get_path("include")]
    flags = ["-std=c++17", "-O1" if variant != "plain" else "-O2", "-g1", "-fPIC", "-fvisibility=hidden"]
    # As nvcc: a multiplication and the addition of its result round once.
    flags += ["-mfma", "-ffp-contract=fast", "-fno-omit-frame-pointer"]
    flags += ["-Wall", "-Wno-unknown-pragmas", "-Werror", *(f"-I{path}" for path in includes)]
    kernel_flags = f"{SANITIZERS[variant]} -fno-sanitize-recover=undefined" if variant == "address" else ""
    kernel_flags = kernel_flags or SANITIZERS[variant]
    define = {"plain": "", "address": "-DCUDA_EMULATOR_ASAN", "thread": "-DCUDA_EMULATOR_TSAN"}[variant]
    lines = [
        f"flags = {' '.join(flags)}",
        "rule compile",
        "  command = g++ $flags $more -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = g++ -shared {SANITIZERS[variant]} $in -o $out",
        # First, so that the linker keeps its copies of inline functions: they are not instrumented.
        f"build scheduler.o: compile {HERE / 'cuda_emulator.cpp'}",
        f"  more = {define}",
        f"build module.o: compile {HERE / 'module.cpp'}",
    ]
    for name, path in sources.items():
        lines += [f"build {name}.o: compile {path}", f"  more = {kernel_flags}"]
    lines.append(f"build emulated.so: link scheduler.o module.o {' '.join(f'{name}.o' for name in sources)}")
    text = "\n".join(lines) + "\n"
    file = folder / "build.ninja"
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    ninja = shutil.which("ninja", path=_path())
    result = subprocess.run([ninja, "-C", str(folder)], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"the kernels do not compile for the emulator:\n{result.stdout}{result.stderr}")
    return folder / "emulated.so"


def load(module: Path | None = None):
    """The module of this process's variant, built if need be."""
    module = module or build(os.environ.get(VARIABLE, "plain"))
    spec = importlib.util.spec_from_file_location("emulated", module)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def environment(variant: str) -> dict[str, str]:
    """Environment of a Python process that can import a variant."""
    names = (*LIBRARIES[variant], "libstdc++.so")
    found = [
        subprocess.run(["g++", f"-print-file-name={n}"], capture_output=True, text=True).stdout.strip() for n in names
    ]
    added = {VARIABLE: variant, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    if variant != "plain":
        added["LD_PRELOAD"] = " ".join(found)
    added["ASAN_OPTIONS"] = "detect_leaks=0"
    added["UBSAN_OPTIONS"] = "print_stacktrace=1"
    added["TSAN_OPTIONS"] = "halt_on_error=1"
    return os.environ | added


def python(variant: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    """Runs Python with a variant. ThreadSanitizer needs the addresses that randomisation may take from it."""
    command = [sys.executable, *arguments]
    if variant == "thread":
        command = ["setarch", "-R", *command]
    return subprocess.run(command, env=environment(variant), **options)


if __name__ == "__main__":
    print(build(sys.argv[1]))
    if len(sys.argv) > 2:
        sys.exit(python(sys.argv[1], *sys.argv[2:]).returncode)
