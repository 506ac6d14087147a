"""What the CPU backend is meant to reach, beside what a result shows."""

from dataclasses import dataclass

from .cases import MODES
from .machine import MIB
from .summary import summaries

# shape: least speed-up of (forward vs eager, forward vs compile, training vs eager, training vs compile)
SPEEDUPS = {
    "(4, 512, 512, 256)": (70, 12, 50, 30),
    "(128, 10, 128, 1024)": (40, 7, 30, 20),
    "(1280, 1, 66, 1024)": (15, 3.5, 8, 5),
    "(64, 1, 1024, 512)": (15, 3.5, 8, 5),
}
# the same, vs identity: least speed-up in (forward, training)
VS_IDENTITY = {"avx512": (2, 3), "avx2": (2, 2.5)}
VS_IDENTITY_CASES = ("(4, 512, 512, 256)", "(128, 10, 128, 1024)", "(64, 1, 1024, 512)")
PEAK_CASE, PEAK_MIB = "attention (4, 512, 512, 256)", 32
FILM_VS_CLONE = 0.9
AVX2_VS_AVX512 = 0.5


@dataclass
class Target:
    what: str
    sign: str  # "≥" or "≤"
    bound: float
    unit: str
    measured: float | None

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        met = self.measured >= self.bound if self.sign == "≥" else self.measured <= self.bound
        return "met" if met else "missed"


def targets(result: dict) -> list[Target]:
    found = []
    attention = {(s["case"], s["mode"]): s for s in summaries(result, "attention")}
    for shape, bounds in SPEEDUPS.items():
        pairs = [(mode, rival) for mode in MODES for rival in ("eager", "compile")]
        for (mode, rival), bound in zip(pairs, bounds, strict=True):
            measured = attention.get((f"attention {shape}", mode), {}).get(f"vs {rival}")
            found.append(Target(f"{shape} {mode} vs {rival}", "≥", bound, "×", measured))

    level = result["machine"]["cpu_capability"]
    for shape in VS_IDENTITY_CASES if level in VS_IDENTITY else ():
        for mode, bound in zip(MODES, VS_IDENTITY[level], strict=True):
            measured = attention.get((f"attention {shape}", mode), {}).get("vs identity")
            found.append(Target(f"{shape} {mode} vs identity", "≥", bound, "×", measured))

    peak = attention.get((PEAK_CASE, "training"), {}).get("fused", {}).get("peak_bytes")
    what = f"{PEAK_CASE.removeprefix('attention ')} training peak memory"
    found.append(Target(what, "≤", PEAK_MIB, " MiB", None if peak is None else peak / MIB))

    film = summaries(result, "film")
    for s in film:
        if s["size"] == "memory":
            found.append(Target(f"{s['case']} {s['mode']} vs clone", "≥", FILM_VS_CLONE, "×", s.get("vs clone")))
    for s in film:
        found.append(Target(f"{s['case']} {s['mode']} vs compile", "≥", 1, "×", s.get("vs compile")))

    rates = {(r["case"], r["mode"], r["contender"]): r["rate"] for r in result["rows"] if r["group"] == "levels"}
    for (case, mode, level), rate in rates.items():
        if level == "avx512":
            measured = rates[case, mode, "avx2"] / rate
            what = f"{case.removeprefix('attention ')} {mode} avx2 vs avx512"
            found.append(Target(what, "≥", AVX2_VS_AVX512, "×", measured))

    for s in summaries(result, "small"):
        found.append(Target(f"small call {s['mode']} vs eager", "≥", 1, "×", s.get("vs eager")))
    return found
