"""Compiles CUDA kernels for the CPU (cuda_emulator.h) into Python modules, and runs Python with them.

    python tests/cuda_emulator/build.py plain|address|thread [arguments of python]

Variants: ``plain``; ``address``, with AddressSanitizer and UndefinedBehaviorSanitizer; ``thread``, with
ThreadSanitizer. A sanitizer must be loaded before everything else, so it needs a Python process of its own: given
arguments, the script starts one. Modules are kept in ``build/cuda_emulator``, each in a folder of its own, so that
several can compile at once, and ninja compiles what has changed.
"""

import contextlib
import fcntl
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
SANITIZERS = {
    "plain": "",
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=undefined",
    "thread": "-fsanitize=thread",
}
LIBRARIES = {"plain": (), "address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}
# Which variant this process was started for; only that one can be imported.
VARIABLE = "FUSEDATTN_EMULATOR_VARIANT"
# A copy of csrc with bugs in it (planted.py) to compile instead; the number of the one that shows is in the other.
CSRC_VARIABLE, BUG_VARIABLE = "FUSEDATTN_EMULATOR_CSRC", "FUSEDATTN_EMULATOR_BUG"


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


def build(name: str, variant: str = "plain", csrc: Path | None = None) -> Path:
    """The compiled module of ``bind_<name>.cpp``, made anew where it is older than what it is made of.

    csrc: a copy with planted bugs, compiled without optimisation, for float32 alone.
    """
    import pybind11

    folder = (csrc.parent if csrc else ROOT / "build" / "cuda_emulator") / variant / name
    folder.mkdir(parents=True, exist_ok=True)
    includes = [csrc or ROOT / "csrc", HERE, toolkit_headers(), pybind11.get_include()]
    includes += [sysconfig.get_path("include")]
    flags = ["-std=c++17", "-O0" if csrc else "-O2" if variant == "plain" else "-O1", "-g1", "-fPIC"]
    # As nvcc: a multiplication and the addition of its result round once.
    flags += ["-mfma", "-ffp-contract=fast", "-fno-omit-frame-pointer", "-fvisibility=hidden"]
    flags += ["-Wall", "-Wno-unknown-pragmas", "-Werror", *(f"-I{path}" for path in includes)]
    if csrc:
        flags += ["-DKERNELS_PLANTED", *(f"-DKERNELS_WITHOUT_{t}" for t in ("FLOAT64", "HALF", "BFLOAT16"))]
    define = {"plain": "", "address": "-DCUDA_EMULATOR_ASAN", "thread": "-DCUDA_EMULATOR_TSAN"}[variant]
    text = f"""
flags = {" ".join(flags)}
sanitizer = {SANITIZERS[variant]}
rule compile
  command = g++ $flags $more -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = g++ -shared $sanitizer $in -o $out
build scheduler.o: compile {HERE / "cuda_emulator.cpp"}
  more = {define}
build kernels.o: compile {HERE / f"bind_{name}.cpp"}
  more = $sanitizer
# The scheduler first: the linker then keeps its copies of inline functions, which are not instrumented.
build {name}.so: link scheduler.o kernels.o
"""
    with locked(folder):
        file = folder / "build.ninja"
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        command = [shutil.which("ninja", path=_path()), "-C", str(folder)]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"bind_{name}.cpp does not compile for the emulator:\n{result.stdout}{result.stderr}")
    return folder / f"{name}.so"


@contextlib.contextmanager
def locked(folder: Path):
    """Other processes, of a test run on several cores, wait until what this one builds there is complete."""
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def load(name: str, csrc: Path | None = None):
    """The module ``name`` in the variant that this process was started for, built if need be."""
    if csrc is None and CSRC_VARIABLE in os.environ:
        csrc = Path(os.environ[CSRC_VARIABLE])
    file = build(name, os.environ.get(VARIABLE, "plain"), csrc)
    spec = importlib.util.spec_from_file_location(f"{name}_planted" if csrc else name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if BUG_VARIABLE in os.environ:
        module.show_bug(int(os.environ[BUG_VARIABLE]))
    return module


def environment(variant: str) -> dict[str, str]:
    """Environment of a Python process that can import a variant."""
    names = (*LIBRARIES[variant], "libstdc++.so")
    found = [
        subprocess.run(["g++", f"-print-file-name={n}"], capture_output=True, text=True).stdout.strip()
        for n in names
    ]
    added = {VARIABLE: variant, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    if variant != "plain":
        added["LD_PRELOAD"] = " ".join(found)
    added["ASAN_OPTIONS"] = "detect_leaks=0"
    added["UBSAN_OPTIONS"] = "print_stacktrace=1"
    added["TSAN_OPTIONS"] = "halt_on_error=1"
    return os.environ | added


def python(variant: str, *arguments: str, variables=(), **options) -> subprocess.CompletedProcess:
    """Runs Python with a variant and further environment variables.

    ThreadSanitizer needs addresses that randomisation may have taken.
    """
    command = [sys.executable, *arguments]
    if variant == "thread":
        command = ["setarch", "-R", *command]
    return subprocess.run(command, env=environment(variant) | dict(variables), **options)


def main(variant: str, *arguments: str) -> int:
    for path in sorted(HERE.glob("bind_*.cpp")):
        print(build(path.stem.removeprefix("bind_"), variant))
    return python(variant, *arguments).returncode if arguments else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
