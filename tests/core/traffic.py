"""Random traffic through the real scheduler and pool, against an obvious reference."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from dynamo_serve.core.batch import Batch, SequenceOutput
from dynamo_serve.core.engine import Engine
from dynamo_serve.core.limits import Limits
from dynamo_serve.core.loop import Cancel, Command, Loop, Submit
from dynamo_serve.core.page_pool import PagePool
from dynamo_serve.core.pins import Pinning
from dynamo_serve.core.prefix_index import APART
from dynamo_serve.core.request import Finish, Refusal, Request, Sampling, TokenEvent
from dynamo_serve.core.scheduler import Scheduler
from dynamo_serve.core.stats import Stats
from dynamo_serve.core.tenant import Tenancy
from dynamo_serve.engines.fake import FakeEngine, next_token

VOCAB_SIZE = 23
MAX_TURNS = 20_000
SAMPLINGS = (Sampling(), Sampling(), Sampling(logprobs=2), Sampling(presence_penalty=0.5))


@dataclass
class Harness:
    """One loop under a virtual clock, turned by hand."""

    engine: Engine
    limits: Limits = field(default_factory=Limits)
    prefix_sharing: bool = True
    tenancy: Tenancy = field(default_factory=Tenancy)
    now: float = 0.0
    pinned_fraction: float = 0.0

    def __post_init__(self) -> None:
        spec = self.engine.start()
        pool = PagePool(spec.num_pages, spec.page_size, prefix_sharing=self.prefix_sharing)
        self.limits = replace(self.limits, copy_seconds=spec.copy_seconds)
        longest = pool.pages_for(spec.max_model_len)
        pinning = Pinning.of(spec.num_pages, longest, self.pinned_fraction)
        self.scheduler = Scheduler(
            pool, self.limits, self.tenancy, tiers=spec.tiers, pinning=pinning
        )
        self.commands: list[Command] = []
        self.arrive: Callable[[], None] = lambda: None  # adds to them what has come meanwhile
        self.took: list[float] = []  # by each step of a `TimedEngine`, in the order of their ends
        self.see: Callable[[list[TokenEvent]], None] = lambda events: None
        self.events: list[TokenEvent] = []
        self.published: list[Stats] = []
        self.loop = Loop(
            self.scheduler,
            self.engine,
            inbox=self._inbox,
            publish=self._publish,
            clock=lambda: self.now,
        )

    def _inbox(self, patience: float | None) -> list[Command]:
        self.arrive()
        if patience and not self.commands:
            self.now += patience
        commands, self.commands = self.commands, []
        return commands

    @property
    def num_commands(self) -> int:
        """That nobody has obeyed yet."""
        return len(self.commands) + len(self.loop._postponed)

    def _publish(self, events: list[TokenEvent], stats: Stats) -> None:
        self.events += events
        self.published.append(stats)
        self.see(events)

    def turn(self) -> None:
        """One turn of the loop, a millisecond long, and a look at the books after it."""
        self.loop.turn()
        self.now += 0.001
        self.scheduler.check()

    def generate(self, *requests: Request) -> dict[str, list[int]]:
        """Run the requests to their end; the tokens of each."""
        self.commands += [Submit(request) for request in requests]
        self.events = []
        for _ in range(MAX_TURNS):
            self.turn()
            if self.scheduler.is_idle:
                return {r.id: self.tokens_of(r.id) for r in requests}
        raise AssertionError("never finished")

    def tokens_of(self, request_id: str) -> list[int]:
        return [t for e in self.events if e.request_id == request_id for t in e.token_ids]

    def refusal_of(self, request_id: str) -> Refusal | None:
        events = [e for e in self.events if e.request_id == request_id]
        return events[0].refusal if events else None

    def finish_of(self, request_id: str) -> list[TokenEvent]:
        return [e for e in self.events if e.request_id == request_id and e.finish]


LAYERS = 8  # between which a step can be held


class TimedEngine(FakeEngine):
    """Steps take virtual time. The default is a small model on two cores, in seconds."""

    harness: Harness
    fixed, per_prompt_token, per_sequence, per_draft_token = 0.08, 0.0008, 0.003, 0.002

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.num_copied = 0  # parts of pages
        self.written: list[set[int]] = []  # by the running step, and by those that it holds

    def step(self, batch: Batch) -> list[SequenceOutput]:
        size, written = self.spec.page_size, set[int]()
        for work in batch.work:
            last = (work.position + len(work.token_ids) - 1) // size
            written.update(work.page_table[work.position // size : last + 1])
        self.written.append(written)
        for work in batch.work:
            if copied := work.copied(size):
                assert not any(copied.source in pages for pages in self.written), "is written to"
                self.num_copied += 1
        try:
            return self.run(batch)
        finally:
            self.written.pop()

    def run(self, batch: Batch) -> list[SequenceOutput]:
        prompt = sum(len(w.token_ids) for w in batch.work if not w.is_decode)
        decoding = sum(w.is_decode for w in batch.work)
        drafts = sum(w.draft_len for w in batch.work)
        seconds = (
            self.fixed
            + self.per_prompt_token * prompt
            + self.per_sequence * decoding
            + self.per_draft_token * drafts
        )
        for _ in range(LAYERS):
            self.harness.now += seconds / LAYERS
            self._between()
        self.harness.took.append(seconds)
        return super().step(batch)


class QuickEngine(TimedEngine):
    fixed, per_prompt_token, per_sequence, per_draft_token = 0.001, 0.0002, 0.0002, 0.0001


def reference(
    request: Request, vocab_size: int = VOCAB_SIZE, copying: float = 0.0
) -> tuple[list[int], Finish]:
    """What the fake model answers, worked out without pages, batches or scheduler."""
    output: list[int] = []
    while len(output) < request.max_tokens:
        banned = request.stop_ids if len(output) < request.min_tokens else frozenset[int]()
        output.append(next_token([*request.prompt_ids, *output], vocab_size, banned, copying))
        if output[-1] in request.stop_ids:
            return output, Finish.STOP
    return output, Finish.LENGTH


def random_requests(rng: random.Random, count: int, longest: int) -> list[Request]:
    """Prompts that share heads of several lengths, some equal, some with another salt."""
    head = [rng.randrange(VOCAB_SIZE) for _ in range(longest)]
    requests = []
    for i in range(count):
        shared = head[: rng.choice([0, 3, 8, longest // 3])]
        own = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, longest // 3))]
        requests.append(
            Request(
                id=f"r{i}",
                prompt_ids=tuple(shared + own if rng.random() < 0.9 else head[: longest // 3]),
                max_tokens=rng.randint(1, longest // 3),
                stop_ids=frozenset({13}) if rng.random() < 0.5 else frozenset(),
                min_tokens=rng.choice([0, 0, 2]),
                salt=rng.choice(["", "", APART + "own"]),
                sampling=SAMPLINGS[i % len(SAMPLINGS)],
            )
        )
    return requests


@dataclass(frozen=True)
class Drafting:
    """A model that copies so much of its text, and the longest draft; the default is none."""

    copying: float = 0.0
    most: int = 0


def check_seed(seed: int, drafting: Drafting) -> Stats:
    """Drive one random mix to its end and compare everything; the last stats."""
    rng = random.Random(seed)
    page_size = rng.choice([1, 2, 4, 16])
    longest = 36
    num_pages = -(-longest // page_size) + rng.randint(0, 12)
    engine = QuickEngine(
        vocab_size=VOCAB_SIZE,
        max_model_len=longest,
        page_size=page_size,
        num_pages=num_pages,
        copying=drafting.copying,
    )
    limits = Limits(
        max_prefill_tokens=rng.choice([1, 5, 16, 64]),
        max_decode_sequences=rng.choice([1, 3, 8]),
        max_queue_delay=rng.choice([0.0, 0.003]),
        max_draft_tokens=drafting.most,
        ladder=True,
        min_copied_tokens=(1, 4)[seed % 2],
    )
    engine.harness = harness = Harness(engine, limits, prefix_sharing=rng.random() < 0.8)
    requests = random_requests(rng, 14, longest)
    cancelled = {r.id for r in requests if rng.random() < 0.2}
    play(harness, rng, requests, cancelled)
    judge(harness, requests, cancelled, drafting.copying)
    assert not harness.scheduler.controller.history, "nobody was promised anything"
    return harness.published[-1]


def play(
    harness: Harness, rng: random.Random, requests: list[Request], cancelled: set[str]
) -> None:
    todo = list(requests)
    for _ in range(MAX_TURNS):
        if todo and rng.random() < 0.4:
            harness.commands.append(Submit(todo.pop()))
        if cancelled and rng.random() < 0.1:
            harness.commands.append(Cancel(rng.choice(sorted(cancelled))))
        harness.turn()
        if not todo and not harness.commands and harness.scheduler.is_idle:
            return
    raise AssertionError("a request never finished")


def judge(
    harness: Harness, requests: list[Request], cancelled: set[str], copying: float = 0.0
) -> None:
    pool = harness.scheduler.pool
    pool.check([])
    assert pool.num_free + pool.num_cached == pool.num_pages, "a page leaked"
    for request in requests:
        tokens, finish = harness.tokens_of(request.id), harness.finish_of(request.id)
        assert len(finish) == 1, f"{request.id} has {len(finish)} finishes"
        last = [e for e in harness.events if e.request_id == request.id][-1]
        assert last.finish, f"{request.id}: an event after the last event"
        told = [
            e.cached_tokens for e in harness.events if e.request_id == request.id and e.token_ids
        ]
        assert [t is not None for t in told] == [i == 0 for i in range(len(told))], request.id
        expected, reason = reference(request, copying=copying)
        for event in harness.events:
            if event.request_id == request.id and request.sampling.logprobs is not None:
                assert [lp.token_id for lp in event.logprobs] == list(event.token_ids), request.id
        if last.finish is Finish.CANCELLED:
            assert request.id in cancelled
            assert tokens == expected[: len(tokens)], request.id
        else:
            assert (tokens, last.finish) == (expected, reason), request.id
            assert (last.stop_id is not None) == (reason is Finish.STOP)
    asked = sum(len(r.prompt_ids) for r in requests)
    last_stats = harness.published[-1]
    assert last_stats.draft_accepted_tokens_total <= last_stats.draft_tokens_total
    assert last_stats.prefix_hit_tokens_total <= last_stats.prefix_asked_tokens_total <= asked
