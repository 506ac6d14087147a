"""The benchmarks' house-keeping: a run keeps its time, fits the machine, and reports what it left out."""

import io
import json
import time

import pytest
import torch
from torch.utils._pytree import tree_map

rich_console = pytest.importorskip("rich.console", reason="rich is an optional extra of the benchmarks")
pytest.importorskip("matplotlib", reason="matplotlib is an optional extra of the benchmarks")

from benchmarks import (  # noqa: E402
    cases,
    contenders,
    fresh,
    identity,
    machine,
    measure,
    plots,
    progress,
    report,
    sizing,
    suite,
    summary,
    wide,
)
from benchmarks.machine import GIB, MIB  # noqa: E402

FAST = sizing.Speed(eager=1e9, clone=10e9)


class Output(io.StringIO):
    def __init__(self, terminal: bool):
        super().__init__()
        self.isatty = lambda: terminal


def progress_of(steps: int, terminal: bool, seconds: float = 0.0) -> str:
    console = rich_console.Console(file=Output(terminal), width=80)
    with progress.Tracker(console, "training", steps) as tracker:
        for n in range(steps):
            tracker.describe(f"step {n}")
            tracker.advance()
            time.sleep(seconds / steps)
    return console.file.getvalue()


@pytest.mark.parametrize("steps", [3, 10, 3000])
def test_a_log_gets_a_line_per_tenth_of_the_work(steps, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    lines = progress_of(steps, terminal=False).splitlines()
    assert len(lines) == min(steps, 10)
    assert f"training: {steps} of {steps}, step {steps - 1}" in lines[-1]


def test_a_terminal_gets_a_bar_redrawn_once_a_second(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    assert 1 <= progress_of(100, terminal=True, seconds=1.5).count("training: step") <= 5


@pytest.mark.parametrize(
    "cache, memory, clone, expected, why",
    [
        (32, 16 * 1024, 10e9, 128, "four times the cache"),
        (32, 1024, 10e9, 64, "free memory"),
        (480, 64 * 1024, 3e9, 480, "x.clone() of twice as much"),
        (480, 64 * 1024, 0.1e9, 240, "x.clone() of twice as much"),  # x and y still exceed the cache
    ],
)
def test_film_is_sized_by_cache_memory_and_time(cache, memory, clone, expected, why):
    sizes, lines = sizing.film_bytes(cache * MIB, memory * MIB, sizing.Speed(1e9, clone))
    assert sizes == {"cache": cache * MIB // 8, "memory": expected * MIB}
    assert f"{expected} MiB" in lines[0] and why in lines[0]
    for case in cases.film(sizes):
        assert sizes[case.size] <= case.x_bytes() <= 1.2 * sizes[case.size]


@pytest.mark.parametrize(
    "speed, memory, batch, why",
    [
        (FAST, 16 * GIB, 4, None),
        (sizing.Speed(50e6, 10e9), 16 * GIB, 2, "an eager step would take 5.4 s"),
        (FAST, 2 * GIB, 1, "eager would need 3.0 of 2.0 GiB"),
    ],
)
def test_attention_fits_time_and_memory(speed, memory, batch, why):
    case = cases.ATTENTION[0]
    fitted, lines = sizing.fitted(case, speed, memory)
    assert fitted == cases.AttentionCase(batch, case.Tq, case.Tk, case.D)
    assert lines == ([f"{case.name} became {fitted.name}: {why}"] if why else [])


def test_a_schedule_shares_its_time_and_notes_what_is_left_out():
    schedule = suite.Schedule(seconds=100, steps=10)
    assert schedule.run("first", lambda seconds: seconds) == pytest.approx(30, abs=1)

    def too_slow(seconds):
        raise fresh.OutOfTimeError(f"not done after {seconds:.0f} s")

    assert schedule.run("second", too_slow) is None
    shares = [schedule.run("more", lambda seconds: seconds) for _ in range(8)]
    assert max(shares) <= 100 and shares[-1] == pytest.approx(100, abs=1)
    over = suite.Schedule(seconds=1, steps=1)
    assert over.run("last", lambda seconds: seconds) is None
    assert schedule.left_out == ["second: not done after 33 s"] and over.left_out == ["last: no time was left"]


def test_a_measurement_short_of_time_takes_fewer_samples():
    def samples(**options) -> list[float]:
        return measure.alternate({"step": lambda: time.sleep(0.01)}, 50, 0.005, **options)["step"]

    assert len(samples()) == 51  # the first call tells how long a step takes
    assert 1 <= len(samples(limit=0.1)) < 11
    job = measure.Job("attention", cases.AttentionCase(1, 2, 3, 4), names=("fused",), check=False)
    assert measure.time_case(job, seconds=0) == []


def test_a_measurement_out_of_time_is_ended():
    start = time.monotonic()
    with pytest.raises(fresh.OutOfTimeError, match="not done after 1 s"):
        fresh.call(time.sleep, 600, seconds=1)
    assert time.monotonic() - start < 60
    assert fresh.call(abs, -3) == 3


def test_free_memory_is_what_the_tightest_limit_leaves(tmp_path):
    job = tmp_path / "user" / "job"
    job.mkdir(parents=True)
    for folder, limit, used in ((job, "max", 10), (job.parent, "1000", 400), (tmp_path, "5000", 700)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text("anon 5\ninactive_file 100\n")
    assert machine.left_of_limits(job) == [700, 4400]
    assert 0 < machine.available_memory() < machine.GIB << 20


def test_the_strongest_rival_computes_the_same():
    case = cases.AttentionCase(2, 3, 5, 8)
    inputs, grad = case.inputs(), case.grad_output()
    rivals = {
        "eager": contenders.attention_matmul,
        "identity": identity.Identity(compiled=lambda function: function),
    }
    steps = [contenders.step(case, "training", name, f, inputs, grad) for name, f in rivals.items()]
    for _ in range(2):  # the buffers are used again
        torch.testing.assert_close(*(step() for step in steps))


WIDE = {case.name: (group, case) for group, cases in wide.CASES.items() for case in cases}


def test_wide_has_forty_cases_and_more_and_their_names_differ():
    assert len(WIDE) == sum(map(len, wide.CASES.values())) >= 40


def test_blocks_are_compared_as_they_are_and_compiled():
    times = {"eager": 6.0, "compile": 4.0, contenders.FUSED: 5.0, contenders.COMPILED_FUSED: 2.0}
    row = {"group": "wide block", "case": "block", "mode": "training", "unit": "", "rate": 0.0}
    result = {"rows": [row | {"contender": name, "milliseconds": t} for name, t in times.items()]}
    (found,) = summary.summaries(result, "wide block")
    assert (found["vs eager"], found[summary.BOTH_COMPILED], found["vs faster"]) == (1.2, 2.0, 1.2)
    columns, ((*cells,),) = report.table(result, "wide block")
    assert dict(zip(columns, cells, strict=True))[summary.BOTH_COMPILED] == "2.00×"
    assert "wide block" in wide.WITH_PEAKS


def test_every_wide_group_is_reported():
    assert list(report.WIDE) == list(wide.CASES) and report.HEADS.keys() >= wide.CASES.keys()


@pytest.mark.parametrize("name", WIDE)
def test_wide_cases_agree_with_code_by_hand(name):
    case = WIDE[name][1].reduced()
    functions = contenders.of(case, compile=False)
    measure.check_agreement(case, functions, case.inputs(), case.grad_output())
    wrong = functions | {"fused": lambda *inputs: tree_map(lambda t: 1.1 * t, functions["fused"](*inputs))}
    with pytest.raises(measure.DisagreementError, match="fused: output"):
        measure.check_agreement(case, wrong, case.inputs(), case.grad_output())


def rows(group: str, case: cases.Case, **extra) -> list[dict]:
    """Of a made-up measurement."""
    return [
        {
            "group": group,
            "case": case.name,
            "mode": mode,
            "contender": contender,
            "milliseconds": milliseconds,
            "rate": 1.0,
            "unit": case.unit,
            "ceiling_milliseconds": 1.0,
            "limit": "bytes",
            **extra,
        }
        for mode in cases.MODES
        for contender, milliseconds in (("eager", 40.0), ("compile", 8.0), ("fused", 2.0))
    ]


@pytest.fixture
def result():
    film = cases.FilmCase("BTC", "memory", 16, 256, 8192)
    return {
        "machine": machine.stamp(),
        "command": "python -m benchmarks",
        "seconds": 1.0,
        "ceilings": {"copy memory": 10.0},
        "sizes": ["FiLM, chosen so"],
        "left_out": ["peak memory: no time was left"],
        "rows": rows("attention", cases.ATTENTION[0]) + rows("film", film, size="memory"),
    }


def test_report_says_what_was_chosen_and_left_out(result):
    console = rich_console.Console(file=io.StringIO(), width=200)
    report.print_result(console, json.loads(json.dumps(result)))
    text = console.file.getvalue()
    assert "sizes: FiLM, chosen so" in text and "left out: peak memory: no time was left" in text
    assert "20.0×" in text and "4.00×" in text and "50% bytes" in text


def test_rows_below_one_are_listed(result):
    group, case = WIDE["film (1, 16, 4) float32"]
    result["rows"] = rows(group, case, model=case.model)
    slow = [row for row in result["rows"] if row["mode"] == "training" and row["contender"] == "fused"]
    slow[0]["milliseconds"] = 10.0
    console = rich_console.Console(file=io.StringIO(), width=200)
    report.print_result(console, result)
    text = console.file.getvalue()
    assert "1 of 2 rows are below 1" in text
    listed = [line for line in text.splitlines() if line.startswith("│ film (1, 16, 4) float32 ")]
    assert len(listed) == 1 and "training" in listed[0] and "0.800×" in listed[0]


def test_readme_is_rewritten_with_its_pictures(result, tmp_path, monkeypatch):
    written = plots.write(result, tmp_path)
    assert [path.name for path in written] == ["ratios.png", "ceilings.png"]
    monkeypatch.setattr(report, "ROOT", tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- benchmarks:begin -->\nold\n<!-- benchmarks:end -->\nafter\n")
    committed = report.update_readme(result, tmp_path)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "Measured by `python -m benchmarks` on" in text and "| (4, 512, 512, 256) | forward | 40.0 |" in text
    for path in committed[1:]:
        assert f"(docs/{path.name})" in text and path.read_bytes().startswith(b"\x89PNG")
