"""A run in a few lines."""

from __future__ import annotations

from collections import Counter

from dynamo_serve.bench.record import OUTCOMES, Run
from dynamo_serve.bench.targets import value

SHARES = ("50", "90", "99")


def brief(run: Run) -> str:
    """What a person wants to know first; warm-up and probes are left out."""
    load = [r for r in run.records if not r.is_warm_up and r.kind != "probe"]
    if not load:
        return "nothing was measured: no call was made after the warm-up"
    counts = Counter(record.outcome for record in load)
    lines = [
        f"{len(load)} requests in {run.seconds:.1f} s: "
        + ", ".join(f"{counts[name]} {name}" for name in OUTCOMES if counts[name]),
    ]
    names = ("requests_per_s", "output_tokens_per_s", "goodput", "cached_share")
    rates = ((name, value(load, name, run.seconds)) for name in names)
    lines += [f"{name:<20} {found:10.4g}" for name, found in rates if found is not None]
    for name in ("ttft", "itl", "tpot", "e2e"):
        values = [value(load, f"{name}_p{share}_ms", run.seconds) for share in SHARES]
        if None not in values:
            shown = "  ".join(f"p{s} {v:9.1f}" for s, v in zip(SHARES, values, strict=True))
            lines.append(f"{name + ' ms':<20} {shown}")
    return "\n".join(lines)
