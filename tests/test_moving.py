"""Streams that move from one service to another: whole, or not at all."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict, replace
from types import NoneType
from typing import Any

import msgpack
import pytest

from dynamo_serve.api.job import Job
from dynamo_serve.api.marks import Streams
from dynamo_serve.config import Config, EngineSection
from dynamo_serve.core.engine import EngineSpec
from dynamo_serve.core.request import Finish, Request, Sampling, Summary, TokenEvent, TokenLogprob
from dynamo_serve.delivery import Delivery, nobody
from dynamo_serve.errors import RequestNotFound, ServerHandover, ServerShutdown
from dynamo_serve.luggage import FORMAT, Luggage, pack, unpack
from dynamo_serve.moving import Arriving, Identity, Leaving
from dynamo_serve.observer import NoObserver
from dynamo_serve.service import Service
from dynamo_serve.text.dialect import Parsing
from tests.core.traffic import reference
from tests.patience import PATIENCE_S
from tests.test_service import config_of, run, running, until
from tests.test_service import folder as folder  # noqa: PLC0414 - a fixture

SPEC = EngineSpec(4096, 4, 64, 300, {"architecture": "fake"})
IDENTITY = Identity.of(["tiny"], SPEC, "digest")
TENANT = "acme"


def job_of(*requests: Request, keep_seconds: float = 15.0) -> Job:
    return Job(
        *("job", 0, "tiny", "fp", len(requests), requests, ("stop",)),
        *("chat", True, False, True, 2, False, keep_seconds),
    )


def slow(step_ms: float = 1.0) -> Config:
    engine = EngineSection(kind="fake", process=False, fake_step_ms=step_ms)
    return replace(config_of(False), engine=engine)


class Other:
    """Stands for the server that takes over: with a service of its own, or refusing. It takes its
    time, so that the engine of the `old` one may say what it still has to, and readers read it."""

    format = FORMAT

    def __init__(
        self,
        arriving: Arriving | None = None,
        old: Service | None = None,
        models: tuple[str, ...] = ("tiny",),
    ) -> None:
        self.identity = asdict(replace(IDENTITY, models=models))
        self.missed: list[str] = []
        self._arriving = arriving
        self._old = old

    async def give(self, id: str, luggage: Any) -> str:
        if self._arriving is None:
            return "it does not want to"
        if (old := self._old) is not None:
            await until(lambda: old.stats.num_running == 0)
            for _ in range(20):
                await asyncio.sleep(0)
            assert old.num_live == 0, "nobody goes on with it there"
        return self._arriving.adopt(msgpack.unpackb(msgpack.packb(luggage), use_list=False))

    def lacks(self, id: str) -> None:
        self.missed.append(id)


def leaving(service: Service, streams: Streams, other: Other | None) -> Leaving:
    return Leaving(service.deliveries, streams, other, IDENTITY)  # type: ignore[arg-type]


def test_luggage_survives_the_way() -> None:
    """Every field of it, of streams that are parked and of those that are done."""
    request = Request("job-0", (1, 2**40), 9, Sampling(0.5, seed=2**63 - 1), frozenset({3}), 1)
    parked = Delivery(request, 15.0, nobody)
    parked.has_begun = True
    parked.take(TokenEvent("job-0", (7,), (TokenLogprob(7, -1.0, ((7, -1.0),)),), 16), 5.0)
    parked.park(TokenEvent("job-0", (), summary=Summary(0.1, 0.2, 0.3, 16, 1)), 6.0)
    parked.is_wanted = False
    done = Delivery(replace(request, id="job-1"), 15.0, nobody)
    done.has_begun = True
    done.take(TokenEvent("job-1", (8, 3), (), 0, Finish.STOP, 3, Summary(0, 0, 0, 0, 0)), 5.0)
    done.is_wanted = False
    job = job_of(parked.request, done.request)
    job = replace(job, parsing=Parsing("hermes", ("f", "g"), True, "think", True))
    parked.texts = ["seven"]  # as from an engine that gives text
    luggage = Luggage(TENANT, job, 3.5, [parked, done])
    sent = msgpack.unpackb(msgpack.packb(pack(luggage)), use_list=False)
    arrived = unpack(sent)
    assert (arrived.tenant, arrived.job, arrived.seconds) == (TENANT, luggage.job, 3.5)
    for before, after in zip([parked, done], arrived.deliveries, strict=True):
        for name in set(Delivery.__slots__) - {"inbox"}:
            assert getattr(after, name) == getattr(before, name), name
        assert after.done() == before.done()


def test_how_long_a_cut_answer_may_get_moves_with_it() -> None:
    request = Request("job-0", (1,), 900, is_open_ended=True)
    cut = Delivery(request, 15.0, nobody)
    cut.take(TokenEvent("job-0", (7,), cached_tokens=0, max_tokens=512), 5.0)
    packed = pack(Luggage(TENANT, job_of(request), 3.5, [cut]))
    [arrived] = unpack(msgpack.unpackb(msgpack.packb(packed), use_list=False)).deliveries
    assert (arrived.request.max_tokens, arrived.request.is_open_ended) == (512, False)
    assert replace(arrived.request, max_tokens=900, is_open_ended=True) == request


@pytest.mark.parametrize("seed", range(5))
def test_a_stream_moves_between_any_two_tokens(folder: str, seed: int) -> None:
    rng = random.Random(seed)
    sampling = Sampling(logprobs=1, prompt_logprobs=1)
    requests = [Request(f"job-{i}", (i, 2, 3), 200, sampling) for i in range(3)]

    async def main() -> None:
        async with running(slow(), folder) as old, running(slow(), folder) as new:
            from_, to = Streams(old), Streams(new)
            job = job_of(*requests)
            from_.add(TENANT, job)
            stop_after = [rng.randrange(1, 199), rng.randrange(1, 199), 200]
            heads = [Reader(old, r, n) for r, n in zip(requests, stop_after, strict=True)]
            await until(lambda: any(reader.has_enough for reader in heads))
            await leaving(old, from_, Other(Arriving(new, to, NoObserver()), old)).finish()
            for reader in heads:
                await reader.task
                assert type(reader.error) in (ServerHandover, NoneType)
            with pytest.raises(ServerHandover):
                from_.find(TENANT, "job")
            with pytest.raises(RequestNotFound):
                to.find("another", "job")
            assert to.find(TENANT, "job") == job
            for request, reader in zip(requests, heads, strict=True):
                rest = new.rejoin(request.id, len(reader.tokens))
                assert reader.tokens + await tokens_of(rest) == reference(request)[0]
                assert len(new.deliveries.kept[request.id].logprobs) == 200
                assert len(new.deliveries.kept[request.id].prompt_logprobs) == 2
            assert old.deliveries.live == old.deliveries.kept == {}

    run(main)


class Reader:
    """Reads a request from its beginning, as far as it goes."""

    def __init__(self, service: Service, request: Request, enough: int) -> None:
        self.tokens: list[int] = []
        self.error: Exception | None = None
        self._enough = enough
        self.task = asyncio.create_task(
            self._read(service.generate(request, keep_seconds=PATIENCE_S))
        )

    @property
    def has_enough(self) -> bool:
        return len(self.tokens) >= self._enough

    async def _read(self, events: AsyncGenerator[TokenEvent, None]) -> None:
        try:
            async with aclosing(events):
                async for event in events:
                    self.tokens += event.token_ids
        except ServerShutdown as error:
            self.error = error


async def tokens_of(events: AsyncGenerator[TokenEvent, None]) -> list[int]:
    return [token async for event in events for token in event.token_ids]


@pytest.mark.parametrize("other", [None, Other(), Other(models=("another",))])
def test_who_cannot_move_is_told_to_send_the_request_again(
    folder: str, other: Other | None
) -> None:
    async def main() -> None:
        async with running(slow(), folder) as service:
            streams = Streams(service)
            request = Request("job-0", (1, 2), 3000)
            streams.add(TENANT, job_of(request))
            reader = Reader(service, request, 3)
            await until(lambda: reader.has_enough)
            await leaving(service, streams, other).finish()
            await reader.task
            assert type(reader.error) is ServerShutdown
            assert service.num_live == 0

    run(main)


def test_a_stream_that_is_asked_for_moves_alone(folder: str) -> None:
    """And at once: its reader, who has read all there is, does not have it go on."""

    async def main() -> None:
        async with running(slow(50), folder) as old, running(slow(), folder) as new:
            from_, to = Streams(old), Streams(new)
            other = Other(Arriving(new, to, NoObserver()))
            request, stays = Request("job-0", (1, 2), 3000), Request("stays", (1, 2), 3000)
            from_.add(TENANT, job_of(request))
            readers = [Reader(old, request, 3), Reader(old, stays, 3)]
            await until(lambda: all(reader.has_enough for reader in readers))
            going = leaving(old, from_, other)
            await going.on_want("another", "job")
            await going.on_want(TENANT, "nonsense")
            assert other.missed == ["job", "nonsense"]
            num_tokens = len(old.deliveries.live["job-0"].tokens)
            await going.on_want(TENANT, "job")
            assert len(new.deliveries.kept["job-0"].tokens) < num_tokens + 20
            await readers[0].task
            assert isinstance(readers[0].error, ServerHandover)
            assert list(old.deliveries.live) == ["stays"]
            await going.on_want(TENANT, "job")
            assert other.missed == ["job", "nonsense", "job"]
            await going.finish()
            await readers[1].task
            assert type(readers[1].error) is ServerShutdown

    run(main)


def test_an_engine_that_says_no_last_word_is_not_waited_for(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tokens that come later would be told twice."""
    monkeypatch.setattr("dynamo_serve.moving.SETTLE_S", 0.0)

    async def main() -> None:
        async with running(slow(20), folder) as old, running(slow(0), folder) as new:
            from_, to = Streams(old), Streams(new)
            request = Request("job-0", (1, 2), 300)
            from_.add(TENANT, job_of(request))
            reader = Reader(old, request, 3)
            await until(lambda: reader.has_enough)
            await leaving(old, from_, Other(Arriving(new, to, NoObserver()), old)).finish()
            await reader.task
            rest = await tokens_of(new.rejoin("job-0", len(reader.tokens)))
            assert reader.tokens + rest == reference(request)[0]

    run(main)


