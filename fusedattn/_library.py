"""Loads what registers raw operators under ``torch.ops.fusedattn``: the compiled extensions, Triton's kernels."""

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch

EXTENSION_ERROR: ImportError | None = None
try:
    from fusedattn import _C  # type: ignore[attr-defined] # noqa: F401
except ImportError as error:  # kept and shown by every backend's reasons and by fusedattn.info
    EXTENSION_ERROR = error
    # The one warning of an installation without compiled kernels; later, torch.compile may be tracing.
    warnings.warn(
        f"fusedattn: the compiled extension did not load ({error}). On the CPU, functions run as plain "
        "PyTorch: same results, slower, with the memory that kernels save. What can run here: "
        "`python -m fusedattn.info`.",
        stacklevel=2,
    )

LEAST_TRITON = (3, 6)
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # runs Triton kernels on the CPU, for tests


def _load_triton() -> str | None:
    """Registers the Triton kernels, where there may be a GPU for them. Returns why not, or None."""
    if not (torch.version.cuda or torch.version.hip or TRITON_INTERPRETED):
        return "this torch is built for the CPU"
    try:
        import triton
    except ImportError as error:
        return f"Triton is not installed: {error}"
    if tuple(map(int, triton.__version__.split(".")[:2])) < LEAST_TRITON:
        return f"Triton {'.'.join(map(str, LEAST_TRITON))} or later is needed, found {triton.__version__}"
    for op in (
        "additive_attention",
        "additive_attention_varlen",
        "additive_scores",
        "attention_pool",
        "film",
        "gated_film",
        "hard_additive_attention",
        "location_attention",
        "norm_film",
    ):
        importlib.import_module(f"fusedattn.triton.{op}")
    return None


TRITON_ERROR = _load_triton()


_Function = TypeVar("_Function", bound=Callable[..., Any])


def assume_constant(function: _Function) -> _Function:
    """Decorator: as ``torch.compiler.assume_constant_result``, which would import dynamo here."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@functools.cache
def _triton_driver_error() -> str | None:
    import triton

    try:
        triton.runtime.driver.active  # noqa: B018, makes the driver
    except Exception as error:  # whatever may stop a compiler
        return f"{type(error).__name__}: {error}"
    return None


@assume_constant
def triton_driver_error() -> str | None:
    """Why Triton cannot launch on this machine's GPU; None if it can. It compiles its driver in C at first use."""
    return _triton_driver_error()


# Why there are no CUDA kernels in this process; None if there are. They need neither a driver nor a GPU to load.
CUDA_ERROR: str | None = None
if torch.version.cuda is None:
    CUDA_ERROR = "this torch is built without CUDA"
elif EXTENSION_ERROR is None:
    try:
        from fusedattn import _C_cuda  # type: ignore[attr-defined] # noqa: F401
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


def empty_cache() -> None:
    """Gives the memory that the CPU kernels keep back to the system, as ``torch.cuda.empty_cache`` does on GPUs.

    Kept for the next step are freed results and gradients from 1 MiB up, never more than was in use at once. What
    no step asks for within five seconds goes by itself at the next call. With ``FUSEDATTN_REUSE_MEMORY=0`` nothing
    is kept.
    """
    if EXTENSION_ERROR is None:
        torch.ops.fusedattn.empty_cache()
