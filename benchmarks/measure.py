"""Agreement, time and ceilings. Peak memory is in memory.py: it needs a process of its own."""

import itertools
import mmap
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil, inf, sqrt

import torch
from torch import Tensor

from . import contenders, memory
from .cases import MODES, AttentionCase, Case
from .machine import MIB

EPSILON = torch.finfo(torch.float32).eps
FAR_BEHIND = 1.15  # times the faster rival's first call
ENOUGH = 3  # samples of which the median survives one that the machine spoiled
LONG = 0.25  # seconds of a step whose memory is worth touching instead of running it twice


class DisagreementError(RuntimeError):
    """A contender's results differ from the float64 reference: its speed means nothing."""


def check_agreement(case: Case, functions: dict[str, Callable], inputs: tuple[Tensor, ...], grad) -> None:
    """Raises DisagreementError unless every contender's output and gradients match float64.

    Allowed is twice the error of eager PyTorch in the same dtype, plus the rounding of a sum of n float32 terms,
    which grows as sqrt(n), eps sqrt(n) max|reference|, and that of the result in a narrower dtype.
    """
    terms = case.summed_terms()
    expected = dict(zip(terms, contenders.reference(case, inputs, grad), strict=True))
    scale = {name: x.abs().max().item() for name, x in expected.items()}
    dtype = contenders.several(grad)[0].dtype
    rounding = 0.0 if dtype is torch.float32 else torch.finfo(dtype).eps
    floor = {name: (rounding + EPSILON * sqrt(n)) * scale[name] for name, n in terms.items()}

    def errors(name: str, mode: str) -> dict[str, float]:
        results = contenders.step(case, mode, name, functions[name], inputs, grad)()
        return {
            what: _largest_difference(result, reference)
            for (what, reference), result in zip(expected.items(), results, strict=False)
        }

    found = {
        (name, mode): errors(name, mode)
        for name in functions
        if name != contenders.CLONE
        for mode in MODES
        if mode == "training" or not name.startswith("eager")  # eager runs the same code in both
    }
    for (name, mode), error in found.items():
        for what, value in error.items():
            eager = max(e[what] for (n, _), e in found.items() if n.startswith("eager"))
            allowed = 2 * eager + floor[what]
            # eager itself is held to the floor alone, with room for the many operations of its score
            bound = 64 * floor[what] if name.startswith("eager") else allowed
            if not value <= bound:
                raise DisagreementError(
                    f"{case.name}, {mode}, {name}: {what} is {value:.3g} from the float64 reference, allowed "
                    f"{bound:.3g} (eager's error {eager:.3g}, largest value {scale[what]:.3g})"
                )


def relative_difference(case: Case, functions: dict[str, Callable], inputs: tuple[Tensor, ...], grad) -> float:
    """The largest one of the outputs and gradients of eager and of our code, over the largest value of each."""
    eager, fused = (contenders.step(case, "training", name, functions[name], inputs, grad)() for name in functions)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(eager, fused, strict=True))


def _largest_difference(result: Tensor, reference: Tensor) -> float:
    """max |result - reference|, element by element of the batch so that the difference stays in cache.

    NaN where the difference holds one, and a NaN is below no bound.
    """
    return torch.stack([(a - b).abs().max() for a, b in zip(result, reference, strict=True)]).max().item()


