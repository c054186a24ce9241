"""A stream as plain data, all that there is of it, to go on in another server process."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from dynamo_serve import wire
from dynamo_serve.api.job import Job
from dynamo_serve.core.request import Summary, TokenLogprob
from dynamo_serve.delivery import Delivery, nobody
from dynamo_serve.text.dialect import Parsing

FORMAT = 4  # of what is packed here; a server takes only its own
# Of a delivery, what is packed as it is; times are of the monotonic clock of this machine.
PLAIN = (
    *("cached_tokens", "first_token_at", "previous", "has_begun", "is_suspect", "since"),
    *("reason", "deaths", "doubts", "blind", "left_at", "engines"),
)


@dataclass(frozen=True, slots=True)
class Luggage:
    """A stream with its tenant, and the seconds for which it is to be kept."""

    tenant: str
    job: Job
    seconds: float
    deliveries: Sequence[Delivery]


def pack(luggage: Luggage) -> tuple[Any, ...]:
    """For msgpack."""
    job = {field.name: getattr(luggage.job, field.name) for field in fields(Job)}
    # Those of the deliveries: of an answer that a rung has cut they say how long it may get.
    job["requests"] = [wire.request_fields(d.request) for d in luggage.deliveries]
    return (luggage.tenant, luggage.seconds, job, [_fields(d) for d in luggage.deliveries])


def unpack(packed: Sequence[Any]) -> Luggage:
    """Its deliveries are parked, or done."""
    tenant, seconds, job, deliveries = packed
    requests = tuple(wire.request_of(*request) for request in job["requests"])
    return Luggage(
        tenant,
        Job(**{**job, "requests": requests, "parsing": _parsing(job["parsing"])}),
        seconds,
        [
            _delivery(Delivery(request, job["keep_seconds"], nobody), *parts)
            for request, parts in zip(requests, deliveries, strict=True)
        ],
    )


def _parsing(packed: Sequence[Any] | None) -> Parsing | None:
    return None if packed is None else Parsing(*packed)


def _fields(delivery: Delivery) -> tuple[Any, ...]:
    assert delivery.error is None, "what has failed stays"
    return (
        array("q", delivery.tokens).tobytes(),
        delivery.texts,
        delivery.logprobs,
        delivery.prompt_logprobs,
        delivery.earlier,
        delivery.last and wire.event_fields(delivery.last),
        [getattr(delivery, name) for name in PLAIN],
    )


def _delivery(
    delivery: Delivery,
    tokens: bytes,
    texts: Sequence[str],
    logprobs: Sequence[Any],
    prompt_logprobs: Sequence[Any],
    earlier: Sequence[Any] | None,
    last: Sequence[Any] | None,
    plain: Sequence[Any],
) -> Delivery:
    delivery.tokens = array("q", tokens).tolist()
    delivery.texts = list(texts)
    delivery.logprobs = [TokenLogprob(*logprob) for logprob in logprobs]
    delivery.prompt_logprobs = tuple(TokenLogprob(*logprob) for logprob in prompt_logprobs)
    delivery.earlier = Summary(*earlier) if earlier else None
    delivery.last = wire.event_of(tuple(last)) if last else None
    for name, value in zip(PLAIN, plain, strict=True):
        setattr(delivery, name, value)
    delivery.is_wanted = False
    return delivery
