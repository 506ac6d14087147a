"""The sizes that people use, `python -m benchmarks --wide`: real models, small ones, half precision, modules, and
loops that call their attention once per step. What matters is where eager PyTorch or torch.compile wins.
"""

import time
from collections.abc import Callable
from dataclasses import replace

from rich.console import Console

from . import contenders, fresh, machine, measure, memory, sizing
from .blocks import DiTBlock, FiLMedResNetBlock
from .dropin import ReplacedCase, ReplacedLoop, ReplacedNetwork, ReplacedPool, ReplacedTranslation, shares
from .location import LocationLoop, LocationStep
from .machine import GIB
from .measure import Job
from .models import Attention, Film, FilmModule, HardAttention, Loop, ModelCase, MultiheadModule, WindowedAttention
from .norms import GatedFilm, NormFilm
from .pool import Pool
from .progress import Tracker
from .sequences import Sequences
from .suite import CAPTIONING, SPEECH, Schedule, time_all

SECONDS = 840  # of a run's 15 minutes
LEFT_OUT = "compile sum"  # "compile @" was as fast wherever both were measured


def _in(dtypes: str, kind: Callable[..., ModelCase], model: str, *sizes, **options) -> list[ModelCase]:
    return [kind(model, {"f": "float32", "b": "bfloat16"}[letter], *sizes, **options) for letter in dtypes]


