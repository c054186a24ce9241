"""One server under a virtual clock: the core's own loop and scheduler, and an engine that waits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import count
from math import inf
from random import Random

from dynamo_serve.bench.record import Sample
from dynamo_serve.config import Config
from dynamo_serve.core.engine import EngineSpec
from dynamo_serve.core.flight import Activity, Doing, FlightRecorder
from dynamo_serve.core.journal import Reason
from dynamo_serve.core.loop import Cancel, Command, Loop, Submit
from dynamo_serve.core.prefix_tree import Chain, PrefixTree
from dynamo_serve.core.request import TokenEvent
from dynamo_serve.core.stats import Standing, Stats, StepStats
from dynamo_serve.core.step_cost import StepShape
from dynamo_serve.core.tenant import Tenancy
from dynamo_serve.scheduling import build_scheduler, recall_ladder
from dynamo_serve.simulate.clients import Client
from dynamo_serve.simulate.costs import Cost
from dynamo_serve.simulate.engine import Answer, Clock, VirtualEngine

SAMPLE_SECONDS = 1.0
NO_SUCH_RUNGS = (Reason.LIGHTER_WEIGHTS.value, Reason.RESTART_ENGINE.value)  # change the engine
JOURNAL_KEPT = (100, 10)  # entries, and requests that are gone: nobody asks, and there may be many
NOTHING: Doing = (Activity.WAITING, 0.0, 0.0, b"")


@dataclass(frozen=True, slots=True)
class Setup:
    """What every replica is built from; `page_size` is that of the trace."""

    config: Config
    tenancy: Tenancy
    spec: EngineSpec
    cost: Cost
    page_size: int
    seed: int = 0


class Paused(Exception):
    """Nothing more happens before the time up to which a replica was to run."""


class Unwatched(FlightRecorder):
    """Nobody looks at the loop of a simulation from outside."""

    def __init__(self) -> None:
        super().__init__(bytearray(1 << 10))

    def waits(self, now: float) -> None: ...

    def turns(self, now: float) -> None: ...

    def took(self, count: int) -> None: ...

    def steps(self, seq_ids: object, now: float, predicted: float) -> Doing:
        return NOTHING

    def goes_on(self, before: Doing, held: float) -> None: ...


class VirtualLoop(Loop):
    """The books are looked at by tests; reading them whenever nothing runs would take most of the
    time of a simulation."""

    has_readers = True  # of what a server tells about itself with every step

    def _check_if_idle(self) -> None:
        self._is_checked = self._is_checked or self.scheduler.is_idle

    def _tell(self, events: list[TokenEvent], step: StepStats | None = None) -> None:
        if self.has_readers or self.scheduler.controller.has_news:
            super()._tell(events, step)
        else:
            self.publish(events, Stats(step=step))


class Untold(PrefixTree):
    """Nobody asks a simulation why a prompt was not found, and parts of pages are not simulated."""

    def learn(self, chain: Chain, places: Iterable[int], now: float) -> None: ...

    def found(self, chain: Chain, now: float) -> None: ...

    def lose(self, key: bytes) -> None: ...


class Replica:
    """`feed` it clients, `run` it, take those that are `done`."""

    def __init__(self, setup: Setup, index: int = 0, *, samples: bool = False) -> None:
        self.setup = setup
        self.clock = Clock()
        self.scheduler = build_scheduler(setup.config, setup.tenancy, setup.spec)
        self.scheduler.pool.tree = Untold(setup.spec.page_size)
        self.scheduler.journal.keep(*JOURNAL_KEPT)
        self.live: dict[str, Client] = {}
        self.done: list[Client] = []
        self.samples: list[Sample] = []
        self._sample_at = 0.0 if samples else inf
        self._answers: dict[str, Answer] = {}
        # A client sends, or hangs up on the so manieth request that it has sent.
        self._agenda: list[tuple[float, int, Client, int]] = []
        self._order = count()
        self._until = inf
        times = setup.cost.times(Random(f"{setup.seed}/{index}"))
        self._times = times
        self._way = setup.cost.way
        engine = VirtualEngine(
            *(setup.spec, self.clock, times, self._shape, self._next_arrival, self._answers)
        )
        self.loop = VirtualLoop(
            self.scheduler,
            engine,
            inbox=self._inbox,
            publish=self._publish,
            clock=self.clock,
            flight=Unwatched(),
        )
        self.loop.has_readers = samples
        section = setup.config.scheduler
        forbidden = (*section.ladder_forbid, *NO_SUCH_RUNGS)
        recall_ladder(self.scheduler, replace(section, ladder_forbid=forbidden), Standing(), 0.0)

    def feed(self, client: Client, at: float) -> None:
        """It sends at that time, or now if that is past."""
        heappush(self._agenda, (at + self._way.there, next(self._order), client, 0))

    def run(self, until: float = inf) -> None:
        """Turn the loop until nothing more happens before `until`; a step that has begun before
        ends after it."""
        self._until = until
        try:
            while self.clock.now < until:
                self.loop.turn()
        except Paused:
            pass

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits for anything."""
        return not self.live and not self._agenda

    # ── the ends of the loop ─────────────────────────────────────────────────

    def _shape(self) -> StepShape:
        return self.scheduler.bill.planned.shape

    def _next_arrival(self) -> float:
        return self._agenda[0][0] if self._agenda else inf

    def _inbox(self, patience: float | None) -> list[Command]:
        commands = self._due()
        if commands or patience == 0.0:
            return commands
        if self.is_idle and self._until == inf:
            raise Paused  # what is left to do for the ladder does not matter any more
        to = min(self._next_arrival(), inf if patience is None else self.clock.now + patience)
        if to >= self._until:
            raise Paused
        self.clock.now = max(self.clock.now, to)
        return self._due()

    def _due(self) -> list[Command]:
        commands: list[Command] = []
        while self._agenda and self._agenda[0][0] <= self.clock.now:
            at, _, client, attempt = heappop(self._agenda)
            if not attempt:
                commands += self._send(client, at - self._way.there)
            elif client.id in self.live and attempt == client.attempts:
                commands.append(Cancel(client.id))
        return commands

    def _send(self, client: Client, at: float) -> list[Command]:
        asked, spec = client.asked, self.setup.spec
        client.sent = at if client.sent is None else client.sent
        client.refusal = None
        client.attempts += 1
        longest = asked.prompt_tokens + asked.max_tokens
        if longest > min(spec.max_model_len, spec.page_size * spec.num_pages):
            client.error, client.end = f"{longest} tokens do not fit", at
            self.done.append(client)
            return []
        promise = self.setup.tenancy.class_of(asked.tenant, asked.class_name or None)
        request, self._answers[client.id] = client.request(self.setup.page_size, at, promise)
        self.live[client.id] = client
        gone_at = client.tries[min(client.attempts, len(client.tries)) - 1].gone_at
        if gone_at is not None:
            hangs_up = at + gone_at + self._way.there
            heappush(self._agenda, (hangs_up, next(self._order), client, client.attempts))
        return [Submit(request)]

    def _publish(self, events: list[TokenEvent], stats: Stats) -> None:
        now = self.clock.now
        seen = now + self._way.back
        for event in events:
            client = self.live[event.request_id]
            client.see(event, seen)
            if event.finish or event.refusal:
                self._end(client, seen)
        if stats.step is not None:
            if now >= self._sample_at:
                self._sample(now, stats)
            self.clock.now = now + self._times.between(stats.step.num_sequences)

    def _end(self, client: Client, now: float) -> None:
        del self.live[client.id], self._answers[client.id]
        again = client.next_try(now)
        if again is None:
            self.done.append(client)
        else:
            self.feed(client, again)

    def _sample(self, now: float, stats: Stats) -> None:
        self._sample_at = now + SAMPLE_SECONDS
        values: dict[str, float] = {
            "dserve_sequences_live": stats.num_running,
            "dserve_sequences_waiting": stats.num_waiting,
            'dserve_pages{state="used"}': stats.pages_used,
            'dserve_pages{state="cached"}': stats.pages_cached,
            'dserve_pages{state="free"}': stats.pages_free,
            "dserve_prefix_asked_tokens_total": stats.prefix_asked_tokens_total,
            "dserve_prefix_hit_tokens_total": stats.prefix_hit_tokens_total,
            "dserve_preemptions_total": stats.preemptions_total,
            "dserve_prompt_tokens_total": stats.prompt_tokens_total,
            "dserve_output_tokens_total": stats.output_tokens_total,
        }
        self.samples.append(Sample(now, values))
