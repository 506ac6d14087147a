"""The compiled extensions, built where there is time and carried to where there is a GPU.

``python -m benchmarks.gpu.libraries prepare`` builds them into build/gpu, for compute capability 9.0 and, as PTX,
8.0 and later; it needs nvcc, but neither a GPU nor a torch with CUDA. ``use``, on the machine with the GPU, puts
them in place if they were made from the sources that lie here, else builds for that GPU. One build serves every
Python from 3.10 and every torch from 2.11 (setup.py).
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from .stages import ROOT, record, rehearsing

CARRIED = ROOT / "build" / "gpu"
DIGEST = "sources.sha256"
NAMES = ("_C.abi3.so", "_C_cuda.abi3.so")
MOST_BYTES = 64 << 20  # of what is carried
ARCHITECTURES = "8.0+PTX;9.0"


def digest(root: Path = ROOT) -> str:
    """Of all that the libraries are made from."""
    files = sorted(p for p in (root / "csrc").rglob("*") if p.is_file())
    total = hashlib.sha256()
    for file in (*files, root / "setup.py"):
        total.update(f"{file.relative_to(root)}\0".encode())
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def build(architectures: str, *arguments: str) -> None:
    # With lines of the sources in it, for compute-sanitizer and ncu.
    flags = {"FUSEDATTN_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architectures, "NVCC_APPEND_FLAGS": "-lineinfo"}
    command = [sys.executable, "setup.py", "-q", "build_ext", *arguments]
    subprocess.run(command, cwd=ROOT, env=os.environ | flags, check=True)


def prepare() -> None:
    (CARRIED / DIGEST).unlink(missing_ok=True)
    sources = digest()  # as they are now: what changes meanwhile may or may not be compiled in
    build(ARCHITECTURES, "--build-lib", str(CARRIED), "--build-temp", str(CARRIED.with_name("gpu_temp")))
    size = sum((CARRIED / "fusedattn" / name).stat().st_size for name in NAMES)
    if size > MOST_BYTES:
        raise SystemExit(f"{CARRIED}: {size >> 20} MiB, expected at most {MOST_BYTES >> 20}")
    (CARRIED / DIGEST).write_text(sources)
    print(f"{CARRIED.relative_to(ROOT)}: {size / (1 << 20):.1f} MiB for {ARCHITECTURES}")


def why_not(carried: Path = CARRIED, root: Path = ROOT) -> str | None:
    """Why the carried libraries cannot be used; None if they can."""
    missing = [name for name in NAMES if not (carried / "fusedattn" / name).exists()]
    if missing or not (carried / DIGEST).exists():
        return f"{carried} lacks {', '.join(missing) or DIGEST}"
    if (carried / DIGEST).read_text() != digest(root):
        return f"{carried} was made from other sources"
    return None


def use() -> None:
    reason = why_not()
    if reason is None:
        for name in NAMES:
            shutil.copy(CARRIED / "fusedattn" / name, ROOT / "fusedattn" / name)
        print(f"took the libraries of {CARRIED.relative_to(ROOT)}")
    elif rehearsing():
        print(f"{reason}: a GPU's machine would build them")
    else:
        import torch

        print(f"{reason}: building")
        build("{}.{}".format(*torch.cuda.get_device_capability()), "--inplace")
    record(kind="libraries", carried=reason is None, why=reason)


if __name__ == "__main__":
    {"prepare": prepare, "use": use}[sys.argv[1]]()