def test_what_was_adopted_is_forgotten_when_nobody_comes(folder: str) -> None:
    async def main() -> None:
        async with running(slow(), folder) as old, running(slow(), folder) as new:
            from_, to = Streams(old), Streams(new)
            request = Request("job-0", (1, 2), 3000)
            from_.add(TENANT, job_of(request, keep_seconds=0.01))
            reader = Reader(old, request, 3)
            await until(lambda: reader.has_enough)
            await leaving(old, from_, Other(Arriving(new, to, NoObserver()))).finish()
            await reader.task
            await until(lambda: not new.is_known("job-0"))

    run(main)


def test_whoever_waits_is_told_also_of_what_is_parked(folder: str) -> None:
    """A reader that was slow, and has just read all there was."""

    async def main() -> None:
        async with running(slow(), folder) as service:
            reader = Reader(service, Request("job-0", (1, 2), 3000), 3)
            await until(lambda: reader.has_enough)
            delivery = service.deliveries.live["job-0"]
            delivery.is_leaving = True  # as if it had read all since the drain was over
            service.deliveries.park(delivery, "reader_slow")
            await until(lambda: not delivery.is_submitted)
            await leaving(service, Streams(service), None).finish()
            await reader.task
            assert type(reader.error) is ServerShutdown

    run(main)


