"""What one request's reader felt, and how a figure is distributed over many of them.

TTFT and E2E count from when a request was due in an open loop, from when it was sent in a closed
one. TPOT is the mean time for each token after the first. ITL are the gaps between reads
that brought tokens, whatever the number of tokens in a read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from dynamo_serve.bench.record import OUTCOMES, Record
from dynamo_serve.bench.spread import Estimate, estimate

SHARES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99.9": 0.999}
LATENCIES = ("ttft", "itl", "tpot", "e2e")
LONGEST_S = 1e9  # nothing was measured for thirty years
EARLY_S = 1e-3  # by so much a timer may wake its sender too soon


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of `count` samples in seconds. A percentile that they are too few for is left out."""

    count: int
    mean: float | None = None
    least: float | None = None
    most: float | None = None
    percentiles: dict[str, Estimate] = field(default_factory=dict)

    def value(self, name: str) -> float | None:
        found = self.percentiles.get(name)
        return None if found is None else found.value


def distribution(values: Iterable[float]) -> Distribution:
    ordered = sorted(values)
    if not ordered:
        return Distribution(0)
    known = {name: estimate(ordered, share) for name, share in SHARES.items()}
    return Distribution(
        count=len(ordered),
        mean=math.fsum(ordered) / len(ordered),
        least=ordered[0],
        most=ordered[-1],
        percentiles={name: found for name, found in known.items() if found is not None},
    )


def began(record: Record, is_open: bool) -> float:
    return record.due if is_open else record.sent


def ttft(record: Record, is_open: bool) -> float | None:
    return None if record.first is None else max(0.0, record.first - began(record, is_open))


def e2e(record: Record, is_open: bool) -> float | None:
    return None if record.end is None else max(0.0, record.end - began(record, is_open))


def tpot(record: Record) -> float | None:
    """None for an answer of one token, and for one that came in one read. The first token of each
    choice is not counted."""
    later = record.output_tokens - record.choices
    return math.fsum(record.gaps) / later if later > 0 and record.gaps else None


def samples(name: str, records: Iterable[Record], is_open: bool) -> list[float]:
    """What of a latency is counted, everywhere: of all who got so far, whatever became of them
    after; E2E of those answered to their end."""
    if name == "itl":
        return [gap for record in records for gap in record.gaps]
    measures: dict[str, Callable[[Record], float | None]] = {
        "ttft": lambda record: ttft(record, is_open),
        "tpot": tpot,
        "e2e": lambda record: e2e(record, is_open) if record.outcome == "ok" else None,
    }
    return [value for value in map(measures[name], records) if value is not None]


def is_sound(record: Record) -> bool:
    """Whether its times can be: finite, and in the order in which things happen."""
    times = [record.due, record.sent]
    times += [at for at in (record.first, record.end) if at is not None]
    tokens = (record.prompt_tokens, record.output_tokens, record.cached_tokens)
    spans = (*record.gaps, *record.targets.values(), *record.server.values())
    return (
        record.outcome in OUTCOMES
        and all(0 <= value < LONGEST_S for value in (*times, *tokens, *spans))
        and all(earlier <= later + EARLY_S for earlier, later in pairwise(times))
    )
