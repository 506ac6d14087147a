"""Loads the compiled extensions: ``torch.ops.fusedattn`` with its CPU kernels, then the CUDA kernels."""

import importlib.util

import torch

EXTENSION_ERROR: ImportError | None = None
try:
    from fusedattn import _C  # noqa: F401
except ImportError as error:  # kept and shown by every backend's reasons and by fusedattn.info
    EXTENSION_ERROR = error

# Why there are no CUDA kernels in this process; None if there are. They need neither a driver nor a GPU to load.
CUDA_ERROR: str | None = None
if torch.version.cuda is None:
    CUDA_ERROR = "this torch is built without CUDA"
elif EXTENSION_ERROR is None:
    try:
        from fusedattn import _C_cuda  # noqa: F401
    except ImportError as error:
        CUDA_ERROR = (
            "they are not part of this build (FUSEDATTN_CUDA=1 builds them)"
            if importlib.util.find_spec("fusedattn._C_cuda") is None
            else f"their extension did not load: {error}"
        )


def cpu_capability() -> str:
    """The instruction-set level of the CPU kernels in use: ``"default"``, ``"avx2"`` or ``"avx512"``.

    Lowered by the environment variable ``FUSEDATTN_CPU_CAPABILITY``, read once per process.
    """
    if EXTENSION_ERROR is not None:
        raise EXTENSION_ERROR
    return torch.ops.fusedattn.cpu_capability()
