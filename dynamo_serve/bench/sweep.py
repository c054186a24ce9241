"""Higher and higher rates, until a server does not serve more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

from dynamo_serve.bench.promises import is_good
from dynamo_serve.bench.record import Record, Run
from dynamo_serve.errors import ConfigError

KEYS = {"first": 1.0, "factor": 1.5, "most": 1000.0, "gain": 0.05}
KEEPS_UP = 0.9  # of the requests that came in a second, served well in a second


@dataclass(frozen=True, slots=True)
class Level:
    """`good`: requests per second that were served and kept their promises."""

    rate: float
    good: float
    run: Run


def levels_of(given: Mapping[str, Any]) -> dict[str, float]:
    """Raises `ConfigError` for keys and values that mean nothing."""
    found = dict(KEYS)
    for name, value in given.items():
        if name not in KEYS or isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"sweep.{name}: {value!r}; allowed: numbers for {', '.join(KEYS)}")
        found[name] = float(value)
    if found["factor"] <= 1 or found["first"] <= 0 or not 0 <= found["gain"] < 1:
        raise ConfigError("sweep: allowed: first above 0, factor above 1, gain from 0 to below 1")
    return found


def sweep(given: Mapping[str, Any], measure: Callable[[int, float], Run]) -> list[Level]:
    """`measure(level, rate)` at rising rates; the first level that serves hardly more than the one
    before, and less than came, is the last one. So is one that was interrupted. (Random arrivals
    may bring hardly more at a higher rate; what is served as it comes says nothing about a limit.)
    """
    wanted = levels_of(given)
    rate, found = wanted["first"], list[Level]()
    while rate <= wanted["most"]:
        run = measure(len(found), rate)
        found.append(Level(rate, good_rate(run), run))
        if run.about.get("interrupted"):
            break
        is_more = len(found) < 2 or found[-1].good > found[-2].good * (1 + wanted["gain"])
        if not is_more and found[-1].good < KEEPS_UP * offered_rate(run):
            break
        rate *= wanted["factor"]
    return found


def good_rate(run: Run) -> float:
    good = sum(is_good(record, is_open=True) for record in _counted(run))
    return good / run.seconds if run.seconds else 0.0


def offered_rate(run: Run) -> float:
    """Requests per second that came, by when they were due; without two of them, no number is."""
    due = [record.due for record in _counted(run)]
    span = max(due, default=0.0) - min(due, default=0.0)
    return (len(due) - 1) / span if span else inf


def _counted(run: Run) -> list[Record]:
    return [r for r in run.records if not r.is_warm_up and r.kind != "probe"]