def alternate(
    steps: dict[str, Callable],
    rounds: int,
    min_seconds: float,
    rivals: tuple[tuple[str, ...], ...] = (),
    budget: float = inf,
    working_set: int = 0,
    warm: bool = False,
    limit: float = inf,
) -> dict[str, list[float]]:
    """Seconds per call of each step, one sample a round.

    Rounds run forwards, backwards, and shifted by one each time after that, so that a drift of the machine
    meets all steps alike. A sample is the median of as many calls as take min_seconds. Memory that lies
    free for seconds a virtual machine hands back to its host, and whoever touches it next would pay ten times
    a page fault; so one call that is not timed goes before every sample, or, before a long step, working_set
    bytes are written. ``warm`` says that every step has run before. Of each group of rivals, which compute
    the same thing, only the fastest goes on after two rounds, and one far behind never starts. The call that
    finds out how long a step takes counts as a sample where none needs repeating. Once `budget` seconds have
    gone, only steps with fewer than ENOUGH samples go on; once `limit` seconds have gone, none.
    """
    start = time.perf_counter()
    first = {}
    for name, run in steps.items():
        first[name] = _seconds(run, 1)
        if not warm or first[name] < LONG:
            first[name] = max(_seconds(run, 1), 1e-9)
    repeats = {name: ceil(min_seconds / seconds) for name, seconds in first.items()}
    samples = {name: [first[name]] if repeats[name] == 1 else [] for name in steps}
    order = _without_slower(list(steps), rivals, first, margin=FAR_BEHIND)
    sampling = time.perf_counter()
    for n in range(rounds):
        if n >= 2 and time.perf_counter() - sampling > budget:
            order = [name for name in order if len(samples[name]) < ENOUGH]
        for name in order if n % 2 == 0 else reversed(order):
            if time.perf_counter() - start > limit:
                break
            if first[name] > LONG and working_set:
                _write_fresh(working_set)
            else:
                steps[name]()
            samples[name].append(_seconds(steps[name], repeats[name]))
        if n == 1:
            order = _without_slower(order, rivals, {name: min(samples[name] or [first[name]]) for name in order})
        if n % 2 == 1:
            order = order[1:] + order[:1]
    return {name: samples[name] or [first[name]] for name in steps}


def _without_slower(
    order: list[str], rivals: tuple[tuple[str, ...], ...], seconds: dict[str, float], margin: float = 1.0
) -> list[str]:
    """The names in order, without those that take longer than margin times the fastest of their rivals."""
    for group in rivals:
        fastest = min((seconds[name] for name in group if name in order), default=inf)
        order = [name for name in order if name not in group or seconds[name] <= margin * fastest]
    return order


def _seconds(run: Callable, repeats: int) -> float:
    """The median of ``repeats`` calls: what interrupts one of many short ones is not their time."""
    ticks = [time.perf_counter()]
    for _ in range(repeats):
        run()
        ticks.append(time.perf_counter())
    return statistics.median(after - before for before, after in itertools.pairwise(ticks))


@dataclass(frozen=True)
class Job:
    """A case to be timed by :func:`time_case`; for ``rounds`` and what follows it see :func:`alternate`."""

    group: str
    case: Case
    modes: tuple[str, ...] = MODES
    names: tuple[str, ...] | None = None  # of the contenders; None: all of them
    check: bool = True  # that they agree
    rounds: int = 5
    min_seconds: float = 0.1
    budget: float = inf  # seconds of a mode
    labels: dict = field(default_factory=dict)  # for the rows
    environment: dict = field(default_factory=dict)  # variables that the process is started with

    @property
    def name(self) -> str:
        return f"{self.case.name}, {' and '.join(self.modes)}"


def time_case(job: Job, seconds: float = inf) -> list[dict]:
    """One row per mode and contender; after ``seconds`` no further sample is taken and no further mode begins."""
    end = time.perf_counter() + seconds
    case, check = job.case, job.check
    functions = contenders.of(case)
    if job.names is not None:
        functions = {name: functions[name] for name in job.names}
    inputs, grad = case.inputs(), case.grad_output()
    if check:
        check_agreement(case, functions, inputs, grad)
        memory.release()
    rows = []
    for n, mode in enumerate(job.modes):
        left = end - time.perf_counter()
        if left <= 0:
            break
        steps = {n: contenders.step(case, mode, n, f, inputs, grad) for n, f in functions.items()}
        rivals = (contenders.EAGER, contenders.COMPILED)
        samples = alternate(
            steps,
            job.rounds,
            job.min_seconds,
            rivals,
            job.budget,
            working_set=case.eager_bytes(mode),
            warm=check,
            limit=left / (len(job.modes) - n),
        )
        for name, times in samples.items():
            # a clone moves the bytes of x once in and once out, whatever the step it stands beside
            work = case.work("forward" if name == contenders.CLONE else mode)
            median = statistics.median(times)
            rows.append(
                {
                    "group": job.group,
                    "case": case.name,
                    "mode": mode,
                    "contender": name,
                    "milliseconds": 1e3 * median,
                    "fastest": 1e3 * min(times),
                    "rounds": len(times),
                    "rate": work / median / 1e9,
                    "unit": case.unit,
                    **job.labels,
                }
            )
    reads_all_once = isinstance(case, AttentionCase) and case.Tq == 1 and case.bytes_moved("forward") >= MIB
    if reads_all_once and time.perf_counter() < end:
        rate = rate_over(inputs)
        rows = [row | {"bytes_rate": rate} for row in rows]
    return rows


