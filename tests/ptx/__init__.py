"""Executes PTX in numpy: what Triton and nvcc compile is run and tested on a machine without a GPU.

    kernel = parse(text)
    launch(kernel, grid=(3, 2), threads=128, arguments=[x, y, 17])

``parser`` reads the text, ``values`` knows the types, ``arithmetic``, ``access`` and ``warp`` are the
instructions, ``memory`` checks every access, ``executor`` runs the threads; ``launcher`` runs Triton's launches.
What is not implemented is an error.
"""

from .executor import launch
from .memory import GlobalMemory, OutOfBounds, Race
from .parser import PtxError, parse

__all__ = ["GlobalMemory", "OutOfBounds", "PtxError", "Race", "launch", "parse"]
