"""`pytest benchmarks/`: the same contenders at small shapes, measured and stored by pytest-benchmark."""

import pytest

from . import contenders, measure
from .cases import MODES, AttentionCase, FilmCase

CASES = [
    AttentionCase(2, 64, 64, 128),
    AttentionCase(8, 1, 256, 128),
    AttentionCase(1, 1, 10_000, 64),
    FilmCase("NCHW", "cache", 4, 64, 32),
    FilmCase("channels_last", "cache", 4, 64, 32),
    FilmCase("BTC", "cache", 4, 64, 1024),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", ""))
def test_agreement(case):
    functions = contenders.of(case, compile=False)
    measure.check_agreement(case, functions, case.inputs(), case.grad_output())


@pytest.mark.parametrize("contender", ["eager", "fused"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", ""))
def test_time(benchmark, case, mode, contender):
    functions = contenders.of(case, compile=False)
    name = next(name for name in functions if name.startswith(contender))
    benchmark.group = f"{case.name} {mode}"
    benchmark(contenders.step(case, mode, name, functions[name], case.inputs(), case.grad_output()))


def test_disagreement_is_refused():
    case = CASES[0]
    functions = contenders.of(case, compile=False)
    wrong = {**functions, "fused": lambda *inputs: functions["fused"](*inputs) * 1.001}
    with pytest.raises(measure.DisagreementError, match="fused: context"):
        measure.check_agreement(case, wrong, case.inputs(), case.grad_output())
