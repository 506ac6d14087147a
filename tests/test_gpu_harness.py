"""The runner of stages for a GPU (benchmarks/gpu): limits, what is kept, what it says of a machine."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import device, libraries, smoke, stages, timings
from benchmarks.gpu.stages import Stage


def python(code, **options):
    return Stage(("-c", code), 30, "", **options)


def run(tmp_path, *pairs, seconds=60.0):
    found = list(stages.run([(n, s, s.seconds) for n, s in pairs], seconds, tmp_path, say=lambda text: None))
    return found, (tmp_path / "log.txt").read_text()


def test_what_a_stage_prints_and_records_is_kept(tmp_path):
    code = "from benchmarks.gpu.stages import record; print('printed'); record(kind='x', n=1)"
    (outcome,), log = run(tmp_path, ("one", python(code)))
    assert (outcome.status, outcome.cut) == (0, False) and "printed" in log
    first, last = map(json.loads, (tmp_path / "records.jsonl").read_text().splitlines())
    assert first == {"kind": "x", "n": 1} and (last["kind"], last["stage"]) == ("stage", "one")


def test_a_stage_that_fails_leaves_the_next_to_run_unless_it_is_needed(tmp_path):
    fails = "import sys; sys.exit(4)"
    found, log = run(tmp_path, ("a", python(fails)), ("b", python("print('ran')")))
    assert [o.status for o in found] == [4, 0] and "ran" in log
    found, _ = run(tmp_path, ("a", python(fails, needed=True)), ("b", python("print('ran')")))
    assert [o.status for o in found] == [4, None]


# A program that answers to Ctrl-C with what it has, and one that does not; the second's child must not outlive it.
POLITE = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('summed up')"
DEAF = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("child", child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("code", [POLITE, DEAF], ids=["polite", "deaf"])
def test_a_stage_is_stopped_at_its_limit(code, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "GRACE", 2)
    start = time.monotonic()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a shell's background
    try:
        outcome, *_ = stages.run([("long", python(code), 5.0)], 60.0, tmp_path, say=lambda text: None)
    finally:
        signal.signal(signal.SIGINT, before)
    assert outcome.cut and time.monotonic() - start < 20
    log = (tmp_path / "log.txt").read_text()
    if code == POLITE:
        assert "summed up" in log
    else:
        child, patience = Path(f"/proc/{log.split()[1]}/stat"), time.monotonic() + 10
        while runs(child) and time.monotonic() < patience:
            time.sleep(0.05)
        assert not runs(child)


def runs(stat):
    """Whether a process of this /proc/<pid>/stat is neither gone nor only waited for."""
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_no_stage_is_started_without_time_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "GRACE", 1)
    pairs = [("a", python("import time; time.sleep(2)")), ("b", python("print('b')"))]
    found, _ = run(tmp_path, *pairs, seconds=stages.LEAST + 1)
    assert [o.status for o in found] == [0, None]
    assert str(found[1]).split() == ["b", "not", "started"]


def test_the_first_stages_fit_ten_minutes_with_carried_libraries():
    limits = {name: stages.STAGES[name].seconds for name in stages.FIRST if name != "libraries"}
    assert sum(limits.values()) <= command.SECONDS + 30  # not all of them need all of their time
    assert list(limits)[:3] == ["check", "smoke-cuda", "smoke-triton"]


def test_a_tool_that_is_not_here_is_left_out_of_a_rehearsal_alone(tmp_path):
    stage = Stage(("-c", "print('ran')"), 30, "", tool=("no-such-tool", "--option"))
    (outcome,), log = run(tmp_path, ("watched", stage))
    assert outcome.status == 127 and "no-such-tool" in log
    assert stage.arguments(rehearsal=True) == [sys.executable, "-c", "print('ran')"]


def test_stages_are_chosen_by_name_and_time():
    assert [(n, s) for n, _, s in command.chosen(["check", "timings=12.5"])] == [("check", 30), ("timings", 12.5)]
    for wrong in ("chek", "check=soon"):
        with pytest.raises(ValueError, match="no stage 'chek': expected one of libraries|could not convert"):
            command.chosen([wrong])


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("580.159.04, 1980, 2619, 700.00\n", ["580.159.04", "1980", "2619", "700.00"]),
        ("580.159.04, [N/A], 2619, [Not Supported]\n", ["580.159.04", None, "2619", None]),
        ("580.1, 1980, 2619, 700\n580.1, 1410, 2619, 700\n", ["580.1", "1980", "2619", "700"]),
        ("No devices were found\n", [None] * 4),
        ("", [None] * 4),
    ],
)
def test_what_nvidia_smi_does_not_know_is_none(answer, expected):
    assert list(device.parse(answer).values()) == expected


def test_without_nvidia_smi_nothing_is_known(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert device.ask() == dict.fromkeys(device.ASKED)
    assert timings.bound(device.ask() | {"multiprocessors": 132}) is None
    assert timings.bound({"max_sm_mhz": "2000", "multiprocessors": 100}) == 32 * 100 * 2


def test_a_line_of_the_gpus_table():
    shared = {"case": "attention (1, 1, 8, 8)", "dtype": "bfloat16", "mode": "forward", "unit": "G tanh/s"}
    row = shared | {"contender": "cuda", "milliseconds": 2.0, "call_microseconds": 30.0, "rate": 5.0}
    agreeing = row | {"disagrees": None}
    assert timings.line(agreeing, 10.0).split()[-7:] == ["cuda", "2.0000", "30.0", "5.0", "G", "tanh/s", "50%"]
    assert timings.line(agreeing, None).endswith("-")
    assert timings.line(row | {"disagrees": "grad_key: 3"}, 10.0).endswith("50%  DISAGREES: grad_key: 3")
    lacking = row | {"milliseconds": None, "why": "out of memory"}
    assert timings.line(lacking, 10.0).endswith("cuda       out of memory")


def test_carried_libraries_must_be_of_these_sources(tmp_path):
    root, carried = tmp_path / "root", tmp_path / "carried"
    (root / "csrc" / "film").mkdir(parents=True)
    (root / "csrc" / "film" / "a.h").write_text("1")
    (root / "setup.py").write_text("")
    (carried / "fusedattn").mkdir(parents=True)
    assert "lacks _C.abi3.so, _C_cuda.abi3.so" in libraries.why_not(carried, root)
    for name in libraries.NAMES:
        (carried / "fusedattn" / name).write_text("")
    (carried / libraries.DIGEST).write_text(libraries.digest(root))
    assert libraries.why_not(carried, root) is None
    (root / "csrc" / "film" / "a.h").write_text("2")
    assert "made from other sources" in libraries.why_not(carried, root)


def test_sources_that_change_while_libraries_are_built_are_not_theirs(tmp_path, monkeypatch):
    sources = ["before"]

    def build(*arguments):
        assert not (tmp_path / libraries.DIGEST).exists()  # a build that fails leaves none
        (tmp_path / "fusedattn").mkdir()
        for name in libraries.NAMES:
            (tmp_path / "fusedattn" / name).write_text("")
        sources[:] = ["after"]

    monkeypatch.setattr(libraries, "ROOT", tmp_path)
    monkeypatch.setattr(libraries, "CARRIED", tmp_path)
    monkeypatch.setattr(libraries, "digest", lambda *_: sources[0])
    monkeypatch.setattr(libraries, "build", build)
    (tmp_path / libraries.DIGEST).write_text("after")
    libraries.prepare()
    assert "made from other sources" in libraries.why_not(tmp_path)


def test_a_run_without_cuda_kernels_ends_at_the_check(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    variables = os.environ | {stages.OUTPUT_VARIABLE: str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.check"],
        cwd=stages.ROOT,
        env=variables,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1 and "cuda cannot run: " in result.stderr
    assert json.loads((tmp_path / "records.jsonl").read_text())["reasons"]["cuda"]


def test_a_failing_check_is_named_and_the_next_runs(monkeypatch):
    monkeypatch.setattr(smoke, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(smoke, "synchronize", lambda: None)
    kernel, reference, inputs = smoke.checks("cpu")["film"]
    assert smoke.attempt(smoke.by_default, kernel, reference, inputs) is None
    wrong = smoke.attempt(smoke.by_default, lambda *a: kernel(*a) * 1.1, reference, inputs)
    assert wrong.startswith("AssertionError: ")


@pytest.fixture
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(device, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(device, "backends", lambda: {"cpu": []})


@pytest.mark.parametrize("case", timings.REHEARSED, ids=lambda case: case.name)
def test_disagreement_is_a_row_and_timing_goes_on(case, on_the_cpu):
    functions = timings.functions_of(case, compiling=False)
    assert timings.disagreements(case, torch.float32, functions) == {}
    right = functions["cpu"]
    functions["cpu"] = lambda *inputs: right(*inputs) * 1.01
    wrong = timings.disagreements(case, torch.float32, functions)
    assert "from float64" in wrong["cpu"]

    def broken(*inputs):
        raise ValueError("no such shape")

    rows = timings.measure(case, torch.float32, "training", functions | {"broken": broken}, wrong)
    by_name = {row["contender"]: row for row in rows}
    assert "DISAGREES" in timings.line(by_name["cpu"], 10.0) and by_name["cpu"]["milliseconds"] > 0
    assert by_name["cpu"]["call_microseconds"] > 0
    assert by_name["broken"]["milliseconds"] is None and "no such shape" in timings.line(by_name["broken"], None)


def test_inputs_keep_the_layout_of_their_case(on_the_cpu):
    case = timings.FilmCase("channels_last", "memory", 2, 8, 5)
    (x, gamma, _), grad = timings.inputs_of(case, torch.bfloat16)
    assert x.is_contiguous(memory_format=torch.channels_last) and x.dtype == torch.bfloat16
    assert gamma.shape == (2, 8) and grad.stride() == x.stride()


def test_kernels_come_before_what_is_compiled():
    order = [compiling for *_, compiling in timings.plan(timings.CASES)]
    assert order == sorted(order) and len(order) == 2 * len(timings.DTYPES) * len(timings.CASES)
