"""Requests for a vector: among others, in chunks, preempted, cancelled; and prompts never cut."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from dynamo_serve.core.batch import Batch, SequenceOutput
from dynamo_serve.core.limits import Limits
from dynamo_serve.core.loop import Submit
from dynamo_serve.core.request import Finish, Pooling, Request, Resumed, TokenEvent
from dynamo_serve.core.tenant import Class, Tenancy
from dynamo_serve.engines.fake_pooling import vector
from tests.core.traffic import VOCAB_SIZE, Harness, QuickEngine, play, random_requests, reference

KINDS = ("mean", "last")


def engine_of(**settings: Any) -> QuickEngine:
    return QuickEngine(**{"vocab_size": VOCAB_SIZE, "page_size": 4, **settings})


def harness_of(engine: QuickEngine, limits: Limits, **settings: Any) -> Harness:
    engine.harness = Harness(engine, limits, **settings)
    return engine.harness


def asks(name: str, prompt: tuple[int, ...], kind: str = "mean", **more: Any) -> Request:
    return Request(name, prompt, 0, pooling=Pooling(kind), **more)


def last_of(harness: Harness, request: Request) -> TokenEvent:
    (last,) = harness.finish_of(request.id)
    return last


@pytest.mark.parametrize("seed", range(12))
def test_random_traffic_of_both_kinds(seed: int) -> None:
    rng = random.Random(seed)
    longest, page_size = 36, rng.choice([1, 4, 16])
    num_pages = -(-longest // page_size) + rng.randint(0, 8)
    engine = engine_of(max_model_len=longest, page_size=page_size, num_pages=num_pages)
    limits = Limits(
        max_prefill_tokens=rng.choice([1, 5, 16]), max_decode_sequences=rng.choice([2, 8])
    )
    harness = harness_of(engine, limits)
    requests = [
        replace(request, max_tokens=0, pooling=Pooling(rng.choice(KINDS)))
        if rng.random() < 0.6
        else request
        for request in random_requests(rng, 14, longest)
    ]
    cancelled = {r.id for r in requests if rng.random() < 0.2}
    play(harness, rng, list(requests), set(cancelled))
    pool = harness.scheduler.pool
    pool.check([])
    assert pool.num_free + pool.num_cached == pool.num_pages, "a page leaked"
    assert not engine._pools._seen, "the engine keeps what was dropped"
    for request in requests:
        last = last_of(harness, request)
        if last.finish is Finish.CANCELLED:
            assert request.id in cancelled
        elif request.pooling is None:
            assert harness.tokens_of(request.id) == reference(request)[0]
        else:
            assert harness.tokens_of(request.id) == []
            assert last.finish is Finish.STOP and last.summary is not None
            assert last.artifact == vector(request.prompt_ids, request.pooling.kind)


def test_only_the_last_token_may_build_on_what_is_cached() -> None:
    harness = harness_of(engine_of(), Limits())
    prompt = tuple(range(14))
    harness.generate(asks("first", prompt, "last"))
    assert last_of(harness, asks("first", prompt)).cached_tokens == 0
    harness.generate(asks("again", prompt, "last"))
    assert last_of(harness, asks("again", prompt)).cached_tokens == 12
    harness.generate(asks("mean", (*prompt, 1), "mean"))
    assert last_of(harness, asks("mean", prompt)).cached_tokens == 0


def test_a_mean_copies_no_part_of_a_page_either() -> None:
    head = tuple(range(10))
    for kind, cached in (("last", 10), ("mean", 0)):
        harness = harness_of(engine_of(page_size=16), Limits())
        harness.generate(Request("chat", (*head, *[11] * 22), 1))
        request = asks("a", (*head, 12, 13), kind)
        harness.generate(request)
        last = last_of(harness, request)
        assert (last.cached_tokens, last.artifact) == (cached, vector(request.prompt_ids, kind))


def test_what_a_mean_computes_is_found_by_others() -> None:
    harness = harness_of(engine_of(), Limits())
    prompt = tuple(range(14))
    harness.generate(asks("mean", prompt))
    chat = Request("chat", prompt, 3)
    assert harness.generate(chat)["chat"] == reference(chat)[0]
    first = next(e for e in harness.events if e.request_id == "chat")
    assert first.cached_tokens is not None and first.cached_tokens >= 12


def test_the_vector_counts_as_the_first_token() -> None:
    promise = Class("quick", ttft=5.0)
    harness = harness_of(
        engine_of(), Limits(), tenancy=Tenancy(classes={"quick": promise, "standard": promise})
    )
    harness.generate(asks("a", (1, 2, 3), class_name="quick"))
    kept, late, *_ = harness.scheduler.life.tally.by_class()["quick"]
    assert (kept, late) == (1, 0)
    summary = last_of(harness, asks("a", ())).summary
    assert summary is not None and summary.prefill_seconds > 0 and summary.decode_seconds == 0


def test_it_says_nothing_about_how_long_answers_are() -> None:
    harness = harness_of(engine_of(), Limits())
    harness.generate(asks("a", (1, 2, 3)))
    assert harness.scheduler.shares.account("default").num_finished == 0


def test_one_that_was_begun_by_a_lost_engine_is_made_again() -> None:
    harness = harness_of(engine_of(), Limits(max_prefill_tokens=4))
    request = asks("a", tuple(range(11)))
    for is_suspect in (False, True):
        harness.events = []
        done = Resumed((), harness.now, "engine_lost", is_suspect=is_suspect)
        harness.commands.append(Submit(request, done))
        for _ in range(50):
            harness.turn()
            if harness.scheduler.is_idle:
                break
        assert last_of(harness, request).artifact == vector(request.prompt_ids, "mean")


# ── engines that take prompts whole only ─────────────────────────────────────


class Whole(QuickEngine):
    """Says how long each share of its steps was."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.shares: list[list[int]] = []

    def step(self, batch: Batch) -> list[SequenceOutput]:
        assert all(w.samples and w.position == 0 for w in batch.work), "a prompt was cut"
        self.shares.append([len(w.token_ids) for w in batch.work])
        return super().step(batch)


