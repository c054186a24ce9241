"""What a server records: one line for each request, whatever became of it, and no text."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import time
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from dynamo_serve import recording, recording_files, settings, trace
from dynamo_serve.config import Config, RecordSection, ServerSection
from dynamo_serve.core.engine import EngineSpec
from dynamo_serve.core.prefix_index import shared_keys
from dynamo_serve.core.request import Finish, Pooling, Request, TokenEvent
from dynamo_serve.core.stats import Stats, StepStats
from dynamo_serve.core.step_cost import StepShape
from dynamo_serve.core.tenant import Quota, Tenancy, Tenant
from dynamo_serve.delivery import Delivery, nobody
from dynamo_serve.directory import digest
from dynamo_serve.errors import ConfigError, EngineFailure, QuotaExceeded, Unavailable
from dynamo_serve.observer import NoObserver
from dynamo_serve.prefixes import Head
from dynamo_serve.recording import Recorder
from dynamo_serve.recording_files import PageNumbers, TraceFiles, check_folder
from dynamo_serve.recording_lines import Lines, wishes
from dynamo_serve.service import Service
from dynamo_serve.trace import Arrival, Header, Line, Step
from tests.patience import PATIENCE_S
from tests.test_cli import serving
from tests.test_readers import impatient
from tests.test_service import collect, config_of, kill_engine, run, until
from tests.test_service import folder as folder  # noqa: PLC0414 - a fixture

PAGE = 4  # tokens, in `config_of`
SECRET = "the launch code is swordfish"
KEY = "key-of-shop-with-enough-characters"


def recorded(config: Config, path: Path, **more: Any) -> Config:
    return replace(config, record=RecordSection(path=str(path), **more))


def recorder_of(config: Config, decode: Any = str) -> Recorder:
    return Recorder(config, NoObserver(), decode, "tiny")


def lines_of(path: Path) -> tuple[Header, list[Arrival], list[Step]]:
    """Everything in a folder, in the order in which it was written."""
    header, lines = Header(), list[Line]()
    for part, file in enumerate(sorted(path.glob(recording_files.PATTERN))):
        header, found = trace.read(file)
        assert header.part == part
        lines += found
    arrivals = [line for line in lines if isinstance(line, Arrival)]
    return header, arrivals, [line for line in lines if isinstance(line, Step)]


class Recorded:
    """A service that is recorded into `path`."""

    def __init__(self, config: Config, folder: str, path: Path, **more: Any) -> None:
        config = recorded(config, path, **more)
        self.recorder = recorder_of(config)
        self.service = Service(config, model_path=folder, observer=self.recorder)

    async def __aenter__(self) -> Service:
        await self.service.start()
        self.recorder.begin(self.service.spec, Tenancy())
        return self.service

    async def __aexit__(self, *_: object) -> None:
        await self.service.close()
        self.recorder.close()
        assert not self.recorder.trouble and not self.recorder.num_dropped


def test_one_line_for_each_request_also_when_engines_are_killed(
    folder: str, tmp_path: Path
) -> None:
    async def main() -> None:
        async with Recorded(config_of(True), folder, tmp_path / "t") as service:
            requests = [Request(f"r{i}-0", (1, 2, 3, 4, 5, i), 200 + i) for i in range(6)]
            requests = [replace(r, arrival=time.monotonic()) for r in requests]
            tasks = [asyncio.create_task(collect(service, r)) for r in requests]
            for count in (1, 2):
                await until(lambda: service.stats.num_running > 0)
                kill_engine(service)
                await until(lambda count=count: service.engine.num_restarts == count)  # type: ignore[misc]
            await asyncio.gather(*tasks)
        header, arrivals, steps = lines_of(tmp_path / "t")
        assert (header.model, header.page_size, header.spec["num_pages"]) == ("tiny", PAGE, 2048)
        assert header.settings.pop("scheduler.max_step_ms") == Config().scheduler.max_step_ms
        kept = ("scheduler.", "cache.stale_s", "cache.prefix_sharing", "cache.pinned_fraction")
        assert {k: v for k, v in header.settings.items() if not k.startswith(kept)} == {
            "engine.kind": "fake",
            "cache.page_size": PAGE,
            "cache.num_pages": 2048,
        }
        assert sorted(a.output_tokens for a in arrivals) == [200 + i for i in range(6)]
        assert {a.ended for a in arrivals} == {"length"}
        # Six tokens each: one page that all have in common, and what is behind it nobody's else.
        assert {a.pages for a in arrivals} == {((0, 1),)}
        own = [set(range(*_span(run))) for a in arrivals for run in a.output_pages]
        assert (
            sum(map(len, own))
            == len(set().union(*own))
            == sum((206 + i) // 4 - 1 for i in range(6))
        )
        for arrival in arrivals:
            assert arrival.waited is not None and arrival.first_token and arrival.end
            assert 0 <= arrival.waited <= arrival.first_token <= arrival.end
        assert steps and all(StepShape(*step.shape).tokens > 0 for step in steps)  # type: ignore[arg-type]

    run(main)


def test_who_asked_for_a_vector_is_recorded_so(folder: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with Recorded(config_of(True), folder, tmp_path / "t") as service:
            request = Request("v-0", (1, 2, 3, 4, 5), 0, pooling=Pooling("mean"))
            request = replace(request, arrival=time.monotonic())
            async with aclosing(service.generate(request)) as events:
                assert [event.finish async for event in events] == [Finish.STOP]
        _, (arrival,), _ = lines_of(tmp_path / "t")
        assert (arrival.pooling, arrival.ended, arrival.prompt_tokens) == ("mean", "stop", 5)
        assert (arrival.output_tokens, arrival.max_tokens) == (0, 0)

    run(main)


def _span(pages: tuple[int, int]) -> tuple[int, int]:
    first, count = pages
    return first, first + count


def test_readers_that_hang_up_or_are_slow_and_streams_that_go_on(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamo_serve.deliveries.SLOW_SECONDS", 0.0)

    async def main() -> None:
        async with Recorded(impatient(step_ms=3.0), folder, tmp_path / "t") as service:
            for name, keep in [("left-0", 0.0), ("back-0", PATIENCE_S), ("slow-0", 0.0)]:
                request = Request(name, (1, 2), 500, arrival=time.monotonic())
                async with aclosing(service.generate(request, keep_seconds=keep)) as events:
                    num_read = len((await anext(events)).token_ids)
                    if name == "slow-0":
                        await until(lambda: "slow-0" in service.deliveries.kept)
                        assert [e async for e in events]
            async with aclosing(service.rejoin("back-0", num_read)) as events:
                assert [event async for event in events][-1].finish is Finish.LENGTH
            await until(lambda: service.num_live == 0)
        arrivals = {a.output_tokens: a for a in lines_of(tmp_path / "t")[1]}
        whole = [a for a in lines_of(tmp_path / "t")[1] if a.ended == "length"]
        (left,) = [a for n, a in arrivals.items() if n < 500]
        assert (left.ended, left.reading) == ("cancelled", None)
        assert left.gone_at and left.first_token and left.gone_at >= left.first_token
        slow, back = sorted(whole, key=lambda a: a.reading is None)
        assert slow.reading and slow.gone_at is None
        assert (back.reading, back.gone_at) == (None, None)

    run(main)


def test_refusals_are_recorded_and_so_is_who_came_too_early(folder: str, tmp_path: Path) -> None:
    async def main() -> None:
        recorded = Recorded(config_of(True), folder, tmp_path / "t")
        with pytest.raises(Unavailable):
            await collect(recorded.service, Request("early-0", (1, 2, 3, 4), 1))
        async with recorded as service:
            quota = Quota(requests_per_minute=1)
            service.configure(Tenancy({"default": Tenant("default", quota=quota)}))
            await collect(service, Request("a-0", (1,), 1, arrival=time.monotonic()))
            with pytest.raises(QuotaExceeded):
                await collect(service, Request("b-0", (1,), 1, arrival=time.monotonic()))
        early, good, late = lines_of(tmp_path / "t")[1]
        assert (early.ended, early.status, early.retry_after) == ("refused", 503, 2.0)
        assert (early.prompt_tokens, early.pages) == (4, ((0, 1),))
        assert (good.ended, good.status) == ("length", 200)
        assert (late.ended, late.status) == ("refused", 429)
        assert late.retry_after and late.retry_after > 1

    run(main)


# --- over HTTP, as users have it


def test_a_server_records_what_clients_ask_and_not_what_they_say(tmp_path: Path) -> None:
    tenants = tmp_path / "tenants.yaml"
    entry = {"keys": [f"sha256:{digest(KEY.encode())}"], "salt": "pepper", "class": "patient"}
    classes = {"patient": {"deadline_ms": 90_000}}
    tenants.write_text(yaml.safe_dump({"tenants": {"shop": entry}, "classes": classes}))
    folder = tmp_path / "traces"
    flags = ("--tenants", str(tenants), "--set", f"record.path={folder}")
    with serving(*flags) as server:
        head = {"Authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=server.url, headers=head, timeout=PATIENCE_S) as client:
            ask: dict[str, Any] = {"prompt": SECRET * 9, "max_tokens": 5, "ignore_eos": True}
            two = {**ask, "n": 2, "prompt_cache_key": "my secret group", "priority": 3}
            assert client.post("/v1/completions", json=two).status_code == 200
            late = {**ask, "deadline_ms": 60_000, "prompt_cache_key": "my secret group"}
            assert client.post("/v1/completions", json=late).status_code == 200
            assert client.post("/v1/completions", json={**ask, "n": 99}).status_code == 400
            apart = {**late, "cache_salt": "a pinch of cinnamon"}
            assert client.post("/v1/completions", json=apart).status_code == 200
            told = client.get("/v1/server").json()["recording"]
            assert told == {"state": "on", "text": False}
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE_S) == 0
    header, arrivals, _ = lines_of(folder)
    assert [a.num_choices for a in arrivals[:2]] == [2, 0]
    first, second, third, fourth = arrivals
    assert first.call == second.call == 0 and third.call is None
    assert first.group == second.group == third.group != ""
    assert (first.priority, first.tenant, first.is_stream) == (3, "shop", False)
    assert third.deadline == pytest.approx(60, abs=10) and not third.has_class_deadline
    assert first.deadline == pytest.approx(90, abs=10) and first.has_class_deadline
    assert third.pages == first.pages and third.cached_tokens >= 16
    assert {fourth.salt, fourth.group}.isdisjoint({"", first.salt, first.group})
    assert fourth.cached_tokens == 0 and fourth.pages[0][0] > first.pages[0][0], "pages of its own"
    assert header.tenancy["tenants"]["shop"]["weight"] == 1.0
    (file,) = folder.glob("*")
    assert file.stat().st_mode & 0o777 == 0o600
    written = file.read_text()
    for word in ("swordfish", "secret", "pepper", "cinnamon", KEY, str(tenants)):
        assert word not in written
    for word in (digest(KEY.encode()), digest(b"a pinch of cinnamon")):
        assert word not in written
    numbers = [number for run in first.pages for number in run]
    assert numbers == [0, first.prompt_tokens // header.page_size]


def test_text_is_recorded_on_request_only_and_clients_can_see_that(tmp_path: Path) -> None:
    flags = ("--set", f"record.path={tmp_path}", "--set", "record.text=true")
    with serving(*flags) as server:
        ask = {"prompt": SECRET, "max_tokens": 2}
        assert httpx.post(server.url + "/v1/completions", json=ask).status_code == 200
        assert httpx.get(server.url + "/v1/server").json()["recording"]["text"] is True
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE_S) == 0
    (arrival,) = lines_of(tmp_path)[1]
    assert arrival.text is not None and SECRET in arrival.text


def test_what_a_killed_server_has_recorded_can_be_read(tmp_path: Path) -> None:
    with serving("--set", f"record.path={tmp_path}") as server:
        ask = {"prompt": SECRET, "max_tokens": 2}
        count = 0
        while not count:  # until the writer has looked into its queue
            assert httpx.post(server.url + "/v1/completions", json=ask).status_code == 200
            found = httpx.get(server.url + "/metrics").text.partition(
                "\ndserve_record_lines_total "
            )
            count = int(float(found[2].split()[0]))
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(PATIENCE_S)
    _, arrivals, steps = lines_of(tmp_path)
    assert len(arrivals) + len(steps) >= count


# --- the queue and the files


def ended(number: int, tokens: int = 3) -> Delivery:
    delivery = Delivery(Request(f"r{number}-0", tuple(range(tokens)), 1), 0.0, nobody)
    delivery.take(TokenEvent(f"r{number}-0", (1,), finish=Finish.LENGTH), 1.0)
    return delivery


def begun(recorder: Recorder) -> Recorder:
    recorder.begin(EngineSpec(256, PAGE, 64, 400, {"device": "none"}), Tenancy())
    return recorder


def test_what_does_not_fit_into_the_queue_is_dropped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "MOST_QUEUED", 10)
    monkeypatch.setattr(recording, "MOST_QUEUED_TOKENS", 100)
    recorder = recorder_of(recorded(Config(), tmp_path))
    for number in range(15):
        recorder.on_end(ended(number), 2.0)
    assert recorder.num_dropped == 5
    begun(recorder).close()
    assert (recorder.num_lines, len(lines_of(tmp_path)[1])) == (10, 10)
    large = recorder_of(recorded(Config(), tmp_path))
    large.on_end(ended(0, tokens=101), 2.0)
    assert large.num_dropped == 1


def test_steps_are_recorded_so_many_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("dynamo_serve.recording.time.monotonic", lambda: now)
    recorder = recorder_of(recorded(Config(), tmp_path, steps=10))
    step = StepStats("decode", 0.001, 1, 1, shape=(0, 0, 1, 5, 0, 0))
    for _ in range(1000):
        now += 0.002
        recorder.on_stats(Stats(step=step))
        recorder.on_stats(Stats(step=step._replace(shape=())))  # it was run again, or none of it
        recorder.on_stats(Stats())
    assert 20 <= len(recorder._queue) <= 31  # in two seconds, and one in advance


def test_a_full_disk_ends_the_recording_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    written = os.write
    room = 2000

    def write(fd: int, data: bytes) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = written(fd, data[:room])
        room -= count
        return count

    monkeypatch.setattr("dynamo_serve.recording_files.os.write", write)
    recorder = begun(recorder_of(recorded(Config(), tmp_path)))
    for number in range(100):
        recorder.on_end(ended(number), 2.0)
    deadline = time.monotonic() + PATIENCE_S
    while not recorder.trouble:
        assert time.monotonic() < deadline
        recorder._thread.join(0.01)
    recorder._thread.join(PATIENCE_S)
    recorder.on_end(ended(100), 2.0)
    facts = recorder.facts()["recording"]
    assert facts == {"state": "stopped", "text": False, "trouble": "No space left on device"}
    assert recorder.num_lines + recorder.num_dropped == 101
    assert len(lines_of(tmp_path)[1]) == recorder.num_lines  # and no half line
    assert [r.message for r in caplog.records if r.levelname == "ERROR"] == [
        "recording has ended: No space left on device; requests go on"
    ]
    recorder.close()


def test_files_are_begun_anew_and_the_oldest_go(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not ours")
    files = TraceFiles(tmp_path, lambda n: json.dumps({"part": n}), max_bytes=100, keep=3)
    for number in range(10):
        files.write([f"{number}" * 60])
    files.close()
    left = sorted(tmp_path.glob(recording_files.PATTERN))
    assert [json.loads(path.read_text().splitlines()[0])["part"] for path in left] == [7, 8, 9]
    assert [path.read_text().splitlines()[1][0] for path in left] == ["7", "8", "9"]
    assert (tmp_path / "notes.txt").exists()


def test_nothing_is_written_to_a_file_that_was_deleted(tmp_path: Path) -> None:
    files = TraceFiles(tmp_path, str, max_bytes=1000, keep=1)
    files.write(["1"])
    for path in tmp_path.glob(recording_files.PATTERN):
        path.unlink()
    with pytest.raises(OSError, match="deleted"):
        files.write(["2"])
    files.close()


def test_the_file_just_begun_is_kept_when_the_clock_has_gone_back(tmp_path: Path) -> None:
    (tmp_path / "trace-99991231T000000Z-1-00000.jsonl").write_text("of another time")
    files = TraceFiles(tmp_path, str, max_bytes=1000, keep=1)
    files.write(["1"])
    files.close()
    (left,) = tmp_path.glob(recording_files.PATTERN)
    assert left.read_text() == "0\n1\n"


def test_a_folder_that_cannot_be_written_to_is_named_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"record\.path = .*/file/x': Not a directory; name a"):
        check_folder(str(tmp_path / "file" / "x"))


def test_settings_of_a_recording_need_a_folder() -> None:
    flags = [settings.from_set("record.text=true")]
    with pytest.raises(ConfigError, match=r"record\.text: nothing is recorded without a folder"):
        settings.load(None, {}, flags)


def test_no_free_text_of_the_settings_is_told() -> None:
    server = ServerSection(api_keys=("k",), tenants_file="/home/x", port=1, handover="/s")
    told = wishes(Config(server=server)).items()
    assert {key: value for key, value in told if key.startswith("server.")} == {"server.port": 1}
    assert not any(isinstance(value, str) and "/" in value for _, value in told)


# --- numbers of pages


def test_pages_are_numbered_as_they_appear_and_new_ones_follow_each_other() -> None:
    pages = PageNumbers(2)
    assert pages.runs((1, 2, 3, 4, 5), "", 5) == (((0, 2),), ())
    assert pages.runs((1, 2, 9, 9, 9, 9), "", 3) == (((0, 1),), ((2, 2),))
    assert pages.runs((1, 2, 9, 9, 9, 9, 5, 5), "", 8) == (((0, 1), (2, 3)), ())
    assert pages.runs((1, 2), "another tenant", 2) == (((5, 1),), ())
    assert pages.runs((9, 9), "", 2) == (((6, 1),), ())  # the text before it is another


def test_heads_of_prompts_are_remembered_longest() -> None:
    pages = PageNumbers(1, most=4)
    assert pages.runs((1, 2, 3), "", 3) == (((0, 3),), ())
    assert pages.runs((7, 8, 9), "", 3) == (((3, 3),), ())
    assert pages.runs((1, 2), "", 2) == (((0, 1), (6, 1)), ())  # of the first the head is left


def test_failures_have_the_status_of_the_answer() -> None:
    delivery = Delivery(Request("a-0", (1,), 1), 0.0, nobody)
    delivery.fail(EngineFailure("bad"))
    line = Lines(0.0, PageNumbers(PAGE)).of_delivery(delivery, 1.0)
    assert (line.ended, line.status) == ("error", 500)


def test_a_stop_string_is_no_hang_up() -> None:
    delivery = Delivery(Request("a-0", (1,), 1), 0.0, nobody)
    delivery.is_cancelled = True
    delivery.leave(0.5)
    delivery.take(TokenEvent("a-0", finish=Finish.CANCELLED), 1.0)
    line = Lines(0.0, PageNumbers(PAGE)).of_delivery(delivery, 1.0)
    assert (line.ended, line.gone_at) == ("stop", None)


def test_heads_that_tenants_share_have_the_same_numbers_and_are_nobodys_requests(
    folder: str, tmp_path: Path
) -> None:
    head = tuple(range(2 * PAGE))

    async def main() -> None:
        settings = recorded(config_of(False), tmp_path / "t")
        recorder = recorder_of(settings)
        service = Service(settings, model_path=folder, observer=recorder)
        service.declare([Head("rules", head, tuple(shared_keys(head, PAGE)))])
        await service.start()
        recorder.begin(service.spec, Tenancy(), service.prefixes.shared_keys)
        for salt in ("shop", "bank"):
            ids = (*head, *range(100, 100 + PAGE), 7)
            await collect(service, Request(f"{salt}-0", ids, 2, salt=salt, tenant=salt))
        await service.close()
        recorder.close()
        _, arrivals, _ = lines_of(tmp_path / "t")
        assert [a.tenant for a in arrivals] == ["shop", "bank"]
        assert [a.pages for a in arrivals] == [((0, 3),), ((0, 2), (3, 1))]

    run(main)


def test_files_that_others_have_put_into_the_folder_stay(tmp_path: Path) -> None:
    other = tmp_path / "trace-of-monday.jsonl"
    other.write_text("mine\n")
    files = TraceFiles(tmp_path, lambda part: f"head {part}", max_bytes=10, keep=1)
    for _ in range(3):
        files.write(["x" * 20])
    files.close()
    assert other.read_text() == "mine\n"
    assert len(list(tmp_path.glob(recording_files.PATTERN))) == 1
