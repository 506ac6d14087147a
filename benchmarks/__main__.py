"""Measures fusedattn against PyTorch on this machine.

Checks first that all results agree with float64 and stops with status 1 where they do not. Prints tables and
writes result.json, result.csv and plots to the output folder.
"""

import argparse
import json
import shlex
import sys
import time
from math import inf
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import cases, contenders, fresh, levels, machine, measure, memory, plots, report

README = machine.ROOT / "README.md"
SMALL_ROUNDS = 21  # microseconds each: many rounds cost nothing


class Plan:
    """How much is measured in each mode of the command."""

    def __init__(self, full: bool):
        self.rounds = 11 if full else 5
        self.min_seconds = 0.1
        self.budget = inf if full else 1.0  # seconds of a case and mode; past it three samples do
        # one compiled form is enough for a quick look: wherever both were measured it was the faster or within 5 %
        self.left_out = () if full else ("compile sum",)
        self.memory_modes = cases.MODES if full else ("training",)
        self.memory_groups = ("attention", "film", "sweep") if full else ("attention", "sweep")
        self.memory_of_compiled = full  # else for the sweep alone: each compiles its code once more
        self.sweep_lengths = (64, 128, 256, 512, 1024, 2048) if full else (64, 256, 2048)
        self.sweep_modes = cases.MODES if full else ("training",)
        self.sweep_rounds = 5 if full else 3
        # bytes of (B, Tq, Tk, D) tensors up to which the sweep runs eager and compiled code
        self.sweep_limit = (8 if full else 1) << 30
        self.level_rounds = 4 if full else 0


