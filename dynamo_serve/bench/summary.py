"""A run in figures: plain data, from records and samples alone. docs/reports.md defines each."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dynamo_serve.bench import account, bandwidth, groups
from dynamo_serve.bench.about import LATE_S, num_late
from dynamo_serve.bench.account import Fairness, Reconciled
from dynamo_serve.bench.bandwidth import Bound
from dynamo_serve.bench.groups import Group
from dynamo_serve.bench.latency import Distribution, distribution, is_sound
from dynamo_serve.bench.promises import TARGETS
from dynamo_serve.bench.record import Record, Run, Sample
from dynamo_serve.bench.served import growth, measured

PROBE = "probe"
COUNTERS = {
    "preemptions": "dserve_preemptions_total",
    "evicted pages": "dserve_evicted_pages_total",
    "engine restarts": "dserve_engine_restarts_total",
}


@dataclass(frozen=True, slots=True)
class Summary:
    """`total` is the load; probes are apart, warm-up is left out. `late` is how long after it was
    due a request was sent, in an open loop. `notes` are what a reader has to know before
    believing a figure."""

    about: dict[str, Any]
    seconds: float
    is_open: bool
    warm_up: int
    total: Group
    probes: Group | None
    tenants: tuple[Group, ...]
    classes: tuple[Group, ...]
    kinds: tuple[Group, ...]
    late: Distribution
    offered: float | None  # requests per second that were due
    fairness: Fairness
    reconciled: Reconciled | None
    prefix_savings: float | None
    bound: Bound | None
    unbound: str  # why there is no bound
    server: dict[str, float]
    errors: dict[str, int]
    notes: tuple[str, ...]


def summary(run: Run) -> Summary:
    """Every figure of one run; one without requests has none, and a note says so."""
    counted = [record for record in run.records if not record.is_warm_up]
    sound = [record for record in counted if is_sound(record)]
    load = [record for record in sound if record.kind != PROBE]
    probes = [record for record in sound if record.kind == PROBE]
    is_open = run.about.get("loop") != "closed"
    seconds = run.seconds if 0 < run.seconds < math.inf else 0.0
    samples = measured(run)
    total = groups.group("all", load, is_open, seconds)
    near = bandwidth.bound(run, samples, load, total.itl)
    late = distribution(max(0.0, record.sent - record.due) for record in load if is_open)
    return Summary(
        about=run.about,
        seconds=seconds,
        is_open=is_open,
        warm_up=len(run.records) - len(counted),
        total=total,
        probes=groups.group(PROBE, probes, is_open, seconds) if probes else None,
        tenants=groups.by(lambda record: record.tenant, load, is_open, seconds),
        classes=groups.by(lambda record: record.class_name, load, is_open, seconds),
        kinds=groups.by(lambda record: record.kind, load, is_open, seconds),
        late=late,
        offered=_offered(load) if is_open else None,
        fairness=account.fairness(load, samples, _weights(run.about)),
        reconciled=account.reconcile(load, samples, is_open),
        prefix_savings=account.prefix_savings(samples),
        bound=near if isinstance(near, Bound) else None,
        unbound=near if isinstance(near, str) else "",
        server=_server(samples),
        errors=dict(Counter(record.error for record in sound if record.error).most_common(8)),
        notes=tuple(_notes(run, load, samples, len(counted) - len(sound))),
    )


def _offered(load: Sequence[Record]) -> float | None:
    """By when requests were due: a server that is slow to the last of them was not offered less."""
    due = [record.due for record in load]
    span = max(due) - min(due) if due else 0.0
    return (len(due) - 1) / span if span > 0 else None


def _weights(about: Mapping[str, Any]) -> dict[str, float]:
    """`about["weights"]`, by tenant; whoever is not in it weighs 1."""
    given = about.get("weights")
    pairs = given.items() if isinstance(given, dict) else ()
    return {
        str(name): float(weight)
        for name, weight in pairs
        if isinstance(weight, int | float) and 0 < weight < math.inf
    }


def _server(samples: list[Sample]) -> dict[str, float]:
    grown = {name: growth(samples, metric) for name, metric in COUNTERS.items()}
    return {name: value for name, value in grown.items() if value is not None}


def _notes(run: Run, load: Sequence[Record], samples: list[Sample], unsound: int) -> list[str]:
    notes = []
    if unsound:
        notes.append(f"{unsound} records were left out: their times or outcomes cannot be.")
    if not 0 < run.seconds < math.inf:
        notes.append("The run measured no time: there are no figures per second.")
    notes += _nothing(load)
    if run.about.get("loop") not in ("open", "closed"):
        notes.append("The run does not say its loop; latencies count from when requests were due.")
    notes += _client(run.about, load)
    if run.about.get("interrupted"):
        notes.append("The run was interrupted: it is shorter than planned.")
    strange = sorted({name for record in load for name in record.targets} - set(TARGETS))
    if strange:
        notes.append(f"Unknown targets were not looked at: {', '.join(strange)}.")
    if len(samples) < 2:
        notes.append("No samples of the server's metrics: costs and timelines of it are missing.")
    return notes


def _nothing(load: Sequence[Record]) -> list[str]:
    """Why there are no latencies, where there are none."""
    if not load:
        return ["No requests were measured."]
    outcomes = {record.outcome for record in load}
    if outcomes == {"refused"}:
        return ["Every request was refused: there are no latencies."]
    if all(record.first is None for record in load):
        return ["No request got a token: there are no times to a first one."]
    return []


def _client(about: Mapping[str, Any], load: Sequence[Record]) -> list[str]:
    """Whether the client was in its own way: by its own account; of a run that has none, by when
    it sent. Who has the account knows better: a connection that the server is slow to accept, or a
    place that is not free, makes a request late, too."""
    told = about.get("client")
    if isinstance(told, dict) and "warning" in told:
        return [f"Of the client: {told['warning']}."] if told["warning"] else []
    late = num_late([record.sent - record.due for record in load])
    if about.get("loop") == "closed" or not late:
        return []
    return [
        f"The client was a bottleneck: {late} of {len(load)} requests were sent more than "
        f"{LATE_S * 1000:g} ms late. Use more client processes, or another machine for it."
    ]
