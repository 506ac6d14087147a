"""A real workload: grapheme-to-phoneme on the CMU Pronouncing Dictionary, with plain PyTorch attention and with ours."""

from .train import demo, run

__all__ = ["demo", "run"]
