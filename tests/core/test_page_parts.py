"""Reuse below a page: right to the token, only one's own, and never from a page that is gone."""

from __future__ import annotations

import random
from typing import Any

import pytest

from dynamo_serve.core.batch import Batch, SequenceOutput, Work
from dynamo_serve.core.journal import Reason
from dynamo_serve.core.limits import Limits
from dynamo_serve.core.loop import Submit
from dynamo_serve.core.page_parts import PageParts
from dynamo_serve.core.prefix_index import extend_keys
from dynamo_serve.core.prefix_tree import Chain, PrefixTree
from dynamo_serve.core.request import Request, Resumed, Sampling
from dynamo_serve.core.tiers import HOST
from tests.core.traffic import VOCAB_SIZE, Harness, QuickEngine, reference

SIZE = 16
PROMPT = tuple(range(20))  # a page and four tokens
Prompt = tuple[int, ...]


class Engine(QuickEngine):
    """Keeps what it was asked to run; raises what it is given, once each."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(vocab_size=VOCAB_SIZE, max_model_len=64, **settings)
        self.batches: list[Batch] = []
        self.faults: list[Exception] = []

    def run(self, batch: Batch) -> list[SequenceOutput]:
        self.batches.append(batch)
        outputs = super().run(batch)
        if self.faults:
            raise self.faults.pop()
        return outputs


def serve(*, size: int = SIZE, pages: int = 40, host: int = 0, **limits: Any) -> Harness:
    engine = Engine(page_size=size, num_pages=pages, below={HOST: host})
    settings = {"mix_phases": True, "max_queue_delay": 0.0, **limits}
    engine.harness = harness = Harness(engine, Limits(**settings))
    return harness


def engine_of(harness: Harness) -> Engine:
    assert isinstance(harness.engine, Engine)
    return harness.engine


def parts_of(harness: Harness) -> PageParts:
    return harness.scheduler.life.parts


def request(harness: Harness, name: str, prompt: Prompt, **fields: Any) -> Request:
    return Request(name, prompt, fields.pop("max_tokens", 2), arrival=harness.now, **fields)


def ask(harness: Harness, prompt: Prompt, **fields: Any) -> int:
    """Run one request to its right end; how many of its tokens were cached."""
    asked = request(harness, f"r{harness.now}", prompt, **fields)
    assert harness.generate(asked)[asked.id] == reference(asked)[0]
    return next(e.cached_tokens for e in harness.events if e.cached_tokens is not None)


def copying(harness: Harness) -> list[Work]:
    """What began with a copy."""
    works = [work for batch in engine_of(harness).batches for work in batch.work]
    return [work for work in works if work.copied_from is not None]


# ── how much ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("prompt", "cached"),
    [
        (PROMPT[:10], 9),  # the head of a page, but for its last token: that is always run
        (PROMPT[:5], 4),
        (PROMPT[:4], 0),  # three tokens are not worth a copy
        (PROMPT[:16], 15),  # a page exactly
        (PROMPT[:17], 16),  # found whole
        (PROMPT[:18], 16),
        ((*PROMPT[:7], 22, *PROMPT[8:]), 7),
        ((*PROMPT[:4], *[22] * 30), 4),
        ((*PROMPT[:3], *[22] * 30), 0),
        ((22, *PROMPT), 0),
    ],
)
def test_what_is_cached_is_right_to_the_token(prompt: Prompt, cached: int) -> None:
    harness = serve()
    ask(harness, PROMPT, tenant="a")
    assert ask(harness, prompt, tenant="a") == cached
    stats = harness.scheduler.stats()
    assert stats.prefix_hit_tokens_total == cached
    assert stats.prefix_copied_tokens_total == cached % SIZE
    assert harness.scheduler.shares.account("a").saved_tokens == cached


@pytest.mark.parametrize("at", range(33))
def test_one_token_that_differs_ends_what_is_reused(at: int) -> None:
    harness = serve(min_copied_tokens=1)
    long = tuple(i % VOCAB_SIZE for i in range(40))
    ask(harness, long)
    changed = (*long[:at], (long[at] + 1) % VOCAB_SIZE, *long[at + 1 :])
    assert ask(harness, changed) == at
    history = harness.scheduler.journal.gone[engine_of(harness).batches[-1].work[0].seq_id]
    (admitted,) = [entry for entry in history if entry.kind.value == "admit"]
    assert admitted.numbers["cached_tokens"] == at
    assert admitted.numbers["copied_tokens"] == at % SIZE


def test_the_page_that_is_most_alike_is_taken_however_many_there_are() -> None:
    harness = serve(pages=400)
    for i in range(200):
        ask(harness, (*PROMPT[:6], i % VOCAB_SIZE, i // VOCAB_SIZE, *range(20)))
    ask(harness, (*PROMPT[:9], *[22] * 10))
    for i in range(100):
        ask(harness, (*PROMPT[:6], i % VOCAB_SIZE, 22 - i // VOCAB_SIZE, *range(20)))
    assert ask(harness, (*PROMPT[:9], *[21] * 10)) == 9


def test_nothing_is_copied_where_computing_takes_less_or_nobody_can() -> None:
    for seconds in (10.0, None):
        harness = serve()
        parts_of(harness).copy_seconds = seconds
        ask(harness, PROMPT)
        assert ask(harness, PROMPT[:10]) == 0
        assert not copying(harness)


def test_an_answer_that_goes_on_is_found_below_a_page_as_well() -> None:
    harness = serve()
    asked = request(harness, "a", PROMPT[:10], max_tokens=12)
    answer = tuple(harness.generate(asked)["a"])
    assert ask(harness, (*PROMPT[:10], *answer[:5], *answer[:3])) >= 15


# ── whose ────────────────────────────────────────────────────────────────────


def test_another_salt_finds_nothing() -> None:
    harness = serve()
    ask(harness, PROMPT, tenant="a", salt="a")
    assert ask(harness, PROMPT[:10], tenant="b", salt="b") == 0
    assert ask(harness, PROMPT[:10], tenant="a", salt="a") == 9


def test_who_shares_a_salt_cannot_guess_anothers_text_token_by_token() -> None:
    harness = serve()
    ask(harness, PROMPT, tenant="a", salt="both")
    assert ask(harness, (*PROMPT[:10], 22, 22), tenant="b", salt="both") == 0
    assert ask(harness, PROMPT, tenant="b", salt="both") == 16, "what is equal, it had itself"
    assert ask(harness, (*PROMPT[:10], 22, 22), tenant="b", salt="both") == 10


# ── the page that is copied ──────────────────────────────────────────────────


def begin(harness: Harness, prompt: Prompt) -> tuple[Batch, int]:
    """A request whose first step is planned; the batch, and the page that it copies from."""
    ask(harness, PROMPT)
    harness.scheduler.add(request(harness, "b", prompt), harness.now)
    batch = harness.scheduler.schedule(harness.now)
    harness.scheduler.check()
    assert batch is not None
    (work,) = batch.work
    assert work.copied_from is not None and work.copied_from not in work.page_table
    assert work.cached_ids == prompt[: work.position]
    return batch, work.copied_from


def test_its_page_is_held_until_the_step_is_settled_and_not_longer() -> None:
    harness = serve(max_prefill_tokens=2)
    batch, page_id = begin(harness, (*PROMPT[:8], *[22] * 8))
    pool = harness.scheduler.pool
    assert pool.num_used == 2 and batch.work[0].copied(SIZE) == (
        page_id,
        *batch.work[0].page_table,
        8,
    )
    harness.scheduler.update(batch, harness.engine.step(batch), harness.now)
    harness.scheduler.check()
    assert pool.num_used == 1
    following = harness.scheduler.schedule(harness.now)
    assert following is not None and following.work[0].copied_from is None


@pytest.mark.parametrize("leaves", ["cancelled", "preempted"])
def test_its_page_is_free_again_when_the_sequence_has_gone_before_it_ran(leaves: str) -> None:
    harness = serve()
    scheduler = harness.scheduler
    batch, _ = begin(harness, PROMPT[:10])
    if leaves == "cancelled":
        scheduler.cancel("b", harness.now)
    else:
        scheduler.life.preempt(scheduler.running["b"], Reason.OUT_OF_PAGES, harness.now)
    scheduler.check()
    assert not scheduler.pool.num_used
    assert scheduler.update(batch, harness.engine.step(batch), harness.now) == []
    scheduler.check()


def test_a_step_that_raises_is_run_again_with_its_copies() -> None:
    harness = serve()
    ask(harness, PROMPT)
    engine_of(harness).faults = [RuntimeError("twice"), RuntimeError("once")]
    asked = [
        request(harness, "b", PROMPT[:10]),
        request(harness, "c", (*PROMPT[:7], *[22] * 20)),
    ]
    answers = harness.generate(*asked)
    assert not engine_of(harness).faults
    for each in asked:
        assert answers[each.id] == reference(each)[0]


def test_an_engine_that_sees_each_token_once_sees_those_copied() -> None:
    harness = serve()
    ask(harness, PROMPT)
    assert ask(harness, PROMPT[:10], sampling=Sampling(presence_penalty=0.5)) == 9
    (first,) = copying(harness)
    assert first.cached_ids == PROMPT[:9] and first.token_ids == PROMPT[9:10]


def test_nobody_loses_a_page_for_a_copy() -> None:
    harness = serve(size=4, pages=5, min_copied_tokens=1)
    ask(harness, tuple(range(9)))  # three pages; two of them are kept
    long = (*range(6), *[22] * 12)  # takes all five, one of them found
    assert ask(harness, long) == 4, "the copy would need a sixth page"
    assert ask(harness, (*range(6), *[22] * 6)) == 11


def test_a_suspect_copies_nothing() -> None:
    harness = serve()
    ask(harness, PROMPT)
    asked = request(harness, "b", PROMPT[:10])
    harness.commands.append(Submit(asked, Resumed((), harness.now, "engine_lost", None, 0, True)))
    for _ in range(20):
        harness.turn()
    assert harness.tokens_of("b") == reference(asked)[0]
    assert engine_of(harness).num_copied == 0


def test_a_resumed_request_goes_on_within_a_page() -> None:
    harness = serve()
    ask(harness, PROMPT, max_tokens=14)  # the second page is full with the twelfth
    asked = request(harness, "b", PROMPT, max_tokens=14)
    tokens = tuple(reference(asked)[0])
    done = Resumed(tokens[:8], harness.now, "engine_lost", harness.now, 0)
    harness.commands.append(Submit(asked, done))
    for _ in range(40):
        harness.turn()
    assert tuple(harness.tokens_of("b")) == tokens[8:]
    (copied,) = copying(harness)
    assert copied.position == 27 == len(PROMPT) + 8 - 1


def test_who_waits_for_its_prefix_still_does() -> None:
    harness = serve(max_prefill_tokens=8)
    ask(harness, PROMPT)
    shared = (*PROMPT[:10], *[22] * 22)
    asked = [request(harness, f"t{i}", (*shared, i)) for i in range(3)]
    harness.generate(*asked)
    told = {e.request_id: e.cached_tokens for e in harness.events if e.cached_tokens is not None}
    assert told == {"t0": 10, "t1": 32, "t2": 32}


def test_what_is_being_restored_is_waited_for_and_nothing_copied() -> None:
    harness = serve(size=4, pages=12, host=64, min_copied_tokens=1)
    ask(harness, PROMPT)
    for i in range(8):
        ask(harness, tuple((5 * i + j) % VOCAB_SIZE for j in range(30)))
        for _ in range(20):
            harness.turn()
    before = engine_of(harness).num_copied
    assert ask(harness, PROMPT) == 16
    assert harness.scheduler.stats().restored_tokens_total == 16
    assert engine_of(harness).num_copied == before


# ── the order in which pages are kept ────────────────────────────────────────


@pytest.mark.parametrize("seed", range(20))
def test_what_begins_alike_is_found_in_the_order_of_how_much(seed: int) -> None:
    rng = random.Random(seed)
    size, tree = 4, PrefixTree(4)
    stored: dict[bytes, Prompt] = {}

    def some(count: int) -> Prompt:
        return tuple(rng.choice([0, 1, 256, 70_000, 1 << 24]) for _ in range(count))

    for _ in range(60):
        tokens, keys = some(size), list[bytes]()
        extend_keys(keys, tokens, "", size, size)
        tree.learn(Chain("t", "", keys, tokens), range(1), 0.0)
        stored[keys[0]] = tokens
        if rng.random() < 0.3:
            gone = rng.choice(list(stored))
            tree.lose(gone)
            del stored[gone]
        tree.check([stored])
        wanted = some(rng.randint(1, size))
        root = tree.parent(Chain("t", "", [], ()), 0)
        found = [(node.key, same) for node, same in tree.alike(root, wanted, 1)]
        common = {
            key: next(
                (i for i, (a, b) in enumerate(zip(tokens, wanted, strict=False)) if a != b),
                len(wanted),
            )
            for key, tokens in stored.items()
        }
        expected = sorted((same for same in common.values() if same), reverse=True)
        assert [same for _, same in found] == expected[: len(found)]
        assert len(found) == min(32, len(expected))
        assert all(common[key] == same for key, same in found)
