"""A run over its time: what readers got, and what the server had in its batch and its cache."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from dynamo_serve.bench.latency import is_sound
from dynamo_serve.bench.plot import Chart, Line
from dynamo_serve.bench.record import Record, Run, Sample
from dynamo_serve.bench.served import series

MOST_POINTS = 200
TIME = "time since the run began (s)"
PAGES = ("used", "cached", "free")


def charts(run: Run) -> list[Chart]:
    """Those that the run has data for; the others say that it has none. Warm-up is shown, too: it
    is a part of what happened."""
    records = [record for record in run.records if is_sound(record)]
    samples = sorted(run.samples, key=lambda sample: sample.at)
    kv = [(state, _gauge(samples, "dserve_pages", "state", state)) for state in PAGES]
    return [
        Chart("Throughput", TIME, "tokens/s", _throughput(records)),
        Chart(
            "Requests in the batch and waiting for it",
            TIME,
            "requests",
            _lines(
                ("running", _gauge(samples, "dserve_sequences_live")),
                ("waiting", _gauge(samples, "dserve_sequences_waiting")),
            ),
        ),
        Chart(
            "Tokens in the batch, by phase",
            TIME,
            "tokens/s",
            _aligned(
                [
                    (phase, _speed(samples, "dserve_batch_tokens_sum", phase))
                    for phase in _phases(samples)
                ]
            ),
            kind="areas",
        ),
        Chart("KV pages", TIME, "pages", _aligned(kv), kind="areas"),
    ]


def _throughput(records: Sequence[Record]) -> list[Line]:
    """Tokens per second as they reached clients, over intervals of a second or more. A read's
    tokens are taken to be equally many."""
    served = [(record.first, record) for record in records if record.first is not None]
    end = max((_reads(first, record)[-1] for first, record in served), default=0.0)
    width = max(1.0, end / MOST_POINTS)
    asked = [0.0] * (int(end / width) + 2)
    output = list(asked)
    for first, record in served:
        asked[int(first / width)] += record.prompt_tokens / width
        times = _reads(first, record)
        for at in times:
            output[int(at / width)] += record.output_tokens / len(times) / width
    if not served:
        return []
    middles = [(n + 0.5) * width for n in range(len(asked) - 1)]
    named = (("output", output), ("input, at the first token", asked))
    return [Line(name, list(zip(middles, bins, strict=False))) for name, bins in named]


def _reads(first: float, record: Record) -> list[float]:
    """When reads brought tokens. Of several choices nobody knows which gap was when: evenly."""
    if record.choices == 1:
        return list(accumulate(record.gaps, initial=first))
    count = max(1, len(record.gaps))
    span = max(0.0, (first if record.end is None else record.end) - first)
    return [first + span * n / count for n in range(len(record.gaps) + 1)]


def _gauge(
    samples: list[Sample], metric: str, label: str = "", value: str = ""
) -> list[tuple[float, float]]:
    points = [
        point
        for labels, found in series(samples, metric).items()
        if not label or dict(labels).get(label) == value
        for point in found
    ]
    return thin(sorted(points))


def _phases(samples: list[Sample]) -> list[str]:
    found = {dict(labels).get("phase") for labels in series(samples, "dserve_batch_tokens_sum")}
    return sorted((phase for phase in found if phase), reverse=True)


def _speed(samples: list[Sample], metric: str, phase: str) -> list[tuple[float, float]]:
    """How fast a counter grew, between samples; one that began anew is left out there."""
    points = _gauge(samples, metric, "phase", phase)
    return [
        (now, max(0.0, after - before) / (now - then))
        for (then, before), (now, after) in pairwise(points)
        if now > then
    ]


def thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Every so many of them, where they are more than can be seen."""
    step = -(-len(points) // MOST_POINTS) or 1
    return [point for point in points[::step] if 0 <= point[0] < 1e9 and 0 <= point[1] < 1e15]


def _lines(*named: tuple[str, list[tuple[float, float]]]) -> list[Line]:
    return [Line(name, points) for name, points in named if points]


def _aligned(named: Sequence[tuple[str, list[tuple[float, float]]]]) -> list[Line]:
    """All at the times that any has, 0 where one has none: what is stacked needs that."""
    by_time = [(name, dict(points)) for name, points in named if points]
    times = sorted({at for _, points in by_time for at in points})
    return [Line(name, [(at, points.get(at, 0.0)) for at in times]) for name, points in by_time]
