"""A server under a virtual clock, with requests that arrive at given times: for promises."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from heapq import heapify, heappop, heappush
from itertools import pairwise
from types import MappingProxyType
from zlib import crc32

from dynamo_serve.core.limits import Limits
from dynamo_serve.core.loop import Submit
from dynamo_serve.core.request import Finish, Refusal, Request, TokenEvent
from dynamo_serve.core.tenant import Tenancy
from tests.core.traffic import Harness, TimedEngine

MAX_TURNS = 200_000
VOCAB_SIZE = 50_000

OnRefusal = Callable[[Request, Refusal, float], Request | None]
"""What a client does that was refused: the request it sends next (its arrival says when)."""


def ask(
    name: str,
    prompt: int,
    outputs: int,
    at: float = 0.0,
    *,
    tenant: str = "default",
    deadline: float = float("inf"),
    priority: int = 0,
) -> Request:
    """A request whose prompt shares nothing with any other's."""
    first = crc32(name.encode()) % 40_000
    prompt_ids = tuple((first + 7 * i) % VOCAB_SIZE for i in range(prompt))
    return Request(
        id=name,
        prompt_ids=prompt_ids,
        max_tokens=outputs,
        salt=name,
        arrival=at,
        tenant=tenant,
        deadline=deadline,
        priority=priority,
    )


class Play:
    """Runs arrivals to their end (or to `until`) and remembers when each token came."""

    def __init__(
        self,
        limits: Limits,
        tenancy: Tenancy | None = None,
        *,
        num_pages: int = 4096,
        below: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        engine = TimedEngine(
            vocab_size=VOCAB_SIZE,
            max_model_len=4096,
            page_size=16,
            num_pages=num_pages,
            below=below,
        )
        self.harness = engine.harness = Harness(engine, limits, tenancy=tenancy or Tenancy())
        self.scheduler = self.harness.scheduler
        self.arrived: dict[str, float] = {}
        self.tokens_at: dict[str, list[float]] = {}
        self.finish: dict[str, Finish] = {}
        self.finished_at: dict[str, float] = {}
        self.refusals: dict[str, Refusal] = {}
        self.returned_at: dict[str, float] = {}

    def run(
        self,
        requests: Iterable[Request],
        *,
        until: float = float("inf"),
        on_refusal: OnRefusal = lambda request, refusal, now: None,
    ) -> Play:
        todo = [(request.arrival, request.id, request) for request in requests]
        heapify(todo)
        known = {request.id: request for _, _, request in todo}
        harness = self.harness

        def arrive() -> None:
            while todo and todo[0][0] <= harness.now:
                _, _, request = heappop(todo)
                self.arrived.setdefault(request.id, request.arrival)
                harness.commands.append(Submit(request))

        def see(events: list[TokenEvent]) -> None:
            for event in events:
                self._see(event)
                if event.refusal is None:
                    continue
                again = on_refusal(known[event.request_id], event.refusal, harness.now)
                if again:
                    self.returned_at[again.id] = again.arrival
                    known[again.id] = again
                    heappush(todo, (again.arrival, again.id, again))

        harness.arrive, harness.see = arrive, see
        for _ in range(MAX_TURNS):
            if self.scheduler.is_idle and todo:
                harness.now = max(harness.now, todo[0][0])
            harness.loop.turn()
            if harness.now > until or (not todo and self.scheduler.is_idle):
                return self
        raise AssertionError("never finished")

    def _see(self, event: TokenEvent) -> None:
        if event.refusal is not None:
            self.refusals[event.request_id] = event.refusal
        if event.token_ids:
            self.tokens_at.setdefault(event.request_id, []).append(self.harness.now)
        if event.finish:
            self.finish[event.request_id] = event.finish
            self.finished_at[event.request_id] = self.harness.now

    def ttft(self, name: str) -> float:
        return self.tokens_at[name][0] - self.arrived[name]

    def longest_gap(self, name: str) -> float:
        return max(later - earlier for earlier, later in pairwise(self.tokens_at[name]))
