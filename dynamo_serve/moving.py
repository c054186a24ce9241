"""What a server that ends does with its requests, and what the next one does with what it gets.

A stream moves as a whole, with all its tokens, from where it is parked to where it is parked: its
engine has said its last word about it, and nobody goes on with it before the other server has it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dynamo_serve.api.job import Job
from dynamo_serve.api.marks import Streams
from dynamo_serve.core.engine import EngineSpec
from dynamo_serve.core.request import Finish
from dynamo_serve.deliveries import Deliveries
from dynamo_serve.delivery import Delivery
from dynamo_serve.errors import RequestError, RequestNotFound, ServerHandover, ServerShutdown
from dynamo_serve.line import Successor
from dynamo_serve.luggage import FORMAT, Luggage, pack, unpack
from dynamo_serve.observer import Observer
from dynamo_serve.service import Service

log = logging.getLogger(__name__)

SETTLE_S = 2.0  # for the engine's last word about what is taken from it
LOOK_S = 0.01
RETRY_S = 5.0
SHUTDOWN = (
    "The server shut down before this request was finished, and nothing of it is kept: send the "
    "request again."
)
HANDOVER = (
    "The server has handed over to another, which goes on with this stream: connect again, with "
    "the id of the last event in the header Last-Event-ID."
)


@dataclass(frozen=True, slots=True)
class Identity:
    """What must be the same for tokens of one server to mean the same in another."""

    models: tuple[str, ...]
    vocab_size: int
    tokenizer: str
    architecture: str
    num_parameters: int

    @classmethod
    def of(cls, models: Sequence[str], spec: EngineSpec, tokenizer: str) -> Identity:
        """`tokenizer` is its digest."""
        facts = spec.facts
        architecture, size = facts.get("architecture", ""), facts.get("num_parameters", 0)
        return cls(tuple(models), spec.vocab_size, tokenizer, str(architecture), int(size))

    def why_not(self, other: Mapping[str, Any]) -> str:
        """Why `other`, the plain data of one, cannot go on with streams of this; empty if it
        can."""
        ours = asdict(self)
        for name in ("vocab_size", "tokenizer", "architecture", "num_parameters"):
            if ours[name] != other.get(name):
                return f"its model is another: {name} {other.get(name)!r}, not {ours[name]!r}"
        return ""


class Leaving:
    """Ends what this server has left, and moves streams to its successor if there is one."""

    def __init__(
        self,
        deliveries: Deliveries,
        streams: Streams,
        successor: Successor | None = None,
        identity: Identity | None = None,
    ) -> None:
        self._deliveries = deliveries
        self._streams = streams
        self._successor = successor
        self._moving: set[str] = set()
        self._why_not = ""
        self._models: Sequence[str] = ()
        if successor is not None and identity is not None:
            self._why_not = identity.why_not(successor.identity)
            self._models = successor.identity.get("models", ())
            if successor.format != FORMAT:
                self._why_not = "its version packs streams in another way"
        if self._why_not:
            log.warning("streams are not handed over, %s", self._why_not)

    async def on_want(self, tenant: str, id: str) -> None:
        """A client has come back for a stream, to the successor."""
        assert self._successor, "nobody asks"
        try:
            job = self._streams.find(tenant, id)
        except (RequestNotFound, ServerHandover):
            self._successor.lacks(id)
            return
        if job.id in self._moving:
            return  # it is on its way
        if not await self._move([(tenant, job)]):
            self._successor.lacks(id)

    async def finish(self) -> None:
        """Nothing goes on here any more, and everybody is told where it does."""
        if self._successor is not None:
            entries = self._streams.entries()
            num_moved = await self._move(entries)
            log.info("%d of %d streams handed over", num_moved, len(entries))
        deliveries = self._deliveries
        for delivery in [*deliveries.live.values(), *deliveries.kept.values()]:
            if not delivery.is_done:
                self._deliveries.end(delivery, Finish.ERROR, shutdown())

    async def _move(self, entries: Sequence[tuple[str, Job]]) -> int:
        """How many of these streams have moved; those on their way already are not counted."""
        streams = [s for s in map(self._packed_up, entries) if s is not None]
        deliveries = [d for stream in streams for d in stream.deliveries]
        for delivery in deliveries:
            delivery.is_leaving = True
            if delivery.is_wanted and not delivery.is_done and not delivery.is_cancelled:
                self._deliveries.park(delivery, "handed_over")
        await settled(deliveries)
        return sum(await asyncio.gather(*map(self._give, streams)))

    def _packed_up(self, entry: tuple[str, Job]) -> Luggage | None:
        """What is to be moved of a stream, if it can go on over there."""
        tenant, job = entry
        found = [self._deliveries.find(request.id) for request in job.requests]
        deliveries = [d for d in found if d is not None and d.error is None]
        # Of a stream without a token no client has an event: it will send the request again.
        has_begun = any(d.tokens or d.is_done for d in deliveries)
        if self._why_not or job.id in self._moving or len(deliveries) < len(found) or not has_begun:
            return None
        if job.model not in self._models:
            log.warning("stream %s is not handed over: no model %r there", job.id, job.model)
            return None
        self._moving.add(job.id)
        left = [self._deliveries.timers.left(d.request.id) for d in deliveries]
        seconds = max([s for s in left if s is not None], default=job.keep_seconds)
        is_read = any(d.inbox is not None for d in deliveries)
        return Luggage(tenant, job, job.keep_seconds if is_read else seconds, deliveries)

    async def _give(self, stream: Luggage) -> bool:
        assert self._successor, "there is somebody to give it to"
        if any(delivery.error for delivery in stream.deliveries):
            why_not = "it has failed meanwhile"
        else:
            why_not = await self._successor.give(stream.job.id, pack(stream))
        if why_not:
            log.warning("stream %s is not handed over: %s", stream.job.id, why_not)
        else:
            self._streams.move_out(stream.job.id)
        for delivery in stream.deliveries:
            if why_not and not delivery.is_done:
                self._deliveries.end(delivery, Finish.ERROR, shutdown())
            elif not why_not:
                self._let_go(delivery, ServerHandover(HANDOVER, retry_after=0.0))
        return not why_not

    def _let_go(self, delivery: Delivery, error: RequestError) -> None:
        """It is in the other server now."""
        id = delivery.request.id
        self._deliveries.timers.stop(id)
        self._deliveries.live.pop(id, None)
        self._deliveries.kept.pop(id, None)
        if delivery.inbox is not None:
            delivery.inbox.fail(error)


def shutdown() -> ServerShutdown:
    return ServerShutdown(SHUTDOWN, retry_after=RETRY_S)


async def settled(deliveries: Sequence[Delivery]) -> None:
    """Wait for the engine's last word about these. If it takes too long they go on from the tokens
    that are here, and whatever still comes is dropped."""
    loop = asyncio.get_running_loop()
    until = loop.time() + SETTLE_S
    while any(d.is_submitted for d in deliveries) and loop.time() < until:
        await asyncio.sleep(LOOK_S)
    for delivery in deliveries:
        delivery.is_submitted = False


class Arriving:
    """Takes streams of the server before this one."""

    def __init__(self, service: Service, streams: Streams, observer: Observer) -> None:
        self._service = service
        self._streams = streams
        self._observer = observer

    def adopt(self, packed: Any) -> str:
        """Park a stream here until its client comes. Why it is not taken; empty if it is."""
        try:
            stream = unpack(packed)
        except Exception as error:  # whatever another process may have sent
            log.exception("a stream that was handed over cannot be read")
            return f"it cannot be read: {type(error).__name__}"
        limit = self._service.spec.max_model_len
        if any(len(r.prompt_ids) + r.max_tokens > limit for r in stream.job.requests):
            return f"it may grow beyond the limit of {limit} tokens"
        deliveries = self._service.deliveries
        for delivery in stream.deliveries:
            deliveries.keep(delivery)
            self._keep_for(delivery, stream.seconds)
            self._observer.on_stream("taken_over")
        self._streams.add(stream.tenant, stream.job)
        return ""

    def _keep_for(self, delivery: Delivery, seconds: float) -> None:
        deliveries = self._service.deliveries
        deliveries.timers.start(delivery.request.id, seconds, lambda: deliveries.forget(delivery))
