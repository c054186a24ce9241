"""Higher and higher rates, until a server does not serve more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dynamo_serve.bench.promises import is_good
from dynamo_serve.bench.record import Run
from dynamo_serve.errors import ConfigError

KEYS = {"first": 1.0, "factor": 1.5, "most": 1000.0, "gain": 0.05}


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
    before is the last one. So is one that was interrupted."""
    wanted = levels_of(given)
    rate, found = wanted["first"], list[Level]()
    while rate <= wanted["most"]:
        run = measure(len(found), rate)
        found.append(Level(rate, good_rate(run), run))
        if run.about.get("interrupted"):
            break
        if len(found) > 1 and found[-1].good < found[-2].good * (1 + wanted["gain"]):
            break
        rate *= wanted["factor"]
    return found


def good_rate(run: Run) -> float:
    counted = [r for r in run.records if not r.is_warm_up and r.kind != "probe"]
    return sum(is_good(r, is_open=True) for r in counted) / run.seconds if run.seconds else 0.0
