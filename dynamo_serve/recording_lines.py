"""What the lines of a trace are made of."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from hashlib import blake2b
from math import inf
from typing import Any, get_origin, get_type_hints

from dynamo_serve.config import Config
from dynamo_serve.core.prefix_index import APART
from dynamo_serve.core.request import Finish, Request, TokenEvent
from dynamo_serve.core.stats import StepStats
from dynamo_serve.core.tenant import Tenancy
from dynamo_serve.delivery import Delivery
from dynamo_serve.errors import RequestError, TryLater
from dynamo_serve.inbox import TOKEN_BYTES
from dynamo_serve.recording_files import PageNumbers
from dynamo_serve.trace import Arrival, Step

STAND_IN_BYTES = 6
MOST_CALLS = 16_384  # whose numbers are remembered
DIGITS = 6  # of a second
# Settings that decide: they are written down whatever they are, for a later default is another.
POLICY = ("scheduler.", "cache.prefix_sharing", "cache.pinned_fraction", "cache.stale_s")


class Lines:
    """Makes them; `began` is of the monotonic clock. With `decode` prompts are in them as text."""

    def __init__(
        self,
        began: float,
        numbers: PageNumbers,
        decode: Callable[[Sequence[int]], str] | None = None,
    ) -> None:
        self._began = began
        self._numbers = numbers
        self._decode = decode
        self._key = secrets.token_bytes(32)  # kept nowhere: nobody can guess a group or a salt
        self._calls: dict[str, int] = {}  # with several choices, oldest first
        self._num_calls = 0

    def of_delivery(self, delivery: Delivery, now: float) -> Arrival:
        return self._arrival(delivery.request, delivery.tokens, outcome(delivery, now))

    def of_turned_away(self, request: Request, error: RequestError) -> Arrival:
        return self._arrival(request, (), failure(error, "refused"))

    def of_step(self, step: StepStats, now: float) -> Step:
        began = now - step.seconds - self._began
        return Step(seconds(began), seconds(step.seconds), tuple(step.shape))

    def _arrival(
        self, request: Request, tokens: Sequence[int], ended: Mapping[str, Any]
    ) -> Arrival:
        num_prompt = len(request.prompt_ids)
        ids = (*request.prompt_ids, *tokens)
        has_deadline = request.deadline < inf
        own = request.salt.partition(APART)[2]
        pages, output_pages = self._numbers.runs(ids, request.salt, num_prompt)
        return Arrival(
            at=seconds(request.arrival - self._began),
            prompt_tokens=num_prompt,
            output_tokens=len(tokens),
            max_tokens=request.max_tokens,
            pages=pages,
            output_pages=output_pages,
            tenant=request.tenant,
            class_name=request.class_name or "",
            priority=request.priority,
            num_choices=request.num_choices,
            call=self._call(request),
            group=self._stand_in(request.group, own) if request.group else "",
            salt=self._stand_in(own) if own else "",
            is_stream=request.is_stream,
            is_open_ended=request.is_open_ended,
            deadline=seconds(request.deadline - request.arrival) if has_deadline else None,
            has_class_deadline=has_deadline and request.has_class_deadline,
            pooling=request.pooling.kind if request.pooling else "",
            text=self._decode(request.prompt_ids) if self._decode else None,
            **ended,
        )

    def _call(self, request: Request) -> int | None:
        """A number for all choices of a call that has several."""
        if request.num_choices == 1 or not request.id:
            return None
        id = request.id.rpartition("-")[0]
        if id not in self._calls:
            self._calls[id] = self._num_calls
            self._num_calls += 1
            if len(self._calls) > MOST_CALLS:
                del self._calls[next(iter(self._calls))]
        return self._calls[id]

    def _stand_in(self, *texts: str) -> str:
        """For what is nobody's business: another recording has another one for it."""
        text = APART.join(texts).encode()
        return blake2b(text, key=self._key, digest_size=STAND_IN_BYTES).hexdigest()


def outcome(delivery: Delivery, now: float) -> dict[str, Any]:
    """How a request ended, and when what happened."""
    arrival = delivery.request.arrival
    last, gone_at, since = delivery.last, delivery.gone_at, delivery.slow_since
    told: dict[str, Any] = {"end": seconds(now - arrival)}
    if delivery.cached_tokens:
        told["cached_tokens"] = delivery.cached_tokens
    if delivery.first_token_at is not None:
        told["first_token"] = seconds(delivery.first_token_at - arrival)
    if gone_at is not None:
        told["gone_at"] = seconds(gone_at - arrival)
    if since is not None and now > since:
        told["reading"] = round(TOKEN_BYTES * delivery.slow_tokens / (now - since), 1)
    summary = delivery.earlier if last is None else last.summary
    if summary is not None:
        told |= {
            "transit": seconds(summary.transit_seconds),
            "waited": seconds(summary.queue_seconds),
            "preemptions": summary.num_preemptions,
        }
        if delivery.first_token_at is not None:
            told["prefill"] = seconds(summary.prefill_seconds)
    if gone_at is not None:
        return told | {"ended": Finish.CANCELLED.value}
    if delivery.error is not None:
        return told | failure(delivery.error, "error")
    return told | ending(last, is_pin=delivery.request.pinned_until is not None)


def ending(last: TokenEvent | None, *, is_pin: bool) -> dict[str, Any]:
    if last is not None and last.refusal is not None:
        status = 429 if last.refusal.is_own else 503
        return {"ended": "refused", "status": status, "retry_after": last.refusal.retry_after}
    assert last is not None and last.finish is not None, "an end without a finish"
    if last.finish is Finish.ERROR:
        return {"ended": "error", "status": 500}
    if last.finish is Finish.CANCELLED and not is_pin:
        return {"ended": "stop"}  # a stop string, of which the engine knows nothing
    return {"ended": last.finish.value}


def failure(error: RequestError, ended: str) -> dict[str, Any]:
    told: dict[str, Any] = {"ended": ended, "status": error.status}
    if isinstance(error, TryLater):
        told["retry_after"] = error.retry_after
    return told


def seconds(value: float) -> float:
    return round(value, DIGITS)


def wishes(config: Config) -> dict[str, Any]:
    """The settings that a simulation goes by, and others that differ from their defaults, but no
    free text: that may be a key, or a path that is nobody's business."""
    default, told = Config(), {}
    for name, kind in get_type_hints(Config).items():
        hints = get_type_hints(kind)
        for field, hint in hints.items():
            value = getattr(getattr(config, name), field)
            is_free = hint is str or (get_origin(hint) is tuple and name != "scheduler")
            key = f"{name}.{field}"
            is_wish = value != getattr(getattr(default, name), field) or key.startswith(POLICY)
            if is_wish and not is_free:
                told[key] = value
    return told


def promises(tenancy: Tenancy) -> dict[str, Any]:
    """Tenants and classes as plain data; what is without limit is left out, for JSON has no word
    for it."""
    plain = asdict(tenancy)
    for facts in plain["classes"].values():
        for key in [key for key, value in facts.items() if value == inf]:
            del facts[key]
    return plain
