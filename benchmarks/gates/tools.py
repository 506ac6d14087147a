"""Finds the compilers and disassemblers, and runs them once per content: results are kept under build/gates."""

import hashlib
import importlib.util
import math
import os
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from ..machine import ROOT

CACHE = ROOT / "build" / "gates"


class ToolError(RuntimeError):
    """A compiler or disassembler failed; the message holds what it printed."""


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")


def disassembler(name: str) -> str | None:
    """nvdisasm or cuobjdump: from their wheels, from the toolkit, or from Triton's wheel, in that order."""

    def folders(package: str, pattern: str) -> list[str]:
        spec = importlib.util.find_spec(package)
        roots = spec.submodule_search_locations if spec else None
        return [str(folder) for root in roots or () for folder in Path(root).glob(pattern)]

    compiler = nvcc()
    toolkit = [str(Path(compiler).parent)] if compiler else []
    path = os.pathsep.join([*folders("nvidia", "*/bin"), *toolkit, *folders("triton", "backends/nvidia/bin")])
    return shutil.which(name, path=path) or shutil.which(name)


def missing_disassembler() -> str | None:
    if None in map(disassembler, ("nvdisasm", "cuobjdump")):
        return "no nvdisasm or no cuobjdump: pip install nvidia-cuda-nvdisasm nvidia-cuda-cuobjdump"
    return None


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ToolError(f"{' '.join(command)}\n{done.stderr or done.stdout}")
    return done.stdout


@cache
def version(tool: str) -> str:
    return re.findall(r"V[\d.]+", run(tool, "--version"))[-1]


def digest(*parts: str | bytes) -> str:
    hasher = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        hasher.update(len(data).to_bytes(8, "little") + data)
    return hasher.hexdigest()[:24]


def digest_of(files: list[Path]) -> str:
    """Of their paths in the tree and their text."""
    return digest(*(part for file in files for part in (str(file.relative_to(ROOT)), file.read_bytes())))


def disassemble(cubin: bytes) -> tuple[str, dict[str, dict[str, int]], dict[str, int]]:
    """Code as `nvdisasm -c` prints it, resources of every function, threads of a block of every kernel."""
    tools = [disassembler(name) for name in ("nvdisasm", "cuobjdump")]
    CACHE.mkdir(parents=True, exist_ok=True)
    stem = CACHE / digest(cubin, *map(version, tools))
    commands = {
        ".sass": (tools[0], "-c"),
        ".usage": (tools[1], "--dump-resource-usage"),
        ".elf": (tools[1], "-elf"),
    }
    results = {suffix: stem.with_suffix(suffix) for suffix in commands}
    if not all(result.exists() for result in results.values()):
        # A file of its own: another process may be at the same code, which two kernels can have.
        with tempfile.NamedTemporaryFile(dir=CACHE, suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            for suffix, command in commands.items():
                written = Path(f"{file.name}{suffix}")
                written.write_text(run(*command, file.name))
                written.replace(results[suffix])
    code, usage, elf = (result.read_text() for result in results.values())
    return code, resources(usage), threads(elf)


_USAGE = re.compile(r"Function (\S+?):\s*\n\s*(.*)")


def resources(usage: str) -> dict[str, dict[str, int]]:
    """REG, STACK, SHARED, LOCAL of every function, by mangled name."""
    return {
        name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
        for name, line in _USAGE.findall(usage)
    }


_INFO = re.compile(r"^\.nv\.info\.(\S+)$(.*?)(?=^\.nv\.|\Z)", re.MULTILINE | re.DOTALL)
_THREADS = re.compile(r"EIATTR_(?:REQNTID|MAX_THREADS)\s+Format:\s+\S+\s+Value:((?:\s+0x[0-9a-f]+){3})")


def threads(elf: str) -> dict[str, int]:
    """Launch bounds by mangled name. A kernel without is refused: its registers would be fitted to any block."""
    found = {}
    for name, info in _INFO.findall(elf):
        bounds = _THREADS.search(info)
        if bounds is None:
            raise ToolError(f"{name}: no __launch_bounds__, so its occupancy is anybody's guess")
        found[name] = math.prod(int(value, 16) for value in bounds[1].split())
    return found