def test_a_drain_does_not_wait_for_who_is_parked(folder: str) -> None:
    async def main() -> None:
        async with running(slow(), folder) as service:
            events = service.generate(Request("job-0", (1, 2), 3000), keep_seconds=PATIENCE_S)
            await anext(events)
            await events.aclose()
            assert service.deliveries.kept["job-0"].is_parked
            await service.drain(timeout=3600)

    run(main)


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (replace(IDENTITY, models=("other",)), ""),  # looked at for each stream
        (replace(IDENTITY, vocab_size=301), "vocab_size 301, not 300"),
        (replace(IDENTITY, tokenizer="x"), "tokenizer 'x', not 'digest'"),
        (replace(IDENTITY, num_parameters=5), "num_parameters 5, not 0"),
    ],
)
def test_another_model_is_told_by_what_differs(other: Identity, why: str) -> None:
    told = IDENTITY.why_not(asdict(other))
    assert told.endswith(why)
    assert bool(told) is bool(why)


def test_a_request_that_may_grow_too_long_there_is_not_taken(folder: str) -> None:
    async def main() -> None:
        async with running(config_of(False), folder) as service:
            arriving = Arriving(service, Streams(service), NoObserver())
            request = Request("job-0", (1, 2), service.spec.max_model_len)
            packed = pack(Luggage(TENANT, job_of(request), 1.0, [Delivery(request, 1.0, nobody)]))
            assert "limit of 4096" in arriving.adopt(packed)
            assert "cannot be read" in arriving.adopt(("nonsense",))
            assert not service.is_known("job-0")

    run(main)