def whole_of(lengths: list[int], limits: Limits) -> tuple[Whole, Harness, list[Request]]:
    """A slot is one very large page."""
    engine = Whole(vocab_size=VOCAB_SIZE, page_size=64, max_model_len=64, num_pages=8)
    harness = harness_of(engine, replace(limits, whole_prompts=True))
    requests = [asks(f"r{i}", (i % VOCAB_SIZE,) * n) for i, n in enumerate(lengths)]
    harness.generate(*requests)
    return engine, harness, requests


def test_prompts_are_never_cut_and_fill_steps_by_their_tokens() -> None:
    lengths = [10, 30, 64, 5, 5, 12, 50, 1, 20, 20]
    engine, harness, requests = whole_of(lengths, Limits(max_prefill_tokens=40))
    assert sorted(n for share in engine.shares for n in share) == sorted(lengths)
    for share in engine.shares:
        assert len(share) == 1 or sum(share) <= 40, "only one alone may be longer than a step"
    assert len(engine.shares) <= 7, "short ones go together"
    for request in requests:
        assert last_of(harness, request).artifact == vector(request.prompt_ids, "mean")


def test_a_suspect_is_not_cut_either() -> None:
    engine, harness, _ = whole_of([3], Limits(max_prefill_tokens=8))
    request = asks("suspect", tuple(range(20)))
    harness.commands.append(Submit(request, Resumed((), harness.now, "engine_lost", None, 0, True)))
    for _ in range(20):
        harness.turn()
        if harness.scheduler.is_idle:
            break
    assert engine.shares[-1] == [20]
    assert last_of(harness, request).artifact == vector(request.prompt_ids, "mean")


def test_as_many_run_as_there_are_slots() -> None:
    engine, _, _ = whole_of([64] * 8, Limits(max_prefill_tokens=1024))
    assert engine.shares == [[64] * 8]
