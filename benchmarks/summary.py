"""What a result says of each case: the fastest form of every rival beside fusedattn, and the ratios."""

from . import contenders


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
        plain = [summary[f"vs {kind}"] for kind in ("eager", "compile") if f"vs {kind}" in summary]
        if plain:
            summary["vs faster"] = min(plain)
        if summary[contenders.CLONE] is not None:
            summary["vs clone"] = fused["rate"] / summary[contenders.CLONE]["rate"]
        if fused.get("ceiling_milliseconds"):
            summary["ceiling"] = fused["ceiling_milliseconds"] / fused["milliseconds"]
        found.append(summary)
    return found
