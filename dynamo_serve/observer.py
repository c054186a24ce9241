"""Who watches what passes through the service."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from dynamo_serve.core.request import Request, TokenEvent
from dynamo_serve.core.stats import Stats
from dynamo_serve.delivery import Delivery
from dynamo_serve.errors import TryLater

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
    recorded: int = 0
    record_dropped: int = 0


class Observer(Protocol):
    """Sees everything that passes; must be quick."""

    def on_stats(self, stats: Stats) -> None: ...

    def on_event(
        self, request: Request, event: TokenEvent, now: float, previous: float | None
    ) -> None:
        """`previous`: when the request's last event with tokens came; None for the first."""
        ...

    def on_end(self, delivery: Delivery, now: float) -> None:
        """Nothing more comes of an accepted request, and nothing in it changes any more."""
        ...

    def on_turned_away(self, request: Request, error: TryLater) -> None:
        """A request was not even accepted. It has no prompt if nobody had looked at that."""
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

    def on_end(self, delivery: Delivery, now: float) -> None:
        pass

    def on_turned_away(self, request: Request, error: TryLater) -> None:
        pass

    def on_stream(self, what: str) -> None:
        pass
