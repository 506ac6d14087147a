"""Builds fusedattn._C, operator schemas and the CPU kernels, and fusedattn._C_cuda, the CUDA kernels.

Both against LibTorch's stable ABI: one wheel (cp310-abi3) serves every Python >= 3.10 and torch >= 2.11. Each op's
cpu_kernel*.cpp are compiled once per instruction set, chosen at run time (csrc/common/cpu_level.cpp). CUDA kernels
need nvcc, but neither a GPU nor a torch with CUDA: any torch builds the same wheel.

Without a C++ compiler, and on Windows, whose compiler takes other flags, the installation is pure Python: Triton
kernels on GPUs, plain PyTorch on the CPU.

Environment:
    FUSEDATTN_SKIP_BUILD=1 asks for that, 0 makes it an error where there is no compiler, or Windows.
    FUSEDATTN_CUDA=1 builds _C_cuda, 0 does not. Default: where this torch has CUDA and nvcc is found.
    TORCH_CUDA_ARCH_LIST: for which GPUs. Default: "7.5;8.0;9.0;10.0+PTX;12.0", all from 7.5 on.
    CUDA_HOME: of the toolkit, if nvcc is neither on PATH nor in /usr/local/cuda.
    FUSEDATTN_SANITIZE=1 builds with AddressSanitizer and UndefinedBehaviorSanitizer; the names of CPU levels, with
    commas between them, leave the kernels of the others as they are.
    MAX_JOBS limits parallel compilation.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from setuptools import setup
from torch.utils import cpp_extension
from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler

OPS = ["additive_attention", "additive_scores", "attention_pool", "film", "gated_film"]
OPS += ["hard_additive_attention", "location_attention", "norm_film", "philox"]

LEVELS = {"default": []}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    LEVELS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"]
    LEVELS["avx512"] += ["-mprefer-vector-width=512"]

CSRC = Path(__file__).parent.resolve() / "csrc"
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
CXX_FLAGS = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", f"-I{CSRC}", "-Wall", "-Wno-psabi", *STABLE_ABI]
# Multiply-adds may fuse; nothing else about floating point is relaxed.
# GCC 12 takes the undefined source operand inside its own AVX-512 intrinsics for ours.
KERNEL_FLAGS = [
    "-Wno-unknown-warning-option",  # of Clang, about the next
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
]
LINK_FLAGS = []
NVCC_FLAGS = ["-O3", "-std=c++17", "-DUSE_CUDA", "--threads=2", "-Xcompiler=-fvisibility=hidden", *STABLE_ABI]
# Machine code runs on its own and the later minor versions (8.6, 8.9), PTX on all later GPUs (11.0).
CUDA_ARCHITECTURES = "7.5;8.0;9.0;10.0+PTX;12.0"
# The only symbol that _C_cuda takes from libtorch_cuda.so: linked to a stand-in of that name, it needs no such
# library to be built.
CUDA_STUB = "int aoti_torch_get_current_cuda_stream(int device, void** stream) { return 1; }\n"

if (sanitized := os.environ.get("FUSEDATTN_SANITIZE", "0")) != "0":
    if not {"1", *LEVELS}.issuperset(sanitized.split(",")):
        raise ValueError(f"FUSEDATTN_SANITIZE: expected 0, 1 or some of {', '.join(LEVELS)}, got {sanitized!r}")
    SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
    CXX_FLAGS += [*SANITIZE, "-g1", "-O1"]  # checks between all instructions: -O3 compiles for many minutes
    LINK_FLAGS += SANITIZE
    for level in LEVELS.keys() - {*sanitized.split(",")} if sanitized != "1" else ():
        LEVELS[level] += ["-fno-sanitize=all"]


def pure_python() -> bool:
    """Whether to build no extension: as asked for, or because there is no C++ compiler that could."""
    skip = os.environ.get("FUSEDATTN_SKIP_BUILD")
    if skip not in (None, "0", "1"):
        raise ValueError(f"FUSEDATTN_SKIP_BUILD: expected 0 or 1, got {skip!r}")
    if skip == "1":
        return True
    if sys.platform == "win32":
        reason = "the kernels are built by GCC and Clang, not by Windows' compiler"
        if skip == "0":
            raise OSError(f"FUSEDATTN_SKIP_BUILD=0: {reason}")
        print(f"fusedattn: {reason}: they are left out", file=sys.stderr)
        return True
    if skip == "0":
        return False
    compiler = get_cxx_compiler()
    if shutil.which(shlex.split(compiler)[0]):
        return False
    print(f"fusedattn: no C++ compiler ({compiler}): the CPU kernels are left out", file=sys.stderr)
    return True


def cuda_home() -> str | None:
    """The CUDA toolkit to build with; None to build without. Raises if FUSEDATTN_CUDA=1 and there is none."""
    wanted = os.environ.get("FUSEDATTN_CUDA", "1" if torch.version.cuda else "0")
    if wanted not in ("0", "1"):
        raise ValueError(f"FUSEDATTN_CUDA: expected 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None
    nvcc = shutil.which("nvcc")  # of a toolkit, or a script that calls it
    homes = [os.environ.get("CUDA_HOME"), nvcc and str(Path(nvcc).resolve().parents[1]), "/usr/local/cuda"]
    for home in filter(None, homes):
        if all((Path(home) / file).exists() for file in ("bin/nvcc", "include/cuda_runtime.h")):
            return home
    if "FUSEDATTN_CUDA" in os.environ:
        raise FileNotFoundError("FUSEDATTN_CUDA=1 needs nvcc: put it on PATH or set CUDA_HOME to a CUDA toolkit")
    return None


class Build(BuildExtension):
    """Compiles every CPU kernel once per instruction set, then builds and links the extensions as usual."""

    def build_extensions(self):
        if self.editable_mode:  # else in a folder that is deleted: a wheel made later would compile all anew
            self.build_temp = os.path.join("build", f"temp.{self.plat_name}-{sys.implementation.cache_tag}")
        for extension in self.extensions:
            if extension.name == "fusedattn._C":
                extension.extra_objects = self.compile_levels()
            else:
                folder = self.make_stub()
                extension.library_dirs = [folder, *extension.library_dirs]
                extension.extra_link_args = [*extension.extra_link_args, *self.make_old_symbols(folder)]
                self.remove_outdated(extension.sources)
        super().build_extensions()

    def make_stub(self):
        folder = Path(self.build_temp).resolve() / "stub"
        folder.mkdir(parents=True, exist_ok=True)
        source, library = folder / "stub.c", folder / "libtorch_cuda.so"
        source.write_text(CUDA_STUB)
        compiler = self.compiler.compiler_so[0]
        self.spawn([compiler, "-shared", "-fPIC", f"-Wl,-soname,{library.name}", str(source), "-o", str(library)])
        return str(folder)

    def make_old_symbols(self, folder):
        """What libcudart_static.a takes of the C library, at the versions of before glibc 2.34.

        Which moved threads, dlopen and the like into libc.so.6 under a new version: linked there, _C_cuda would
        not load with an older glibc. libc.so.6 has the old versions, too, but the linker takes them only from a
        library that has no others.
        """
        compiler = self.compiler.compiler_so[0]
        libc = subprocess.check_output([compiler, "-print-file-name=libc.so.6"], text=True).strip()
        if not Path(libc).is_absolute():  # not glibc
            return []
        table = subprocess.check_output(["objdump", "-T", libc], text=True)
        moved = set(re.findall(r" GLIBC_2\.34 +(\w+)$", table, re.MULTILINE))
        nodes = {}  # of each version those functions of which it was the latest before
        lines = re.findall(r"\s\((GLIBC_([\d.]+))\) +(\w+)$", table, re.MULTILINE)  # parentheses: not the default
        lines.sort(key=lambda line: [int(n) for n in line[1].split(".")])
        for name, version in {name: version for version, _, name in lines if name in moved}.items():
            nodes.setdefault(version, []).append(name)
        if not nodes:
            return []
        source, script, library = (Path(folder) / f"old_symbols{end}" for end in (".c", ".map", ".so"))
        source.write_text("".join(f"void {name}(void) {{}}\n" for names in nodes.values() for name in names))
        script.write_text("".join(f"{version} {{ {'; '.join(names)}; }};\n" for version, names in nodes.items()))
        flags = ["-shared", "-fPIC", "-w", "-fno-builtin", "-nostdlib", f"-Wl,--version-script={script}"]
        self.spawn([compiler, *flags, "-Wl,-soname,libc.so.6", str(source), "-o", str(library)])
        return [str(library)]

    def remove_outdated(self, sources):
        """Under a torch without CUDA, ninja does not see on which headers .cu files depend."""
        newest = max(p.stat().st_mtime for p in (*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh")))
        for source in sources:
            target = Path(self.build_temp, source).with_suffix(".o")
            if target.exists() and target.stat().st_mtime < newest:
                target.unlink()

    def compile_levels(self):
        folder = Path(self.build_temp).resolve() / "levels"
        folder.mkdir(parents=True, exist_ok=True)
        headers = [*CSRC.rglob("*.h"), Path(__file__)]

        def compile_level(source, level):
            target = folder / f"{source.parent.name}_{source.stem}_{level}.o"
            newest = max(p.stat().st_mtime for p in [source, *headers])
            name = "default_" if level == "default" else level  # `default` is a C++ keyword
            flags = [*CXX_FLAGS, *KERNEL_FLAGS, *LEVELS[level], f"-DFUSEDATTN_LEVEL={name}", "-fPIC"]
            compiler = getattr(self.compiler, "compiler_so_cxx", self.compiler.compiler_so)
            command = [*compiler, "-c", str(source), "-o", str(target), *flags]
            # Written once it is compiled. `force` says nothing: BuildExtension sets it wherever there is ninja.
            made_by = target.with_suffix(".txt")
            kept = made_by.exists() and target.exists() and made_by.stat().st_mtime >= newest
            if not (kept and made_by.read_text() == shlex.join(command)):
                self.spawn(command)
                made_by.write_text(shlex.join(command))
            return str(target)

        sources = [source for op in OPS for source in sorted(CSRC.glob(f"{op}/cpu_kernel*.cpp"))]
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(lambda job: compile_level(*job), [(s, v) for s in sources for v in LEVELS]))


extensions = [
    CppExtension(
        "fusedattn._C",
        ["csrc/module.cpp", "csrc/library.cpp", "csrc/common/cpu_level.cpp", "csrc/common/memory.cpp"]
        + [f"csrc/{op}/cpu.cpp" for op in OPS],
        extra_compile_args={"cxx": list(CXX_FLAGS)},
        extra_link_args=LINK_FLAGS,
        py_limited_api=True,
    )
]
if home := cuda_home():
    cpp_extension.CUDA_HOME = home  # None under a torch without CUDA
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
    extensions.append(
        CppExtension(
            "fusedattn._C_cuda",
            ["csrc/module_cuda.cpp", *sorted(str(p.relative_to(CSRC.parent)) for p in CSRC.glob("*/cuda_*.cu"))],
            include_dirs=[str(CSRC), f"{home}/include"],
            library_dirs=[f"{home}/lib64"],
            libraries=["torch_cuda", "cudart_static", "rt", "dl", "pthread"],
            # Not -I for nvcc: torch takes a flag with "arch" in it, such as in a path, for the choice of GPUs.
            extra_compile_args={"cxx": [*CXX_FLAGS, "-DUSE_CUDA"], "nvcc": list(NVCC_FLAGS)},
            extra_link_args=["-Wl,--no-as-needed", *LINK_FLAGS],
            py_limited_api=True,
        )
    )

if pure_python():
    setup()
else:
    setup(
        ext_modules=extensions,
        cmdclass={"build_ext": Build},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