CASES: dict[str, list[ModelCase]] = {
    "wide loop": [
        *_in("f", Loop, "one sentence", 1, 40, 128, 128, 30),
        *_in("f", Loop, "g2p", 16, 30, 128, 128, 30),
        *_in("fb", Loop, "translation", 64, 50, 512, 512, 20),
        CAPTIONING,
        SPEECH,
        replace(SPEECH, dtype="bfloat16"),
    ],
    "wide attention": [
        *_in("fb", Attention, "decoding long inputs", 64, 1, 1024, 512),
        *_in("fb", Attention, "translation, all steps", 128, 10, 128, 1024),
        *_in("fb", Attention, "long sequences", 4, 512, 512, 256),
        *_in("f", Attention, "long sequences", 4, 512, 512, 256, activation="relu"),
        *_in("f", WindowedAttention, "long sequences", 4, 512, 512, 256),
        *_in("f", HardAttention, "long sequences", 4, 512, 512, 256),
        *_in("f", Sequences, "lengths from 1 to 512", 8, 512, 256),
        *_in("f", Sequences, "lengths from 1 to 512", 8, 512, 256, padded=True),
        *_in("f", Attention, "long sequences", 4, 512, 512, 256, biased=True),
        *_in("f", Attention, "one key", 64, 64, 1, 256),
        *_in("f", Attention, "tiny", 1, 8, 8, 64),
        *_in("f", Attention, "narrow", 4, 256, 256, 8),
        *_in("f", Attention, "narrow", 4, 256, 256, 16),
        *_in("fb", Attention, "one query", 64, 1, 512, 64, heads=8),
        *_in("f", Attention, "heads, all steps", 16, 64, 64, 64, heads=8),
        *_in("f", Attention, "one sentence, a step", 1, 1, 40, 128),
        *_in("fb", Attention, "translation, a step", 80, 1, 50, 1000),
        *_in("fb", Attention, "captioning, a step", 32, 1, 196, 512),
        *_in("fb", Attention, "speech, a step", 64, 1, 400, 128),
        *_in("f", Attention, "Tacotron 2, a step", 64, 1, 160, 128),
        *_in("f", Attention, "words of a document", 64, 1, 30, 100),
        *_in("f", Attention, "pointer network", 128, 50, 50, 128),
        *_in("fb", Attention, "slide of 10,000 patches", 1, 1, 10_000, 512),
    ],
    "wide location": [
        *_in("fb", LocationStep, "Tacotron 2, a step", 64, 400, 128, 512, 2, 32, 31),
        *_in("f", LocationStep, "speech, a step", 32, 200, 320, 320, 1, 10, 201),
        *_in("f", LocationStep, "one sentence, a step", 1, 150, 128, 512, 2, 32, 31),
        *_in("f", LocationLoop, "Tacotron 2", 64, 400, 128, 512, 2, 32, 31),
    ],
    "wide pool": [
        *_in("f", Pool, "slide of 100,000 patches", (1, 100_000, 512), 256),
        *_in("fb", Pool, "slide of 10,000 patches", (1, 10_000, 512), 256),
        *_in("f", Pool, "tiny", (1, 64, 64), 64),
    ],
    "wide film": [
        *_in("fb", Film, "fully connected", (4096, 1024)),
        *_in("f", Film, "fully connected", (4096, 1024), shared=True),
        *_in("f", Film, "fully connected", (64, 512)),
        *_in("f", Film, "tiny", (1, 16, 4)),
        *_in("fb", Film, "diffusion policy", (32, 256, 16)),
        *_in("f", Film, "late ResNet", (32, 512, 7, 7)),
        *_in("fb", Film, "visual reasoning", (64, 128, 14, 14), activation="relu", residual=True),
        *_in("fb", Film, "transformer", (8, 1024, 768), channel_dim=2),
        *_in("f", Film, "DiT-S/2", (8, 256, 384), channel_dim=2),
        *_in("fb", Film, "latent diffusion", (4, 320, 64, 64), activation="silu"),
        *_in("f", Film, "speech separation", (8, 64, 8000), activation="relu"),
    ],
    "wide norm": [
        *_in("fb", NormFilm, "DiT, between two layers", "layer", (8, 1024, 1152), gated=True),
        *_in("f", NormFilm, "diffusion U-Net", "group", (16, 256, 64, 64), 1, 32, affine=True, activation="silu"),
        *_in("f", NormFilm, "style transfer", "instance", (8, 128, 128, 128), 1, affine=True, activation="relu"),
        *_in("f", NormFilm, "FiLMed ResNet", "batch", (64, 128, 28, 28), 1, activation="relu", residual=True),
        *_in(
            *("f", NormFilm, "FiLMed ResNet", "batch", (64, 128, 28, 28), 1),
            **{"activation": "relu", "residual": True, "channels_last": True},
        ),
        *_in("b", NormFilm, "transformer", "rms", (4, 2048, 1536)),
        *_in("f", NormFilm, "DiT, a condition a token", "layer", (2, 4096, 1152), per_place=True),
        *_in("f", NormFilm, "DiT-S/2", "layer", (8, 256, 384), gated=True),
        *_in("f", NormFilm, "tiny", "layer", (1, 16, 64)),
    ],
    "wide gated": [
        *_in("fb", GatedFilm, "PixelCNN", (32, 256, 32, 32)),
        *_in("f", GatedFilm, "PixelCNN, a condition a place", (32, 256, 32, 32), per_place=True),
        *_in("f", GatedFilm, "WaveNet, channels last", (8, 1024, 512), channel_dim=2),
        *_in("f", GatedFilm, "tiny", (1, 32, 8, 8)),
    ],
    "wide module": [
        *_in("fb", FilmModule, "visual reasoning", 64, 128, 14, 256),
        *_in("f", MultiheadModule, "translation, all steps", 32, 20, 50, 256, 1),
        *_in("fb", MultiheadModule, "transformer", 16, 64, 64, 512, 8),
    ],
    "wide block": [
        *_in("f", DiTBlock, "DiT-S/2", 8, 256, 384, 6),
        *_in("f", FiLMedResNetBlock, "visual reasoning", 64, 128, 14, 256),
    ],
    "wide dropin": [
        *_in("f", ReplacedLoop, "speech", "espnet.AttLoc", 16, 200, 320, 320, 320, 20),
        *_in("f", ReplacedLoop, "Tacotron 2", "tacotron2.Attention", 16, 160, 512, 1024, 128, 30),
        *_in("f", ReplacedLoop, "captioning", "captioning.Attention", 8, 196, 2048, 512, 512, 10),
        *_in("f", ReplacedTranslation, "GNMT", 32, 40, 40, 1024),
        *_in("f", ReplacedPool, "slide of 10,000 patches", 10_000, 512, 128),
        *_in("f", ReplacedNetwork, "DiT-S/2", "diffusers.BasicTransformerBlock", 384, (4, 256, 384)),
        *_in("f", ReplacedNetwork, "diffusion U-Net", "guided_diffusion.ResBlock", 128, (2, 128, 32, 32), 512),
        *_in("f", ReplacedNetwork, "FiLMed ResNet", "film.FiLMedResBlock", 128, (32, 128, 14, 14), 1024),
    ],
}
WITH_BYTES = ("wide pool", "wide norm", "wide gated")  # groups of which the bytes that must be moved are known
WITH_PEAKS = (*WITH_BYTES, "wide block", "wide dropin")


