"""KV events as cluster routers read them: bytes, sockets, and a server that is followed."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import socket
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import msgpack
import pytest

from dynamo_serve import kv_events, settings
from dynamo_serve.config import CacheSection, Config, EngineSection
from dynamo_serve.core.limits import Limits
from dynamo_serve.core.page_events import Cleared, Event, Removed, Stored
from dynamo_serve.core.page_pool import PagePool
from dynamo_serve.core.request import Request
from dynamo_serve.core.scheduler import Scheduler
from dynamo_serve.core.tiers import DEVICE, DISK, HOST
from dynamo_serve.errors import ConfigError, EngineStartError
from dynamo_serve.kv_events import END, Publisher, block_hash, maps_of, pack
from dynamo_serve.service import Service
from dynamo_serve.text.tokenizer import Tokenizer
from tests.api.live import NAMES, config, save_model, serving
from tests.core.traffic import VOCAB_SIZE, Harness, QuickEngine, random_requests
from tests.patience import PATIENCE_S
from tests.test_service import pid_of

zmq: Any = pytest.importorskip("zmq", reason="pip install 'dynamo-serve[events]'")

PATIENCE_MS = 1000 * PATIENCE_S
ANYWHERE = "tcp://127.0.0.1:*"


def key(number: int) -> bytes:
    return number.to_bytes(8, signed=True) + bytes(8)


def stored(number: int, parent: int | None, tier: int = DEVICE) -> Stored:
    before = None if parent is None else key(parent)
    return Stored(key(number), before, array("q", [number, number]), tier)


def test_the_bytes_are_those_that_routers_read() -> None:
    events: list[Event] = [Cleared(), stored(-7, None), stored(8, -7), Removed(key(8), HOST)]
    expected = (
        b"\x93\xcb?\xf8\x00\x00\x00\x00\x00\x00"  # [1.5, events, rank]
        b"\x93\x81\xa4type\xb0AllBlocksCleared"
        b"\x88\xa4type\xabBlockStored"
        b"\xacblock_hashes\x92\xf9\x08"
        b"\xb1parent_block_hash\xc0"
        b"\xa9token_ids\x94\xf9\xf9\x08\x08"
        b"\xaablock_size\x02"
        b"\xa7lora_id\xc0\xa6medium\xa3GPU\xa9lora_name\xc0"
        b"\x83\xa4type\xacBlockRemoved\xacblock_hashes\x91\x08\xa6medium\xaaCPU_PINNED"
        b"\x00"
    )
    assert pack(events, 1.5) == expected


def test_chains_become_one_event_and_parents_stay_first() -> None:
    events: list[Event] = [
        *(stored(1, None), stored(1, None, HOST), stored(2, 1), stored(2, 1, HOST)),
        *(stored(5, 1), stored(3, 2), Removed(key(9), DISK), Removed(key(8), DISK)),
        *(Removed(key(8), HOST), stored(6, 5)),
    ]
    told = [(m["type"], m["block_hashes"], m["medium"]) for m in maps_of(events)]
    assert told == [
        ("BlockStored", [1, 2], "GPU"),
        ("BlockStored", [1, 2], "CPU_PINNED"),
        ("BlockStored", [5], "GPU"),
        ("BlockStored", [3], "GPU"),
        ("BlockRemoved", [9, 8], "DISK"),
        ("BlockRemoved", [8], "CPU_PINNED"),
        ("BlockStored", [6], "GPU"),
    ]


# ── sockets ──────────────────────────────────────────────────────────────────


class Router:
    """Follows a publisher."""

    def __init__(self, endpoint: str, topic: bytes = b"", **options: int) -> None:
        self._context = zmq.Context()
        self.sub = self._context.socket(zmq.SUB)
        for name, value in options.items():
            self.sub.setsockopt(getattr(zmq, name), value)
        self.sub.setsockopt(zmq.SUBSCRIBE, topic)
        self.sub.connect(endpoint)
        self.pages: set[tuple[int, str]] = set()
        self.num_cleared = 0
        self.numbers: list[int] = []

    def hear(self) -> None:
        """Take in one message; raises if none comes."""
        assert self.sub.poll(PATIENCE_MS), "nothing comes"
        _, number, batch = self.sub.recv_multipart()
        self.numbers.append(int.from_bytes(number))
        self.fold(batch)

    def fold(self, batch: bytes) -> None:
        _, events, rank = msgpack.unpackb(batch)
        assert rank == 0
        for event in events:
            match event["type"]:
                case "AllBlocksCleared":
                    self.pages.clear()
                    self.num_cleared += 1
                case "BlockStored":
                    parent, hashes = event["parent_block_hash"], event["block_hashes"]
                    assert parent is None or parent in {h for h, _ in self.pages}
                    assert len(event["token_ids"]) == len(hashes) * event["block_size"]
                    self.pages |= {(h, event["medium"]) for h in hashes}
                case "BlockRemoved":
                    self.pages -= {(h, event["medium"]) for h in event["block_hashes"]}

    def hear_until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE_MS / 1000
        while not condition():
            assert time.monotonic() < end, "it never came to that"
            self.hear()

    def ask(self, endpoint: str, first: int) -> list[tuple[bytes, bytes]]:
        """What the replay socket has from a number on."""
        answers: list[tuple[bytes, bytes]] = []
        with self._context.socket(zmq.DEALER) as dealer:
            dealer.connect(endpoint)
            dealer.send_multipart([b"", first.to_bytes(8)])
            for _ in range(10_000):
                assert dealer.poll(PATIENCE_MS), "no answer"
                _, number, batch = dealer.recv_multipart()
                if number == END:
                    return answers
                answers.append((number, batch))
        raise AssertionError("no end")

    def close(self) -> None:
        self.sub.close(linger=0)
        self._context.destroy(linger=0)


@contextmanager
def router(endpoint: str, topic: bytes = b"", **options: int) -> Iterator[Router]:
    found = Router(endpoint, topic, **options)
    try:
        yield found
    finally:
        found.close()


@contextmanager
def publishing(scheduler: Scheduler, **others: Any) -> Iterator[tuple[str, str]]:
    """Addresses of events and of the replay."""
    publisher = Publisher(ANYWHERE, replay=ANYWHERE, **others)
    try:
        endpoints = publisher.endpoints
        publisher.follow(scheduler)
        yield endpoints
    finally:
        publisher.close()


def harness_of(pages: int = 30) -> Harness:
    engine = QuickEngine(
        vocab_size=VOCAB_SIZE, max_model_len=36, page_size=4, num_pages=pages, below={HOST: 40}
    )
    engine.harness = harness = Harness(engine, Limits())
    return harness


def there(scheduler: Scheduler) -> set[tuple[int, str]]:
    """Pages by the books, as routers call them."""
    (host,) = scheduler.spill.tiers
    lists = {"GPU": scheduler.pool.index.pages, "CPU_PINNED": {**host._clean, **host._others}}
    return {(block_hash(key), medium) for medium, keys in lists.items() for key in keys}


def traffic(harness: Harness, seed: int) -> None:
    requests = random_requests(random.Random(seed), 12, 36)
    harness.generate(*(replace(r, id=f"{seed}-{r.id}") for r in requests))
    for _ in range(200):
        harness.turn()


def test_a_subscriber_knows_at_the_end_what_is_there() -> None:
    harness = harness_of()
    with publishing(harness.scheduler, topic="kv@here@m") as (endpoint, replay):
        with router(endpoint, b"kv@here@m") as early:
            early.hear_until(lambda: early.num_cleared > 0)
            for seed in range(5):
                traffic(harness, seed)
            early.hear_until(lambda: early.pages == there(harness.scheduler))
            with router(endpoint, b"kv@") as late:
                late.hear_until(lambda: late.pages == there(harness.scheduler))
                assert late.num_cleared
            first, last = early.numbers[0], early.numbers[-1]
            assert early.numbers == list(range(first, last + 1)), "a gap"
            answers = early.ask(replay, 0)
            numbers = [int.from_bytes(number) for number, _ in answers]
            assert numbers == list(range(numbers[0], numbers[-1] + 1)), "a gap"
            assert numbers[0] <= first and last <= numbers[-1]
            assert early.ask(replay, last) == answers[numbers.index(last) :]
            early.pages.clear()
            for _, batch in answers:
                early.fold(batch)
            assert early.pages == there(harness.scheduler)
            assert early.ask(replay, 2**62) == []
        assert any(medium == "CPU_PINNED" for _, medium in there(harness.scheduler))


def test_more_than_the_buffer_holds_is_told_anew() -> None:
    harness = harness_of()
    with (
        publishing(harness.scheduler, max_events=1) as (endpoint, _),
        router(endpoint) as follower,
    ):
        for seed in range(5):
            traffic(harness, seed)
        follower.hear_until(lambda: follower.pages == there(harness.scheduler))
        assert harness.scheduler.stats().kv_events_anew_total > 1


def is_told(follower: Router, begun: int) -> Callable[[], bool]:
    """Whether it has heard of all pages again since."""
    return lambda: follower.num_cleared > begun and len(follower.pages) == 256


def test_a_subscriber_that_takes_nothing_is_cut_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kv_events, "MOST_UNREAD", 2)
    pool = PagePool(256, 1024)
    scheduler = Scheduler(pool, Limits())
    with (
        publishing(scheduler, stuck_seconds=0.5) as (endpoint, _),
        router(endpoint, RCVHWM=1, RCVBUF=4096) as stuck,
        router(endpoint) as follower,
    ):
        stuck.hear_until(lambda: stuck.num_cleared > 0)
        follower.hear_until(lambda: follower.num_cleared > 0)
        keys: list[bytes] = []
        table: list[int] = []
        tokens = list(range(70_000, 70_000 + 256 * 1024))
        assert pool.grow(table, len(tokens)) and pool.events
        pool.extend_keys(keys, tokens, "", len(tokens))
        for page_id, name in zip(table, keys, strict=True):
            pool.seal(page_id, name)
        pool.events.sealed(keys, tokens, range(len(keys)))
        for _ in range(20):  # a megabyte each: more than any buffer between them holds
            begun = follower.num_cleared
            pool.events.begin_anew()
            follower.hear_until(is_told(follower, begun))


def test_an_address_in_use_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    harness = harness_of()
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        endpoint = f"tcp://127.0.0.1:{holder.getsockname()[1]}"
        with caplog.at_level(logging.WARNING):
            publisher = Publisher(endpoint)
    try:
        assert f"cache.kv_events = '{endpoint}': Address already in use" in caplog.text
        publisher.follow(harness.scheduler)
        with router(endpoint) as follower:
            follower.hear_until(lambda: follower.num_cleared > 0)
    finally:
        publisher.close()


def test_nonsense_on_the_replay_socket_is_not_answered() -> None:
    harness = harness_of()
    with (
        publishing(harness.scheduler) as (endpoint, replay),
        router(endpoint) as follower,
        follower._context.socket(zmq.DEALER) as dealer,
    ):
        dealer.connect(replay)
        for frames in ([b"x"], [b"", b"short"], [b"", b"", b"", b""], [b"", bytes(10_000)]):
            dealer.send_multipart(frames)
        assert follower.ask(replay, 2**62) == []
        assert not dealer.poll(0)


# ── settings ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kv_events", "127.0.0.1:5557"),
        ("kv_events", "ipc:///tmp/events"),
        ("kv_events", "tcp://127.0.0.1"),
        ("kv_events", "tcp://127.0.0.1:*"),
        ("kv_events_replay", "tcp://a b:1"),
        ("kv_events_buffer", "0"),
    ],
)
def test_a_malformed_setting_is_refused_by_its_name(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"cache\.{name} = "):
        settings.load(flags=[settings.from_set(f"cache.{name}={value}")])


@pytest.mark.parametrize(
    ("cache", "fault"),
    [
        (["kv_events_topic=x"], r"cache\.kv_events_topic: set cache\.kv_events, too"),
        (["kv_events_replay=tcp://*:1"], r"cache\.kv_events_replay: set cache\.kv_events"),
        (["kv_events_buffer=5"], r"cache\.kv_events_buffer: set cache\.kv_events"),
        (["kv_events=tcp://*:1", "prefix_sharing=false"], r"needs cache\.prefix_sharing"),
        (
            ["kv_events=tcp://*:1", "kv_events_replay=tcp://*:1"],
            r"cache\.kv_events_replay: it needs an address of its own",
        ),
        (
            ["kv_events=tcp://127.0.0.1:99999"],
            r"cache\.kv_events = .*: allowed: ports from 1 to 65535",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_loads(
    cache: list[str], fault: str
) -> None:
    with pytest.raises(ConfigError, match=fault):
        settings.load(flags=[settings.from_set(f"cache.{setting}") for setting in cache])


def test_an_address_that_is_not_ours_is_refused_with_the_remedy() -> None:
    fault = r"cache\.kv_events = 'tcp://203.*: Cannot assign requested address; choose"
    with (
        pytest.raises(EngineStartError, match=fault),
        kv_events.opened(CacheSection(kv_events="tcp://203.0.113.1:5557")),
    ):
        raise AssertionError("it was taken")


def test_without_the_library_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zmq", None)
    with pytest.raises(EngineStartError, match=r"pip install 'dynamo-serve\[events\]'"):
        Publisher(ANYWHERE)


def test_by_default_nobody_is_told() -> None:
    with kv_events.opened(CacheSection()) as publisher:
        assert publisher is None


# ── a server ─────────────────────────────────────────────────────────────────


def free_endpoint() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize("process", [True, False])
def test_a_router_follows_a_server_and_the_engine_after_the_first(
    process: bool, tmp_path: Path
) -> None:
    endpoint = free_endpoint()
    settled: Config = replace(
        config(),
        engine=EngineSection(kind="fake", process=process),
        cache=CacheSection(page_size=4, num_pages=512, kv_events=endpoint, kv_events_topic="kv"),
    )
    model = save_model(tmp_path)
    service = Service(settled, model_path=model)
    with (
        serving(service, Tokenizer.load(model), settled) as url,
        router(endpoint, b"kv") as follower,
    ):

        def complete(prompt: str) -> None:
            body = {"model": NAMES[0], "prompt": prompt, "max_tokens": 8}
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_S)
            assert answer.status_code == 200, answer.text

        follower.hear_until(lambda: follower.num_cleared > 0)
        complete("a long prompt that fills several pages")
        follower.hear_until(lambda: len(follower.pages) > 5)
        if process:
            begun = follower.num_cleared
            os.kill(pid_of(service), signal.SIGKILL)
            follower.hear_until(lambda: follower.num_cleared > begun)
            assert not follower.pages
            complete("another one, for the engine that came after it")
            follower.hear_until(lambda: len(follower.pages) > 5)
            numbers = follower.numbers
            assert numbers == sorted(set(numbers)), "routers would take these for old ones"


def test_the_engine_that_cannot_publish_does_not_start(tmp_path: Path) -> None:
    cache = CacheSection(kv_events="tcp://203.0.113.1:5557")
    settled = replace(config(), cache=cache, engine=EngineSection(kind="fake", process=True))
    service = Service(settled, model_path=save_model(tmp_path))

    async def main() -> None:
        try:
            with pytest.raises(EngineStartError, match=r"cache\.kv_events = 'tcp://203"):
                await service.start()
        finally:
            await service.close()

    asyncio.run(main())


def test_a_request_is_answered_whoever_listens() -> None:
    harness = harness_of()
    with publishing(harness.scheduler):
        request = Request("a", tuple(range(3, 20)), 3)
        assert len(harness.generate(request)["a"]) == 3
