"""The figures by name, flat: what runs are compared by, and how sure each is over repeats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dynamo_serve.bench.latency import LATENCIES, SHARES, Distribution
from dynamo_serve.bench.record import Run
from dynamo_serve.bench.spread import Estimate, mean
from dynamo_serve.bench.summary import Summary, summary

UNITS = {  # name → unit, whether more of it is better (None: neither)
    "requests_per_s": ("requests/s", True),
    "input_tokens_per_s": ("tokens/s", True),
    "output_tokens_per_s": ("tokens/s", True),
    "good_requests_per_s": ("requests/s", True),
    "refused": ("requests", False),
    "failed": ("requests", False),
    "cancelled": ("requests", None),
    "cached_share": ("share", True),
    "good_share": ("share", True),
    "jain": ("index", True),
    "bandwidth_fraction": ("share", True),
}


@dataclass(frozen=True, slots=True)
class Repeats:
    """The same run several times. `figures` has the mean of each with its 95 % t-interval, where
    every run knows it; `missing` those that only some know."""

    summaries: tuple[Summary, ...]
    figures: dict[str, Estimate]
    missing: tuple[str, ...]


def unit(name: str) -> str:
    if name.startswith("attainment"):
        return "share"
    return UNITS[name][0] if name in UNITS else "ms"


def more_is_better(name: str) -> bool | None:
    if name.startswith("attainment"):
        return True
    return UNITS[name][1] if name in UNITS else False


def figures(of: Summary) -> dict[str, float]:
    """What is known of a run; latencies in milliseconds."""
    total = of.total
    found: dict[str, float | None] = {
        "refused": total.counts.refused,
        "failed": total.counts.failed,
        "cancelled": total.counts.cancelled,
        "cached_share": total.cached_share,
        "good_share": total.good_share,
        "jain": of.fairness.jain,
        "bandwidth_fraction": of.bound.fraction if of.bound else None,
    }
    if total.rates:
        found["requests_per_s"] = total.rates.requests
        found["input_tokens_per_s"] = total.rates.input_tokens
        found["output_tokens_per_s"] = total.rates.output_tokens
        found["good_requests_per_s"] = total.rates.good
    for name in LATENCIES:
        found |= _latency(name, getattr(total, name))
    for name, share in total.attainment.items():
        found[f"attainment_{name}"] = share.value
    return {name: float(value) for name, value in found.items() if value is not None}


def _latency(name: str, of: Distribution) -> dict[str, float | None]:
    """Not the greatest: it grows with the number of requests."""
    values = {"mean": of.mean, **{share: of.value(share) for share in SHARES}}
    return {
        f"{name}_{which}_ms": None if value is None else value * 1000
        for which, value in values.items()
    }


def summaries(runs: Sequence[Run]) -> Repeats:
    """Repeated runs as one result: the mean of every figure over runs, with Student's t-interval
    of 95 % (`spread.mean`). Requests of one run depend on each other, by queue and batch, so
    this is a better account of the noise than any interval within a run."""
    several = tuple(summary(run) for run in runs)
    flat = [figures(one) for one in several]
    everywhere = set.intersection(*map(set, flat)) if flat else set()
    somewhere = {name: None for one in flat for name in one}
    return Repeats(
        several,
        {name: mean([one[name] for one in flat]) for name in somewhere if name in everywhere},
        tuple(name for name in somewhere if name not in everywhere),
    )
