"""Long texts: they hold up nobody else, and what cannot fit is not tokenized at all."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from dynamo_serve.api import encoding
from dynamo_serve.api.encoding import LONG_CHARACTERS, LongTexts
from dynamo_serve.errors import QuotaExceeded, Unavailable
from dynamo_serve.service import Service, State
from dynamo_serve.text.tokenizer import Tokenizer
from tests.api.live import MAX_MODEL_LEN, config, save_model, serving
from tests.api.stub import StubService, says
from tests.api.test_hang_up import send
from tests.patience import PATIENCE_S

LONG = "hello " * (LONG_CHARACTERS // 6 + 1)
MIDDLE = "hello " * (encoding.INLINE_CHARACTERS // 6 + 1)
MANY = encoding.MOST_OF_A_TENANT  # no pool of threads has more by default
GENERATING: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": LONG},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": LONG}]},
    "/v1/responses": {"input": LONG},
    "/v1/messages": {"messages": [{"role": "user", "content": LONG}], "max_tokens": 1},
    "/v1/prefixes": {"prompt": LONG, "ttl_s": 10},
    "/v1/cache/explain": {"prompt": LONG},
}
SHOWING: dict[str, dict[str, Any]] = {
    "/tokenize": {"prompt": LONG},
    "/v1/completions/render": {"prompt": LONG},
    "/v1/chat/completions/render": GENERATING["/v1/chat/completions"],
    "/v1/responses/input_tokens": GENERATING["/v1/responses"],
}


class Slow:
    """Tokenizing: the long texts that were begun, none of which ends before `go_on`."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.num_begun = 0
        self.go_on = threading.Event()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Generator[Slow]:
    state, encode = Slow(), Tokenizer.encode

    def waiting(self: Tokenizer, text: str, **options: Any) -> list[int]:
        if len(text) > encoding.LONG_CHARACTERS:
            state.num_begun += 1
            state.begun.release()
            assert state.go_on.wait(PATIENCE_S)
        return encode(self, text, **options)

    monkeypatch.setattr(Tokenizer, "encode", waiting)
    yield state
    state.go_on.set()


@pytest.fixture
def base(tokenizer: Tokenizer) -> Generator[str]:
    with serving(StubService(says(tokenizer, "hi")), tokenizer, config()) as url:
        yield url


def post(base: str, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(base + path, json=body)


def test_texts_of_others_do_not_wait_for_long_ones(base: str, slow: Slow) -> None:
    with ThreadPoolExecutor(MANY) as pool:
        asked = list(SHOWING.items()) * (MANY // len(SHOWING))
        long = [pool.submit(post, base, path, body) for path, body in asked]
        try:
            assert slow.begun.acquire(timeout=PATIENCE_S)
            for _ in range(3):
                answer = post(base, "/tokenize", {"prompt": MIDDLE})
                assert answer.json()["count"] > 1
            assert slow.num_begun == 1
        finally:
            slow.go_on.set()
        assert {answer.result().status_code for answer in long} == {200}


@pytest.mark.parametrize("path", GENERATING)
def test_what_cannot_fit_is_refused_unread(base: str, slow: Slow, path: str) -> None:
    answer = post(base, path, GENERATING[path])
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert "at least" in error["message"] and f"may have {MAX_MODEL_LEN}" in error["message"]
    if path != "/v1/messages":
        assert error["code"] == "context_length_exceeded"
    assert slow.num_begun == 0


def test_who_goes_before_its_turn_is_forgotten(base: str, slow: Slow) -> None:
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, base, "/tokenize", {"prompt": LONG})
        assert slow.begun.acquire(timeout=PATIENCE_S)
        for _ in range(3):
            send(base, "/tokenize", {"prompt": LONG}).close()
            for _ in range(3):  # through the server's event loop, until it has seen that
                assert post(base, "/tokenize", {"prompt": "a"}).status_code == 200
        slow.go_on.set()
        assert first.result().status_code == 200
    assert post(base, "/tokenize", {"prompt": LONG}).status_code == 200
    assert slow.num_begun == 2


def test_who_waits_when_the_server_ends_is_told_so(tokenizer: Tokenizer, slow: Slow) -> None:
    stub = StubService(says(tokenizer, "hi"))
    with ThreadPoolExecutor(1) as pool:
        with serving(stub, tokenizer, config(), timeout_graceful_shutdown=0) as base:
            asked = pool.submit(post, base, "/tokenize", {"prompt": LONG})
            assert slow.begun.acquire(timeout=PATIENCE_S)
        answer = asked.result()
    assert answer.status_code == 503 and answer.headers["Retry-After"]
    assert answer.json()["error"]["code"] == "server_shutdown"


def test_so_many_may_wait_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "MOST_OF_A_TENANT", 2)
    monkeypatch.setattr(encoding, "MOST_WAITING", 3)
    go_on = threading.Event()

    async def ask() -> None:
        long_texts = LongTexts()

        def begin(tenant: str) -> asyncio.Task[bool]:
            return asyncio.create_task(long_texts.run(tenant, lambda: go_on.wait(PATIENCE_S)))

        waiting = [begin("a"), begin("a")]
        with pytest.raises(QuotaExceeded, match="2 of your texts"):
            await begin("a")
        waiting.append(begin("b"))
        with pytest.raises(Unavailable, match="Too many"):
            await begin("c")
        go_on.set()
        assert all(await asyncio.gather(*waiting))
        assert await begin("a")

    asyncio.run(ask())


