"""Where a result was measured: stamped on every result file, and the cache sizes that set tensor sizes."""

import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

import fusedattn
from fusedattn._library import cpu_capability

ROOT = Path(__file__).resolve().parent.parent
MIB, GIB = 1 << 20, 1 << 30
DEFAULT_LAST_LEVEL_CACHE = 32 * MIB  # where the system does not tell


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _command(*words: str) -> str | None:
    try:
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu_model() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return _command("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor() or platform.machine()


def caches() -> dict[str, int]:
    """Bytes of each cache one core sees, by name: L1d, L1i, L2, L3."""
    sizes = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(f"{folder}/{name}").strip() for name in ("level", "type", "size"))
        if size:
            suffix = {"Data": "d", "Instruction": "i"}.get(kind, "")
            sizes[f"L{level}{suffix}"] = int(size.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(size[-1], 0)
    return sizes


def last_level_cache() -> int:
    return max(caches().values(), default=DEFAULT_LAST_LEVEL_CACHE)


def available_memory() -> int:
    """Bytes that can be allocated without swapping, within a container's limits; 4 GiB where the system does not
    tell."""
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable"):
            group = _read("/proc/self/cgroup").strip().rpartition("0::/")[2]
            return min([int(line.split()[1]) << 10, *left_of_limits(Path("/sys/fs/cgroup") / group)])
    return 4 * GIB


def left_of_limits(group: Path) -> list[int]:
    """Bytes that the memory limits of a control group (version 2) and of those above it leave, if there are any.
    What a group caches of files can be dropped, so it counts as free."""
    left = []
    for folder in (group, *group.parents):
        limit = _read(f"{folder}/memory.max").strip()
        if limit.isdigit():
            statistics = dict(line.split() for line in _read(f"{folder}/memory.stat").splitlines())
            used = int(_read(f"{folder}/memory.current")) - int(statistics["inactive_file"])
            left.append(max(0, int(limit) - used))
    return left


def stamp() -> dict:
    changes = _command("git", "status", "--porcelain")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "caches": caches(),
        "memory": available_memory(),
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled").partition("[")[2].partition("]")[0],
        "variables": {name: value for name, value in os.environ.items() if name.startswith("FUSEDATTN_")},
        "cpu_capability": cpu_capability(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fusedattn": fusedattn.__version__,
        "commit": _command("git", "rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
    }


def describe(machine: dict) -> str:
    """One line for tables, plots and the README."""
    commit = (machine["commit"] or "no commit")[:10] + (" (modified)" if machine["dirty"] else "")
    variables = "".join(f"{name}={value}, " for name, value in machine.get("variables", {}).items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, level "
        f"{machine['cpu_capability']}, torch {machine['torch']}, Python {machine['python']}, "
        f"{variables}fusedattn {machine['fusedattn']} {commit}, {machine['date'][:10]}"
    )
