"""Compiles every GPU kernel, reads what it costs, writes table.md and counts.json, fails where a threshold breaks.

Needs no GPU. What cannot be compiled here is left out with a word, and keeps its rows in the table: CUDA C++
without nvcc, Triton where it is not installed. Machine code is kept under build/gates: only what changed is
compiled again.

The oldest Triton supported has rows of its own: `pip install --target DIR triton==3.6`, then `--triton DIR`.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from . import cuda_kernels, table, thresholds, tools, triton_kernels
from .kernel import Kernel

FOLDER = Path(__file__).resolve().parent
PARTS = {"CUDA C++": cuda_kernels, "Triton": triton_kernels}
# For a quick look, each kernel on one of: the architecture of the plan, the one that spills soonest, one of AMD.
QUICK = ("sm_80", "sm_90", "gfx942")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gates", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time")
    parser.add_argument("--only", choices=PARTS, help="leave the others' rows as they are")
    parser.add_argument(
        "--triton", type=Path, metavar="DIR", help="folder of another Triton; only Triton's kernels"
    )
    parser.add_argument("--quick", action="store_true", help=f"each on one of {', '.join(QUICK)}; writes nothing")
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of table.md and counts.json")
    options = parser.parse_args()
    if options.triton:
        if not (options.triton / "triton").is_dir():
            parser.error(f"--triton {options.triton}: no folder triton in it")
        sys.path.insert(0, str(options.triton.resolve()))
        options.only = "Triton"

    counts = options.output / "counts.json"
    stored = json.loads(counts.read_text()) if counts.exists() else {"tools": {}, "kernels": []}
    if options.quick:
        print(f"Quick: each kernel on one of {', '.join(QUICK)}. Without --quick, as in make gates, on all.")
    kernels, compilers, broken = [Kernel.from_json(k) for k in stored["kernels"]], dict(stored["tools"]), 0
    digests = dict(stored.get("sources", {}))
    for backend, part in PARTS.items():
        missing = "not asked for" if options.only not in (None, backend) else part.missing()
        if missing:
            print(f"{backend}: not checked, {missing}")
            continue
        try:
            found = part.measure(options.jobs, QUICK if options.quick else None)
        except tools.ToolError as error:
            print(f"{backend}: {error}", file=sys.stderr)
            broken += 1
            continue
        section = found[0].section
        compilers[section] = part.compiler()
        digests[section] = tools.digest_of(part.inputs())
        kernels = [k for k in kernels if k.section != section] + found
        failed = thresholds.broken(found)
        for line in failed:
            print(f"{section}: {line}", file=sys.stderr)
        broken += len(failed)
        archs = ", ".join(dict.fromkeys(k.arch for k in found))
        print(
            f"{section} ({compilers[section]}): {len({k.name for k in found})} kernels on {archs}: "
            f"{len(failed)} thresholds broken"
        )
    if not (options.check or options.quick):
        kernels.sort(key=lambda k: k.section)  # stable: within a section as they were found
        rows = ",\n".join(json.dumps(k.to_json()) for k in kernels)
        head = f'"tools": {json.dumps(compilers)},\n"sources": {json.dumps(digests)}'
        counts.write_text(f'{{{head},\n"kernels": [\n{rows}\n]}}\n')
        (options.output / "table.md").write_text(table.markdown(kernels, compilers))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
