"""What is measured, in which order, and how a run keeps its time.

Every case is measured in a process of its own and may take three times its even share of the time left. When that
runs short it takes fewer samples; one that takes longer is ended and left out, and the result says so. Sizes are
chosen so that this stays rare (sizing.py).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any

from rich.console import Console

from . import cases, contenders, fresh, g2p, levels, machine, measure, memory, sizing
from .measure import Job
from .models import Loop
from .progress import Tracker
from .summary import summaries

UNEVEN = 3  # times an even share of the time left: what one step of a run may take
LEAST_SECONDS = 3  # under which no step is started
STOPS_AFTER = 0.7  # of its time: where a case takes no further sample


# Decoders, by their attention part: what training one feels like.
CAPTIONING = Loop("captioning", "float32", 32, 196, 512, 2048, 20)
SPEECH = Loop("speech", "float32", 64, 400, 128, 512, 50)
WITH_CEILINGS = ("attention", "film", "sweep", "small")  # groups whose limit is known
# PyTorch's own switch for large allocations, off by default; our memory has huge pages in any case.
HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}


@dataclass(frozen=True)
class Plan:
    """How much is measured, by the mode of the command."""

    seconds: float  # that the run may take
    attention: tuple[cases.AttentionCase, ...] = cases.ATTENTION
    film: tuple[tuple[str, str], ...] = tuple((layout, size) for size in cases.SIZES for layout in cases.LAYOUTS)
    loops: tuple[Loop, ...] = (CAPTIONING, SPEECH)
    rounds: int = 5
    budget: float = 1.0  # seconds of a case and mode; past it three samples do
    # one compiled form is enough for a quick look: wherever both were measured it was the faster or within 5 %
    left_out: tuple[str, ...] = ("compile sum",)
    memory_modes: tuple[str, ...] = ("training",)
    memory_groups: tuple[str, ...] = ("attention", "sweep")
    memory_kinds: tuple[str, ...] = (
        "eager",
        contenders.FUSED,
    )  # the sweep's are all: compiling once more takes its time
    sweep_lengths: tuple[int, ...] = (64, 256, 2048)
    sweep_modes: tuple[str, ...] = ("training",)
    sweep_rounds: int = 3
    sweep_limit: int = machine.GIB  # bytes of (B, Tq, Tk, D) tensors up to which it runs eager and compiled code
    level_rounds: int = 0
    g2p: bool = True
    g2p_quick: bool = True


QUICK = Plan(
    seconds=260,  # of 300: Python's start, the pictures and a last step of g2p come on top
    attention=(cases.ATTENTION[0], cases.ATTENTION[3]),
    film=(("NCHW", "cache"), ("BTC", "memory")),
    loops=(CAPTIONING,),
    sweep_lengths=(256, 2048),
)
SUITE = Plan(seconds=900)
FULL = Plan(
    seconds=inf,
    rounds=11,
    budget=inf,
    left_out=(),
    memory_modes=cases.MODES,
    memory_groups=("attention", "film", "sweep"),
    memory_kinds=(*contenders.RIVALS, contenders.FUSED),
    sweep_lengths=(64, 128, 256, 512, 1024, 2048),
    sweep_modes=cases.MODES,
    sweep_rounds=5,
    sweep_limit=8 * machine.GIB,
    level_rounds=4,
    g2p_quick=False,
)


class Schedule:
    """The time of a run, shared out among its steps, and what was left out for want of it."""

    def __init__(self, seconds: float, steps: int):
        self.left_out: list[str] = []
        self._end, self._steps = time.monotonic() + seconds, steps

    def run(self, what: str, step: Callable[[float], Any]) -> Any:
        """``step(seconds that it may take)``; None, and a line in ``left_out``, where they are too few."""
        share = (self._end - time.monotonic()) * min(1.0, UNEVEN / self._steps)
        self._steps -= 1
        try:
            if share < LEAST_SECONDS:
                raise fresh.OutOfTimeError("no time was left")
            return step(share)
        except fresh.OutOfTimeError as error:
            self.left_out.append(f"{what}: {error}")
            return None


def time_all(
    jobs: list[Job], schedule: Schedule, tracker: Tracker, time_case: Callable[[Job, float], list[dict]]
) -> list[dict]:
    """The rows of all jobs, each in a process of its own."""
    rows = []
    for job in jobs:
        tracker.describe(job.name)
        new = schedule.run(job.name, partial(_time, time_case, job)) or []
        skipped = set(job.modes) - {row["mode"] for row in new} if new else ()
        schedule.left_out += [f"{job.case.name}, {mode}: no time was left" for mode in skipped]
        rows += new
        tracker.advance()
    return rows


def _time(time_case: Callable[[Job, float], list[dict]], job: Job, seconds: float) -> list[dict]:
    """The process stops by itself after most of the time, and is ended after all of it."""
    limit = STOPS_AFTER * seconds
    return fresh.call(time_case, job, limit, environment=job.environment, seconds=seconds)


def jobs(plan: Plan, attention: list[cases.AttentionCase], film_bytes: dict[str, int]) -> list[Job]:
    """The cases to be timed, most important first."""
    effort = {"rounds": plan.rounds, "budget": plan.budget}
    found = [Job("attention", case, names=_names(case, plan.left_out), **effort) for case in attention]
    for case in cases.film(film_bytes):
        if (case.layout, case.size) in plan.film:
            names = _names(case, plan.left_out)
            found.append(Job("film", case, names=names, labels={"size": case.size}, **effort))
            if case.size == "memory":
                found.append(Job("huge pages", case, names=names, environment=HUGE_PAGES, **effort))
    found += [Job("loop", case, names=_names(case, plan.left_out), **effort) for case in plan.loops]
    # microseconds a call: many rounds cost nothing
    found.append(Job("small", cases.SMALL, names=_names(cases.SMALL, plan.left_out), rounds=21, min_seconds=0.01))
    for mode in plan.sweep_modes:
        for case in cases.sweep(plan.sweep_lengths):
            # one form of each contender; eager and compiled code only where their memory allows
            fits = case.eager_bytes(mode) <= min(plan.sweep_limit, machine.available_memory() // 2)
            names = ("eager @", "compile @") * fits + (contenders.IDENTITY, contenders.FUSED)
            effort = {"rounds": plan.sweep_rounds, "budget": plan.budget, "check": False}
            found.append(Job("sweep", case, (mode,), names=names, labels={"length": case.Tq}, **effort))
    return found


def _names(case: cases.Case, left_out: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in contenders.names(case) if name not in left_out)


def run(plan: Plan, console: Console) -> dict:
    """Everything that the plan names; the dict that is stored as result.json."""
    started = time.monotonic()
    cache, free = machine.last_level_cache(), machine.available_memory()
    speed = fresh.call(sizing.speed)
    film_bytes, sizes = sizing.film_bytes(cache, free, speed)
    attention = []
    for case in plan.attention:
        fitted, change = sizing.fitted(case, speed, free)
        attention.append(fitted)
        sizes += change
    todo = jobs(plan, attention, film_bytes)
    timed = {(job.group, job.case.name): job.case for job in todo if job.group in WITH_CEILINGS}
    steps = len(todo) + 3 + bool(plan.level_rounds)
    schedule = Schedule(plan.seconds - (time.monotonic() - started), steps + plan.g2p)
    result: dict = {"machine": machine.stamp(), "sizes": sizes, "left_out": schedule.left_out, "rows": []}
    rows: list[dict] = result["rows"]

    with Tracker(console, "measured", steps) as tracker:

        def step(what: str, run: Callable[[float], Any]) -> Any:
            tracker.describe(what)
            done = schedule.run(what, run)
            tracker.advance()
            return done

        # the least that a run must have: without ceilings no figure says how good it is
        before = step("ceilings", lambda _: fresh.call(measure.ceilings, film_bytes))
        rows += time_all(todo, schedule, tracker, measure.time_case)
        if plan.level_rounds:
            rows += step("CPU levels", lambda _: levels.rows(plan.level_rounds)) or []
        # the better of the two: a ceiling lowered by a busy machine would flatter
        again = step("ceilings again", lambda seconds: fresh.call(measure.ceilings, film_bytes, seconds=seconds))
        after = again or before
        result["ceilings"] = ceilings = {name: max(before[name], after[name]) for name in before}
        step("peak memory", lambda seconds: _add_peaks(result, plan, timed, seconds))

    measure.add_ceilings(rows, timed, ceilings, cache)
    if plan.g2p:
        try:
            result["g2p"] = schedule.run("g2p", lambda seconds: g2p.run(plan.g2p_quick, limit=seconds))
        except ImportError as error:
            schedule.left_out.append(f"g2p: {error}")
    result["seconds"] = time.monotonic() - started
    return result


def _add_peaks(result: dict, plan: Plan, timed: dict[tuple[str, str], cases.Case], seconds: float) -> None:
    """Puts peak memory into the rows that are quoted of each kind; the others' is nobody's question."""
    wanted = []
    for group in plan.memory_groups:
        kinds = (*contenders.RIVALS, contenders.FUSED) if group == "sweep" else plan.memory_kinds
        for s in summaries(result, group):
            if s["mode"] in plan.memory_modes:
                names = [s[kind]["contender"] for kind in kinds if s[kind]]
                wanted.append((timed[group, s["case"]], s["mode"], names))
    memory.add_peaks(result["rows"], wanted, seconds)
