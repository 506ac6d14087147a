"""``python -m fusedattn.info``: versions, what is built, what can run here, and why not."""

import argparse
import os
import platform
import subprocess
import sys

import torch

import fusedattn
from fusedattn import _library
from fusedattn._dispatch import BACKENDS, describe_gpu

# Lowest first; each runs wherever a later one does.
LEVELS = ("default", "avx2", "avx512")
VARIABLE = "FUSEDATTN_CPU_CAPABILITY"


def supported_levels() -> list[str]:
    """The levels of the CPU kernels that this machine can run, best first.

    The level in use is the best one unless ``FUSEDATTN_CPU_CAPABILITY`` lowered it; it is read once per process,
    so a second process without it answers then. Raises ``ImportError`` if the extension did not load.
    """
    if VARIABLE not in os.environ:
        best = _library.cpu_capability()
    else:
        environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
        code = "from fusedattn._library import cpu_capability; print(cpu_capability())"
        answer = subprocess.run(
            [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
        )
        best = answer.stdout.strip()
    return list(reversed(LEVELS[: LEVELS.index(best) + 1]))


def _extension() -> str:
    if _library.EXTENSION_ERROR is not None:
        return f"not loaded: {_library.EXTENSION_ERROR}"
    return f"loaded from {_library._C.__file__}"


def _cpu_level() -> str:
    try:
        in_use = _library.cpu_capability()
    except ImportError:
        return "none: the extension is not loaded"
    except RuntimeError as error:  # a value of the variable that is not a level
        return f"none: {str(error).splitlines()[0]}"
    return f"{in_use}; this machine supports {', '.join(supported_levels())}"


def _availability(reasons: list[str], where: str) -> str:
    return "not available: " + "; ".join(reasons) if reasons else f"available for tensors on {where}"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "a GPU"
    return torch.cuda.get_device_name() if torch.version.hip else describe_gpu(torch.device("cuda"))


def _triton() -> str:
    if _library.TRITON_ERROR is not None:
        return f"not loaded: {_library.TRITON_ERROR}"
    import triton

    return triton.__version__ + (" (interpreted on the CPU)" if _library.TRITON_INTERPRETED else "")


def _backends() -> dict[str, str]:
    triton_device, triton_where = ("cpu", "the CPU") if _library.TRITON_INTERPRETED else ("cuda", _gpu())
    devices = {"cpu": ("cpu", "the CPU"), "cuda": ("cuda", _gpu()), "triton": (triton_device, triton_where)}
    rows = {}
    for name, reasons in BACKENDS.items():
        device, where = devices[name]
        rows[name] = _availability(reasons(torch.device(device), torch.float32), where)
    return rows | {"reference": "available on any device (plain PyTorch); runs where no other can"}


def report() -> str:
    """The text that ``python -m fusedattn.info`` prints."""
    accelerator = f"CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU"
    rows = [
        ("fusedattn", fusedattn.__version__),
        ("torch", f"{torch.__version__} ({accelerator})"),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("extension", _extension()),
        ("triton", _triton()),
        ("CPU level", _cpu_level()),
        ("", f"to lower it: {VARIABLE}={'|'.join(LEVELS)}, read once per process"),
        ("threads", f"{torch.get_num_threads()} (torch.set_num_threads or OMP_NUM_THREADS)"),
    ]
    if _library.TRITON_ERROR is None:
        from fusedattn.triton import _tiles

        state = "on" if _tiles.enabled() else "off"
        rows.insert(5, ("", f"tuning of tiles: {state} ({_tiles.VARIABLE}=1 times them at first use)"))
    lines = [f"{name:11}{text}".rstrip() for name, text in rows]
    lines += ["", "backends of every op"]
    lines += [f"  {backend:11}{text}" for backend, text in _backends().items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fusedattn.info", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--levels", action="store_true", help="print only the supported CPU levels, best first")
    arguments = parser.parse_args()
    print(" ".join(supported_levels()) if arguments.levels else report())


if __name__ == "__main__":
    main()
