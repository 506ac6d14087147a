"""Pictures of the grapheme-to-phoneme runs: loss curves and alignments."""

from pathlib import Path

import matplotlib
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def plot_losses(results: list[dict], output: Path) -> Path:
    """Loss against step of the plain and the fused run, one panel per decoder."""
    figure, axes = plt.subplots(1, len(results), figsize=(5 * len(results), 3.5), squeeze=False)
    for axis, result in zip(axes[0], results, strict=True):
        axis.plot(result["plain"]["losses"], label="plain PyTorch", linewidth=3, alpha=0.4)
        axis.plot(result["fused"]["losses"], label="fusedattn", linewidth=1)
        axis.set(title=f"decoder: {result['decoder']}", xlabel="step", ylabel="loss")
        axis.legend()
    return _save(figure, output, "g2p_loss.png")


def plot_alignments(words: list[str], spoken: list[list[str]], weights: Tensor, output: Path) -> Path:
    """Attention weights of each word: letters across, phones down."""
    figure, axes = plt.subplots(1, len(words), figsize=(3.2 * len(words), 3.2), squeeze=False)
    for axis, word, phones, weight in zip(axes[0], words, spoken, weights, strict=True):
        axis.imshow(weight[: len(phones), : len(word)], aspect="auto", cmap="viridis", vmin=0, vmax=1)
        axis.set_xticks(range(len(word)), word)
        axis.set_yticks(range(len(phones)), phones)
    return _save(figure, output, "g2p_alignments.png")


def _save(figure, output: Path, name: str) -> Path:
    output.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(output / name, dpi=120)
    plt.close(figure)
    return output / name
