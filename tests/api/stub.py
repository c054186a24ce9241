"""A service that says what the test tells it to, and remembers who hung up."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncGenerator, Callable
from typing import Any, cast

from dynamo_serve.core.engine import EngineSpec
from dynamo_serve.core.request import Finish, Request, TokenEvent, TokenLogprob
from dynamo_serve.core.stats import Stats
from dynamo_serve.core.tenant import Tenancy
from dynamo_serve.errors import RequestError, Unavailable
from dynamo_serve.observer import NoObserver
from dynamo_serve.prefixes import Prefixes
from dynamo_serve.preparing import Preparing
from dynamo_serve.service import Service, State
from dynamo_serve.supervisor import Supervisor
from dynamo_serve.text.tokenizer import Tokenizer

CACHED = 7

Script = Callable[[Request], AsyncGenerator[TokenEvent, None]]


class StubService(Service):
    """`script` answers each request; `seen` and `cancelled` are filled as requests come and go.
    `answers` are what `inspect` says to whoever asks; without one, the engine is not up.
    """

    _observer = NoObserver()
    state = State.READY
    spec = EngineSpec(256, 16, 64, 400, {"device": "none", "attention_backend": "none"})

    def __init__(self, script: Script) -> None:
        self.stats = Stats()
        self.script = script
        self.refusal: RequestError | None = None
        self.seen: queue.Queue[Request] = queue.Queue()
        self.cancelled: queue.Queue[str] = queue.Queue()
        self.ended: queue.Queue[str] = queue.Queue()
        self.tenancies: list[Tenancy] = []
        self.answers: dict[str, Any] = {}
        self.asked: list[tuple[str, str]] = []
        self.preparing = Preparing()
        self.prefixes = Prefixes(cast(Supervisor, None), self.generate, self.cancel)  # none

    def configure(self, tenancy: Tenancy) -> None:
        self.tenancies.append(tenancy)

    def cancel(self, request_id: str) -> None:
        self.ended.put(request_id)

    def is_live(self, request_id: str) -> bool:
        return False

    async def inspect(self, what: str, id: str = "", timeout: float = 0.0, about: Any = ()) -> Any:
        self.asked.append((what, id))
        if what not in self.answers:
            raise Unavailable("the engine is not up")
        return self.answers[what]

    def is_known(self, request_id: str) -> bool:
        return False

    def check_alive(self) -> None:
        pass

    def check_ready(self) -> None:
        self.check_open()

    def check_open(self) -> None:
        if self.refusal is not None:
            raise self.refusal

    async def generate(
        self, request: Request, **about_readers: Any
    ) -> AsyncGenerator[TokenEvent, None]:
        self.check_open()
        self.seen.put(request)
        finished = False
        try:
            async for event in self.script(request):
                finished = event.finish is not None
                yield event
        finally:
            if not finished:
                self.cancelled.put(request.id)


def says(tokenizer: Tokenizer, text: str, *, finish: Finish = Finish.STOP) -> Script:
    """One token per event, then the stop token (or none, for another finish)."""
    end = min(tokenizer.eos_ids)

    async def script(request: Request) -> AsyncGenerator[TokenEvent, None]:
        cached: int | None = CACHED
        for token_id in tokenizer.encode(text):
            scores = _scores(request, token_id)
            yield TokenEvent(request.id, (token_id,), scores, cached_tokens=cached)
            cached = None
        if finish is Finish.STOP:
            scores = _scores(request, end)
            yield TokenEvent(request.id, (end,), scores, finish=finish, stop_id=end)
        else:
            yield TokenEvent(request.id, finish=finish)

    return script


def _scores(request: Request, token_id: int) -> tuple[TokenLogprob, ...]:
    wanted = request.sampling.logprobs
    if wanted is None:
        return ()
    top = tuple((token_id + i, -0.5 - i) for i in range(wanted))
    return (TokenLogprob(token_id, -0.5, top),)


async def begins_and_hangs(request: Request) -> AsyncGenerator[TokenEvent, None]:
    """One token, and then nothing ever."""
    yield TokenEvent(request.id, (100,))
    await asyncio.Event().wait()


async def hangs(request: Request) -> AsyncGenerator[TokenEvent, None]:
    """Not even one token."""
    await asyncio.Event().wait()
    yield TokenEvent(request.id)
