"""Who watches what passes through the service."""

from __future__ import annotations

from typing import Protocol

from dynamo_serve.core.request import Request, TokenEvent
from dynamo_serve.core.stats import Stats


class Observer(Protocol):
    """Sees everything that passes; must be quick."""

    def on_stats(self, stats: Stats) -> None: ...

    def on_event(
        self, request: Request, event: TokenEvent, now: float, previous: float | None
    ) -> None:
        """`previous`: when the request's last event with tokens came; None for the first."""
        ...


class NoObserver:
    def on_stats(self, stats: Stats) -> None:
        pass

    def on_event(
        self, request: Request, event: TokenEvent, now: float, previous: float | None
    ) -> None:
        pass
