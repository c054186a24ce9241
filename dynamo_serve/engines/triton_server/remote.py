"""All servers, and the event loop that talks to them, in a thread of the engine process."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any

from dynamo_serve.config import TritonSection
from dynamo_serve.engines.triton_server import faults
from dynamo_serve.engines.triton_server.dialects import Piece, triton_dialect
from dynamo_serve.engines.triton_server.endpoints import Budget, Endpoint, pick
from dynamo_serve.engines.triton_server.faults import Fault
from dynamo_serve.engines.triton_server.server import Server, Spoken
from dynamo_serve.engines.triton_server.stream import Stream
from dynamo_serve.errors import EngineStartError

log = logging.getLogger(__name__)

Pieces = AsyncGenerator[Piece, None]

RETRY_SECONDS = 0.05  # before the first other try, on average; then twice that, and so on
CLOSE_SECONDS = 5.0
NOBODY = "no Triton server is there to answer"


class Remote:
    """`start`, `begin`, `cancel` and `close` are for the engine's thread, the rest for its own."""

    def __init__(self, settings: TritonSection, rng: random.Random | None = None) -> None:
        self.spoken: Spoken
        self.canary_count: int | None = None  # of the canary's tokens, by a server
        self._settings = settings
        self._rng = rng or random.Random()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="triton", daemon=True)
        self._endpoints = [Endpoint(address) for address in settings.endpoints]
        self._servers: dict[Endpoint, Server] = {}
        self._budget = Budget()
        self._tasks: set[asyncio.Task[None]] = set()
        self._began = uuid.uuid4().hex

    # ── the engine's thread ──────────────────────────────────────────────────

    def start(self) -> None:
        """Raises `EngineStartError` if no server has the model."""
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()

    def begin(self, stream: Stream) -> None:
        self._loop.call_soon_threadsafe(self._begin, stream)

    def cancel(self, stream: Stream) -> None:
        self._loop.call_soon_threadsafe(self._cancel, stream)

    def told(self) -> dict[str, Any]:
        """What has become of requests, by server, as plain data; from any thread."""
        endpoints = {endpoint.address: endpoint.told() for endpoint in self._endpoints}
        return {"began": self._began, "endpoints": endpoints}

    def close(self) -> None:
        """May be called twice."""
        if self._thread.is_alive():
            closing = asyncio.run_coroutine_threadsafe(self._close(), self._loop)
            try:
                closing.result(CLOSE_SECONDS)
            except TimeoutError:
                log.warning("what goes on with the Triton servers does not end, and is left behind")
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(CLOSE_SECONDS)
        if not self._loop.is_running():
            self._loop.close()

    # ── the loop's thread ────────────────────────────────────────────────────

    async def _start(self) -> None:
        for endpoint in self._endpoints:
            self._servers[endpoint] = Server(endpoint.address, self._settings)
        self._opened = asyncio.Event()
        tries = [self._servers[endpoint].declared() for endpoint in self._endpoints]
        found = await asyncio.gather(*tries, return_exceptions=True)
        for each in found:
            if isinstance(each, BaseException) and not isinstance(each, Fault):
                raise each
        declared = [each for each in found if not isinstance(each, BaseException)]
        if not declared:
            raise EngineStartError(self._nobody(found))
        dialect = triton_dialect(declared[0], self._settings.dialect, self._settings.model)
        self.spoken = Spoken(dialect, declared[0])
        checks = await asyncio.gather(*map(self._check, self._endpoints), return_exceptions=True)
        if not any(endpoint.is_open for endpoint in self._endpoints):
            raise EngineStartError(self._nobody(checks))
        for endpoint, fault in zip(self._endpoints, checks, strict=True):
            if not endpoint.is_open:
                self._eject(endpoint, str(fault))

    def _nobody(self, faults: list[Any]) -> str:
        said = "; ".join(
            f"{endpoint.address}: {fault}"
            for endpoint, fault in zip(self._endpoints, faults, strict=True)
        )
        return (
            f"no server in triton.endpoints serves the model {self._settings.model!r} ({said}): "
            "start one, or set triton.endpoints and triton.model to what there is"
        )

    async def _close(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(server.close() for server in self._servers.values()))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _begin(self, stream: Stream) -> None:
        stream.task = self._spawn(self._run(stream))

    def _cancel(self, stream: Stream) -> None:
        if stream.task is not None:
            stream.task.cancel()

    # ── one request ──────────────────────────────────────────────────────────

    async def _run(self, stream: Stream) -> None:
        try:
            await self._try(stream)
        except Fault as fault:
            log.warning("request %s failed after %d tokens: %s", *stream.so_far, fault)
            stream.fail(fault)
        except Exception as error:  # ours; whoever waits has to know
            log.exception("request %s failed", stream.seq_id)
            stream.fail(Fault(f"{type(error).__name__}: {error}"))

    async def _try(self, stream: Stream) -> None:
        """On one server after another, as long as nothing has been said. Raises `Fault`."""
        tried: list[Endpoint] = []
        before = Fault(NOBODY, "unavailable")
        stream.end_by = self._loop.time() + self._settings.total_timeout_s
        while True:
            endpoint = await self._open_one(tried)
            if endpoint is None:
                raise before
            if not tried:  # a server is not late because none was open
                stream.first_by = self._loop.time() + self._settings.first_token_timeout_s
            tried.append(endpoint)
            try:
                await self._follow(endpoint, stream)
                self._budget.earn()
                return
            except Fault as fault:
                if stream.is_over:
                    return
                if fault.ejects or (fault.is_silence and endpoint.is_silent()):
                    self._eject(endpoint, str(fault))
                is_last = len(tried) > self._settings.retries
                if not fault.elsewhere or is_last or not self._budget.spend():
                    raise
                if not stream.begin_again():
                    raise
                endpoint.counts.retries += 1
                log.info("request %s is tried again: %s", stream.seq_id, fault)
                before = fault
            await asyncio.sleep(RETRY_SECONDS * 2 ** len(tried) * self._rng.random())

    async def _open_one(self, tried: list[Endpoint]) -> Endpoint | None:
        """A server to ask; waits for one to come back, but not for long."""
        try:
            async with asyncio.timeout(self._settings.connect_timeout_s):
                while (endpoint := pick(self._endpoints, tried, self._rng)) is None:
                    self._opened.clear()
                    await self._opened.wait()
                return endpoint
        except TimeoutError:
            return None

    async def _follow(self, endpoint: Endpoint, stream: Stream) -> None:
        """Hand on what a server says until its answer is over. Raises `Fault`."""
        counts, outcome = endpoint.counts, "failed"
        endpoint.in_flight += 1
        try:
            await self._hand_on(endpoint, stream)
            outcome = "done"
        except Fault as fault:
            outcome = "done" if stream.is_over else fault.outcome
            raise
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        finally:
            endpoint.in_flight -= 1
            counts.outcomes[outcome] += 1

    async def _hand_on(self, endpoint: Endpoint, stream: Stream) -> None:
        began, has_begun = self._loop.time(), False
        server = self._servers[endpoint]
        pieces = server.stream(stream.seq_id, stream.ask, self.spoken, stream.priority)
        async with aclosing(pieces):
            # To the end of the stream, also behind that of the answer: leaving is cancelling.
            while (piece := await self._next(pieces, stream)) is not None:
                endpoint.answered()
                if not has_begun:
                    endpoint.counts.ttft.observe(self._loop.time() - began)
                    has_begun = True
                if not stream.is_over:
                    stream.push(piece)
        if not stream.is_over:
            if "finish_reason" not in self.spoken.dialect.infers:
                raise Fault(faults.UNFINISHED, "unavailable", elsewhere=True)
            stream.end()

    async def _next(self, pieces: Pieces, stream: Stream) -> Piece | None:
        until, limit = stream.first_by, faults.FIRST_TOKEN
        if stream.num_tokens:
            until, limit = self._loop.time() + self._settings.idle_timeout_s, faults.IDLE
        if stream.end_by < until:
            until, limit = stream.end_by, faults.TOTAL
        try:
            async with asyncio.timeout_at(until):
                return await anext(pieces, None)
        except TimeoutError:
            raise faults.late(limit, self._settings) from None

    # ── servers that come and go ─────────────────────────────────────────────

    def _eject(self, endpoint: Endpoint, why: str) -> None:
        """No more requests until a canary comes back; of many failures at once one counts."""
        if endpoint.is_open or not endpoint.num_ejections:
            pause = endpoint.eject()
            endpoint.counts.ejections += 1
            log.warning("%s gets no requests for %g s: %s", endpoint.address, pause, why)
            self._spawn(self._look_again(endpoint, pause))

    async def _look_again(self, endpoint: Endpoint, pause: float) -> None:
        began = time.monotonic()
        while not endpoint.is_open:
            await asyncio.sleep(pause * (0.75 + 0.5 * self._rng.random()))
            try:
                await self._check(endpoint)
            except Exception as error:  # whatever it is: it will be looked at again
                pause = endpoint.eject()
                log.info("%s is still not there: %s", endpoint.address, error)
        log.warning("%s is back after %.1f s", endpoint.address, time.monotonic() - began)

    async def _check(self, endpoint: Endpoint) -> None:
        """Let it have requests if it is ready, has the same model and answers. Raises `Fault`."""
        server = self._servers[endpoint]
        if await server.declared() != self.spoken.declared:
            raise Fault("its model declares other inputs or outputs than that of the first server")
        count = await server.canary(self.spoken)
        self.canary_count = self.canary_count if count is None else count
        endpoint.is_open = True
        self._opened.set()