def rate_over(tensors: tuple[Tensor, ...], rounds: int = 7) -> float:
    """GB/s, reads plus writes, that PyTorch reaches over these very tensors: for sums, or for copies into memory
    that exists. A buffer of another size may fit a cache that they do not, or lie in other pages."""
    copies = tuple(torch.zeros_like(x) for x in tensors)
    steps = {
        "read": lambda: [x.sum() for x in tensors],
        "copy": lambda: [y.copy_(x) for x, y in zip(tensors, copies, strict=True)],
    }
    with torch.no_grad():
        samples = alternate(steps, rounds, 0.01)
    moved = {"read": 1, "copy": 2}
    size = sum(x.nbytes for x in tensors)
    return max(moved[name] * size / statistics.median(seconds) for name, seconds in samples.items()) / 1e9


def ceilings(sizes: dict[str, int], rounds: int = 7) -> dict[str, float]:
    """The best this machine does, per second: bytes (reads plus writes, in GB) and multiply-adds (in G).

    clone writes through a fresh output, so the system's page faults are in it; copy writes memory that
    exists; read only sums; fresh writes new memory in huge pages, which the system must clear first. The
    multiply-add rate is that of a matrix product, from whichever of PyTorch's two libraries is faster: MKL
    leaves AVX-512 unused on some CPUs that have it.
    """
    n = 1024
    a, b, product = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
    steps, work = {"mm": lambda: torch.mm(a, b, out=product)}, {"mm": n**3}
    if torch.backends.mkldnn.is_available():
        steps["onednn"] = lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        work["onednn"] = n**3
    for where, size in sizes.items():
        x = torch.ones(size // 4)
        y = torch.zeros_like(x)
        for name, run, moved in (
            ("clone", x.clone, 2 * size),
            ("copy", lambda x=x, y=y: y.copy_(x), 2 * size),
            ("read", x.sum, size),
            ("fresh", lambda size=size: _write_fresh(size), size),
        ):
            steps[f"{name} {where}"] = run
            work[f"{name} {where}"] = moved
    with torch.no_grad():
        samples = alternate(steps, rounds, 0.01)
    rates = {name: work[name] / statistics.median(seconds) / 1e9 for name, seconds in samples.items()}
    products = [rates.pop(name) for name in ("mm", "onednn") if name in rates]
    return {"multiply-add": max(products), **rates}


def _write_fresh(size: int) -> None:
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE) as block:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            block.madvise(mmap.MADV_HUGEPAGE)
        torch.frombuffer(block, dtype=torch.float32).fill_(1)


def add_ceilings(
    rows: list[dict], timed: dict[tuple[str, str], Case], ceilings: dict[str, float], cache_bytes: int
) -> None:
    """Puts them into the rows of these cases, by group and name."""
    for row in rows:
        if case := timed.get((row["group"], row["case"])):
            seconds, limit = ceiling_seconds(case, row["mode"], ceilings, cache_bytes, row.get("bytes_rate"))
            row["ceiling_milliseconds"], row["limit"] = 1e3 * seconds, limit


def ceiling_seconds(
    case: Case, mode: str, ceiling: dict[str, float], cache_bytes: int, bytes_rate: float | None = None
) -> tuple[float, str]:
    """The least time the measured ceilings allow a case, and which of them sets it. ``bytes_rate`` is that of
    :func:`rate_over` its own tensors, where it was measured.

    Within the cache everything goes to memory that exists. Beyond it the output of the forward pass is fresh, and
    gradients are not: what those of the last step took is kept for them.
    """
    if bytes_rate is not None:
        seconds = case.bytes_moved(mode) / bytes_rate
    elif case.bytes_moved(mode) <= cache_bytes:
        fastest = max(ceiling["copy cache"], ceiling["clone cache"], ceiling["read cache"])
        seconds = case.bytes_moved(mode) / fastest
    else:
        fastest = max(ceiling["copy memory"], ceiling["read memory"])
        fresh = case.bytes_written("forward")
        seconds = (case.bytes_moved(mode) - fresh) / fastest
        seconds += fresh / max(ceiling["fresh memory"], ceiling["clone memory"])
    bounds = {"bytes": seconds / 1e9}
    if isinstance(case, AttentionCase):
        bounds["compute"] = case.vector_operations(mode) / ceiling["multiply-add"] / 1e9
    limit = max(bounds, key=bounds.get)
    return bounds[limit], limit
