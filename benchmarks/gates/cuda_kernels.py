"""Gates of the CUDA C++ kernels: compiles every csrc/<op>/cuda_*.cu as the extension does, and reads the cubin."""

import re
import subprocess
import tempfile
from collections.abc import Container
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from torch.utils.cpp_extension import include_paths

from . import sass, tools
from .kernel import Kernel
from .occupancy import SHARED_RESERVED, occupancy

ARCHITECTURES = (75, 80, 90, 100, 120)
FLAGS = ("-std=c++17", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY")
LAUNCHES = Path(__file__).with_name("launches.cpp")
# In names of kernels. Those of tanh do not say so.
SHORT = {"__nv_bfloat16": "bfloat16", "__half": "half", ", Tanh": ""}


def sources() -> list[Path]:
    return sorted(path for path in (tools.ROOT / "csrc").glob("*/cuda_*.cu") if path.parent.name != "common")


def inputs() -> list[Path]:
    """Every file that may change what is compiled: the sources, and what they include of ours."""
    found, rest = set(), sources()
    while rest:
        file = rest.pop()
        found.add(file)
        included = re.findall(r'^#include "([^"]+)"', file.read_text(), re.MULTILINE)
        paths = (folder / name for name in included for folder in (file.parent, tools.ROOT / "csrc"))
        rest += [path for path in map(Path.resolve, paths) if path.exists() and path not in found]
    return sorted(found)


def compile_source(source: Path, arch: int) -> bytes:
    """The cubin. Kept by the text that the preprocessor makes of the source, so that headers count too."""
    compiler = tools.nvcc()
    includes = [f"-I{tools.ROOT / 'csrc'}", *(f"-isystem={path}" for path in include_paths())]
    command = [compiler, *FLAGS, f"-arch=sm_{arch}", *includes]
    text = tools.run(*command, "-E", str(source))
    cubin = tools.CACHE / f"{tools.digest(text, tools.version(compiler), *FLAGS)}.sm_{arch}.cubin"
    if not cubin.exists():
        tools.CACHE.mkdir(parents=True, exist_ok=True)
        partial = cubin.with_suffix(".part")
        tools.run(*command, "-cubin", "-o", str(partial), str(source))
        partial.rename(cubin)
    return cubin.read_bytes()


def demangle(names: list[str]) -> list[str]:
    """`film_fwd_kernel_rows<float, 4>` of a mangled kernel: without namespaces and parameters."""
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [short_name(line) for line in text.splitlines()]


def short_name(demangled: str) -> str:
    depth = 0
    for end, letter in enumerate(demangled):  # the parameter list opens outside of every < >
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0 and not demangled.startswith("(anonymous", end):
            break
    else:
        end = len(demangled)
    name = re.sub(r"^(?:void|static) ", "", demangled[:end])
    name = re.sub(r"\([^()<>]*\)(?=[\w-])", "", name)  # casts of template arguments: (int)4
    name = re.sub(r"(?:\w+|\(anonymous namespace\))::", "", name)
    for long, short in SHORT.items():
        name = name.replace(long, short)
    return name


@cache
def dynamic_shared() -> dict[int, dict[str, int]]:
    """Most dynamic shared memory that launches of each kernel ask for, as the launchers say, by architecture."""
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/launches"
        includes = [f"-I{tools.ROOT / 'csrc'}", f"-I{tools.ROOT / 'tests' / 'cuda_emulator'}"]
        tools.run(tools.nvcc(), "-std=c++17", *includes, "-o", program, str(LAUNCHES))
        lines = {arch: tools.run(program, str(arch)).splitlines() for arch in ARCHITECTURES}
    found: dict[int, dict[str, int]] = {arch: {} for arch in ARCHITECTURES}
    for arch in ARCHITECTURES:
        for line in lines[arch]:
            shared, kernel = re.match(r"(\d+) .* kernel = ([^;]*);", line).groups()
            name = short_name(kernel)
            found[arch][name] = max(found[arch].get(name, 0), int(shared))
    return found


def kernels_of(op: str, cubin: bytes, arch: int, launched: dict[int, dict[str, int]]) -> list[Kernel]:
    """The kernels of a cubin, without those that are launched on other architectures alone.

    Args:
        launched: of each architecture; a kernel that none names has neither shared memory nor occupancy.
    """
    dynamic, elsewhere = launched.get(arch, {}), {name for names in launched.values() for name in names}
    code, usage, threads = tools.disassemble(cubin)
    functions = sass.parse(code)
    names = list(threads)  # kernels alone have a thread count; device functions have none
    found = []
    for mangled, name in zip(names, demangle(names), strict=True):
        if name in elsewhere and name not in dynamic:
            continue
        function, used = functions[mangled], usage[mangled]
        # From sm_90 on the system's share is counted in, unless the file holds no shared memory at all.
        static = max(0, used["SHARED"] - SHARED_RESERVED) if arch >= 90 else used["SHARED"]
        shared = static + dynamic[name] if name in dynamic else None
        resident = None if shared is None else occupancy(arch, threads[mangled], used["REG"], shared).fraction
        found.append(
            Kernel.from_sass(
                backend="CUDA C++",
                op=op,
                name=name,
                arch=f"sm_{arch}",
                threads=threads[mangled],
                registers=used["REG"],
                shared=shared,
                stack=used["STACK"],
                occupancy=resident,
                function=function,
            )
        )
    return found


def measure(jobs: int, archs: Container[str] | None = None) -> list[Kernel]:
    """Every kernel on every architecture, or on one of those named. Raises ToolError where a compilation fails."""
    wanted = [arch for arch in ARCHITECTURES if archs is None or f"sm_{arch}" in archs]
    work = [(source, arch) for source in sources() for arch in wanted]
    if archs is not None:  # of a source's kernels, all on the same one
        work = [item for n, item in enumerate(work) if n // len(wanted) % len(wanted) == n % len(wanted)]
    with ThreadPoolExecutor(jobs) as pool:
        cubins = list(pool.map(lambda item: compile_source(*item), work))
        launched = dynamic_shared()
        lists = list(
            pool.map(lambda item, cubin: kernels_of(item[0].parent.name, cubin, item[1], launched), work, cubins)
        )
    return [kernel for kernels in lists for kernel in kernels]


def missing() -> str | None:
    """Why these kernels cannot be compiled here."""
    if not sources():
        return "there are none"
    if tools.nvcc() is None:
        return "no nvcc: install the CUDA toolkit, or set CUDA_HOME"
    return tools.missing_disassembler()


def compiler() -> str:
    return f"nvcc {tools.version(tools.nvcc())}"
