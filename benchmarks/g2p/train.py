"""Trains one model with plain and with fused attention: losses, speed and the share of attention compared."""

import statistics
import time
from math import inf
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from ..measure import DisagreementError
from ..progress import Tracker
from .data import PAD, Batch, Dictionary
from .model import FusedAttention, Model, PlainAttention, PlainAttentionSummed
from .plots import plot_alignments, plot_losses

CONTENDERS = {"plain": PlainAttention, "plain, other order": PlainAttentionSummed, "fused": FusedAttention}
BLOCK = 10  # steps of one contender before the next has its turn
LEAST_BLOCKS = 3  # the first warms up
SEED = 0


def build(attention, hidden: int, phones: int, stepwise: bool) -> Model:
    """The model with the parameters that this seed gives, whatever the class of attention."""
    torch.manual_seed(SEED)
    plain = Model(PlainAttention, hidden, phones, stepwise)
    torch.nn.init.uniform_(plain.attention.weight, -(hidden**-0.5), hidden**-0.5)
    model = Model(attention, hidden, phones, stepwise)
    model.load_state_dict(plain.state_dict())
    return model


def loss_of(model: Model, batch: Batch) -> torch.Tensor:
    logits = model(batch.letters, batch.lengths, batch.inputs)
    return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=PAD)


