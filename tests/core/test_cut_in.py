"""Prompts that go ahead of others, and prompts for which a running step is held."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from statistics import median

import pytest

from dynamo_serve.core.batch import Batch, SequenceOutput
from dynamo_serve.core.limits import Limits
from dynamo_serve.core.loop import Cancel, Configure, Stop, Submit
from dynamo_serve.core.request import Finish, Request, TokenEvent
from dynamo_serve.core.tenant import Class, Quota, Tenancy, Tenant
from tests.core.playing import Play, ask
from tests.core.traffic import (
    LAYERS,
    MAX_TURNS,
    VOCAB_SIZE,
    Harness,
    TimedEngine,
    random_requests,
    reference,
)

LONGEST = 48
CLASSES = {
    "quick": Class("quick", 0, ttft=0.5, itl=1.0),
    "quicker": Class("quicker", 0, ttft=0.3, itl=1.0),
    "chat": Class("chat", 1, itl=0.25),
    "batch": Class("batch", 2),
}
QUICK = Tenant("asks", 1.0, "quick")
ALONE = TimedEngine.fixed + 48 * TimedEngine.per_prompt_token  # a question's prompt
STEP = TimedEngine.fixed + 256 * TimedEngine.per_prompt_token + 16 * TimedEngine.per_sequence


def tenancy(**changes: Tenant) -> Tenancy:
    quota = Quota(live_sequences=16)
    tenants = {
        "asks": Tenant("asks", 1.0, "quicker"),
        "pours": Tenant("pours", 1.0, "batch", quota),
        **changes,
    }
    return Tenancy(tenants, CLASSES)


def play_of(
    *,
    hold_steps: bool,
    tenants: Tenancy | None = None,
    mix_phases: bool = True,
    num_pages: int = 4096,
) -> Play:
    limits = Limits(
        max_prefill_tokens=512,
        max_mixed_tokens=256,
        max_decode_sequences=24,
        mix_phases=mix_phases,
        hold_steps=hold_steps,
    )
    return Play(limits, tenants or tenancy(), num_pages=num_pages)


def flood(count: int = 60, outputs: int = 40) -> list[Request]:
    return [ask(f"f{i}", 200, outputs, tenant="pours") for i in range(count)]


def questions(every: float, count: int, first: float = 3.0) -> list[Request]:
    return [ask(f"q{i}", 48, 4, first + every * i, tenant="asks") for i in range(count)]


def ttfts(play: Play, asked: list[Request]) -> list[float]:
    return [play.ttft(request.id) for request in asked]


def chunks(play: Play, reason: str) -> list[str]:
    return [e.request_id for e in play.scheduler.journal.entries if e.reason == reason]


# ── ahead of others ──────────────────────────────────────────────────────────


def test_a_prompt_that_would_be_late_goes_ahead() -> None:
    play, asked = play_of(hold_steps=False, tenants=tenancy(asks=QUICK)), questions(0.93, 14)
    play.run([*flood(), *asked])
    assert max(ttfts(play, asked)) <= 0.5 / 2 + ALONE + 0.01, "the step that ran, and its own"
    assert len(chunks(play, "ahead")) > 5


def test_prompts_go_ahead_only_every_other_time() -> None:
    play, asked = play_of(hold_steps=False, tenants=tenancy(asks=QUICK)), questions(0.1, 100)
    play.run([*flood(), *asked])
    began = [e.at for e in play.scheduler.journal.entries if e.reason == "ahead"]
    assert len(set(began)) > 5
    ends = sorted({at for times in play.tokens_at.values() for at in times})
    for first, second in pairwise(sorted(set(began))):
        assert sum(first < end <= second for end in ends) >= 2, "twice in a row"


def test_nobody_goes_ahead_whose_tenant_has_had_more() -> None:
    heavy = Tenant("asks", 0.01, "quick")
    play, asked = play_of(hold_steps=True, tenants=tenancy(asks=heavy)), questions(0.5, 20, 3.02)
    play.run([*flood(), *asked])
    light = play_of(hold_steps=True).run([*flood(), *asked])
    for reason in ("ahead", "cut_in"):
        assert len(chunks(play, reason)) <= 1 < len(chunks(light, reason)), reason


def test_streams_keep_their_gaps_beside_prompts_that_hurry() -> None:
    classes = {**CLASSES, "chat": Class("chat", 1, itl=0.2)}
    tenants = replace(tenancy(asks=QUICK, streams=Tenant("streams", 1.0, "chat")), classes=classes)
    for hold_steps in (False, True):
        play = play_of(hold_steps=hold_steps, tenants=tenants)
        streams = [ask(f"s{i}", 64, 100, tenant="streams") for i in range(4)]
        play.run([*streams, *flood(), *questions(0.37, 60, 4.0)])
        assert max(play.longest_gap(f"s{i}") for i in range(4)) <= 1.1 * 0.2


# ── while a step is held ─────────────────────────────────────────────────────


def test_a_question_cuts_into_a_running_step() -> None:
    asked = questions(0.93, 14)
    play = play_of(hold_steps=True).run([*flood(), *asked])
    waits = ttfts(play, asked)
    assert len(chunks(play, "cut_in")) > 3
    assert median(waits) <= 1.7 * ALONE
    assert max(waits) <= 0.3
    cut = [play.ttft(name) for name in chunks(play, "cut_in")]
    assert max(cut) <= ALONE + STEP / LAYERS + 0.01, "it waits for a layer, not for a step"


def test_what_a_step_was_held_for_is_not_its_own_time() -> None:
    play = play_of(hold_steps=True).run([*flood(), *questions(0.93, 14)])
    shares = play.scheduler.shares
    steps = [stats.step for stats in play.harness.published if stats.step]
    assert sum(step.seconds for step in steps) == pytest.approx(shares.device_seconds)
    assert [step.seconds for step in steps] == pytest.approx(play.harness.took)


def test_who_cuts_in_keeps_its_own_gaps() -> None:
    """It has its first token early, and then waits for the rest of the step."""
    classes = {**CLASSES, "quicker": Class("quicker", 0, ttft=1.0, itl=0.2)}
    play = play_of(hold_steps=True, tenants=replace(tenancy(), classes=classes))
    asked = questions(0.77, 20)
    play.run([*flood(), *asked])
    assert max(play.longest_gap(request.id) for request in asked[3:]) <= 1.1 * 0.2


def test_streams_in_the_held_step_keep_their_gaps() -> None:
    classes = {**CLASSES, "chat": Class("chat", 1, itl=0.3)}
    tenants = replace(tenancy(streams=Tenant("streams", 1.0, "chat")), classes=classes)
    play = play_of(hold_steps=True, tenants=tenants)
    streams = [ask(f"s{i}", 64, 100, tenant="streams") for i in range(4)]
    play.run([*streams, *flood(), *questions(0.37, 60, 4.0)])
    assert chunks(play, "cut_in")
    assert max(play.longest_gap(f"s{i}") for i in range(4)) <= 1.1 * 0.3


def test_streams_outside_of_the_held_step_keep_their_gaps() -> None:
    classes = {**CLASSES, "chat": Class("chat", 1, itl=0.5)}
    tenants = replace(tenancy(streams=Tenant("streams", 1.0, "chat")), classes=classes)
    play = play_of(hold_steps=True, tenants=tenants, mix_phases=False)
    streams = [ask(f"s{i}", 64, 150, tenant="streams") for i in range(4)]
    play.run([*streams, *flood(), *questions(0.37, 60, 4.0)])
    assert chunks(play, "cut_in")
    assert max(play.longest_gap(f"s{i}") for i in range(4)) <= 1.1 * 0.5


def test_a_strict_class_is_not_refused_for_a_step_that_is_held() -> None:
    refused = []
    for hold_steps in (False, True):
        classes = {**CLASSES, "quicker": Class("quicker", 0, ttft=1.0, itl=1.0, strict=True)}
        play = play_of(hold_steps=hold_steps, tenants=replace(tenancy(), classes=classes))
        play.run([*flood(), *questions(0.77, 30)])
        refused.append(len(play.refusals))
    assert refused[1] <= refused[0]


def test_steps_stay_short_where_nobody_could_cut_in() -> None:
    """All places are taken: whoever comes must wait for the end of a step."""
    late = {}
    for hold_steps in (False, True):
        classes = {**CLASSES, "quicker": Class("quicker", 0, ttft=1.0, itl=1.0)}
        tenants = replace(tenancy(pours=Tenant("pours", 1.0, "batch")), classes=classes)
        play, asked = play_of(hold_steps=hold_steps, tenants=tenants), questions(0.93, 20)
        play.run([*flood(100), *asked])
        late[hold_steps] = max(ttfts(play, asked))
    assert late[True] <= 1.1 * late[False]


def test_a_step_is_never_held_for_longer_than_it_takes() -> None:
    play = play_of(hold_steps=True)
    crowd = [
        ask(f"q{i}-{j}", 48, 2, 3.0 + 0.53 * i + 0.03 * j, tenant="asks")
        for i in range(15)
        for j in range(12)
    ]
    bill, held = play.scheduler.bill, list[tuple[float, float]]()
    original = bill.resume

    def resume(now: float) -> None:
        original(now)
        assert bill.step is not None
        held.append((bill._held_seconds, bill.step.predicted_seconds))

    bill.resume = resume  # type: ignore[method-assign]
    play.run([*flood(), *crowd])
    assert max(seconds for seconds, _ in held) > 1.9 * ALONE, "nobody tried"
    assert all(seconds <= predicted + 0.02 for seconds, predicted in held)


@pytest.mark.parametrize("every", [0.93, 1.3])
def test_nobody_is_preempted_while_a_step_is_held(every: float) -> None:
    """Their pages are being written."""
    asks = Tenant("asks", 1.0, "quicker", Quota(pages_guaranteed=8))
    play = play_of(hold_steps=True, tenants=tenancy(asks=asks), num_pages=230)
    was_held: list[bool] = []
    original = play.scheduler.life.preempt

    def preempt(seq: object, reason: object, now: float) -> None:
        was_held.append(play.scheduler.bill.held is not None)
        original(seq, reason, now)  # type: ignore[arg-type]

    play.scheduler.life.preempt = preempt  # type: ignore[method-assign]
    play.run([*flood(100), *questions(every, 14)])
    assert was_held, "nobody had to make room"
    assert not any(was_held)
    assert chunks(play, "cut_in")


class Between:
    """Does something as soon as a long step has begun."""

    def __init__(self, play: Play, act: Callable[[float], None]) -> None:
        self._play, self._act, self._is_done = play, act, False
        play.harness.arrive = self._arrive

    def _arrive(self) -> None:
        step, now = self._play.scheduler.bill.step, self._play.harness.now
        if self._is_done or step is None or step.predicted_seconds < 0.2:
            return
        if step.began < now < step.began + step.predicted_seconds / 2:
            self._is_done = True
            self._act(now)


def question(now: float) -> Submit:
    return Submit(ask("q", 48, 1, now, tenant="asks"))


def started(play: Play, requests: list[Request]) -> None:
    for request in requests:
        play.harness.commands.append(Submit(request))
    while play.harness.now < 3.0:
        play.harness.turn()


def turn_until_idle(play: Play) -> None:
    for _ in range(2000):
        play.harness.turn()
        if play.scheduler.is_idle:
            return
    raise AssertionError("never finished")


def test_cancelling_waits_for_the_step_that_is_held() -> None:
    play = play_of(hold_steps=True)
    started(play, flood())
    harness, victim = play.harness, next(iter(play.scheduler.running))
    pages = list(play.scheduler.running[victim].page_table)
    taken: list[set[int]] = []
    Between(play, lambda now: harness.commands.extend([Cancel(victim), question(now)]))
    step = harness.engine.step

    def spy(batch: Batch) -> list[SequenceOutput]:
        taken.extend(set(w.page_table) for w in batch.work if w.seq_id == "q")
        return step(batch)

    harness.engine.step = spy  # type: ignore[method-assign]
    turn_until_idle(play)
    assert chunks(play, "cut_in") == ["q"]
    assert not taken[0].intersection(pages), "pages that the held step writes to"
    assert [e.finish for e in harness.finish_of(victim)] == [Finish.CANCELLED]
    assert [e.finish for e in harness.finish_of("q")] == [Finish.LENGTH]


def test_a_step_is_not_held_for_a_request_that_is_gone() -> None:
    play = play_of(hold_steps=True)
    started(play, flood())
    Between(play, lambda now: play.harness.commands.extend([question(now), Cancel("q")]))
    turn_until_idle(play)
    assert chunks(play, "cut_in") == []
    assert [e.finish for e in play.harness.finish_of("q")] == [Finish.CANCELLED]


def test_who_came_before_is_not_overtaken() -> None:
    play = play_of(hold_steps=True)
    started(play, flood())
    before = ask("before", 48, 1, 3.0, tenant="pours")
    added: list[str] = []
    original = play.scheduler.add

    def add(request: Request, now: float) -> list[TokenEvent]:
        added.append(request.id)
        return original(request, now)

    play.scheduler.add = add  # type: ignore[method-assign]
    Between(play, lambda now: play.harness.commands.extend([Submit(before), question(now)]))
    turn_until_idle(play)
    assert chunks(play, "cut_in") == ["q"]
    assert added == ["before", "q"]


def test_the_last_place_is_left_to_another_tenant_that_waits() -> None:
    other = Tenant("other", 50.0, "batch")
    quota = Quota(live_sequences=23)
    pours = Tenant("pours", 1.0, "batch", quota)
    play = play_of(hold_steps=True, tenants=tenancy(other=other, pours=pours))
    started(play, flood(100))
    first = ask("first", 48, 1, 3.0, tenant="other")
    Between(play, lambda now: play.harness.commands.extend([Submit(first), question(now)]))
    turn_until_idle(play)
    waited_for = [e.reason for e in play.scheduler.journal.entries if e.request_id == "first"]
    assert "slots" not in waited_for


@pytest.mark.parametrize("first", [Stop(), Configure(tenancy())])
def test_nobody_cuts_in_past_the_end_or_other_tenants(first: Stop | Configure) -> None:
    play = play_of(hold_steps=True)
    started(play, flood())
    Between(play, lambda now: play.harness.commands.extend([first, question(now)]))
    for _ in range(20):
        play.harness.turn()
    assert chunks(play, "cut_in") == []


def test_a_failure_while_a_step_is_held_fails_the_newcomer_alone() -> None:
    play = play_of(hold_steps=True)
    started(play, flood())
    harness, step = play.harness, play.harness.engine.step

    def broken(batch: Batch) -> list[SequenceOutput]:
        if any(work.seq_id == "q" for work in batch.work):
            raise RuntimeError("no luck")
        return step(batch)

    harness.engine.step = broken  # type: ignore[method-assign]
    Between(play, lambda now: harness.commands.append(question(now)))
    turn_until_idle(play)
    assert chunks(play, "cut_in") == ["q"]
    assert [e.finish for e in harness.finish_of("q")] == [Finish.ERROR]
    assert all(harness.finish_of(f"f{i}")[0].finish is Finish.LENGTH for i in range(60))


def test_what_cannot_be_published_ends_the_turn_after_the_step() -> None:
    """The engine is in no position to pass on what is raised while it holds a step."""
    play = play_of(hold_steps=True)
    started(play, flood())
    harness, publish = play.harness, play.harness.loop.publish
    broken_at: list[float] = []

    def broken(events: object, stats: object) -> None:
        if play.scheduler.bill.held and not broken_at:
            broken_at.append(harness.now)
            raise ConnectionError("nobody listens")
        publish(events, stats)  # type: ignore[arg-type]

    harness.loop.publish = broken
    Between(play, lambda now: harness.commands.append(question(now)))
    with pytest.raises(ConnectionError):
        turn_until_idle(play)


def random_play(seed: int) -> int:
    """Traffic with shared beginnings that comes at any time; how many cut in."""
    rng = random.Random(seed)
    size = rng.choice([1, 4, 16])
    engine = TimedEngine(
        vocab_size=VOCAB_SIZE,
        max_model_len=LONGEST,
        page_size=size,
        num_pages=rng.choice([6, 12]) * -(-LONGEST // size),
        copying=0.9,
    )
    engine.fixed, engine.per_sequence = 0.02, 0.03  # a short prompt is worth it
    limits = Limits(
        max_prefill_tokens=rng.choice([16, 64]),
        max_decode_sequences=rng.choice([4, 12]),
        mix_phases=rng.random() < 0.7,
        max_draft_tokens=rng.choice([0, 4]),
        hold_steps=True,
        min_copied_tokens=1,
    )
    classes = {"quick": Class("quick", 0, ttft=0.15), "batch": Class("batch", 2)}
    tenants = {"a": Tenant("a", 1.0, "quick"), "b": Tenant("b", 1.0, "batch")}
    engine.harness = harness = Harness(engine, limits, tenancy=Tenancy(tenants, classes))
    todo, sent = random_requests(rng, 60, LONGEST), []

    def arrive() -> None:
        if todo and rng.random() < 0.1:
            sent.append(replace(todo.pop(), arrival=harness.now, tenant=rng.choice("ab")))
            harness.commands.append(Submit(sent[-1]))
        if sent and rng.random() < 0.01:
            harness.commands.append(Cancel(rng.choice(sent).id))

    harness.arrive = arrive
    for _ in range(MAX_TURNS):
        harness.turn()
        if not todo and not harness.num_commands and harness.scheduler.is_idle:
            break
    for request in sent:
        tokens, finish = harness.tokens_of(request.id), harness.finish_of(request.id)
        expected, reason = reference(request, copying=0.9)
        assert len(finish) == 1, request.id
        if finish[0].finish is Finish.CANCELLED:
            assert tokens == expected[: len(tokens)], request.id
        else:
            assert (tokens, finish[0].finish) == (expected, reason), request.id
    pool = harness.scheduler.pool
    assert pool.num_free + pool.num_cached == pool.num_pages, "a page leaked"
    return harness.scheduler.journal.counts.get(("chunk", "cut_in"), 0)


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_random_traffic_that_cuts_in_ends_exactly(first: int) -> None:
    assert sum(random_play(seed) for seed in range(first, first + 20)) > 20
