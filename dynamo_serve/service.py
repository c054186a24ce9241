"""Tokens in, tokens out: what the HTTP edge asks of everything behind it.

INTERFACE SKETCH, being built: signatures are final, bodies are not.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from enum import Enum

from dynamo_serve.core.engine import EngineSpec
from dynamo_serve.core.request import Request, TokenEvent
from dynamo_serve.core.stats import Stats


class State(Enum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    RESTARTING = "restarting"
    CLOSED = "closed"


class Service:
    """Owns the engine (process or thread) and every accepted request."""

    state: State
    spec: EngineSpec  # valid once state has been READY
    stats: Stats  # the newest the engine published
    on_stats: Callable[[Stats], None]  # called once per publish (metrics hook)

    async def start(self) -> None:
        """Start the engine and wait until it is ready. Raises `EngineStartError`."""
        raise NotImplementedError

    def generate(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        """Events of one request; the last has `finish`. Closing the generator cancels.

        Waiting events are merged when the reader is slow. Raises `Unavailable` (starting, draining,
        queue full, engine lost; also in the middle of a stream when the engine dies) and
        `EngineFailure` when the engine failed this request (finish ERROR is never yielded).
        """
        raise NotImplementedError

    @property
    def num_live(self) -> int:
        """Requests accepted and not finished."""
        raise NotImplementedError

    def check_ready(self) -> None:
        """Raise `Unavailable` (with retry_after) unless new requests are accepted."""
        raise NotImplementedError

    async def drain(self, timeout: float) -> None:
        """Refuse new requests; return when the live ones finished or `timeout` seconds passed."""
        raise NotImplementedError

    async def close(self) -> None:
        """Stop the engine; whoever still waits gets `Unavailable`."""
        raise NotImplementedError
