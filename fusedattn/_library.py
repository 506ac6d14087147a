"""Loads the compiled extension, which registers the raw operators under ``torch.ops.fusedattn``."""

import torch

EXTENSION_ERROR: ImportError | None = None
try:
    from fusedattn import _C  # noqa: F401
except ImportError as error:  # kept and shown by every backend's reasons and by fusedattn.info
    EXTENSION_ERROR = error


def cpu_capability() -> str:
    """The instruction-set level of the CPU kernels in use: ``"default"``, ``"avx2"`` or ``"avx512"``.

    Lowered by the environment variable ``FUSEDATTN_CPU_CAPABILITY``, read once per process.
    """
    if EXTENSION_ERROR is not None:
        raise EXTENSION_ERROR
    return torch.ops.fusedattn.cpu_capability()
