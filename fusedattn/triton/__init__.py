"""Triton kernels: the raw ops again as ``torch.ops.fusedattn.<op>_triton``, for NVIDIA and AMD GPUs.

Importing a module of this folder registers its ops; ``fusedattn/_library.py`` does so where a GPU may be used.
"""
