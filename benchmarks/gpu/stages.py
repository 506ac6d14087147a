"""The stages of a run on a GPU: what each starts, how long it may take, and where its answers go.

A stage is a process of its own, so that a fault that ends one leaves the next a working GPU. What it prints is
appended to log.txt, what it finds to records.jsonl, line by line as it is known: a run that is cut loses nothing.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GRACE = 8  # seconds between asking a stage to stop, so that it says what it has, and ending it
LEAST = 5  # seconds under which no stage is started
OUTPUT_VARIABLE = "FUSEDATTN_GPU_OUTPUT"


def record(**fields) -> None:
    """Appends a line to records.jsonl of the run that this process is part of; without one, does nothing."""
    if folder := os.environ.get(OUTPUT_VARIABLE):
        with open(Path(folder) / "records.jsonl", "a") as file:
            file.write(json.dumps(fields) + "\n")


@dataclass(frozen=True)
class Stage:
    """A command and its limit.

    Args:
        command: what follows the interpreter.
        seconds: it may take, unless told otherwise.
        what: for --help.
        variables: of its environment.
        tool: a program, with its options, that runs the command.
        needed: whether the run ends if it fails.
    """

    command: tuple[str, ...]
    seconds: int
    what: str
    variables: dict[str, str] = field(default_factory=dict)
    tool: tuple[str, ...] = ()
    needed: bool = False

    def arguments(self, rehearsal: bool) -> list[str]:
        """In a rehearsal a tool that is not here is left out."""
        tool = () if rehearsal and self.tool and shutil.which(self.tool[0]) is None else self.tool
        return [*tool, sys.executable, *self.command]


def _tests(backend: str) -> Stage:
    # Those beside the emulator wait for a compiler; several processes keep the GPU busy while others trace.
    command = ["-m", "pytest", "-q", "@tests/on_gpus.txt", "-k", "not emulator", "--maxfail=60", "--tb=short"]
    command += ["-rfE", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(max(1, min(6, (os.cpu_count() or 2) // 2)))]
    variables = {"FUSEDATTN_TEST_DEVICE": "cuda", "FUSEDATTN_TEST_BACKEND": backend}
    return Stage(
        tuple(command), 110, f"the tests of tests/on_gpus.txt with {backend} in the place of auto", variables
    )


def _sanitizer(tool: str) -> Stage:
    # Our kernels alone, without torch's caching allocator, which hides where one tensor ends and the next begins.
    checker = ("compute-sanitizer", "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "3")
    checker += ("--kernel-name", "kernel_substring=fusedattn", "--print-limit", "20")
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Stage(
        ("-m", "benchmarks.gpu.workload", "small"), 45, f"{tool} over the CUDA C++ kernels", variables, checker
    )


def _profile() -> Stage:
    hottest = "regex:^additive_attention_(fwd_kernel|bwd_kernel_inputs|bwd_kernel_keys)$"
    profiler = ("ncu", "--clock-control", "none", "--set", "full", "--kernel-name", hottest, "--launch-count", "3")
    return Stage(
        ("-m", "benchmarks.gpu.workload", "large"), 60, "what ncu counts in the hottest kernels", {}, profiler
    )


STAGES = {
    "libraries": Stage(
        ("-m", "benchmarks.gpu.libraries", "use"), 300, "takes the carried libraries, or builds them", needed=True
    ),
    "check": Stage(
        ("-m", "benchmarks.gpu.check"), 30, "what this machine is; without CUDA kernels the run ends", needed=True
    ),
    "smoke-cuda": Stage(("-m", "benchmarks.gpu.smoke", "cuda"), 45, "each op in each surrounding, CUDA C++"),
    "smoke-triton": Stage(("-m", "benchmarks.gpu.smoke", "triton"), 75, "the same in Triton"),
    "tests-cuda": _tests("cuda"),
    "tests-triton": _tests("triton"),
    "timings": Stage(("-m", "benchmarks.gpu.timings"), 130, "main shapes against PyTorch, checked, then timed"),
    "memcheck": _sanitizer("memcheck"),
    "racecheck": _sanitizer("racecheck"),
    "autotune": Stage(
        ("-m", "benchmarks.gpu.timings", "--only", "triton"),
        90,
        "Triton with the fastest of its tiles",
        {"FUSEDATTN_AUTOTUNE": "1"},
    ),
    "ncu": _profile(),
    "emulator": Stage(
        ("-m", "pytest", "-q", "tests/test_cuda.py", "-k", "emulator"),
        180,
        "the GPU against the emulator",
        {"FUSEDATTN_TEST_DEVICE": "cuda"},
    ),
}
# The most valuable first; together within ten minutes where the libraries were carried.
FIRST = (
    "libraries",
    "check",
    "smoke-cuda",
    "smoke-triton",
    "tests-cuda",
    "tests-triton",
    "timings",
    "memcheck",
    "racecheck",
)
# Instead of a GPU: the CPU and the stand-in of the tests, with a little of everything.
REHEARSAL = {"FUSEDATTN_GPU_REHEARSAL": "1", "FUSEDATTN_TEST_DEVICE": "standin", "FUSEDATTN_TEST_BACKEND": "auto"}


def rehearsing() -> bool:
    return os.environ.get("FUSEDATTN_GPU_REHEARSAL") == "1"


@dataclass(frozen=True)
class Outcome:
    stage: str
    status: int | None  # None: not started
    seconds: float
    cut: bool = False  # at its limit

    def __str__(self) -> str:
        if self.status is None:
            return f"{self.stage:14} not started"
        how = (
            "stopped at its limit"
            if self.cut
            else "passed"
            if self.status == 0
            else f"failed, status {self.status}"
        )
        return f"{self.stage:14} {self.seconds:5.0f} s  {how}"


def run_command(command: list[str], seconds: float, log: Path, variables: dict[str, str]) -> tuple[int, bool]:
    """The status of a command and whether it was stopped. What it prints goes to the log and to standard output.

    At the limit its process group is interrupted, as by Ctrl-C, on which pytest still sums up; GRACE seconds later
    what is left of it is killed.
    """
    options = {
        "cwd": ROOT,
        "env": os.environ | variables,
        "start_new_session": True,
        "preexec_fn": _heed_interrupts,
    }
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    except FileNotFoundError as error:  # a tool that is not here: status of a shell
        with open(log, "a") as file:
            file.write(f"{error}\n")
        return 127, False
    copier = threading.Thread(target=_copy, args=(process.stdout, log), daemon=True)
    copier.start()
    cut = False
    try:
        process.wait(max(1.0, seconds - GRACE))
    except subprocess.TimeoutExpired:
        cut = True
        _signal_group(process, signal.SIGINT)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            _signal_group(process, signal.SIGKILL)
            process.wait()
    _signal_group(process, signal.SIGKILL)  # what the stage left running would hold the GPU, and our pipe
    copier.join()
    return process.returncode, cut


def _heed_interrupts() -> None:
    """A shell's background jobs are started with interrupts ignored, which those whom they start would inherit."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _signal_group(process: subprocess.Popen, which: int) -> None:
    try:
        os.killpg(process.pid, which)
    except ProcessLookupError:
        return  # all of it has ended


