"""What became of requests that were sent on, by server: totals that go on with another engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dynamo_serve.endpoint_counts import Counts


class EndpointCounts:
    def __init__(self, endpoints: Sequence[str]) -> None:
        self._began = ""  # which engine counts
        self._last: dict[str, Mapping[str, Any]] = {}  # of this engine
        self._before = {endpoint: Counts() for endpoint in endpoints}  # of those before it

    def take(self, told: Mapping[str, Any]) -> None:
        """An engine's answer about its endpoints."""
        if told["began"] != self._began:
            for endpoint, counts in self._last.items():
                self._before[endpoint].add(counts)
            self._began = told["began"]
        self._last = told["endpoints"]

    def numbers(self) -> dict[str, dict[tuple[str, ...], Any]]:
        """Metric → label values → value."""
        last = self._last
        whole = {endpoint: self._whole(endpoint) for endpoint in self._before}
        return {
            "endpoint_requests": {
                (endpoint, outcome): count
                for endpoint, counts in whole.items()
                for outcome, count in counts.outcomes.items()
            },
            "endpoint_retries": {(name,): counts.retries for name, counts in whole.items()},
            "endpoint_ejections": {(name,): counts.ejections for name, counts in whole.items()},
            "endpoint_ttft": {(name,): counts.ttft for name, counts in whole.items()},
            "endpoint_in_flight": {
                (name,): last[name]["in_flight"] if name in last else 0 for name in whole
            },
            "endpoint_open": {
                (name,): int(name in last and last[name]["is_open"]) for name in whole
            },
        }

    def _whole(self, endpoint: str) -> Counts:
        counts = Counts()
        counts.add(self._before[endpoint].told())
        if endpoint in self._last:
            counts.add(self._last[endpoint])
        return counts