def train_step(model: Model, optimizer, batch: Batch) -> float:
    optimizer.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def attention_seconds(model: Model, batch: Batch, repeats: int = 5) -> float:
    """Seconds that forward and backward of every call of the attention take in one step, measured apart."""
    calls = []
    hook = model.attention.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
    loss_of(model, batch)
    hook.remove()
    with torch.no_grad():
        letters, lengths = batch.letters, batch.lengths
        packed = torch.nn.utils.rnn.pack_padded_sequence(
            model.letters(letters), lengths, batch_first=True, enforce_sorted=False
        )
        memory, _ = torch.nn.utils.rnn.pad_packed_sequence(model.encoder(packed)[0], batch_first=True)
    memory.requires_grad_()
    queries = [query.detach().requires_grad_() for query, _ in calls]
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        keys = model.attention.project_keys(memory, key_lengths=batch.lengths)
        contexts = [model.attention(query, keys, return_weights=True)[0] for query in queries]
        torch.autograd.grad(torch.cat(contexts, 1).sum(), [*queries, memory])
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def compare(
    dictionary: Dictionary, stepwise: bool, steps: int, hidden: int, size: int, limit: float, console: Console
) -> dict:
    """Trains each contender on the same batches, in alternating blocks, so that drift hits all alike.

    It ends early, after LEAST_BLOCKS at least, once ``limit`` seconds have gone.
    """
    names = list(CONTENDERS)
    models = {name: build(CONTENDERS[name], hidden, len(dictionary.phones), stepwise) for name in names}
    optimizers = {name: torch.optim.Adam(model.parameters(), lr=2e-3) for name, model in models.items()}
    losses: dict[str, list[float]] = {name: [] for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    source = dictionary.batches(size, SEED)
    title = "step by step" if stepwise else "all steps at once"
    end = time.monotonic() + limit
    with Tracker(console, f"g2p, {title}", steps // BLOCK) as tracker:
        for block in range(steps // BLOCK):
            if block >= LEAST_BLOCKS and time.monotonic() > end:
                break
            batches = [next(source) for _ in range(BLOCK)]
            for name in names if block % 2 == 0 else reversed(names):
                for batch in batches:
                    start = time.perf_counter()
                    losses[name].append(train_step(models[name], optimizers[name], batch))
                    seconds[name].append(time.perf_counter() - start)
            tracker.describe(f"loss {losses['fused'][-1]:.3f}")
            tracker.advance()
    result = {
        "decoder": title,
        "stepwise": stepwise,
        "steps": len(losses["plain"]),
        "hidden": hidden,
        "batch": size,
        "words": len(dictionary.words),
    }
    for name in names:
        step = statistics.median(seconds[name][BLOCK:])  # the first block warms up
        share = attention_seconds(models[name], batches[-1]) / step
        result[name] = {
            "losses": losses[name],
            "steps_per_second": 1 / step,
            "attention_share": share,
            "final_loss": statistics.mean(losses[name][-BLOCK:]),
        }
    result |= agreement(losses)
    return result


def agreement(losses: dict[str, list[float]]) -> dict:
    """Whether the fused run follows the plain one as closely as rounding lets any run follow it.

    A loss is a mean of float32 terms, so the first step may differ by a few units of rounding. Training then
    magnifies any difference, at a rate that the second plain run shows: at each step the fused run may be as far
    from the plain one as ten times the largest distance of that run so far, plus 1e-5 of the loss.
    """
    plain, control, fused = (losses[name] for name in CONTENDERS)
    widest, excess = 0.0, 0.0
    for a, b, c in zip(plain, control, fused, strict=True):
        widest = max(widest, abs(a - b))
        excess = max(excess, abs(a - c) - 10 * widest - 1e-5 * abs(a))
    return {
        "max_difference": max(abs(a - c) for a, c in zip(plain, fused, strict=True)),
        "max_difference_of_plain": widest,
        "agree": excess <= 0,
    }


def report(results: list[dict], console: Console) -> None:
    table = Table(title=f"grapheme-to-phoneme, CMU Pronouncing Dictionary, {results[0]['words']:,} words")
    for column in (
        "decoder",
        "attention",
        "steps/s",
        "speed-up",
        "attention's share",
        "final loss",
        "max loss diff",
    ):
        table.add_column(column, justify="left" if column in ("decoder", "attention") else "right")
    for result in results:
        differences = {
            "plain": "",
            "plain, other order": f"{result['max_difference_of_plain']:.1e}",
            "fused": f"{result['max_difference']:.1e}" + ("" if result["agree"] else " DISAGREES"),
        }
        for name in CONTENDERS:
            row = result[name]
            table.add_row(
                f"{result['decoder']}, {result['steps']} steps" if name == "plain" else "",
                name,
                f"{row['steps_per_second']:.1f}",
                f"{row['steps_per_second'] / result['plain']['steps_per_second']:.2f} x",
                f"{row['attention_share']:.0%}",
                f"{row['final_loss']:.4f}",
                differences[name],
            )
    console.print(table)


def run(quick: bool, output: Path | None = None, limit: float = inf) -> dict:
    """The comparison for both decoders: prints a table, plots into the folder ``output``, returns the figures.

    ``quick``: 200 steps of 32 words, hidden width 128; else 400 steps of 256 words, width 256; fewer where they
    take longer than ``limit`` seconds together. Raises ``DisagreementError`` where the losses of the fused run do
    not follow those of the plain one.
    """
    steps, hidden, size = (200, 128, 32) if quick else (400, 256, 256)
    console, dictionary = Console(), Dictionary()
    results = [
        compare(dictionary, stepwise, steps, hidden, size, limit / 2, console) for stepwise in (True, False)
    ]
    report(results, console)
    if output is not None:
        plot_losses(results, output)
    for result in results:
        if not result["agree"]:
            raise DisagreementError(
                f"g2p, {result['decoder']}: losses differ by {result['max_difference']:.1e}, two plain runs by "
                f"{result['max_difference_of_plain']:.1e}"
            )
    return {"results": results}


def edit_distance(a: list[int], b: list[int]) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def error_rates(model: Model, dictionary: Dictionary, words: list[str], size: int = 512) -> tuple[float, float]:
    """Phoneme and word error rate; a word with several pronunciations is held against the nearest."""
    distance = phones = wrong = 0
    for first in range(0, len(words), size):
        some = words[first : first + size]
        spoken, _ = model.greedy(*dictionary.letters(some))
        for word, said in zip(some, spoken, strict=True):
            nearest = min(dictionary.words[word], key=lambda truth: edit_distance(said, truth))
            errors = edit_distance(said, nearest)
            distance, phones, wrong = distance + errors, phones + len(nearest), wrong + (errors > 0)
    return distance / phones, wrong / len(words)


def demo(output: Path, steps: int = 3000, hidden: int = 256, size: int = 128) -> dict:
    """Trains the step-by-step decoder with fused attention; error rates on held-out words, alignment plots."""
    console, dictionary = Console(), Dictionary()
    model = build(FusedAttention, hidden, len(dictionary.phones), stepwise=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    source = dictionary.batches(size, SEED)
    with Tracker(console, "training", steps) as tracker:
        for _ in range(steps):
            tracker.describe(f"loss {train_step(model, optimizer, next(source)):.3f}")
            schedule.step()
            tracker.advance()
    phoneme, word = error_rates(model, dictionary, dictionary.testing)
    console.print(
        f"{len(dictionary.testing):,} held-out words after {steps} steps of {size}: "
        f"phoneme error rate {phoneme:.1%}, word error rate {word:.1%}"
    )
    samples = ["attention", "pronounce", "knowledge", "philosopher"]
    letters, lengths = dictionary.letters(samples)
    spoken, weights = model.greedy(letters, lengths)
    for sample, said in zip(samples, spoken, strict=True):
        console.print(f"  {sample}: {' '.join(dictionary.phones[p] for p in said)}")
    path = plot_alignments(samples, [[dictionary.phones[p] for p in said] for said in spoken], weights, output)
    console.print(f"alignments: {path}")
    return {"phoneme_error_rate": phoneme, "word_error_rate": word, "steps": steps}