# --- a drain

FITS = "hello " * 20


@contextmanager
def draining(
    service: Service, tokenizer: Tokenizer, slow: Slow, body: dict[str, Any], seconds: float
) -> Generator[tuple[Future[httpx.Response], Future[None]]]:
    """A chat whose text is being tokenized, and the drain of `service` that has begun, with its
    end."""
    loops: list[asyncio.AbstractEventLoop] = []

    async def end() -> None:
        await service.drain(seconds)
        await service.close()

    async def begin() -> None:
        loops.append(asyncio.get_running_loop())
        await Service.start(service)

    service.start = begin  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as pool, serving(service, tokenizer, config()) as base:
        chat = {"messages": [{"role": "user", "content": FITS}], "max_tokens": 4, **body}
        asked = pool.submit(post, base, "/v1/chat/completions", chat)
        assert slow.begun.acquire(timeout=PATIENCE_S)
        ended = asyncio.run_coroutine_threadsafe(end(), loops[0])
        refused = post(base, "/tokenize", {"prompt": "a"})  # the loop has begun with the drain
        assert refused.status_code == 503
        assert service.state is not State.READY
        yield asked, ended
        slow.go_on.set()
        ended.result(PATIENCE_S)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Service:
    monkeypatch.setattr(encoding, "INLINE_CHARACTERS", len(FITS) // 4)
    monkeypatch.setattr(encoding, "LONG_CHARACTERS", len(FITS) // 2)
    return Service(config(), model_path=save_model(tmp_path))


@pytest.mark.parametrize("stream", [False, True])
def test_a_drain_waits_for_texts_and_their_answers(
    service: Service, tokenizer: Tokenizer, slow: Slow, stream: bool
) -> None:
    body = {"stream": stream, "ignore_eos": True}
    with draining(service, tokenizer, slow, body, PATIENCE_S) as (asked, ended):
        assert service.state is State.DRAINING and not ended.done()
        slow.go_on.set()
        answer = asked.result(PATIENCE_S)
        assert answer.status_code == 200
        assert '"finish_reason":"length"' in answer.text
        ended.result(PATIENCE_S)
        assert not service.preparing


def test_a_drain_that_takes_too_long_ends_who_waits(
    service: Service, tokenizer: Tokenizer, slow: Slow
) -> None:
    with draining(service, tokenizer, slow, {}, 0.0) as (asked, _):
        answer = asked.result(PATIENCE_S)
        assert answer.status_code == 503 and answer.headers["Retry-After"]
        assert answer.json()["error"]["code"] == "server_shutdown"
        assert not slow.go_on.is_set()
