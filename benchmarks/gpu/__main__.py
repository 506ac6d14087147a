"""Runs stages on this machine's GPU, the most valuable first, each within its time.

A stage is given as NAME or NAME=SECONDS. Without any: those that fit ten minutes. Results, in --output: log.txt,
what was printed; records.jsonl, what was found, line by line; result.json, the timings, which
``python -m benchmarks.roofline --result`` reads. Status 1 if a stage failed or did not end.
"""

import argparse
import sys
from pathlib import Path

from .stages import FIRST, STAGES, run

SECONDS = 570


def chosen(words: list[str]) -> list[tuple]:
    """(name, stage, seconds) of each word. Raises ValueError where a stage is unknown or its time no number."""
    found = []
    for word in words:
        name, _, seconds = word.partition("=")
        if name not in STAGES:
            raise ValueError(f"no stage {name!r}: expected one of {', '.join(STAGES)}")
        found.append((name, STAGES[name], float(seconds) if seconds else STAGES[name].seconds))
    return found


def main() -> int:
    table = "\n".join(f"  {name:14} {stage.seconds:4} s  {stage.what}" for name, stage in STAGES.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        epilog=f"stages:\n{table}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE[=SECONDS]")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of all stages (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu"))
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, as far as it goes")
    options = parser.parse_args()
    try:
        stages = chosen(options.stages or list(FIRST))
    except ValueError as error:
        parser.error(str(error))
    outcomes = list(run(stages, options.seconds, options.output, options.rehearse, lambda s: print(s, flush=True)))
    total = sum(outcome.seconds for outcome in outcomes)
    print("\n".join(["", *map(str, outcomes), f"{total:.0f} s in all; results in {options.output}"]))
    return int(any(outcome.status != 0 or outcome.cut for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
