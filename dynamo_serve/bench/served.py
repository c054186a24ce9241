"""What the server said of itself during a run, read from the samples of its metrics."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from dynamo_serve.bench.record import Run, Sample

LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Histogram:
    """What was observed during the run: counts up to each bound, in order, and sum and number."""

    bounds: tuple[tuple[float, float], ...]
    total: float
    count: float

    def quantile(self, share: float) -> float | None:
        """Interpolated within its bucket, so no better than the buckets are."""
        below, edge = 0.0, 0.0
        for bound, count in self.bounds:
            if count >= share * self.count and count > below:
                if math.isinf(bound):
                    return None  # beyond the last bucket: unknown
                return edge + (bound - edge) * (share * self.count - below) / (count - below)
            below, edge = max(below, count), bound
        return None


def split(name: str) -> tuple[str, Labels]:
    """`name{a="b"}` in two."""
    bare, _, rest = name.partition("{")
    return bare, tuple(LABEL.findall(rest))


def measured(run: Run) -> list[Sample]:
    """By time, from the first measured request on: what warm-up did is not to be counted. The
    first has the last value of everything until then, for not every sample has all metrics."""
    load = [record for record in run.records if record.kind != "probe"]
    due = [record.due for record in load if not record.is_warm_up]
    samples = sorted(run.samples, key=lambda sample: sample.at)
    before = [sample for sample in samples if due and sample.at <= min(due)]
    if not before:
        return samples
    known = {name: value for sample in before for name, value in sample.values.items()}
    return [Sample(before[-1].at, known), *samples[len(before) :]]


def series(samples: list[Sample], metric: str) -> dict[Labels, list[tuple[float, float]]]:
    """One metric's values over time, by its labels."""
    found: dict[Labels, list[tuple[float, float]]] = {}
    for sample in samples:
        for name, value in sample.values.items():
            if name.startswith(metric) and math.isfinite(value):
                bare, labels = split(name)
                if bare == metric:
                    found.setdefault(labels, []).append((sample.at, value))
    return found


def increase(samples: list[Sample], metric: str) -> dict[Labels, float]:
    """By how much a counter grew. One that fell began anew; one that came later began at 0."""
    began = samples[0].at if samples else 0.0
    grown: dict[Labels, float] = {}
    for labels, points in series(samples, metric).items():
        last = points[0][1] if points[0][0] == began else 0.0
        total = 0.0
        for _, value in points:
            total += value - last if value >= last else value
            last = value
        grown[labels] = total
    return grown


def growth(samples: list[Sample], metric: str) -> float | None:
    """The same over all labels; None where the server has no such metric."""
    grown = increase(samples, metric)
    return math.fsum(grown.values()) if grown else None


def histogram(samples: list[Sample], metric: str, **wanted: str) -> Histogram | None:
    """What came into a histogram during the run; None if nothing did."""
    buckets: dict[float, float] = {}
    sums = {"_sum": 0.0, "_count": 0.0}
    for labels, value in increase(samples, metric + "_bucket").items():
        told = dict(labels)
        bound = _bound(told.get("le", ""))
        if wanted.items() <= told.items() and bound is not None:
            buckets[bound] = buckets.get(bound, 0.0) + value
    for end in sums:
        for labels, value in increase(samples, metric + end).items():
            if wanted.items() <= dict(labels).items():
                sums[end] += value
    if sums["_count"] <= 0:
        return None
    return Histogram(tuple(sorted(buckets.items())), sums["_sum"], sums["_count"])


def _bound(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def by_tenant(samples: list[Sample], metric: str) -> dict[str, float]:
    return {
        dict(labels)["tenant"]: value
        for labels, value in increase(samples, metric).items()
        if "tenant" in dict(labels)
    }
