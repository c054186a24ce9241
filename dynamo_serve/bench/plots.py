"""What is drawn of a run, and of several at different loads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dynamo_serve.bench.figures import Repeats
from dynamo_serve.bench.latency import LONGEST_S, is_sound, samples
from dynamo_serve.bench.plot import Chart, Line, Mark
from dynamo_serve.bench.record import Run
from dynamo_serve.bench.spread import estimate, quantile
from dynamo_serve.bench.summary import PROBE, Summary
from dynamo_serve.bench.words import number

CURVE_POINTS = 200
SHOWN = (0.5, 0.99)
TITLES = {
    "ttft": "Time to first token (TTFT)",
    "itl": "Gap between tokens (ITL)",
    "tpot": "Time per output token (TPOT)",
    "e2e": "Whole request (E2E)",
}


def distributions(run: Run, is_open: bool) -> list[Chart]:
    """How latencies are distributed, p50 and p99 marked where they are known."""
    records = [r for r in run.records if not r.is_warm_up and r.kind != PROBE and is_sound(r)]
    return [distribution(title, samples(name, records, is_open)) for name, title in TITLES.items()]


def distribution(title: str, seconds: Iterable[float]) -> Chart:
    """The share of samples that took at most so long. The edge is a quarter beyond p99, so that
    one straggler does not squeeze all others; a note says how many lie beyond."""
    ordered = sorted(value * 1000 for value in seconds)
    x_label, y_label = "milliseconds", "share of samples (%)"
    if not ordered:
        return Chart(title, x_label, y_label, [])
    edge = max(1.25 * quantile(ordered, 0.99), 1e-3)
    shares = [n / CURVE_POINTS for n in range(CURVE_POINTS + 1)]
    curve = [(quantile(ordered, share), share * 100) for share in shares]
    beyond = sum(value > edge for value in ordered)
    note = f"{len(ordered):,} samples"
    if beyond:
        note += f"; {beyond:,} beyond the edge, the greatest {number(ordered[-1])} ms"
    known = ((share, estimate(ordered, share)) for share in SHOWN)
    marks = [
        Mark(found.value, share * 100, f"p{share * 100:g} {number(found.value)} ms")
        for share, found in known
        if found is not None
    ]
    lines = [Line("samples", [point for point in curve if point[0] <= edge])]
    return Chart(title, x_label, y_label, lines, "line", marks, note, edge, 100)


def load(of: Summary) -> float | None:
    """Requests per second that were due; in a closed loop, how many were in flight on average
    (Little: their seconds by the run's)."""
    if of.is_open:
        return of.offered
    done = of.total.e2e
    return done.count * done.mean / of.seconds if done.mean and of.seconds else None


def sweep(points: Sequence[Repeats]) -> list[Chart]:
    """Over the load: latencies, throughput and goodput; and what one user gets against what all
    get. Each point is the mean of its runs, with its interval if there are several."""
    placed = sorted(
        ((at, point) for point in points if (at := _mean_load(point)) is not None),
        key=lambda pair: pair[0],
    )
    is_open = all(one.is_open for point in points for one in point.summaries)
    x_label = "offered load (requests/s)" if is_open else "requests in flight"
    shares = ("p50", "p95", "p99")
    ttfts = [(f"TTFT {share}", f"ttft_{share}_ms") for share in shares]
    itls = [(f"ITL {share}", f"itl_{share}_ms") for share in shares]
    rates = [("answered", "requests_per_s"), ("within targets", "good_requests_per_s")]
    charts = [
        ("TTFT over load", "milliseconds", ttfts),
        ("ITL over load", "milliseconds", itls),
        ("Requests over load", "requests/s", rates),
        ("Output over load", "tokens/s", [("output", "output_tokens_per_s")]),
    ]
    drawn = [
        Chart(title, x_label, y_label, [_line(placed, *pair) for pair in pairs], "dots")
        for title, y_label, pairs in charts
    ]
    return [*drawn, _pareto(placed)]


def _mean_load(of: Repeats) -> float | None:
    loads = [found for one in of.summaries if (found := load(one)) is not None]
    usable = [value for value in loads if 0 <= value < LONGEST_S]
    return sum(usable) / len(usable) if usable else None


def _line(placed: Sequence[tuple[float, Repeats]], name: str, figure: str) -> Line:
    found = [(at, of.figures[figure]) for at, of in placed if figure in of.figures]
    bars = [
        None if one.low is None or one.high is None else (one.low, one.high) for _, one in found
    ]
    return Line(name, [(at, one.value) for at, one in found], bars)


def _pareto(placed: Sequence[tuple[float, Repeats]]) -> Chart:
    points, marks = [], []
    for at, of in placed:
        pace, output = of.figures.get("tpot_mean_ms"), of.figures.get("output_tokens_per_s")
        if pace and output and pace.value > 0:
            points.append((1000 / pace.value, output.value))
            marks.append(Mark(1000 / pace.value, output.value, f"load {number(at)}", True))
    return Chart(
        "What one user gets, against what all get (Pareto)",
        "tokens/s of one user (1 / mean TPOT)",
        "output tokens/s of all",
        [Line("load points", points)],
        "dots",
        marks,
    )