def time_case(job: Job, seconds: float) -> list[dict]:
    """As measure.time_case, but what is checked are the results at a smaller size, without compiling for it."""
    small = job.case.reduced()
    measure.check_agreement(small, contenders.of(small, compile=False), small.inputs(), small.grad_output())
    rows = measure.time_case(replace(job, check=False), seconds)
    if isinstance(job.case, ReplacedCase):
        functions = contenders.of(job.case, compile=False)
        difference = measure.relative_difference(job.case, functions, job.case.inputs(), job.case.grad_output())
        found = shares(job.case)
        rows = [row | {"difference": difference} | found.get(row["mode"], {}) for row in rows]
    return rows


def _of_peaks(rows: list[dict]) -> list[tuple[ModelCase, str, list[str]]]:
    """What memory.measure takes: of the groups WITH_PEAKS a training step of all contenders."""
    names: dict[str, list[str]] = {}
    for row in rows:
        if row["mode"] == "training":
            names.setdefault(row["case"], []).append(row["contender"])
    cases = (case for group in WITH_PEAKS for case in CASES[group])
    return [(case, "training", names[case.name]) for case in cases if case.name in names]


def run(console: Console) -> dict:
    """The dict that is stored as result.json."""
    started = time.monotonic()
    cache, free = machine.last_level_cache(), machine.available_memory()
    jobs, left_out = [], []
    for group, cases in CASES.items():
        for case in cases:
            needs = case.eager_bytes("training")
            if needs > free // 2:
                left_out.append(f"{case.name}: eager would need {needs / GIB:.1f} of {free / GIB:.1f} GiB")
                continue
            names = tuple(name for name in contenders.names(case) if name != LEFT_OUT)
            jobs.append(Job(group, case, names=names, min_seconds=0.05, budget=0.5, labels={"model": case.model}))
    schedule = Schedule(SECONDS, len(jobs) + 2)
    schedule.left_out += left_out
    result = {"machine": machine.stamp(), "sizes": [], "left_out": schedule.left_out, "ceilings": {}}
    with Tracker(console, "measured", len(jobs)) as tracker:
        sizes, _ = sizing.film_bytes(cache, free, fresh.call(sizing.speed))
        ceilings = schedule.run("ceilings", lambda seconds: fresh.call(measure.ceilings, sizes, seconds=seconds))
        result["rows"] = rows = time_all(jobs, schedule, tracker, time_case)
        tracker.describe("peak memory")
        schedule.run("peak memory", lambda seconds: memory.add_peaks(rows, _of_peaks(rows), seconds))
    if ceilings:
        result["ceilings"] = ceilings
        timed = {(group, case.name): case for group in WITH_BYTES for case in CASES[group]}
        measure.add_ceilings(rows, timed, ceilings, cache)
    result["seconds"] = time.monotonic() - started
    return result
