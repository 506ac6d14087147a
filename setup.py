"""Builds fusedattn._C: operator schemas and the CPU kernels, against LibTorch's stable ABI.

One wheel (cp310-abi3) serves every Python >= 3.10 and torch >= 2.11. Each op's cpu_kernel.cpp is compiled
once per instruction set, chosen at run time (csrc/common/cpu_level.cpp).

Without a C++ compiler the installation is pure Python: Triton kernels on GPUs, plain PyTorch on the CPU.

Environment: FUSEDATTN_SKIP_BUILD=1 asks for that, 0 makes a missing compiler an error. FUSEDATTN_SANITIZE=1
builds with AddressSanitizer and UndefinedBehaviorSanitizer. MAX_JOBS limits parallel compilation.
"""

import os
import platform
import shlex
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler

OPS = ["additive_attention", "film"]

LEVELS = {"default": []}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    LEVELS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"]
    LEVELS["avx512"] += ["-mprefer-vector-width=512"]

CSRC = Path(__file__).parent.resolve() / "csrc"
CXX_FLAGS = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", f"-I{CSRC}", "-Wall", "-Wno-psabi"]
CXX_FLAGS += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
# Multiply-adds may fuse; nothing else about floating point is relaxed.
# GCC 12 takes the undefined source operand inside its own AVX-512 intrinsics for ours.
KERNEL_FLAGS = [
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
]
LINK_FLAGS = []

if os.environ.get("FUSEDATTN_SANITIZE") == "1":
    SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
    CXX_FLAGS += [*SANITIZE, "-g1"]
    LINK_FLAGS += SANITIZE


def pure_python() -> bool:
    """Whether to build no extension: as asked for, or because there is no C++ compiler."""
    skip = os.environ.get("FUSEDATTN_SKIP_BUILD")
    if skip not in (None, "0", "1"):
        raise ValueError(f"FUSEDATTN_SKIP_BUILD: expected 0 or 1, got {skip!r}")
    if skip is not None:
        return skip == "1"
    compiler = get_cxx_compiler()
    if shutil.which(shlex.split(compiler)[0]):
        return False
    print(f"fusedattn: no C++ compiler ({compiler}): the CPU kernels are left out", file=sys.stderr)
    return True


class BuildLevels(BuildExtension):
    """Compiles every kernel file once per instruction set, then builds and links the extension as usual."""

    def build_extensions(self):
        folder = Path(self.build_temp).resolve() / "levels"
        folder.mkdir(parents=True, exist_ok=True)
        headers = [*CSRC.rglob("*.h"), Path(__file__)]

        def compile_level(op, level):
            source = CSRC / op / "cpu_kernel.cpp"
            target = folder / f"{op}_{level}.o"
            newest = max(p.stat().st_mtime for p in [source, *headers])
            if self.force or not target.exists() or target.stat().st_mtime < newest:
                name = "default_" if level == "default" else level  # `default` is a C++ keyword
                flags = [*CXX_FLAGS, *KERNEL_FLAGS, *LEVELS[level], f"-DFUSEDATTN_LEVEL={name}", "-fPIC"]
                compiler = getattr(self.compiler, "compiler_so_cxx", self.compiler.compiler_so)
                self.spawn([*compiler, "-c", str(source), "-o", str(target), *flags])
            return str(target)

        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(jobs) as pool:
            objects = list(pool.map(lambda job: compile_level(*job), [(o, v) for o in OPS for v in LEVELS]))
        for extension in self.extensions:
            extension.extra_objects = objects
        super().build_extensions()


if pure_python():
    setup()
else:
    setup(
        ext_modules=[
            CppExtension(
                "fusedattn._C",
                ["csrc/module.cpp", "csrc/library.cpp", "csrc/common/cpu_level.cpp"]
                + [f"csrc/{op}/cpu.cpp" for op in OPS],
                extra_compile_args={"cxx": CXX_FLAGS},
                extra_link_args=LINK_FLAGS,
                py_limited_api=True,
            )
        ],
        cmdclass={"build_ext": BuildLevels},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
