"""Drafts change how fast an answer comes, and nothing else."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from dynamo_serve.core.batch import Batch, SequenceOutput, Work
from dynamo_serve.core.forecast import forecast
from dynamo_serve.core.journal import Kind
from dynamo_serve.core.limits import Limits
from dynamo_serve.core.loop import Cancel, Submit
from dynamo_serve.core.request import Finish, Request, Sampling
from dynamo_serve.core.tenant import Class, Quota, Tenancy, Tenant
from tests.core.traffic import VOCAB_SIZE, Harness, TimedEngine, reference

COPYING = 0.95
DRAFTS = Limits(max_queue_delay=0.0, max_draft_tokens=6, mix_phases=True)


class Machine(TimedEngine):
    """A step takes 80 ms, and so much more for each sequence and each draft token; the model
    copies nearly everything."""

    per_prompt_token, per_sequence, per_draft_token = 0.0001, 0.003, 0.002

    def __init__(self, **options: Any) -> None:
        super().__init__(
            **{"vocab_size": VOCAB_SIZE, "page_size": 4, "num_pages": 256, "max_model_len": 500}
            | {"copying": COPYING}
            | options
        )
        self.batches: list[Batch] = []

    def step(self, batch: Batch) -> list[SequenceOutput]:
        self.batches.append(batch)
        return super().step(batch)

    @property
    def drafted(self) -> list[Work]:
        return [work for batch in self.batches for work in batch.work if work.draft_len]


class Dear(Machine):
    """Computing is all that takes time, and most of it for drafts."""

    fixed, per_sequence, per_draft_token = 0.002, 0.01, 0.02


class Quick(Machine):
    fixed, per_draft_token = 0.04, 0.004


def machine(
    limits: Limits = DRAFTS,
    tenancy: Tenancy | None = None,
    kind: type[Machine] = Machine,
    **options: Any,
) -> tuple[Harness, Machine]:
    engine = kind(**options)
    engine.harness = harness = Harness(engine, limits, tenancy=tenancy or Tenancy())
    return harness, engine


def ask(name: str, outputs: int = 60, **fields: Any) -> Request:
    rng = random.Random(name)
    prompt = tuple(rng.randrange(VOCAB_SIZE) for _ in range(40))
    return Request(name, prompt, outputs, **fields)


def seconds(request: Request, limits: Limits, **options: Any) -> float:
    harness, _ = machine(limits, **options)
    harness.generate(request)
    return harness.now


def expect(request: Request, copying: float = COPYING) -> list[int]:
    return reference(request, copying=copying)[0]


# ── what it is for ───────────────────────────────────────────────────────────


def test_a_copying_answer_comes_sooner_and_is_the_same() -> None:
    request = ask("a", 200)
    harness, engine = machine()
    assert harness.generate(request)["a"] == expect(request)
    stats = harness.published[-1]
    assert stats.draft_accepted_tokens_total > 100
    assert sum(w.draft_len for w in engine.drafted) == stats.draft_tokens_total
    assert harness.now < 0.5 * seconds(request, replace(DRAFTS, max_draft_tokens=0))


def test_what_was_drafted_is_told_with_the_finish() -> None:
    harness, _ = machine()
    harness.generate(ask("a", 100))
    [finish] = harness.finish_of("a")
    stats = harness.published[-1]
    assert finish.summary is not None
    assert finish.summary.draft_tokens == stats.draft_tokens_total > 0
    assert finish.summary.draft_accepted == stats.draft_accepted_tokens_total > 0
    history = harness.scheduler.journal.gone["a"]
    assert [entry.kind for entry in history].count(Kind.DRAFT) == 1
    assert history[-1].numbers["draft_tokens"] == finish.summary.draft_tokens


def test_the_forecast_knows_that_steps_bring_several_tokens() -> None:
    harness, _ = machine()
    harness.generate(*(ask(f"w{i}", 200) for i in range(3)))
    assert harness.scheduler.shares.tokens_per_step > 2
    harness.commands = [Submit(ask("a", 200, arrival=harness.now))]
    harness.turn()
    seq = harness.scheduler.running["a"]
    foreseen = forecast(seq, harness.scheduler.life, harness.scheduler.intake).finish
    began = harness.now
    harness.generate()
    assert foreseen == pytest.approx(harness.now - began, rel=0.5)


# ── when there is none ───────────────────────────────────────────────────────


def test_nothing_is_drafted_unless_the_engine_can_verify() -> None:
    harness, engine = machine(replace(DRAFTS, max_draft_tokens=0))
    harness.generate(ask("a", 100))
    assert engine.drafted == []


def test_an_answer_that_copies_nothing_costs_hardly_more() -> None:
    request = ask("a", 400)
    off = seconds(request, replace(DRAFTS, max_draft_tokens=0), copying=0.0)
    assert seconds(request, DRAFTS, copying=0.0) < 1.02 * off


@pytest.mark.parametrize("count", [1, 2, 8])
def test_drafts_end_where_they_cost_more_than_they_save(count: int) -> None:
    requests = [ask(f"r{i}", 200) for i in range(count)]
    harness, engine = machine(kind=Dear)
    harness.generate(*requests)
    with_drafts = harness.now
    tried = sum(any(work.draft_len for work in batch.work) for batch in engine.batches)
    assert 0 < tried < 0.1 * len(engine.batches)
    harness, _ = machine(replace(DRAFTS, max_draft_tokens=0), kind=Dear)
    harness.generate(*requests)
    assert with_drafts < 1.07 * harness.now  # 200 steps, so four are 2 %


def test_what_is_known_to_be_too_dear_is_not_tried_again() -> None:
    harness, engine = machine(kind=Dear)
    harness.commands = [Submit(ask(f"r{i}", 300)) for i in range(2)]
    for _ in range(200):
        harness.scheduler.speculation.credit = 4.0
        harness.turn()
    assert sum(work.draft_len > 0 for batch in engine.batches[40:] for work in batch.work) < 10


def test_a_sequence_whose_drafts_fail_is_left_alone_until_it_copies_again() -> None:
    class Moody(Machine):
        """Copies, then invents, then copies."""

        per_draft_token = 0.02

        def step(self, batch: Batch) -> list[SequenceOutput]:
            self._copying = 0.0 if 150 < batch.work[0].position < 300 else 1.0
            return super().step(batch)

    harness, engine = machine(kind=Moody)
    harness.generate(ask("a", 440))
    drafted = [w.position for w in engine.drafted]
    assert sum(position < 150 for position in drafted) > 10
    assert sum(170 < position < 300 for position in drafted) < 5
    assert sum(position > 310 for position in drafted) > 10


def test_penalties_look_at_what_is_settled_and_get_no_drafts() -> None:
    harness, engine = machine()
    harness.generate(ask("a", 100, sampling=Sampling(frequency_penalty=0.1)), ask("b", 100))
    assert {w.seq_id for w in engine.drafted} == {"b"}


# ── how far a draft may reach ────────────────────────────────────────────────


def test_a_draft_ends_before_the_last_token_that_is_wanted() -> None:
    for outputs in range(1, 30):
        harness, engine = machine(max_model_len=70, num_pages=18)
        request = ask("a", outputs)
        assert harness.generate(request)["a"] == expect(request)
        for work in engine.drafted:
            assert work.position + len(work.token_ids) < 40 + outputs


def test_a_draft_keeps_to_one_side_of_min_tokens() -> None:
    stops = frozenset({3, 5, 8})
    reached = 0
    for least in range(2, 40):
        request = ask(f"m{least}", 60, stop_ids=stops, min_tokens=least)
        harness, engine = machine()
        assert harness.generate(request)[request.id] == expect(request)
        for work in engine.drafted:
            outputs = work.position + 1 - work.prompt_len
            assert bool(work.banned_ids) == (outputs < least)
            if work.banned_ids:
                assert outputs + work.draft_len < least
                reached += 1
    assert reached


def test_nothing_is_drafted_after_a_stop_token() -> None:
    for i in range(30):
        request = ask(f"s{i}", 80, stop_ids=frozenset({i % VOCAB_SIZE}))
        harness, engine = machine()
        tokens, finish = reference(request, copying=COPYING)
        assert harness.generate(request)[request.id] == tokens
        [last] = harness.finish_of(request.id)
        assert last.finish is finish and (last.stop_id is None) == (finish is not Finish.STOP)
        for work in engine.drafted:
            draft = work.token_ids[len(work.token_ids) - work.draft_len :]
            assert not request.stop_ids & set(draft)


def test_logprobs_come_for_each_of_several_tokens() -> None:
    harness, _ = machine()
    harness.generate(ask("a", 100, sampling=Sampling(logprobs=2), stop_ids=frozenset({4})))
    events = [event for event in harness.events if event.token_ids]
    assert max(len(event.token_ids) for event in events) > 2
    for event in events:
        assert [lp.token_id for lp in event.logprobs] == list(event.token_ids)


# ── pages ────────────────────────────────────────────────────────────────────


def test_a_draft_leaves_a_page_for_everybody() -> None:
    harness, engine = machine(num_pages=12, max_model_len=48)
    for i in range(4):  # until it is known how long plain steps take
        harness.generate(ask(f"first{i}", 8))
    engine.batches.clear()
    for i in range(8):
        request = ask(f"a{i}", 8)
        assert harness.generate(request)[request.id] == expect(request)
    assert engine.drafted
    for work in engine.drafted:  # the last page is free, and may be needed for another
        assert len(work.page_table) == (work.position + 4) // 4


def test_a_draft_is_cut_to_the_pages_there_are() -> None:
    harness, engine = machine(num_pages=17, max_model_len=68)
    harness.scheduler.pool.grow([], 4)  # somebody else's, for good
    request = ask("a", 24)
    harness.commands = [Submit(request)]
    while not harness.finish_of("a"):
        harness.loop.turn()
    assert harness.tokens_of("a") == expect(request)
    for work in engine.drafted:
        assert len(work.page_table) * 4 >= work.position + len(work.token_ids)


@pytest.mark.parametrize("burst", range(22, 29))
def test_a_draft_takes_no_page_beyond_a_quota(burst: int) -> None:
    quota = Quota(pages_burst=burst)
    tenancy = Tenancy({"t": Tenant("t", quota=quota)})
    harness, engine = machine(tenancy=tenancy)
    harness.generate(ask("first", 30))  # until it is known how long plain steps take
    engine.batches.clear()
    requests = [ask("a", 16, tenant="t"), ask("b", 16, tenant="t")]
    harness.commands = [Submit(request) for request in requests]
    while not all(harness.finish_of(r.id) for r in requests):
        harness.turn()
        held = {p for seq in harness.scheduler.running.values() for p in seq.page_table}
        assert len(held) <= burst or len(harness.scheduler.running) == 1
    assert engine.drafted


def test_pages_of_rejected_tokens_are_not_shared() -> None:
    """Later prompts that begin as an answer did find only what was settled."""
    rng = random.Random(6)
    for i in range(40):
        harness, _ = machine(copying=0.7)
        first = ask(f"f{i}", 60)
        answer = harness.generate(first)[first.id]
        assert answer == expect(first, 0.7)
        again = Request("again", (*first.prompt_ids, *answer[: rng.randint(1, 60)]), 20)
        assert harness.generate(again)["again"] == expect(again, 0.7)
        assert harness.published[-1].prefix_hit_tokens_total > 30


# ── promises and the bill ────────────────────────────────────────────────────


@pytest.mark.parametrize("mix_phases", [True, False])
def test_drafts_break_no_promise_of_a_gap(mix_phases: bool) -> None:
    classes = {"prompt": Class("prompt", itl=0.1), "any": Class("any", 2)}
    tenants = {"p": Tenant("p", class_name="prompt"), "q": Tenant("q", class_name="any")}
    limits = replace(DRAFTS, mix_phases=mix_phases)
    harness, engine = machine(
        limits,
        Tenancy(tenants, classes),
        copying=1.0,
        kind=Quick,
    )
    harness.generate(ask("a", 200, tenant="p"), *(ask(f"b{i}", 200, tenant="q") for i in range(3)))
    times: list[float] = []
    for batch in engine.batches:
        if len(batch.work) == 4:
            drafts = sum(work.draft_len for work in batch.work)
            times.append(engine.fixed + 4 * engine.per_sequence + engine.per_draft_token * drafts)
    assert engine.drafted and max(times[20:]) < 0.1 < 4 * 6 * engine.per_draft_token + times[0]


def test_the_bill_of_steps_with_drafts_adds_up() -> None:
    harness, _ = machine()
    harness.generate(ask("a", 100), ask("b", 100, sampling=Sampling(presence_penalty=0.1)))
    shares = harness.scheduler.shares
    paid = {r: harness.finish_of(r)[0].summary for r in "ab"}
    total = sum(summary.device_seconds for summary in paid.values() if summary)
    assert total == pytest.approx(shares.device_seconds)
    account = shares.accounts["default"]
    assert account.device_seconds == pytest.approx(shares.device_seconds)
    assert account.output_tokens == 200


def test_a_request_cancelled_while_its_draft_is_verified_leaves_nothing() -> None:
    for turns in range(3, 40):
        harness, _ = machine()
        harness.commands = [Submit(ask("a", 60))]
        for _ in range(turns):
            harness.turn()
        harness.commands = [Cancel("a")]
        harness.turn()
        pool = harness.scheduler.pool
        assert pool.num_free + pool.num_cached == pool.num_pages
        tokens = harness.tokens_of("a")
        assert tokens == expect(ask("a", 60))[: len(tokens)]
