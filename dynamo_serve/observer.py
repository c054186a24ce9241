"""Who watches what passes through the service."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from dynamo_serve.core.request import Request, TokenEvent
from dynamo_serve.core.stats import Stats

STREAMS = (
    *("reader_gone", "reader_slow", "resumed", "given_up", "forgotten"),
    *("handed_over", "taken_over"),
)


class Vitals(NamedTuple):
    """What is asked for at a scrape: see the metrics of these names."""

    restarts: int = 0
    parked: int = 0
    lag: float = 0.0
    stalled: int = 0


class Observer(Protocol):
    """Sees everything that passes; must be quick."""

    def on_stats(self, stats: Stats) -> None: ...

    def on_event(
        self, request: Request, event: TokenEvent, now: float, previous: float | None
    ) -> None:
        """`previous`: when the request's last event with tokens came; None for the first."""
        ...

    def on_stream(self, what: str) -> None:
        """One of `STREAMS`: a request was parked because of its reader, resumed, given up on for
        a reader that stands still, forgotten because nobody came back, parked to be handed over
        to the server that follows, or taken over from the one before."""
        ...


class NoObserver:
    def on_stats(self, stats: Stats) -> None:
        pass

    def on_event(
        self, request: Request, event: TokenEvent, now: float, previous: float | None
    ) -> None:
        pass

    def on_stream(self, what: str) -> None:
        pass
