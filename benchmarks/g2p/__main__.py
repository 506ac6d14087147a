"""``python -m benchmarks.g2p``: compare plain and fused attention in training, or train a model to look at."""

import argparse
from pathlib import Path

from .train import demo, run

parser = argparse.ArgumentParser(prog="python -m benchmarks.g2p", description=__doc__)
choice = parser.add_mutually_exclusive_group()
choice.add_argument("--quick", action="store_true", help="200 steps of 64 words each (default)")
choice.add_argument("--full", action="store_true", help="400 steps of 256 words each, hidden width 256")
choice.add_argument("--demo", action="store_true", help="train longer, print error rates, plot alignments")
parser.add_argument("--steps", type=int, default=3000, help="steps of --demo (default: %(default)s)")
parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "results", help="folder for plots")
options = parser.parse_args()
if options.demo:
    demo(options.output, options.steps)
else:
    run(quick=not options.full, output=options.output)
