"""Sends a plan at its times to one server, from one event loop, and keeps a record of each call."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace

from dynamo_serve.bench import answers, bodies
from dynamo_serve.bench.client import Answer, Client, Reading
from dynamo_serve.bench.later import Later
from dynamo_serve.bench.outcomes import pause, record_of
from dynamo_serve.bench.plan import Call, Planned
from dynamo_serve.bench.record import Record

AHEAD = 128  # sessions that are made before they are due
LAG_EVERY_S = 0.01

Session = list[tuple[int, Planned]]


@dataclass(frozen=True, slots=True)
class Driving:
    """How a plan is sent. `duration`: nothing is begun after it; `concurrency`: places, each taken
    by one session from its first call to its last; without it everything is sent when due.
    `grace`: how long the calls under way may take once nothing more is begun."""

    extras: bodies.BodyExtras = field(default_factory=bodies.BodyExtras)
    concurrency: int | None = None
    duration: float | None = None
    grace: float = 600.0
    timeout: float = 600.0
    warm_up_s: float = 0.0
    warm_up_calls: int = 0


@dataclass(slots=True)
class Tally:
    """How far it is; and what tells a client that cannot keep up: how late calls were begun, how
    late timers came (seconds)."""

    begun: int = 0
    ended: int = 0
    failed: int = 0
    refused: int = 0
    late: list[float] = field(default_factory=list)
    lags: list[float] = field(default_factory=list)


def sessions(plan: Iterable[Planned], first: int = 0) -> Iterator[Session]:
    """The calls of each session with their numbers."""
    group: Session = []
    for number, planned in enumerate(plan, first):
        if planned.after is None:
            if group:
                yield group
            group = []
        elif not group or planned.after != group[-1][0]:
            raise ValueError(f"call {number} goes on after {planned.after}, not the one before it")
        group.append((number, planned))
    if group:
        yield group


def _made_ahead(groups: Iterable[Session]) -> Iterator[Session]:
    """The same; some are made now, and one more whenever one is taken."""
    rest = iter(groups)
    ahead = deque(itertools.islice(rest, AHEAD))

    def taken() -> Iterator[Session]:
        while ahead:
            yield ahead.popleft()
            ahead.extend(itertools.islice(rest, 1))

    return taken()


class Driver:
    """One run of one event loop; `run` sends everything, `stop` ends it before its time."""

    def __init__(self, client: Client, driving: Driving) -> None:
        self.records: list[Record] = []
        self.tally = Tally()
        self.is_over = asyncio.Event()
        self.later = Later()
        self._client, self._driving = client, driving
        self._tasks: set[asyncio.Task[None]] = set()
        self._senders: list[asyncio.Task[None]] = []
        self._fault: BaseException | None = None  # of ours, not of the server's

    def prepare(self, plan: Iterable[Session], probes: Iterable[Session] = ()) -> None:
        """Make what is sent first; texts take time."""
        self._plan, self._probes = _made_ahead(plan), _made_ahead(probes)

    async def run(self, began: float) -> None:
        """Send everything, and wait for what is under way. The plan's time 0 is `began`, on the
        monotonic clock."""
        self._began = began
        await asyncio.sleep(began - time.monotonic())
        places, make = self._driving.concurrency, asyncio.create_task
        probing = make(self._by_the_clock(self._probes))
        beside = [make(self._watch_lag()), make(self._end_in_time())]
        if places is None:
            self._senders = [make(self._by_the_clock(self._plan))]
        else:
            self._senders = [make(self._place(self._plan)) for _ in range(places)]
        everything = [*self._senders, probing, *beside]
        try:
            await asyncio.wait(self._senders)
            probing.cancel()
            while self._tasks:
                await asyncio.wait(self._tasks)
        finally:
            self.stop()
            for task in everything:
                task.cancel()
            results = await asyncio.gather(*everything, *self._tasks, return_exceptions=True)
        faults = (self._fault, *results)
        for fault in faults:
            if isinstance(fault, Exception):
                raise fault

    def stop(self) -> None:
        """End now: what is under way is cut off, and its records say so."""
        self.is_over.set()
        for task in (*self._senders, *self._tasks):
            task.cancel()

    @property
    def now(self) -> float:
        return time.monotonic() - self._began

    def _may_begin(self, at: float) -> bool:
        duration = self._driving.duration
        return not self.is_over.is_set() and (duration is None or at < duration)

    async def _by_the_clock(self, groups: Iterator[Session]) -> None:
        for group in groups:
            at = group[0][1].at
            assert at is not None, "a call without a time needs a place of a closed loop"
            if not self._may_begin(at):
                return
            if (wait := at - self.now) > 0:
                await asyncio.sleep(wait)
            self.tally.late.append(self.now - at)
            self._begin(group, at)
            await asyncio.sleep(0)  # or a burst would not be sent before its last call is due

    async def _place(self, groups: Iterator[Session]) -> None:
        """One after the other; a call with a time waits for it, and counts from it."""
        for group in groups:
            at = group[0][1].at
            due = self.now if at is None else at
            if not self._may_begin(max(due, self.now)):
                return
            if (wait := due - self.now) > 0:
                await asyncio.sleep(wait)
            await asyncio.wait([self._begin(group, due)])

    def _begin(self, group: Session, due: float) -> asyncio.Task[None]:
        task = asyncio.create_task(self._session(group, due))
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fault = self._fault or error
            self.stop()

    async def _end_in_time(self) -> None:
        """After the duration nothing begins, and after the grace nothing goes on."""
        duration = self._driving.duration
        if duration is not None:
            await asyncio.sleep(duration + self._driving.grace - self.now)
            self.stop()

    async def _watch_lag(self) -> None:
        while True:
            due = time.monotonic() + LAG_EVERY_S
            await asyncio.sleep(LAG_EVERY_S)
            self.tally.lags.append(time.monotonic() - due)

    async def _session(self, group: Session, due: float) -> None:
        before: Call | None = None
        answer = ""
        for number, planned in group:
            call = planned.call
            if before is not None:
                call = bodies.after(before, answer, call)
                if not self._may_begin(due):
                    return
                await asyncio.sleep(max(0.0, due - self.now))
            if call.ready is not None:
                await call.ready()
                due = max(due, self.now)  # nobody could have sent it sooner
            record, answer = await self._call(number, call, due)
            if record.outcome != "ok":
                return
            before = call
            following = group[number - group[0][0] + 1 :][:1]
            due = (record.end or self.now) + (following[0][1].think if following else 0.0)

    async def _call(self, number: int, call: Call, due: float) -> tuple[Record, str]:
        """One call with its attempts; its record is kept even if it is cut off."""
        self.tally.begun += 1
        blank = self._blank(number, call, due)
        ended: list[tuple[Record, str]] = []
        try:
            await self._attempts(call, blank, ended)
        except asyncio.CancelledError:
            cut = replace(blank, outcome="cancelled", end=self.now, error="the run was over")
            ended.append((cut, ""))
            raise
        finally:
            if ended:
                self._keep(ended[-1][0])
        return ended[-1]

    def _keep(self, record: Record) -> None:
        self.records.append(record)
        self.tally.ended += 1
        self.tally.failed += record.outcome == "failed"
        self.tally.refused += record.outcome == "refused"

    async def _attempts(self, call: Call, blank: Record, ended: list[tuple[Record, str]]) -> None:
        raw = self._client.request(
            "POST", bodies.path_of(call), bodies.body_of(call, self._driving.extras), call.api_key
        )
        attempt, sent = 1, None
        while True:
            answer = await self._client.send(raw, self._reading(call))
            sent = answer.sent - self._began if sent is None else sent
            blank_now = replace(blank, sent=sent, attempts=attempt)
            record, text = await self.later.run(self._read(answer, call, blank_now))
            ended.append((record, text))
            behaviour = call.behaviour
            if record.outcome != "refused" or behaviour.retry == "none":
                return
            if attempt >= behaviour.max_attempts or self.is_over.is_set():
                return
            await asyncio.sleep(pause(record, behaviour.retry, attempt))
            attempt += 1

    def _reading(self, call: Call) -> Reading:
        behaviour, enough = call.behaviour, None
        if behaviour.leaves_after_tokens is not None:
            left = behaviour.leaves_after_tokens

            def enough(body: bytes) -> bool:
                nonlocal left
                left -= answers.count_tokens(body)
                return left <= 0

        timeout = self._driving.timeout
        return Reading(behaviour.bytes_per_s, behaviour.leaves_after_s, enough, timeout)

    def _blank(self, number: int, call: Call, due: float) -> Record:
        driving = self._driving
        return Record(
            number=number,
            due=due,
            sent=self.now,
            kind=call.kind,
            tenant=call.tenant,
            class_name=call.class_name,
            prompt_tokens=call.prompt_tokens,
            is_warm_up=due < driving.warm_up_s or 0 <= number < driving.warm_up_calls,
            targets=dict(call.targets),
        )

    def _read(
        self, answer: Answer, call: Call, blank: Record
    ) -> Generator[None, None, tuple[Record, str]]:
        said = yield from answers.parse(answer)
        if call.on_answer is not None:
            call.on_answer([ids for _, ids in sorted(said.token_ids.items())])
        return record_of(answer, said, call, blank, self._began), "".join(said.text)
