"""Benchmarks of fusedattn against PyTorch; ``python -m benchmarks --help``."""