def sweep_contenders(case: cases.AttentionCase, mode: str, limit: int) -> list[str]:
    """One form of each contender, eager and compiled code only where their memory allows."""
    if case.eager_bytes(mode) > min(limit, machine.available_memory() // 2):
        return [contenders.FUSED]
    return ["eager @", "compile @", contenders.FUSED]


def run(plan: Plan, console: Console, with_g2p: bool, quick: bool) -> dict:
    cache = machine.last_level_cache()
    sizes = cases.tensor_sizes(cache, machine.available_memory())
    film = cases.film(sizes)
    sweep = cases.sweep(plan.sweep_lengths)
    every = [("attention", case) for case in cases.ATTENTION] + [("film", case) for case in film]
    every.append(("small", cases.SMALL))
    started = time.time()
    result: dict = {"machine": machine.stamp(), "rows": []}
    rows: list[dict] = result["rows"]

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
    steps = 2 + len(every) + len(sweep) * len(plan.sweep_modes) + bool(plan.level_rounds)
    memory_jobs = []
    with bar:
        task = bar.add_task("ceilings", total=steps)

        def done(what: str, new: list[dict] = ()) -> None:
            """Advances the bar and leaves one line, so that a log without a terminal shows progress too."""
            for mode in dict.fromkeys(row["mode"] for row in new):
                times = ", ".join(
                    f"{row['contender']} {report.number(row['milliseconds'])}"
                    for row in new
                    if row["mode"] == mode
                )
                console.print(f"  {what} {mode}, ms: {times}", highlight=False)
            rows.extend(new)
            bar.update(task, advance=1)

        before = fresh.call(measure.ceilings, sizes)
        done("ceilings")

        for group, case in every:
            bar.update(task, description=case.name)
            names = [name for name in contenders.of(case) if name not in plan.left_out]
            effort = (plan.rounds, plan.min_seconds, plan.budget)
            if case is cases.SMALL:
                effort = (SMALL_ROUNDS, 0.01, inf)
            new = fresh.call(measure.time_case, group, case, cases.MODES, *effort, names, True)
            if isinstance(case, cases.FilmCase):
                new = [{**row, "size": case.size} for row in new]
            done(case.name, new)
            if group in plan.memory_groups:
                kinds = ("eager", "compile", "fused") if plan.memory_of_compiled else ("eager", "fused")
                memory_jobs += [(group, case, mode, _fastest(new, mode, kinds)) for mode in plan.memory_modes]

        for mode in plan.sweep_modes:
            for case in sweep:
                bar.update(task, description=f"sweep {case.name}")
                names = sweep_contenders(case, mode, plan.sweep_limit)
                arguments = ((mode,), plan.sweep_rounds, plan.min_seconds, plan.budget, names)
                new = fresh.call(measure.time_case, "sweep", case, *arguments)
                done(case.name, [{**row, "length": case.Tq} for row in new])
                memory_jobs.append(("sweep", case, mode, names))

        if plan.level_rounds:
            bar.update(task, description="CPU levels")
            done("levels", levels.rows(plan.level_rounds))

        bar.update(task, description="ceilings again")
        # the better of the two: a ceiling lowered by a busy machine would flatter
        after = fresh.call(measure.ceilings, sizes)
        result["ceilings"] = ceilings = {name: max(before[name], after[name]) for name in before}
        done("ceilings")

        task = bar.add_task("peak memory", total=sum(len(names) for *_, names in memory_jobs))
        peaks = {}
        for name, mode, contender, peak in memory.measure([job[1:] for job in memory_jobs]):
            bar.update(task, advance=1, description=f"peak memory {name}")
            peaks[name, mode, contender] = peak

    for group, case in every + [("sweep", case) for case in sweep]:
        for row in rows:
            if row["group"] == group and row["case"] == case.name:
                row["peak_bytes"] = peaks.get((case.name, row["mode"], row["contender"]))
                seconds, limit = measure.ceiling_seconds(case, row["mode"], ceilings, cache)
                row["ceiling_milliseconds"], row["limit"] = 1e3 * seconds, limit

    if with_g2p:
        try:
            from . import g2p

            result["g2p"] = g2p.run(quick=quick)
        except ImportError as error:
            console.print(f"[yellow]grapheme-to-phoneme left out: {error} (pip install 'fusedattn\\[bench]')")
    result["seconds"] = time.time() - started
    return result


def _fastest(rows: list[dict], mode: str, kinds: tuple[str, ...]) -> list[str]:
    """The contender that is quoted of each kind: the others' memory is nobody's question."""
    best: dict[str, dict] = {}
    for row in rows:
        kind = row["contender"].split()[0]
        if row["mode"] == mode and kind in kinds:
            best[kind] = min(best.get(kind, row), row, key=lambda r: r["milliseconds"])
    return [row["contender"] for row in best.values()]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--quick", action="store_true", help="under five minutes on two cores (default)")
    amount.add_argument("--full", action="store_true", help="11 rounds, every mode of the sweep, every CPU level")
    amount.add_argument(
        "--load", type=Path, metavar="RESULT", help="measure nothing; report an earlier result.json"
    )
    parser.add_argument("--no-g2p", action="store_true", help="leave out the grapheme-to-phoneme training")
    parser.add_argument("--threads", type=int, help="threads PyTorch may use (default: its own choice)")
    parser.add_argument("--compare", type=Path, metavar="OLD", help="show an older result.json side by side")
    parser.add_argument("--targets", action="store_true", help="show each performance target, met or missed")
    parser.add_argument("--readme", action="store_true", help="rewrite the benchmark section of README.md")
    default = machine.ROOT / "benchmarks" / "results"
    parser.add_argument("--output", type=Path, default=default, help="folder for the files (default: %(default)s)")
    options = parser.parse_args()
    for path in (options.load, options.compare):
        if path is not None and not path.is_file():
            parser.error(f"no such result file: {path}")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    return options


def main() -> int:
    options = arguments()
    # a fixed width keeps tables whole where the output is a file or a pipe
    console = Console() if sys.stdout.isatty() else Console(width=160)
    older = json.loads(options.compare.read_text()) if options.compare else None
    if options.load:
        result = json.loads(options.load.read_text())
    else:
        if options.threads:
            torch.set_num_threads(options.threads)
        try:
            result = run(Plan(options.full), console, not options.no_g2p, quick=not options.full)
        except measure.DisagreementError as error:
            console.print(f"[red]Results disagree, so nothing is reported.[/red] {error}")
            return 1
        result["command"] = shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        report.write_csv(result, options.output / "result.csv")
        plots.write(result, options.output)

    report.print_result(console, result)
    if options.targets:
        report.print_targets(console, result)
    if older is not None:
        report.print_comparison(console, older, result)
    if options.readme:
        report.update_readme(result, README)
    if not options.load:
        console.print(f"{result['seconds']:.0f} s; results in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
