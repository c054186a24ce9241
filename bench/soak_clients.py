"""The traffic of a soak: at a pace, not in a loop; most clients behave, some do not."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from bench.survival import Answer, Run, bodies

TENANTS: dict[str, Any] = {"day": {"class": "batch", "weight": 3}, "night": {"class": "batch"}}
# How often each kind of client comes, of a hundred.
KINDS = {"plain": 60, "comes_back": 15, "hangs_up": 8, "slow": 6, "stuck": 2, "wrong": 9}
# More than the buffers of soak.SETTINGS take: 1,500 tokens that come in few events may fit.
SLOW_TOKENS, STUCK_TOKENS = 400, 3500
PATIENCE_S = 10  # server.reader_patience_s
STUCK_S = 60.0
CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
# What is refused, and with which status.
WRONG: tuple[tuple[str, Any, int], ...] = (
    (CHAT, {"messages": HELLO, "max_tokens": -1}, 400),
    (CHAT, {"messages": HELLO, "no_such_field": 1}, 400),
    (CHAT, {"messages": HELLO, "model": "no-such-model"}, 404),
    (CHAT, {"messages": []}, 400),
    (CHAT, {"messages": HELLO, "n": 1000}, 400),
    (PLAIN, {"prompt": "hello", "temperature": "warm"}, 400),
    (PLAIN, {"prompt": [999_999_999]}, 400),
    (PLAIN, {"prompt": "hello " * 20_000}, 400),
    (PLAIN, [1, 2, 3], 400),
    ("/v1/no-such-path", {}, 404),
)
Body = tuple[str, dict[str, Any]]


def asked(outputs: int) -> tuple[list[Body], list[Body]]:
    """Requests whose answers are known from a calm run; the second ones are for slow readers."""
    slow = [
        (PLAIN, {"prompt": f"Chapter {i}. ", "max_tokens": SLOW_TOKENS, "ignore_eos": True,
                 "temperature": 0.8, "seed": i, "stream": True, "return_token_ids": True})
        for i in range(3)
    ]  # fmt: skip
    return bodies(outputs), slow


class Clients:
    """Comes at random times, `rate` times a second, and compares what it gets with `known`."""

    def __init__(self, run: Run, outputs: int, rate: float, failed: Callable[[str], None]) -> None:
        self.run, self.rate, self.failed = run, rate, failed
        self.asked, self.slow = asked(outputs)
        self.known: list[Answer] = []
        self.known_slow: list[Answer] = []
        self.seen: Counter[str] = Counter()
        self.tasks: set[asyncio.Task[None]] = set()

    async def calm(self) -> None:
        """Ask everything once, one after the other, to know the answers."""
        async with self._http("day") as http:
            self.known = [await self.run.ask(http, *body) for body in self.asked]
            self.known_slow = [await self.run.ask(http, *body) for body in self.slow]

    async def come(self, until: float) -> None:
        """Send traffic until a moment of the monotonic clock, and wait for all of it."""
        rng, at = self.run.rng, time.monotonic()
        while (at := at + rng.expovariate(self.rate)) < until:
            await asyncio.sleep(max(0.0, at - time.monotonic()))
            (kind,) = rng.choices(list(KINDS), list(KINDS.values()))
            task = asyncio.create_task(self._one(kind, rng.choice(list(TENANTS))))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        await asyncio.gather(*self.tasks)

    async def _one(self, kind: str, tenant: str) -> None:
        self.run.num_requests += 1
        try:
            await getattr(self, f"_{kind}")(tenant)
        except (RuntimeError, httpx.HTTPError, KeyError) as error:
            self.failed(f"{kind}: {type(error).__name__} {error}")
        else:
            self.seen[kind] += 1

    async def _plain(self, tenant: str) -> None:
        number = self.run.rng.randrange(len(self.asked))
        async with self._http(tenant) as http:
            same(await self.run.ask(http, *self.asked[number]), self.known[number], number)

    async def _comes_back(self, tenant: str) -> None:
        """Its connection breaks again and again; each time it goes on where it was."""
        rng, answer = self.run.rng, Answer()
        number = rng.choice([i for i, (_, body) in enumerate(self.asked) if body["stream"]])
        async with self._http(tenant) as http:
            while not answer.is_done:
                self.run.num_resumed += bool(answer.last_id)
                cut = rng.choice([float("inf"), rng.randrange(700, 9000)])
                await self.run.read(http, answer, *self.asked[number], cut=cut)
                await asyncio.sleep(rng.choice([0.0, 0.0, rng.uniform(0, 5)]))
        same(answer, self.known[number], number)

    async def _hangs_up(self, tenant: str) -> None:
        """Leaves in mid-stream, or while it waits for a whole answer, and never comes back."""
        rng = self.run.rng
        body = new_text(rng, 200)
        async with self._http(tenant) as http:
            if rng.random() < 0.5:
                await self.run.read(http, Answer(), PLAIN, body, cut=rng.randrange(1, 9000))
                return
            whole = http.post(self.run.base + PLAIN, json={**body, "stream": False})
            try:
                await asyncio.wait_for(whole, rng.uniform(0.01, 0.5))
            except TimeoutError:
                return

    async def _slow(self, tenant: str) -> None:
        """Reads nothing for a while, so that its request is parked, and then all of it."""
        number = self.run.rng.randrange(len(self.slow))
        seconds = self.run.rng.uniform(1, 0.6 * PATIENCE_S)
        async with self._http(tenant, pause=seconds) as http:
            same(await self.run.ask(http, *self.slow[number]), self.known_slow[number], number)

    async def _stuck(self, tenant: str) -> None:
        """Reads nothing until it is cut off."""
        body, answer = new_text(self.run.rng, STUCK_TOKENS), Answer()
        try:
            async with self._http(tenant, pause=STUCK_S) as http:
                await self.run.read(http, answer, PLAIN, body, cut=float("inf"))
        except (httpx.ReadError, httpx.RemoteProtocolError):
            return
        raise RuntimeError("who read nothing was not cut off")

    async def _wrong(self, tenant: str) -> None:
        path, body, status = self.run.rng.choice(WRONG)
        async with self._http(tenant) as http:
            response = await http.post(self.run.base + path, json=body)
        if response.status_code != status or "error" not in response.json():
            raise RuntimeError(f"{path}: {response.status_code} instead of {status}")

    def _http(self, tenant: str, *, pause: float = 0.0) -> httpx.AsyncClient:
        """A client with a connection of its own; with a pause it has small buffers, and reads on
        so many seconds after the headers have come.

        httpx makes them small after it has connected and promised the server more room. What was
        sent into that is dropped, and once the server has closed, its kernel tries again for less
        than two minutes only: who had all of the answer coming then is never told another byte.
        """

        async def wait(_: httpx.Response) -> None:
            await asyncio.sleep(pause)

        small = [(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)]
        return httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(socket_options=small if pause else None),
            event_hooks={"response": [wait] if pause else []},
            headers={
                "Authorization": f"Bearer {tenant}",
                "Connection": "close",
                "Accept": "text/event-stream, application/json",
            },
            timeout=120,
        )


def new_text(rng: random.Random, tokens: int) -> dict[str, Any]:
    """A request that nobody has asked before: it finds no cached pages, and leaves some."""
    words = " ".join(rng.choice(("sun", "rain", "road", "ship", "gold")) for _ in range(40))
    return {"prompt": f"{rng.random()} {words}", "max_tokens": tokens, "ignore_eos": True,
            "stream": True, "return_token_ids": True}  # fmt: skip


def same(answer: Answer, known: Answer, number: int) -> None:
    if answer != known:
        raise RuntimeError(f"request {number}: another answer than in the calm run")


def totals(seen: Counter[str]) -> Sequence[str]:
    return [f"{count} {kind}" for kind, count in sorted(seen.items())]
