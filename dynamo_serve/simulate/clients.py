"""Who asks: the clients of a trace, each with what it saw of one request in a simulation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf
from statistics import median
from typing import NamedTuple

from dynamo_serve.bench.record import Record
from dynamo_serve.core.request import Finish, Pooling, Refusal, Request, TokenEvent
from dynamo_serve.core.tenant import Class, Tenancy
from dynamo_serve.simulate.engine import Answer
from dynamo_serve.simulate.texts import STOP, Text
from dynamo_serve.trace import Arrival

RETRY_SECONDS = 600.0  # a request like one that was refused is a retry if it comes within that
OBEYED = 0.9  # of the Retry-After: who waited for so much of it has read it
KNOWN = ("stop", "length")
CUT_OFF = ("cancelled", "deadline")
TOO_LARGE = 400  # and other statuses of requests that no scheduler ever saw
REFUSED = (429, 503)


class Length(NamedTuple):
    """Tokens of an answer, and whether it stops by itself there."""

    tokens: int
    stops: bool


@dataclass(slots=True, eq=False)
class Client:
    """One request of a trace, with the times it was sent again after a refusal. Times of what it
    saw are readings of the virtual clock."""

    number: int
    tries: list[Arrival]
    length: Length
    call_tokens: int = 0
    id: str = ""
    attempts: int = 0
    sent: float | None = None  # the first time; later ones are the server's doing, not its own
    first: float | None = None
    last: float = 0.0
    end: float | None = None
    gaps: list[float] = field(default_factory=list)
    output_tokens: int = 0
    cached_tokens: int = 0
    finish: Finish | None = None
    refusal: Refusal | None = None
    summary: tuple[float, int] | None = None  # seconds in the queue, preemptions
    error: str = ""

    @property
    def asked(self) -> Arrival:
        return self.tries[0]

    # ── what it sends ────────────────────────────────────────────────────────

    def request(self, page_size: int, now: float, promise: Class) -> tuple[Request, Answer]:
        """The request as it is sent at `now`; `page_size` is that of the trace."""
        asked = self.asked
        text = Text(self.number, asked, page_size)
        deadline = promise.deadline
        if asked.deadline is not None and not asked.has_class_deadline:
            deadline = asked.deadline
        request = Request(
            id=self.id,
            prompt_ids=text.prompt_ids,
            max_tokens=asked.max_tokens,
            stop_ids=frozenset({STOP}),
            tenant=asked.tenant,
            arrival=now,
            deadline=now + deadline,
            class_name=asked.class_name or None,
            priority=asked.priority,
            num_choices=asked.num_choices,
            call_tokens=self.call_tokens,
            is_open_ended=asked.is_open_ended,
            group=asked.group,
            pooling=Pooling(asked.pooling) if asked.pooling else None,
        )
        return request, Answer(text, self.length.tokens, self.length.stops)

    def next_try(self, now: float) -> float | None:
        """When it asks again, if the client in the trace did: at the time it was told if that one
        kept to it, else after as long as that one waited."""
        if self.refusal is None or self.attempts >= len(self.tries):
            return None
        before, again = self.tries[self.attempts - 1 : self.attempts + 1]
        waited = again.at - before.at
        told = before.retry_after
        if told is not None and waited >= OBEYED * told:
            return now + self.refusal.retry_after + max(0.0, waited - told)
        return now + waited

    # ── what it sees ─────────────────────────────────────────────────────────

    def see(self, event: TokenEvent, now: float) -> None:
        if event.refusal is not None:
            self.refusal, self.end = event.refusal, now
            return
        if event.token_ids or event.artifact is not None:
            if self.first is None:
                self.first = now
                self.cached_tokens = event.cached_tokens or 0
            else:
                self.gaps.append(now - self.last)
            self.last = now
            self.output_tokens += len(event.token_ids)
        if event.finish:
            self.finish, self.end = event.finish, now
            self.error = event.error or ""
            if event.summary:
                self.summary = event.summary.queue_seconds, event.summary.num_preemptions

    def record(self, tenancy: Tenancy) -> Record:
        asked, refusal = self.asked, self.refusal
        promise = tenancy.class_of(asked.tenant, asked.class_name or None)
        targets = {"ttft": promise.ttft, "itl": promise.itl, "e2e": promise.deadline}
        waited, preemptions = self.summary or (0.0, 0)
        status = 200 if refusal is None else 429 if refusal.is_own else 503
        return Record(
            number=self.number,
            due=asked.at,
            sent=asked.at if self.sent is None else self.sent,
            outcome=self._outcome(),
            status=TOO_LARGE if self.error and self.finish is None else status,
            tenant=asked.tenant,
            class_name=promise.name,
            prompt_tokens=asked.prompt_tokens,
            output_tokens=self.output_tokens,
            cached_tokens=self.cached_tokens,
            first=self.first,
            end=self.end,
            gaps=tuple(self.gaps),
            finish=self.finish.value if self.finish else "",
            attempts=max(1, self.attempts),
            retry_after=refusal.retry_after if refusal else None,
            error=self.error,
            targets={name: value for name, value in targets.items() if value < inf},
            server={"queue": waited, "preemptions": preemptions} if self.summary else {},
        )

    def _outcome(self) -> str:
        if self.finish in (Finish.STOP, Finish.LENGTH):
            return "ok"
        if self.finish is Finish.CANCELLED:
            return "cancelled"
        return "refused" if self.refusal is not None else "failed"


def clients_of(arrivals: Iterable[Arrival]) -> list[Client]:
    """In the order of their arrival. Requests that never came to a scheduler are left out."""
    ordered = sorted(filter(was_scheduled, arrivals), key=lambda arrival: arrival.at)
    usual = _usual(ordered)
    tokens = _call_tokens(ordered)
    clients: list[Client] = []
    refused: dict[tuple[object, ...], Client] = {}
    for arrival in ordered:
        like = (arrival.tenant, arrival.pages, arrival.prompt_tokens, arrival.max_tokens)
        client = refused.pop(like, None) if refused else None
        if client is not None and arrival.at - client.tries[-1].at <= RETRY_SECONDS:
            client.tries.append(arrival)
        else:
            number, call = len(clients), arrival.call
            name = f"r{number}" if call is None else f"c{call}"
            client = Client(number, [arrival], Length(1, False), id=f"{name}-{number}")
            if call is not None and arrival.num_choices:
                client.call_tokens = tokens[call]
            clients.append(client)
        if arrival.ended == "refused" and arrival.call is None:
            refused[like] = client
        client.length = _length(arrival, usual)
    return clients


def was_scheduled(arrival: Arrival) -> bool:
    """Whether a scheduler has seen it: its prompt was read, and it was not found wrong."""
    is_wrong = TOO_LARGE <= arrival.status < 500 and arrival.status not in REFUSED
    asks = arrival.max_tokens > 0 or arrival.pooling
    return bool(arrival.prompt_tokens > 0 and asks and not is_wrong)


def _call_tokens(arrivals: Iterable[Arrival]) -> Counter[int]:
    """By call, the tokens of the prompts of all its choices."""
    tokens: Counter[int] = Counter()
    for arrival in arrivals:
        if arrival.call is not None:
            tokens[arrival.call] += arrival.prompt_tokens
    return tokens


def _usual(arrivals: Iterable[Arrival]) -> dict[str, int]:
    """By tenant, the length of its answers that nothing cut off."""
    seen: dict[str, list[int]] = {}
    for arrival in arrivals:
        if arrival.ended in KNOWN:
            seen.setdefault(arrival.tenant, []).append(arrival.output_tokens)
    return {tenant: int(median(lengths)) for tenant, lengths in seen.items()}


def _length(arrival: Arrival, usual: dict[str, int]) -> Length:
    """How long its answer gets if nothing cuts it off."""
    most = arrival.max_tokens
    if arrival.ended in KNOWN:
        tokens = max(1, min(arrival.output_tokens, most))
        return Length(tokens, stops=arrival.ended == "stop" or tokens < most)
    if arrival.ended in CUT_OFF:  # longer than what came of it
        return Length(most, stops=False)
    tokens = max(1, min(usual.get(arrival.tenant, most), most))
    return Length(tokens, stops=tokens < most)
