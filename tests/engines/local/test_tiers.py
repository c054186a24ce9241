"""Pages of a real model on their way through host memory and disk: the same tokens as ever."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from dynamo_serve.config import CacheSection
from dynamo_serve.core.limits import Limits
from dynamo_serve.core.loop import Command, Loop, Submit
from dynamo_serve.core.page_pool import PagePool
from dynamo_serve.core.request import Request, TokenEvent
from dynamo_serve.core.scheduler import Scheduler
from dynamo_serve.core.stats import Stats
from dynamo_serve.core.step_cost import StepCost, StepShape
from dynamo_serve.core.tiers import DISK, HOST
from dynamo_serve.directory import Caller
from dynamo_serve.engines.local import LocalEngine
from dynamo_serve.engines.local.background import LEAST, step_back
from dynamo_serve.engines.local.copier import NICE
from dynamo_serve.engines.local.malloc import take_memory, zeros_on_huge_pages
from dynamo_serve.engines.local.tier_stores import SECTOR, DiskStore
from dynamo_serve.errors import ConfigError, EngineStartError
from dynamo_serve.fits import check_disk
from tests.engines.local.driver import GREEDY, make_engine
from tests.engines.local.zoo import checkpoint, expected_tokens
from tests.patience import PATIENCE_S

COUNT = 8
MAX_TURNS = 5000
NUM_PAGES = 24
MIB = 1 / 1024  # in GiB
MODEL = "qwen3"
PROMPT = tuple(random.Random(5).randrange(128) for _ in range(41))  # ten full pages


class Dear(StepCost):
    """Prompt tokens cost so much that everything that can be restored is."""

    def predict(self, shape: StepShape) -> float:
        return float(shape.tokens)


class Served:
    """An engine behind the production loop, turned by hand."""

    def __init__(self, engine: LocalEngine) -> None:
        spec = engine.start()
        pool = PagePool(spec.num_pages, spec.page_size)
        self.scheduler = Scheduler(pool, Limits(), cost=Dear(), tiers=spec.tiers)
        self.spill = self.scheduler.spill
        self.commands: list[Command] = []
        self.events: list[TokenEvent] = []
        self.loop = Loop(
            self.scheduler,
            engine,
            inbox=self._inbox,
            publish=self._publish,
            clock=time.monotonic,
        )

    def _inbox(self, patience: float | None) -> list[Command]:
        commands, self.commands = self.commands, []
        return commands

    def _publish(self, events: list[TokenEvent], stats: Stats) -> None:
        self.events += events

    def ask(self, prompt: tuple[int, ...], salt: str = "") -> tuple[tuple[int, ...], int]:
        """The answer, and how many tokens of the prompt were cached."""
        self.events = []
        now = time.monotonic()
        request = Request(f"r{now}", prompt, COUNT, GREEDY, salt=salt, arrival=now)
        self.commands.append(Submit(request))
        self.until(lambda: any(event.finish for event in self.events))
        cached = next(e.cached_tokens for e in self.events if e.cached_tokens is not None)
        return tuple(t for event in self.events for t in event.token_ids), cached

    def until(self, done: object) -> None:
        assert callable(done)
        end = time.monotonic() + PATIENCE_S
        while not done():
            assert time.monotonic() < end, "it never came to that"
            self.loop.turn()
            self.scheduler.check()

    def flush(self) -> None:
        """Have the pool taken by others, so that only a tier can have what was in it."""
        rng = random.Random(len(self.spill.tiers))
        self.loop.turn()
        self.until(lambda: not self.spill.flights.is_busy)
        while any(key in self.scheduler.pool for key in self.keys(PROMPT)):
            self.ask(tuple(rng.randrange(128) for _ in range(61)))
            self.until(lambda: not self.spill.flights.is_busy)

    def keys(self, prompt: tuple[int, ...], salt: str = "") -> list[bytes]:
        keys: list[bytes] = []
        self.scheduler.pool.extend_keys(keys, prompt, salt, len(prompt) - 1)
        return keys


@contextmanager
def served(**cache: object) -> Iterator[Served]:
    engine = make_engine(checkpoint(MODEL), num_pages=NUM_PAGES, **cache)
    try:
        yield Served(engine)
    finally:
        engine.close()


def expected() -> tuple[int, ...]:
    return expected_tokens(MODEL, PROMPT, COUNT)


def test_a_prefix_goes_to_host_memory_and_comes_back() -> None:
    with served(host_gib=4 * MIB) as server:
        assert server.ask(PROMPT) == (expected(), 0)
        server.flush()
        assert all(key in server.spill.tiers[0] for key in server.keys(PROMPT))
        assert server.ask(PROMPT) == (expected(), 40)
        assert server.spill.num_copied[HOST, 0] == 10
        assert server.scheduler.stats().restored_tokens_total == 40


def test_pages_of_8_bits_go_down_and_come_back_and_have_a_folder_of_their_own(
    tmp_path: Path,
) -> None:
    disk = {"disk_gib": 4 * MIB, "disk_path": str(tmp_path / "pages")}
    with served(**disk) as plain:
        assert plain.ask(PROMPT) == (expected(), 0)
        plain.ask(PROMPT)
        plain.until(lambda: all(key in plain.spill for key in plain.keys(PROMPT)))
    with served(kv_dtype="int8", **disk) as first:
        first.until(lambda: not first.spill.flights.is_busy)
        answer, cached = first.ask(PROMPT)
        assert cached == 0, "pages of the other type were taken"
        assert first.ask(PROMPT) == (answer, 40)
        first.flush()
        assert first.ask(PROMPT) == (answer, 40)
        assert first.spill.num_copied[DISK, 0] == 10
    with served(kv_dtype="int8", **disk) as second:
        second.until(lambda: all(key in second.spill for key in second.keys(PROMPT)))
        assert second.ask(PROMPT) == (answer, 40)
    with served(**disk) as plain:
        plain.until(lambda: all(key in plain.spill for key in plain.keys(PROMPT)))
        assert plain.ask(PROMPT) == (expected(), 40)


def test_a_page_that_changed_in_host_memory_is_computed_again() -> None:
    with served(host_gib=4 * MIB) as server:
        server.ask(PROMPT)
        server.flush()
        third = server.spill.tiers[0].place(server.keys(PROMPT)[3])
        server.loop.engine._ready.copier._stores[HOST]._rows[third.slot][7] ^= 1  # type: ignore[attr-defined]
        assert server.ask(PROMPT) == (expected(), 12)
        assert server.spill.num_failed[HOST] == 1
        assert server.ask(PROMPT) == (expected(), 40)


def test_the_next_server_finds_what_was_used_twice(tmp_path: Path) -> None:
    cache = {"disk_gib": 4 * MIB, "disk_path": str(tmp_path / "pages"), "host_gib": MIB}
    with served(**cache) as first:
        first.ask(PROMPT)
        assert first.ask(PROMPT) == (expected(), 40)
        first.until(lambda: all(key in first.spill.tiers[1] for key in first.keys(PROMPT)))
    with served(**cache) as second:
        second.until(lambda: all(key in second.spill for key in second.keys(PROMPT)))
        assert second.ask(PROMPT) == (expected(), 40)
        assert second.spill.num_copied[DISK, 0] == 10


def test_the_next_server_finds_what_was_apart_with_its_salt_only(tmp_path: Path) -> None:
    cache = {"disk_gib": 4 * MIB, "disk_path": str(tmp_path / "pages")}
    ann, bob = (Caller("default", "").salted(name).salt for name in ("ann", "bob"))
    with served(**cache) as first:
        first.ask(PROMPT, ann)
        assert first.ask(PROMPT, ann) == (expected(), 40)
        first.until(lambda: all(key in first.spill for key in first.keys(PROMPT, ann)))
    with served(**cache) as second:
        second.until(lambda: all(key in second.spill for key in second.keys(PROMPT, ann)))
        assert second.ask(PROMPT, bob) == (expected(), 0)
        assert second.ask(PROMPT) == (expected(), 0)
        assert second.ask(PROMPT, ann) == (expected(), 40)


def test_a_page_that_changed_on_disk_is_computed_again(tmp_path: Path) -> None:
    cache = {"disk_gib": 4 * MIB, "disk_path": str(tmp_path)}
    with served(**cache) as first:
        first.ask(PROMPT)
        first.ask(PROMPT)
        first.until(lambda: all(key in first.spill for key in first.keys(PROMPT)))
        fifth = first.spill.tiers[0].place(first.keys(PROMPT)[5]).slot
        stride = first.loop.engine._ready.copier._stores[DISK]._stride  # type: ignore[attr-defined]
    with (tmp_path / "pages").open("r+b") as file:
        file.seek(fifth * stride + SECTOR + 3)
        file.write(b"\xff\x00\xff")
    with served(**cache) as second:
        second.until(lambda: all(key in second.spill for key in second.keys(PROMPT)))
        assert second.ask(PROMPT) == (expected(), 20)
        assert second.spill.num_failed[DISK] == 1


def test_no_folder_on_the_way_to_pages_is_for_others(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "int8" / "kv-int8", 1, 64, {})
    store.open()
    store.close()
    for folder in (tmp_path / "int8", tmp_path / "int8" / "kv-int8"):
        assert folder.stat().st_mode & 0o077 == 0


def test_a_folder_with_pages_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    cache = {"disk_gib": 4 * MIB, "disk_path": str(tmp_path)}
    with served(**cache) as first:
        first.until((tmp_path / "model.json").exists)
    other = make_engine(checkpoint("llama"), num_pages=NUM_PAGES, **cache)
    with pytest.raises(EngineStartError, match=r"(?s)cache.disk_path.*choose another folder"):
        other.start()
    pages = make_engine(checkpoint(MODEL), num_pages=NUM_PAGES, page_size=8, **cache)
    with pytest.raises(EngineStartError, match="page_size 4, and here it is 8"):
        pages.start()


def test_a_folder_in_use_is_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = {"disk_gib": 4 * MIB, "disk_path": str(tmp_path)}
    caplog.set_level(logging.WARNING)
    with served(**cache) as first:
        first.ask(PROMPT)
        first.ask(PROMPT)
        first.until(lambda: all(key in first.spill for key in first.keys(PROMPT)))
        with served(**cache) as second:
            second.until(lambda: "used by another process" in caplog.text)
            assert second.ask(PROMPT) == (expected(), 0)
            first.loop.engine.close()
            second.until(lambda: len(second.spill.tiers[0]) >= 10)


def test_who_gives_up_waiting_closes_nothing_of_others(tmp_path: Path) -> None:
    first, second = (DiskStore(tmp_path / "tier", 1, 64, {}) for _ in range(2))
    assert first.open() == [] and second.open() is None
    with (tmp_path / "another").open("w") as file:  # has the number that was free again
        second.close()
        file.write("of somebody else")
    first.close()


def test_tiers_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for cache, message in (
        ({"host_gib": 1e6}, "do not fit"),
        ({"host_gib": 1e-7}, "a page takes"),
    ):
        engine = make_engine(checkpoint(MODEL), num_pages=NUM_PAGES, **cache)
        with pytest.raises(EngineStartError, match=message):
            engine.start()


def test_pages_tell_for_themselves_whose_they_are(tmp_path: Path) -> None:
    """Where `model.json` was lost, its own model finds them, and no other."""
    cache = {"disk_gib": 4 * MIB, "disk_path": str(tmp_path)}
    with served(**cache) as first:
        first.ask(PROMPT)
        first.ask(PROMPT)
        first.until(lambda: all(key in first.spill for key in first.keys(PROMPT)))
    for spoiled in ("", "[]", "[" * 100_000):
        (tmp_path / "model.json").write_text(spoiled)
        with served(**cache) as again:
            again.until(lambda: len(again.spill.tiers[0]) >= 10)
            assert again.ask(PROMPT) == (expected(), 40)
    (tmp_path / "model.json").unlink()
    other = make_engine(checkpoint("qwen2"), num_pages=NUM_PAGES, **cache)
    try:
        server = Served(other)
        server.until((tmp_path / "model.json").exists)
        assert not len(server.spill.tiers[0])
    finally:
        other.close()


def test_an_engine_does_without_a_disk_that_cannot_be_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    with served(disk_gib=4 * MIB, disk_path=str(tmp_path / "file")) as server:
        server.until(lambda: "no disk tier" in caplog.text)
        assert server.ask(PROMPT) == (expected(), 0)
        assert server.ask(PROMPT) == (expected(), 40)


def test_a_disk_tier_that_cannot_be_stops_the_start(tmp_path: Path) -> None:
    check_disk(CacheSection(disk_gib=MIB, disk_path=str(tmp_path / "new" / "folder")))
    assert (tmp_path / "new" / "folder").stat().st_mode & 0o077 == 0
    (tmp_path / "file").write_text("in the way")
    for gib, path, message in (
        (1e9, tmp_path, "GiB are free"),
        (MIB, tmp_path / "file", "cache.disk_path"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_disk(CacheSection(disk_gib=gib, disk_path=str(path)))


def test_the_thread_that_takes_the_memory_of_a_pool_gives_way_to_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[int] = []
    monkeypatch.setattr("os.getpriority", lambda which, who: 0)
    monkeypatch.setattr("os.setpriority", lambda which, who, nice: told.append(nice))
    pages = zeros_on_huge_pages((3, 1 << 20), torch.uint8)
    pages[1] = 7
    take_memory([pages]).join(PATIENCE_S)
    assert told == [LEAST]
    assert pages.sum(dim=1).tolist() == [0, 7 << 20, 0]


@pytest.mark.parametrize(("before", "after"), [(0, [NICE]), (15, [])])
def test_threads_that_are_nice_enough_are_left_as_they_are(
    before: int, after: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that was started with `nice` may not become less nice: that would raise."""
    told: list[int] = []
    monkeypatch.setattr("os.getpriority", lambda which, who: before)
    monkeypatch.setattr("os.setpriority", lambda which, who, nice: told.append(nice))
    step_back(NICE)
    assert told == after
