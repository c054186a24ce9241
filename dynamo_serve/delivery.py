"""An accepted request on this side: all that has come of it, and how much of that is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from dynamo_serve.core.request import (
    READER_BACK,
    Finish,
    Refusal,
    Request,
    Resumed,
    Summary,
    TokenEvent,
    TokenLogprob,
)
from dynamo_serve.errors import (
    EngineFailure,
    EngineTimeout,
    InvalidRequest,
    Overloaded,
    QuotaExceeded,
    RequestError,
    Shed,
    Unavailable,
)
from dynamo_serve.inbox import Inbox

MOST_DEATHS = 2  # of engines that ran one request alone
MOST_DOUBTS = 4  # when each of them may have been ended from outside
MOST_BLIND = 4  # crashes in a row of which nobody knows who was at fault


def nobody() -> None:
    """Is told when no other reader is."""


class Delivery:
    """One request from its acceptance to its end, whatever happens to engines and readers.

    `is_submitted`: an engine has it and will report exactly one finish. `is_wanted`: it is to go
    on; a request whose reader has stopped or gone is parked: taken from its engine, whose pages
    keep its KV as long as nobody needs them, and submitted again when a reader is back.
    """

    __slots__ = (
        *(
            "request",
            "inbox",
            "tokens",
            "texts",
            "logprobs",
            "prompt_logprobs",
            "cached_tokens",
            "first_token_at",
            "last",
        ),
        *("error", "is_submitted", "is_wanted", "is_cancelled", "has_begun", "is_suspect"),
        *("since", "reason", "deaths", "doubts", "earlier", "previous", "keep_seconds"),
        *("on_stuck", "engines", "patience", "blind", "left_at", "is_leaving"),
        *("gone_at", "slow_since", "slow_tokens"),
    )

    def __init__(self, request: Request, keep_seconds: float, on_stuck: Callable[[], None]) -> None:
        self.request = request
        self.keep_seconds = keep_seconds  # after a reader has gone
        self.on_stuck = on_stuck
        self.inbox: Inbox | None = None  # of whoever reads
        self.tokens: list[int] = []
        self.texts: list[str] = []  # of each of them, from engines that give text
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: tuple[TokenLogprob, ...] = ()
        self.cached_tokens: int | None = None
        self.first_token_at: float | None = None
        self.previous: float | None = None  # when tokens came last
        self.last: TokenEvent | None = None  # the one with the finish
        self.error: RequestError | None = None
        self.is_submitted = self.has_begun = False
        self.is_wanted = True
        self.is_cancelled = False  # for good
        self.is_suspect = False
        self.is_leaving = False  # it goes on in another server, if anywhere
        self.since, self.reason = 0.0, ""
        self.deaths = 0  # of engines that ran it alone
        self.doubts = 0  # such deaths, perhaps from outside, since it last got a token
        self.blind = 0  # crashes outside any step since it last got a token
        self.left_at = 0.0  # when it had its finish, or nobody read it any more
        self.patience = 0.0  # with a reader that stands still, in seconds
        self.gone_at: float | None = None  # when its reader went before the end, for good
        self.slow_since: float | None = None  # when its reader was first found too slow
        self.slow_tokens = 0  # which it has taken since then
        self.engines = 0  # lost while they had it
        self.earlier: Summary | None = None  # what it has cost up to the last parking

    @property
    def is_done(self) -> bool:
        return self.last is not None or self.error is not None

    @property
    def is_parked(self) -> bool:
        return not (self.is_wanted or self.is_done)

    def done(self) -> Resumed | None:
        """Where it goes on; None if no engine has had it."""
        if not self.has_begun:
            return None
        return Resumed(
            tuple(self.tokens),
            self.since,
            self.reason,
            self.first_token_at,
            self.cached_tokens or 0,
            self.is_suspect,
            "".join(self.texts),
        )

    # ── what the engine brings ───────────────────────────────────────────────

    def take(self, event: TokenEvent, now: float) -> None:
        """Put down the tokens of an event, and hand it on."""
        if event.token_ids:
            self.tokens += event.token_ids
            self.texts += event.texts
            if event.logprobs and self.keep_seconds:
                self.logprobs += event.logprobs
            if event.prompt_logprobs and self.keep_seconds:
                self.prompt_logprobs = event.prompt_logprobs
            if self.first_token_at is None:
                self.first_token_at = now
            self.previous = now
            self.is_suspect, self.doubts, self.blind = False, 0, 0
            if event.max_tokens is not None:  # for every engine after this one
                most = event.max_tokens
                self.request = replace(self.request, max_tokens=most, is_open_ended=False)
            if event.cached_tokens is not None:
                self.cached_tokens = event.cached_tokens
        if event.finish or event.refusal:
            self.last, self.left_at = event, now
        if self.inbox is not None:
            self.inbox.put(event)

    def park(self, event: TokenEvent, now: float) -> None:
        """It has been taken from its engine for now: what came with that."""
        if event.token_ids:
            self.take(event._replace(finish=None, summary=None, stop_id=None), now)
        if event.summary:
            self.earlier = together(self.earlier, event.summary)
        self.since, self.reason = now, READER_BACK

    def whole(self, event: TokenEvent) -> TokenEvent:
        """Its last event, with what it has cost from the beginning."""
        if event.summary is None:
            return event
        return event._replace(summary=together(self.earlier, event.summary))

    def lose(
        self, now: float, seq_ids: tuple[str, ...], is_own: bool, is_planned: bool = False
    ) -> bool:
        """Its engine is gone. Whether it is not tried again: several died that ran nothing else, or
        between two steps."""
        self.is_submitted = False
        self.since, self.reason = now, "engine_changed" if is_planned else "engine_lost"
        if is_planned:
            return False
        self.engines += 1
        if seq_ids or not is_own:
            self.is_suspect = self.request.id in seq_ids
        else:  # it died between two steps, of anybody
            self.blind += 1
        if seq_ids == (self.request.id,):
            self.deaths += is_own
            self.doubts += not is_own
        return self.deaths >= MOST_DEATHS or self.doubts >= MOST_DOUBTS or self.blind >= MOST_BLIND

    def ended(self, finish: Finish, error: RequestError | None) -> TokenEvent:
        """The last event of one that ends without an engine."""
        message = error.message if error else None
        return TokenEvent(self.request.id, finish=finish, summary=self.earlier, error=message)

    def given_up(self) -> RequestError:
        waited = f"nothing was read for {self.patience:g} s"
        return Unavailable(f"The stream was given up: {waited}.")

    def blamed(self, reason: str) -> str:
        """What whoever sent it is told."""
        request = self.request
        return (
            f"The engine was lost {self.engines} times with this request, each time alone in its "
            f"step or between two steps ({reason}); it is not tried again. It has "
            f"{len(request.prompt_ids)} prompt tokens, max_tokens {request.max_tokens} and "
            f"{len(self.tokens)} tokens of output."
        )

    def fail(self, error: RequestError) -> None:
        self.error = error
        if self.inbox is not None:
            self.inbox.fail(error)

    def head(self, count: int) -> TokenEvent:
        """The first `count` tokens, as one event."""
        tokens, logprobs = tuple(self.tokens[:count]), tuple(self.logprobs[:count])
        texts = tuple(self.texts[:count])
        return TokenEvent(self.request.id, tokens, logprobs, self.cached_tokens, texts=texts)

    def is_needed_by(self, others: Iterable[Delivery], now: float) -> bool:
        """Whether another choice of the same call is read, or was until just now."""
        call = self.request.id.rpartition("-")[0] + "-"
        return self.request.num_choices != 1 and any(
            other.request.id.startswith(call)
            and (other.inbox is not None or other.left_at + other.keep_seconds > now)
            for other in others
            if other is not self
        )

    # ── who reads ────────────────────────────────────────────────────────────

    def read(self, event: TokenEvent) -> TokenEvent:
        """`event` is with its reader now."""
        if self.slow_since is not None:
            self.slow_tokens += len(event.token_ids)
        return event

    def leave(self, now: float) -> None:
        """Its reader has gone."""
        self.inbox, self.left_at = None, now
        if not (self.is_done or self.is_cancelled):
            self.gone_at = now

    def slow(self, now: float, patience: float) -> None:
        """Its reader takes too little, and has so many seconds to read on."""
        self.patience = patience
        if self.slow_since is None:
            self.slow_since = now

    def attach(self, num_read: int) -> Inbox:
        """A reader who has had the first `num_read` tokens; there is one at a time, the latest."""
        inbox = self.inbox = Inbox()
        if not self.is_done:
            self.gone_at = None
        if num_read < len(self.tokens):
            cached = self.cached_tokens if num_read == 0 else None
            tokens, logprobs = tuple(self.tokens[num_read:]), tuple(self.logprobs[num_read:])
            texts = tuple(self.texts[num_read:])
            event = TokenEvent(self.request.id, tokens, logprobs, cached, texts=texts)
            scores = self.prompt_logprobs if num_read == 0 else ()
            inbox.put(event._replace(prompt_logprobs=scores))
        if self.last is not None:
            bare = self.last._replace(token_ids=(), texts=(), logprobs=(), cached_tokens=None)
            inbox.put(bare._replace(prompt_logprobs=()))
        if self.error is not None:
            inbox.fail(self.error)
        return inbox


def together(first: Summary | None, second: Summary) -> Summary:
    """What a request has cost in two parts: the times of the second one count from its arrival."""
    if first is None:
        return second
    return second._replace(
        num_preemptions=first.num_preemptions + second.num_preemptions,
        stall_seconds=first.stall_seconds + second.stall_seconds,
        device_seconds=first.device_seconds + second.device_seconds,
        page_seconds=first.page_seconds + second.page_seconds,
        draft_tokens=first.draft_tokens + second.draft_tokens,
        draft_accepted=first.draft_accepted + second.draft_accepted,
        transit_seconds=first.transit_seconds,
    )


def stream_lag(deliveries: Iterable[Delivery], now: float) -> float:
    """How long the oldest event that waits for a reader has waited."""
    inboxes = [delivery.inbox for delivery in deliveries if delivery.inbox]
    return max((now - box.since for box in inboxes if box.since is not None), default=0.0)


def failure(event: TokenEvent) -> RequestError:
    """The error that a failed request ends with."""
    message = event.error or "the engine failed this request"
    match event.fault:
        case "unavailable":
            return Unavailable(message)
        case "timeout":
            return EngineTimeout(message)
        case "refused":
            return InvalidRequest(message)
    return EngineFailure(message)


def refused(refusal: Refusal) -> Shed:
    """The error that a shed request ends with."""
    kind = QuotaExceeded if refusal.is_own else Overloaded
    return kind(
        refusal.message,
        retry_after=refusal.retry_after,
        reason=refusal.reason,
        limit=refusal.limit,
        predicted_wait=refusal.predicted_wait,
        queue_position=refusal.queue_position,
    )
