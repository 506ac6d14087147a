"""Measures fusedattn against PyTorch on this machine.

Checks first that all results agree with float64 and stops with status 1 where they do not. Prints tables and
writes result.json, result.csv and pictures to the output folder.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from . import machine, measure, plots, report, suite, wide

RESULTS = machine.ROOT / "benchmarks" / "results"
PLANS = {"quick": suite.QUICK, "suite": suite.SUITE, "full": suite.FULL}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    amount = parser.add_mutually_exclusive_group()
    parser.set_defaults(plan="suite")
    for name, text in (
        ("quick", "a case or two of each kind, within five minutes"),
        ("wide", "the sizes that people use, small ones, half precision and loops; lists every row below 1"),
        ("full", "11 rounds, every mode of the sweep, every CPU level"),
    ):
        amount.add_argument(f"--{name}", action="store_const", dest="plan", const=name, help=text)
    amount.add_argument(
        "--load", type=Path, metavar="RESULT", help="measure nothing, report an earlier result.json"
    )
    parser.add_argument("--no-g2p", action="store_true", help="leave out the grapheme-to-phoneme training")
    parser.add_argument("--threads", type=int, help="threads PyTorch may use (default: its own choice)")
    parser.add_argument("--compare", type=Path, metavar="OLD", help="show an older result.json side by side")
    parser.add_argument("--targets", action="store_true", help="show each performance target, met or missed")
    parser.add_argument("--readme", action="store_true", help="rewrite README.md's benchmark section and pictures")
    parser.add_argument(
        "--output", type=Path, help=f"folder for the files (default: that of --load, or {RESULTS})"
    )
    options = parser.parse_args()
    for path in (options.load, options.compare):
        if path is not None and not path.is_file():
            parser.error(f"no such result file: {path}")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    options.output = options.output or (options.load.parent if options.load else RESULTS)
    return options


def command(options: argparse.Namespace) -> str:
    """What to type for the same measurement."""
    words = ["python -m benchmarks"]
    words += [f"--{options.plan}"] if options.plan != "suite" else []
    words += [f"--threads {options.threads}"] if options.threads else []
    return " ".join(words)


def main() -> int:
    options = arguments()
    # a fixed width keeps tables whole where the output is a file or a pipe
    console = Console() if sys.stdout.isatty() else Console(width=160)
    older = json.loads(options.compare.read_text()) if options.compare else None
    options.output.mkdir(parents=True, exist_ok=True)
    if options.load:
        result = json.loads(options.load.read_text())
    else:
        if options.threads:
            torch.set_num_threads(options.threads)
        try:
            if options.plan == "wide":
                result = wide.run(console)
            else:
                result = suite.run(replace(PLANS[options.plan], g2p=not options.no_g2p), console)
        except measure.DisagreementError as error:
            console.print(f"[red]Results disagree, so nothing is reported.[/red] {error}")
            return 1
        result["command"] = command(options)
        (options.output / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        report.write_csv(result, options.output / "result.csv")

    report.print_result(console, result)
    if options.targets:
        report.print_targets(console, result)
    if older is not None:
        report.print_comparison(console, older, result)
    written = [options.output / "result.json", *plots.write(result, options.output)]
    if options.readme:
        written += report.update_readme(result, options.output)
    console.print(f"measured in {result['seconds']:.0f} s:", highlight=False)
    for path in written:
        console.print(f"  {path}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
