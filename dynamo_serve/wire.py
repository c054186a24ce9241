"""Messages between the API process and the engine process: msgpack arrays, framed.

To the engine     ["configure", sections, model path, tenancy, ladder], once and first
                  · ["submit", request, how far it had got or nil] · ["cancel", id]
                  · ["unpin", id] · ["declare", keys]
                  · ["tenancy", tenancy] · ["steer", modes] · ["inspect", ticket, what, id, about]
                  · ["stop"]
From the engine   ["progress", stage, fraction] · ["ready", spec] · ["step", events, stats]
                  · ["answer", ticket, data] · ["failed", kind, message]
"""

from __future__ import annotations

import struct
from array import array
from dataclasses import asdict
from typing import Any

import msgpack

from dynamo_serve.core.engine import EngineSpec
from dynamo_serve.core.loop import (
    Cancel,
    Command,
    Configure,
    Declare,
    Inspect,
    Steer,
    Stop,
    Submit,
    Unpin,
)
from dynamo_serve.core.request import (
    Finish,
    Grammar,
    Pooling,
    Refusal,
    Request,
    Resumed,
    Sampling,
    Summary,
    TokenEvent,
    TokenLogprob,
)
from dynamo_serve.core.stats import Standing, Stats, StepStats, TierStats
from dynamo_serve.core.tenant import Tenancy
from dynamo_serve.core.tiers import TierSpec

HEADER = struct.Struct("<I")
PLAIN_FIELDS = 2  # an event that is only a request id and tokens: nearly all of them
OPEN_FIELDS = 4  # … with log-probabilities or the number of cached tokens
GRAMMAR_AT = 13  # of a request's fields behind `stop_ids`; the one behind it is its pooling
NOTHING_ELSE = TokenEvent("")[OPEN_FIELDS:]


def pack(*message: Any) -> bytes:
    """One frame: four bytes of length, then the message."""
    body: bytes = msgpack.packb(message)
    return HEADER.pack(len(body)) + body


def unpack(body: bytes) -> list[Any]:
    message: list[Any] = msgpack.unpackb(body, use_list=False)
    return message


class Frames:
    """Cuts a byte stream into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[list[Any]]:
        """The messages that are complete now."""
        self._buffer += data
        messages: list[list[Any]] = []
        start = 0
        while len(self._buffer) - start >= HEADER.size:
            (length,) = HEADER.unpack_from(self._buffer, start)
            end = start + HEADER.size + length
            if len(self._buffer) < end:
                break
            messages.append(unpack(bytes(self._buffer[start + HEADER.size : end])))
            start = end
        del self._buffer[:start]
        return messages


def pack_command(command: Command) -> bytes:
    match command:
        case Submit(request, done):
            return pack("submit", request_fields(request), done)
        case Cancel(request_id) | Unpin(request_id):
            return pack("cancel" if isinstance(command, Cancel) else "unpin", request_id)
        case Configure(tenancy):
            return pack("tenancy", asdict(tenancy))
        case Declare(data) | Steer(data):
            return pack("declare" if isinstance(command, Declare) else "steer", data)
        case Inspect():
            return pack("inspect", *command)
        case Stop():
            return pack("stop")


def command_of(message: list[Any]) -> Command:
    match message[0]:
        case "submit":
            return Submit(request_of(*message[1]), message[2] and Resumed(*message[2]))
        case "cancel" | "unpin" as what:
            return Cancel(message[1]) if what == "cancel" else Unpin(message[1])
        case "tenancy":
            return Configure(Tenancy.of(message[1]))
        case "declare" | "steer" as what:
            return Declare(message[1]) if what == "declare" else Steer(message[1])
        case "inspect":
            return Inspect(*message[1:])
        case "stop":
            return Stop()
    raise AssertionError(f"unknown command {message[0]!r}")


def pack_step(events: list[TokenEvent], stats: Stats) -> bytes:
    return pack("step", [event_fields(event) for event in events], stats)


def step_of(message: list[Any]) -> tuple[list[TokenEvent], Stats]:
    _, events, fields = message
    stats = Stats(*fields)
    if stats.step is not None:
        stats = stats._replace(step=StepStats(*stats.step))
    if stats.tiers:
        stats = stats._replace(tiers=tuple(TierStats(*tier) for tier in stats.tiers))
    if stats.ladder is not None:
        stats = stats._replace(ladder=Standing(*stats.ladder))
    return [event_of(e) for e in events], stats


def pack_spec(spec: EngineSpec) -> bytes:
    return pack("ready", asdict(spec))


def spec_of(message: list[Any]) -> EngineSpec:
    fields = message[1]
    tiers = tuple(TierSpec(*tier) for tier in fields["tiers"])
    return EngineSpec(**{**fields, "tiers": tiers})


def request_fields(request: Request) -> tuple[Any, ...]:
    s = request.sampling
    return (
        request.id,
        array("q", request.prompt_ids).tobytes(),
        request.max_tokens,
        tuple(getattr(s, name) for name in Sampling.__slots__),
        tuple(request.stop_ids),
        request.min_tokens,
        request.tenant,
        request.salt,
        request.arrival,
        request.deadline,
        request.class_name,
        request.priority,
        request.num_choices,
        request.call_tokens,
        request.is_open_ended,
        # Left out where it is not needed, as nearly always.
        *_rare(request),
    )


def _rare(request: Request) -> tuple[Any, ...]:
    values = request.pinned_until, request.is_stream, request.group, request.grammar
    if request.pooling is not None:
        return (*values, request.pooling)
    if request.grammar is not None:
        return values
    if request.group:
        return values[:3]
    return () if request.pinned_until is None else values[:1]


def request_of(
    id: str,
    prompt: bytes,
    max_tokens: int,
    sampling: tuple[Any, ...],
    stop_ids: tuple[int, ...],
    *rest: Any,
) -> Request:
    prompt_ids = array("q")
    prompt_ids.frombytes(prompt)
    if len(rest) > GRAMMAR_AT:
        grammar, *pooling = rest[GRAMMAR_AT:]
        made = None if grammar is None else Grammar(*grammar)
        rest = (*rest[:GRAMMAR_AT], made, *(Pooling(*each) for each in pooling))
    return Request(
        id, tuple(prompt_ids), max_tokens, Sampling(*sampling), frozenset(stop_ids), *rest
    )


def event_fields(event: TokenEvent) -> tuple[Any, ...]:
    if event[4:] == NOTHING_ELSE:
        is_plain = event.cached_tokens is None and not event.logprobs
        return event[: PLAIN_FIELDS if is_plain else OPEN_FIELDS]
    return (*event[:4], event.finish and event.finish.value, *event[5:])


def event_of(fields: tuple[Any, ...]) -> TokenEvent:
    event = TokenEvent(*fields)
    if len(fields) > PLAIN_FIELDS:
        event = event._replace(
            logprobs=tuple(TokenLogprob(*lp) for lp in event.logprobs),
            finish=event.finish and Finish(event.finish),
            summary=event.summary and Summary(*event.summary),
            refusal=event.refusal and Refusal(*event.refusal),
        )
    return event
