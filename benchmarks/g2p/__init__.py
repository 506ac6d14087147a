"""A real workload: grapheme-to-phoneme on the CMU Pronouncing Dictionary, plain PyTorch attention against ours."""

from .train import demo, run

__all__ = ["demo", "run"]
