"""Gates of the Triton kernels: compiles what `kernels()` of every fusedattn/triton/<op>.py lists.

Needs neither GPU nor driver. NVIDIA's machine code is read like that of CUDA C++; on AMD the assembler's own
account of registers, spills and occupancy is taken.
"""

import importlib
import importlib.util
import multiprocessing
import os
import re
from collections import Counter
from collections.abc import Container
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from . import amdgcn, sass, tools
from .kernel import ATTENTION, Kernel
from .occupancy import occupancy

FOLDER = tools.ROOT / "fusedattn" / "triton"
TARGETS = (("cuda", 80), ("cuda", 90), ("cuda", 100), ("cuda", 120), ("hip", "gfx942"), ("hip", "gfx950"))
BACKEND = "Triton"
OLDEST = "3.6"  # supported
AMD_WAVES = 8  # of a SIMD of a CDNA3 or CDNA4 compute unit


def missing() -> str | None:
    """Why these kernels cannot be compiled here."""
    if not ops():
        return "there are none"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return tools.missing_disassembler()


def compiler() -> str:
    return f"Triton {triton_version()}"


def triton_version() -> str:
    import triton

    return triton.__version__


def ops() -> list[str]:
    """Those of fusedattn/ops; other files of the folder are parts of theirs."""
    return sorted(
        path.stem for path in FOLDER.glob("[!_]*.py") if (tools.ROOT / "fusedattn/ops" / path.name).exists()
    )


def inputs() -> list[Path]:
    """Every file that may change what is compiled."""
    return sorted(FOLDER.glob("*.py"))


@cache
def kernels(op: str, target: tuple[str, int | str] = ("cuda", 90)) -> list[tuple[str, Any]]:
    """Name and description of an op's kernels on a target; further specialisations of a name are numbered."""
    seen: Counter = Counter()
    found = []
    for described in importlib.import_module(f"fusedattn.triton.{op}").kernels(target=target):
        seen[described.name] += 1
        count = seen[described.name]
        found.append((described.name if count == 1 else f"{described.name} #{count}", described))
    return found


def read_amdgcn(op: str, name: str, arch: str, threads: int, text: str) -> Kernel:
    def field(key: str) -> int:
        found = re.search(rf"^\s*\.{key}:\s+(\d+)", text, re.MULTILINE)
        if found is None:
            raise tools.ToolError(f"{name}: no .{key} in the assembler's metadata of {arch}")
        return int(found[1])

    score = amdgcn.score_loop(text) if op in ATTENTION else None
    counts = {}
    if score is not None:
        counts = {"slots": score.slots / score.tanh, "mufu": score.transcendental / score.tanh}
    waves = re.search(r"^; Occupancy: (\d+)", text, re.MULTILINE)
    return Kernel(
        backend=BACKEND,
        op=op,
        name=name,
        arch=arch,
        threads=threads,
        registers=field("vgpr_count"),
        scalar_registers=field("sgpr_count"),
        shared=field("group_segment_fixed_size"),
        occupancy=int(waves[1]) / AMD_WAVES if waves else None,
        stack=field("private_segment_fixed_size"),
        local=field("vgpr_spill_count"),
        scalar_spills=field("sgpr_spill_count"),
        **counts,
    )


def measure_one(op: str, index: int, backend: str, arch: int | str) -> Kernel:
    name, described = kernels(op, (backend, arch))[index]
    try:
        compiled = described.compile(backend, arch)
    except Exception as error:  # Triton's own do not all survive the way back from this process
        raise tools.ToolError(f"{name}, {arch_name(arch)}: does not compile: {error}") from None
    if backend == "hip":
        if "asm " in compiled.asm["llir"]:  # Triton drops it without a word: the values would be undefined
            raise tools.ToolError(f"{name}, {arch_name(arch)}: inline assembly, which AMD does not get")
        return read_amdgcn(op, name, arch, compiled.metadata.num_warps * 64, compiled.asm["amdgcn"])
    code, usage, _ = tools.disassemble(compiled.asm["cubin"])
    entry = compiled.metadata.name
    aligned = ("N" if "_runs" in name else "C") in described.divisible
    if (align := described.constexprs.get("ALIGN", 1)) > 1:  # elements
        aligned = align == 16 or described.signature.get("X") == "*fp32"
    threads, registers, shared = compiled.metadata.num_warps * 32, usage[entry]["REG"], compiled.metadata.shared
    return Kernel.from_sass(
        backend=BACKEND,
        op=op,
        name=name,
        arch=arch_name(arch),
        threads=threads,
        registers=registers,
        shared=shared,
        stack=usage[entry]["STACK"],
        aligned=aligned,
        occupancy=occupancy(arch, threads, registers, shared).fraction,
        function=sass.parse(code)[entry],
    )


def arch_name(arch: int | str) -> str:
    return f"sm_{arch}" if isinstance(arch, int) else arch


def measure(jobs: int, archs: Container[str] | None = None) -> list[Kernel]:
    """Every kernel on every architecture, or on one of those named; in processes: Triton compiles one at once."""
    os.environ["TRITON_CACHE_DIR"] = str(tools.CACHE / "triton")
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default, of which every process warns if unset
    targets = [target for target in TARGETS if archs is None or arch_name(target[1]) in archs]
    work = [
        (op, n, *target)
        for op in ops()
        for turn, target in enumerate(targets)
        for n in range(len(kernels(op, target)))
        if archs is None or n % len(targets) == turn
    ]
    oldest = triton_version().startswith(f"{OLDEST}.")
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        return [replace(kernel, oldest=oldest) for kernel in pool.map(measure_one, *zip(*work, strict=True))]
