"""A server that only pretends, with delays that are known: what the load generator is held to.

The delays of its n-th completion are drawn from a seed. A body may say how it is to be treated, in
a field `stub`: {"refuse": attempts, "retry_after": seconds, "fail_after": tokens, "cut_after":
tokens, "status": number}.

    python -m bench.stub_server [--seed 0] [--stall AT,SECONDS]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import itertools
import json
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import httptools

from dynamo_serve.bench.precise_loop import new_loop

EVENTS = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
WORD = "word"


@dataclass(frozen=True)
class Delays:
    """Seconds: medians of the first token and of the gaps, and how they spread (0: not at all)."""

    first: float = 0.04
    gap: float = 0.01
    spread: float = 0.4

    def offsets(self, seed: int, number: int, tokens: int) -> list[float]:
        """When each token comes, since the request."""
        rng = random.Random(f"{seed}:{number}")
        medians = (self.first, *[self.gap] * (tokens - 1))
        drawn = (m * math.exp(rng.uniform(-self.spread, self.spread)) for m in medians)
        return list(itertools.accumulate(drawn))


@dataclass
class Stub:
    """What all connections share. `seen` has each body with when it came; in a stall (seconds
    since the first completion, and how long) nothing is answered. `wish` is how bodies are treated
    that do not say so; `facts` what is told at /v1/server."""

    seed: int = 0
    delays: Delays = field(default_factory=Delays)
    stall: tuple[float, float] | None = None
    url: str = ""
    wish: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] | None = None
    seen: list[tuple[float, dict[str, Any]]] = field(default_factory=list)
    hung_up: int = 0
    attempts: Counter[str] = field(default_factory=Counter)
    open: set[Connection] = field(default_factory=set)

    def after_stall(self, at: float) -> float:
        """`at`, or the end of the stall if it falls into it."""
        if self.stall is None or not self.seen:
            return at
        begin = self.seen[0][0] + self.stall[0]
        return begin + self.stall[1] if begin <= at < begin + self.stall[1] else at


class Connection(asyncio.Protocol):
    def __init__(self, stub: Stub) -> None:
        self._stub = stub
        self._loop = asyncio.get_running_loop()
        self._timers: list[asyncio.TimerHandle] = []
        self._body = b""
        self._url = b""
        self._last = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._parser = httptools.HttpRequestParser(self)
        self._stub.open.add(self)

    def close(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._now = time.monotonic()
        self._parser.feed_data(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._stub.open.discard(self)
        self._stub.hung_up += any(timer.when() > self._loop.time() for timer in self._timers)
        for timer in self._timers:
            timer.cancel()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        url, body, self._url, self._body = self._url, self._body, b"", b""
        if url == b"/v1/models":
            self._whole({"data": [{"id": "stub"}]})
        elif url == b"/v1/server" and self._stub.facts is not None:
            self._whole(self._stub.facts)
        elif url == b"/metrics":
            text = (
                f"# TYPE stub_requests_total counter\nstub_requests_total {len(self._stub.seen)}\n"
            )
            self._write(_whole(200, text.encode(), "text/plain"))
        elif body:
            self._complete(json.loads(body), url.endswith(b"/chat/completions"))
        else:
            self._whole({"error": {"message": "no such path"}}, 404)

    def _complete(self, plain: dict[str, Any], is_chat: bool) -> None:
        stub = self._stub
        number = len(stub.seen)
        stub.seen.append((self._now, plain))
        wish = stub.wish | plain.get("stub", {})
        if "status" in wish:
            self._whole({"error": {"message": "as wished"}}, wish["status"])
        elif self._is_refused(plain, wish):
            after = wish.get("retry_after", 1)
            self._whole({"error": {"message": "full"}}, 503, f"retry-after: {after}\r\n")
        elif plain.get("stream"):
            offsets = stub.delays.offsets(stub.seed, number, plain["max_tokens"])
            self._stream(offsets, plain, is_chat, wish)
        else:
            part = {"text": WORD, "finish_reason": "length"}
            self._whole({"choices": [part], "usage": _usage(plain)})

    def _is_refused(self, plain: dict[str, Any], wish: dict[str, Any]) -> bool:
        key = json.dumps(plain)
        self._stub.attempts[key] += 1
        return self._stub.attempts[key] <= int(wish.get("refuse", 0))

    def _stream(
        self, offsets: Sequence[float], plain: dict[str, Any], is_chat: bool, wish: dict[str, Any]
    ) -> None:
        self._timers = []
        self._at(self._now, EVENTS + (_event(_choice("", True)) if is_chat else b""))
        for index, offset in enumerate(offsets):
            if index == wish.get("fail_after"):
                self._at(self._now + offset, _event({"error": {"message": "broke"}}) + DONE)
                return
            if index == wish.get("cut_after"):
                self._timers.append(self._loop.call_at(self._now + offset, self._transport.abort))
                return
            last = _tail(plain, is_chat) if index == len(offsets) - 1 else b""
            self._at(self._now + offset, _token(index, is_chat) + last)

    def _at(self, at: float, data: bytes) -> None:
        # Timers of the same moment come in any order, so no two are of the same.
        self._last = at = max(self._stub.after_stall(at), self._last + 1e-6)
        self._timers.append(self._loop.call_at(at, self._write, data))

    def _write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)

    def _whole(self, plain: dict[str, Any], status: int = 200, headers: str = "") -> None:
        self._write(_whole(status, json.dumps(plain).encode(), "application/json", headers))


def _whole(status: int, body: bytes, kind: str, headers: str = "") -> bytes:
    head = f"HTTP/1.1 {status} Said\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n"
    return (head + headers + "\r\n").encode() + body


def _event(plain: dict[str, Any]) -> bytes:
    return _chunk(b"data: " + json.dumps(plain, separators=(",", ":")).encode() + b"\n\n")


def _chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


DONE = _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


def _choice(text: str, is_chat: bool, finish: str | None = None) -> dict[str, Any]:
    part: dict[str, Any] = {"delta": {"content": text}} if is_chat else {"text": text}
    return {"choices": [{"index": 0, **part, "finish_reason": finish}]}


@functools.cache  # what the stub computes beside its delays makes it late
def _token(index: int, is_chat: bool) -> bytes:
    return _event(_choice(f" {WORD}{index}", is_chat))


def _tail(plain: dict[str, Any], is_chat: bool) -> bytes:
    end = _event(_choice("", is_chat, "length"))
    if plain.get("stream_options", {}).get("include_usage"):
        end += _event({"choices": [], "usage": _usage(plain)})
    return end + DONE


def _usage(plain: dict[str, Any]) -> dict[str, Any]:
    """A word is a token, an id is one, and a message has 3 of its own."""
    said = plain.get("messages")
    if said is not None:
        prompt = sum(len(message["content"].split()) + 3 for message in said)
    else:
        given = plain["prompt"]
        prompt = len(given.split()) if isinstance(given, str) else len(given)
    details = {"prompt_tokens_details": {"cached_tokens": prompt // 2}}
    return {"prompt_tokens": prompt, "completion_tokens": plain["max_tokens"], **details}


async def _serve(stub: Stub, ready: threading.Event, over: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(stub), "127.0.0.1", 0, backlog=2048)
    stub.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    ready.set()
    async with server:
        await over.wait()
        for connection in list(stub.open):
            connection.close()
        await asyncio.sleep(0)


@contextlib.contextmanager
def serving(stub: Stub) -> Iterator[Stub]:
    """The stub in a thread of this process; for tests that time nothing."""
    ready, loop, over = threading.Event(), new_loop(), asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(_serve(stub, ready, over)))
    thread.start()
    try:
        assert ready.wait(10)
        yield stub
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(10)
        loop.close()


async def _announced(stub: Stub) -> None:
    ready = threading.Event()
    task = asyncio.create_task(_serve(stub, ready, asyncio.Event()))
    while not ready.is_set():
        await asyncio.sleep(0)
    print(stub.url, flush=True)
    await task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stall", default="")
    arguments = parser.parse_args()
    at, _, seconds = arguments.stall.partition(",")
    stall = (float(at), float(seconds)) if arguments.stall else None
    with asyncio.Runner(loop_factory=new_loop) as runner, contextlib.suppress(KeyboardInterrupt):
        runner.run(_announced(Stub(arguments.seed, stall=stall)))


if __name__ == "__main__":
    main()