def _copy(pipe, log: Path) -> None:
    with open(log, "ab") as file:
        while data := pipe.read1(1 << 16):
            file.write(data)
            file.flush()
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()


def run(
    stages: Iterable[tuple[str, Stage, float]],
    seconds: float,
    output: Path,
    rehearsal: bool = False,
    say: Callable[[str], None] = print,
) -> Iterator[Outcome]:
    """Runs named stages, each within its own limit and what is left of ``seconds``; all after a needed one that
    failed are not started."""
    output.mkdir(parents=True, exist_ok=True)
    variables = {OUTPUT_VARIABLE: str(output.resolve()), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    variables |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # the references' products of matrices must repeat too
    begin, ended = time.monotonic(), False
    for name, stage, limit in stages:
        now = time.monotonic() - begin
        limit = min(limit, seconds - now)
        if ended or limit < LEAST:
            outcome = Outcome(name, None, 0.0)
        else:
            say(f"\n==== {name}, at {now:.0f} s, for {limit:.0f} s at most")
            own = stage.variables | (REHEARSAL if rehearsal else {})
            status, cut = run_command(stage.arguments(rehearsal), limit, output / "log.txt", variables | own)
            outcome = Outcome(name, status, time.monotonic() - begin - now, cut)
            ended = stage.needed and (status != 0 or cut)
        with open(output / "records.jsonl", "a") as file:
            file.write(json.dumps({"kind": "stage"} | vars(outcome)) + "\n")
        yield outcome
