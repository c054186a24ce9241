"""What each tenant has used: totals that go on when an engine begins to count anew."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

# A comment to Prometheus, a hint to who wonders.
LEFT_OUT = b"# dserve_tenant_*: only for an admin key (Authorization: Bearer KEY).\n"

# What an answer about costs calls it → the metric's key.
COUNTERS = {
    "device_seconds": "tenant_device_seconds",
    "page_seconds": "tenant_page_seconds",
    "saved_tokens": "tenant_saved_tokens",
    "output_tokens": "tenant_output_tokens",
}
STATES = ("live", "waiting")


class TenantCosts:
    def __init__(self) -> None:
        self._last: dict[str, dict[str, float]] = {}  # tenant → number → value, of this engine
        self._before: dict[tuple[str, str], float] = {}  # of the engines before it

    def take(self, costs: Mapping[str, Any]) -> None:
        """An answer about costs. A missing number is 0, a missing tenant is idle."""
        given = costs.get("tenants", {})
        now = {
            name: {key: float(used.get(key) or 0) for key in (*COUNTERS, *STATES)}
            for name, used in given.items()
        }
        falls = (
            now[name][key] < self._last[name][key]
            for name in now.keys() & self._last.keys()
            for key in COUNTERS
        )
        if any(falls):
            self.restart()
        idle = {name: {**used, **dict.fromkeys(STATES, 0.0)} for name, used in self._last.items()}
        self._last = {**idle, **now}

    def restart(self) -> None:
        """Another engine counts from now on: keep what the last one counted."""
        for name, used in self._last.items():
            for key in COUNTERS:
                self._before[name, key] = self._before.get((name, key), 0.0) + used[key]
            self._last[name] = dict.fromkeys(used, 0.0)

    def numbers(self) -> dict[str, dict[tuple[str, ...], float]]:
        """Metric → label values → value."""
        counted: dict[str, dict[tuple[str, ...], float]] = {
            metric: {
                (name,): self._before.get((name, key), 0.0) + used[key]
                for name, used in self._last.items()
            }
            for key, metric in COUNTERS.items()
        }
        counted["tenant_sequences"] = {
            (name, state): used[state] for name, used in self._last.items() for state in STATES
        }
        return counted


class Nameless(Collector):
    """The same metrics without those that have a tenant's label."""

    def __init__(self, whole: Collector, named: Collection[str]) -> None:
        self._whole, self._named = whole, named

    def collect(self) -> Iterable[Metric]:
        return (family for family in self._whole.collect() if family.name not in self._named)
