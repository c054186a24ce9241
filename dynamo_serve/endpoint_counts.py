"""What has become of requests that were sent on to a server: counted where they are sent, shown by
the API process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynamo_serve.metrics_histogram import SECONDS, Histogram

# Of one try: its answer came to an end; whoever asked has gone or has enough; no room in the
# server's queue; nothing in time; server or connection lost; the request or the model at fault.
OUTCOMES = ("done", "cancelled", "full", "late", "lost", "refused", "failed")


class Counts:
    """Of one server. `retries` are tries that were followed by another one, here or elsewhere."""

    def __init__(self) -> None:
        self.outcomes = dict.fromkeys(OUTCOMES, 0)
        self.retries = 0
        self.ejections = 0
        self.ttft = Histogram(SECONDS)  # from when it was asked, not from the request's arrival

    def told(self) -> dict[str, Any]:
        """As plain data, for `add`."""
        return {
            "outcomes": dict(self.outcomes),
            "retries": self.retries,
            "ejections": self.ejections,
            "ttft": [list(self.ttft.counts), self.ttft.total],
        }

    def add(self, told: Mapping[str, Any]) -> None:
        for name, count in told["outcomes"].items():
            self.outcomes[name] += count
        self.retries += told["retries"]
        self.ejections += told["ejections"]
        counts, total = told["ttft"]
        self.ttft.counts = [a + b for a, b in zip(self.ttft.counts, counts, strict=True)]
        self.ttft.total += total
