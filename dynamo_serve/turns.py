"""Whose turn it is where one thing is done at a time for all tenants."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

from dynamo_serve.fair_queue import FairQueue

T = TypeVar("T")
R = TypeVar("R")


@dataclass(slots=True, eq=False)
class _Turn(Generic[T, R]):
    thing: T
    answer: asyncio.Future[R]


class Turns(Generic[T, R]):
    """Does things one by one on threads that the process, when it ends, does not wait for. For one
    event loop at a time."""

    def __init__(
        self,
        work: Callable[[T], R],
        done: Callable[[T, R], object] = lambda thing, answer: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`work` is called on the thread; what it raises is raised to who asked. `done` is called
        on the event loop before the next turn, also if nobody waits for the answer any more.
        """
        self._clock = clock
        self._work, self._done = work, done
        self._one = threading.Lock()  # what an event loop left behind may still be at work
        self._queue = FairQueue[_Turn[T, R]]()
        self._running: asyncio.Task[None] | None = None

    async def run(self, tenant: str, thing: T) -> R:
        """What `work` makes of `thing`, in the tenant's turn. Cancelled before, it is not begun."""
        turn: _Turn[T, R] = _Turn(thing, asyncio.get_running_loop().create_future())
        self._queue.push(tenant, turn)
        self._go_on()
        try:
            return await turn.answer
        except asyncio.CancelledError:
            self._queue.discard(tenant, turn)  # or it would hold `thing` until its turn
            raise

    def _go_on(self) -> None:
        while self._running is None and (turn := self._queue.pop()) is not None:
            if not turn.answer.done():  # somebody still waits for it
                self._running = asyncio.create_task(self._serve(turn))

    async def _serve(self, turn: _Turn[T, R]) -> None:
        began = self._clock()
        work = asyncio.wrap_future(self._begin(turn.thing))
        try:
            await asyncio.wait((work,))
        except asyncio.CancelledError:  # the event loop ends
            work.cancel()
            self._queue = FairQueue()
            self._running = None
            raise
        self._queue.charge(self._clock() - began)
        self._running = None
        error = work.exception()
        if error is None:
            self._done(turn.thing, work.result())
        if not turn.answer.done():
            if error is None:
                turn.answer.set_result(work.result())
            else:
                turn.answer.set_exception(error)
        self._go_on()

    def _begin(self, thing: T) -> Future[R]:
        answer = Future[R]()
        answer.set_running_or_notify_cancel()

        def work() -> None:
            try:
                with self._one:
                    made = self._work(thing)
            except BaseException as error:
                answer.set_exception(error)
            else:
                answer.set_result(made)

        # A pool's threads are joined at exit, whatever they are at.
        threading.Thread(target=work, name="turns", daemon=True).start()
        return answer
