"""What a result says of each case: the fastest form of every rival beside fusedattn, and the ratios."""

from . import contenders

BOTH_COMPILED = "both compiled"  # how many times as fast ours is where our code is compiled, too


def summaries(result: dict, group: str) -> list[dict]:
    """One dict per case and mode: the fastest form of each rival beside fusedattn."""
    steps: dict[tuple[str, str], dict[str, dict]] = {}
    for row in result["rows"]:
        if row["group"] == group:
            steps.setdefault((row["case"], row["mode"]), {})[row["contender"]] = row
    found = []
    for (case, mode), by_name in steps.items():
        fused = by_name[contenders.FUSED]
        summary = {"case": case, "mode": mode, "fused": fused}
        summary |= {label: fused.get(label) for label in ("size", "length", "model")}
        summary[contenders.COMPILED_FUSED] = by_name.get(contenders.COMPILED_FUSED)
        for kind in (*contenders.RIVALS, contenders.CLONE):
            rivals = [row for name, row in by_name.items() if name.startswith(kind)]
            best = min(rivals, key=lambda row: row["milliseconds"], default=None)
            summary[kind] = best
            if best is not None and kind != contenders.CLONE:
                summary[f"vs {kind}"] = best["milliseconds"] / fused["milliseconds"]
        both = summary["compile"], summary[contenders.COMPILED_FUSED]
        if None not in both:
            summary[BOTH_COMPILED] = both[0]["milliseconds"] / both[1]["milliseconds"]
        against_compile = BOTH_COMPILED if BOTH_COMPILED in summary else "vs compile"
        plain = [summary[name] for name in ("vs eager", against_compile) if name in summary]
        if plain:
            summary["vs faster"] = min(plain)
        if summary[contenders.CLONE] is not None:
            summary["vs clone"] = fused["rate"] / summary[contenders.CLONE]["rate"]
        if fused.get("ceiling_milliseconds"):
            summary["ceiling"] = fused["ceiling_milliseconds"] / fused["milliseconds"]
        found.append(summary)
    return found
