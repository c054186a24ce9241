"""What each tenant has used: totals that go on when an engine begins to count anew."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from dynamo_serve.core.stats import OUTCOMES

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
PROMISES, SEQUENCES = "tenant_promises", "tenant_sequences"
Numbers = dict[str, dict[tuple[str, ...], float]]  # metric → label values → value


class TenantCosts:
    def __init__(self) -> None:
        self._last: dict[tuple[str, ...], float] = {}  # metric, label values → count of this engine
        self._before: dict[tuple[str, ...], float] = {}  # of the engines before it
        self._states: dict[tuple[str, ...], float] = {}  # tenant, state

    def take(self, costs: Mapping[str, Any]) -> None:
        """An answer about costs. A missing number is 0, a missing tenant is idle."""
        tenants = costs.get("tenants", {})
        now = dict(_counts(tenants))
        if any(now[key] < self._last[key] for key in now.keys() & self._last.keys()):
            self.restart()
        self._last |= now
        self._states = dict.fromkeys(self._states, 0.0) | {
            (name, state): float(used.get(state) or 0)
            for name, used in tenants.items()
            for state in STATES
        }

    def restart(self) -> None:
        """Another engine counts from now on: keep what the last one counted."""
        for key, count in self._last.items():
            self._before[key] = self._before.get(key, 0.0) + count
        self._last = dict.fromkeys(self._last, 0.0)
        self._states = dict.fromkeys(self._states, 0.0)

    def numbers(self) -> Numbers:
        found: Numbers = {metric: {} for metric in (*COUNTERS.values(), PROMISES)}
        for (metric, *labels), count in self._last.items():
            found[metric][tuple(labels)] = self._before.get((metric, *labels), 0.0) + count
        return {**found, SEQUENCES: self._states}


def _counts(tenants: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], float]]:
    for name, used in tenants.items():
        for key, metric in COUNTERS.items():
            yield (metric, name), float(used.get(key) or 0)
        for class_name, kept in used.get("promises", {}).items():
            for promise, outcome in OUTCOMES:
                labels = (name, class_name, promise, outcome)
                yield (PROMISES, *labels), float(kept.get(f"{promise}_{outcome}") or 0)


class Nameless(Collector):
    """The same metrics without those that have a tenant's label."""

    def __init__(self, whole: Collector, named: Collection[str]) -> None:
        self._whole, self._named = whole, named

    def collect(self) -> Iterable[Metric]:
        return (family for family in self._whole.collect() if family.name not in self._named)
