"""The cases random traffic rarely meets, one by one."""

from __future__ import annotations

from typing import Any

import pytest

from dynamo_serve.core.batch import Batch, Phase, SequenceOutput
from dynamo_serve.core.limits import Limits
from dynamo_serve.core.loop import Cancel, Submit
from dynamo_serve.core.request import Finish, Request, Sampling
from dynamo_serve.engines.fake import FakeEngine
from tests.core.traffic import VOCAB_SIZE, Harness, reference

NO_DELAY = Limits(max_queue_delay=0.0)


class Recorder(FakeEngine):
    """Keeps every batch it was given."""

    def __init__(self, **options: Any) -> None:
        super().__init__(vocab_size=VOCAB_SIZE, **options)
        self.batches: list[Batch] = []
        self.forgotten: list[str] = []

    def step(self, batch: Batch) -> list[SequenceOutput]:
        self.batches.append(batch)
        return super().step(batch)

    def drop(self, seq_ids: Any) -> None:
        self.forgotten += seq_ids

    def prefilled(self, seq_id: str) -> int:
        return sum(
            len(w.token_ids)
            for b in self.batches
            if b.phase is Phase.PREFILL
            for w in b.work
            if w.seq_id == seq_id
        )


def harness_of(limits: Limits = NO_DELAY, **options: Any) -> tuple[Harness, Recorder]:
    engine = Recorder(**options)
    return Harness(engine, limits), engine


def ask(name: str, prompt: tuple[int, ...], max_tokens: int = 3, **fields: Any) -> Request:
    return Request(name, prompt, max_tokens, **fields)


def test_a_prompt_cached_to_its_last_token_still_yields_a_first_token() -> None:
    harness, engine = harness_of()
    prompt = tuple(range(1, 9))
    first = harness.generate(ask("a", prompt))["a"]
    assert harness.generate(ask("b", prompt))["b"] == first == reference(ask("a", prompt))[0]
    [finish] = harness.finish_of("b")
    assert finish.summary is not None
    assert finish.summary.cached_tokens == 4  # the second page holds the last token
    assert engine.prefilled("b") == 4


def test_a_cached_head_is_shown_to_the_engine_once() -> None:
    harness, engine = harness_of(Limits(max_prefill_tokens=3, max_queue_delay=0.0))
    harness.generate(ask("a", tuple(range(1, 12))))
    engine.batches.clear()
    harness.generate(ask("b", (*range(1, 12), 20, 21)))
    shares = [w for b in engine.batches for w in b.work]
    assert shares[0].cached_ids == tuple(range(1, 9))
    assert all(not w.cached_ids for w in shares[1:])
    assert sum((w.token_ids for w in shares[:2]), shares[0].cached_ids) == (*range(1, 12), 20, 21)


def test_tenants_with_other_salts_share_nothing() -> None:
    harness, engine = harness_of()
    prompt = tuple(range(1, 13))
    harness.generate(ask("a", prompt, salt="acme"))
    harness.generate(ask("b", prompt, salt="globex"))
    assert engine.prefilled("b") == len(prompt)
    assert harness.published[-1].prefix_hit_tokens_total == 0


def test_choices_of_one_prompt_compute_it_once() -> None:
    harness, engine = harness_of()
    prompt = tuple(range(1, 14))
    names = ("n0", "n1", "n2", "n3")
    harness.generate(*(ask(name, prompt) for name in names))
    assert [engine.prefilled(name) for name in names] == [13, 1, 1, 1]
    assert harness.published[-1].prefix_hit_tokens_total == 3 * 12


def test_whoever_waits_for_a_prefix_does_not_hold_up_others() -> None:
    harness, engine = harness_of(Limits(max_prefill_tokens=8, max_queue_delay=0.0))
    prompt = tuple(range(1, 22))
    harness.commands = [Submit(ask(n, p)) for n, p in (("a", prompt), ("b", prompt), ("c", (7, 7)))]
    for _ in range(10):
        harness.turn()
    order = [w.seq_id for b in engine.batches if b.phase is Phase.PREFILL for w in b.work]
    assert order.index("c") < order.index("b")


def test_a_waiter_computes_for_itself_when_the_maker_is_cancelled() -> None:
    harness, engine = harness_of(Limits(max_prefill_tokens=4, max_queue_delay=0.0))
    prompt = tuple(range(1, 14))
    harness.commands = [Submit(ask("a", prompt)), Submit(ask("b", prompt))]
    harness.turn()
    harness.commands = [Cancel("a")]
    harness.generate()
    assert harness.tokens_of("b") == reference(ask("b", prompt))[0]
    assert engine.prefilled("b") == 13 - 4


def test_a_long_prompt_is_run_in_chunks_with_decode_steps_between() -> None:
    harness, engine = harness_of(Limits(max_prefill_tokens=4, max_queue_delay=0.0))
    harness.commands = [Submit(ask("short", (1, 2), max_tokens=8))]
    for _ in range(2):
        harness.turn()
    harness.generate(ask("long", tuple(range(1, 17)), max_tokens=1))
    phases = [b.phase for b in engine.batches]
    assert phases[2:10] == [Phase.PREFILL, Phase.DECODE] * 4
    chunks = [w for b in engine.batches for w in b.work if w.seq_id == "long"]
    assert [w.samples for w in chunks] == [False, False, False, True]


def test_arrivals_are_merged_while_nothing_else_could_run() -> None:
    harness, engine = harness_of(Limits(max_queue_delay=0.005))
    harness.commands = [Submit(ask("a", (1, 2), arrival=0.0))]
    harness.turn()
    harness.commands = [Submit(ask("b", (3, 4), arrival=0.001))]
    for _ in range(8):
        harness.turn()
    assert [len(b.work) for b in engine.batches][:1] == [2]
    assert engine.batches[0].phase is Phase.PREFILL


def test_the_merge_window_is_not_waited_while_something_runs() -> None:
    harness, engine = harness_of(Limits(max_queue_delay=10.0, max_prefill_tokens=4))
    harness.commands = [Submit(ask("a", (1, 2, 3, 4), max_tokens=9))]  # fills a step: no wait
    harness.turn()
    harness.commands = [Submit(ask("b", (5,), arrival=harness.now))]
    for _ in range(2):
        harness.turn()
    assert "b" in {w.seq_id for b in engine.batches for w in b.work}
    assert harness.now < 1.0


def test_a_cancelled_request_frees_its_pages() -> None:
    harness, engine = harness_of()
    harness.commands = [Submit(ask("a", tuple(range(1, 10)), max_tokens=50))]
    for _ in range(4):
        harness.turn()
    harness.commands = [Cancel("a"), Cancel("a")]
    harness.turn()
    assert harness.published[-1].pages_used == 0
    assert [e.finish for e in harness.finish_of("a")] == [Finish.CANCELLED]
    assert engine.forgotten == ["a"]


def test_a_cancel_that_lands_while_its_step_is_in_flight_wins() -> None:
    harness, engine = harness_of()
    scheduler = harness.scheduler
    scheduler.add(ask("d", (1, 2)), 0.0)
    batch = scheduler.schedule(0.0)
    assert batch is not None
    [cancelled] = scheduler.cancel("d", 0.0)
    assert cancelled.finish is Finish.CANCELLED
    assert scheduler.update(batch, engine.step(batch), 0.0) == []
    assert scheduler.cancel("d", 0.0) == []
    scheduler.check()


def test_the_newest_sequence_is_preempted_and_resumes_with_its_tokens() -> None:
    harness, engine = harness_of(num_pages=8, max_model_len=32)
    old, new = ask("old", tuple(range(1, 9)), 18), ask("new", tuple(range(9, 17)), 18)
    answers = harness.generate(old, new)
    assert harness.published[-1].preemptions_total > 0
    assert answers == {"old": reference(old)[0], "new": reference(new)[0]}
    preempted = [r for r in ("old", "new") if engine.forgotten.count(r) > 1]
    assert preempted == ["new"]


def test_prefix_hits_are_counted_once_whatever_preemption_does() -> None:
    harness, _ = harness_of(num_pages=8, max_model_len=32)
    old, new = ask("old", tuple(range(1, 9)), 18), ask("new", tuple(range(9, 17)), 18)
    harness.generate(old, new)
    assert harness.published[-1].preemptions_total > 0
    assert harness.published[-1].prefix_asked_tokens_total == 16
    assert harness.published[-1].prompt_tokens_total == 16
    assert harness.published[-1].prefix_hit_tokens_total == 0


def test_the_head_of_the_queue_is_not_overtaken_for_want_of_room() -> None:
    harness, engine = harness_of(num_pages=8, max_model_len=32)
    harness.commands = [Submit(ask("running", tuple(range(1, 13)), 12))]
    harness.turn()
    harness.commands = [Submit(ask("big", tuple(range(2, 22)), 4)), Submit(ask("small", (1,), 4))]
    harness.turn()
    harness.turn()
    assert "small" not in harness.scheduler.running
    harness.generate()
    firsts = list(dict.fromkeys(w.seq_id for b in engine.batches for w in b.work))
    assert firsts == ["running", "big", "small"]


def test_stop_tokens_are_banned_before_min_tokens_and_end_the_request_after() -> None:
    stops = frozenset(range(0, VOCAB_SIZE, 2))
    request = ask("a", (1, 2, 3), max_tokens=9, stop_ids=stops, min_tokens=4)
    harness, engine = harness_of()
    tokens = harness.generate(request)["a"]
    assert (tokens, Finish.STOP) == reference(request)
    assert not stops & set(tokens[:4])
    assert tokens[-1] in stops
    assert harness.finish_of("a")[0].stop_id == tokens[-1]
    assert [bool(w.banned_ids) for b in engine.batches for w in b.work][:5] == [True] * 4 + [False]


def test_logprobs_come_with_their_tokens() -> None:
    harness, _ = harness_of()
    harness.generate(ask("a", (1, 2, 3), sampling=Sampling(logprobs=2)))
    for event in harness.events:
        assert [lp.token_id for lp in event.logprobs] == list(event.token_ids)
        assert all(len(lp.top) == 2 for lp in event.logprobs)


class Bursts(FakeEngine):
    """Yields nothing at some steps and several tokens at others, like a remote stream."""

    def __init__(self, **options: Any) -> None:
        super().__init__(vocab_size=VOCAB_SIZE, **options)
        self.turn = 0

    def step(self, batch: Batch) -> list[SequenceOutput]:
        self.turn += 1
        outputs = super().step(batch)
        if self.turn % 2:
            return []
        return [out._replace(token_ids=out.token_ids * 3) for out in outputs]


def test_a_step_may_yield_no_token_or_several() -> None:
    harness = Harness(Bursts(page_size=64, num_pages=4), Limits(max_queue_delay=0.0))
    tokens = harness.generate(ask("a", (1, 2, 3), max_tokens=7))["a"]
    assert len(tokens) == 7
    assert len(harness.finish_of("a")) == 1


class Flaky(FakeEngine):
    """Raises when a sequence called "bad" is in the batch; leaves rubbish in its pages."""

    def step(self, batch: Batch) -> list[SequenceOutput]:
        if any(work.seq_id.startswith("bad") for work in batch.work):
            raise RuntimeError("device lost its mind")
        return super().step(batch)


def test_a_step_that_raises_fails_its_batch_and_publishes_none_of_its_pages() -> None:
    harness = Harness(Flaky(vocab_size=VOCAB_SIZE), Limits(max_queue_delay=0.0))
    prompt = tuple(range(1, 10))
    harness.generate(ask("bad", prompt))
    [finish] = harness.finish_of("bad")
    assert finish.finish is Finish.ERROR
    assert finish.error is not None and "device lost its mind" in finish.error
    good = ask("good", prompt)
    assert harness.generate(good)["good"] == reference(good)[0]
    assert harness.published[-1].prefix_hit_tokens_total == 0


def test_an_engine_that_fails_every_step_ends_the_loop() -> None:
    harness = Harness(Flaky(vocab_size=VOCAB_SIZE), Limits(max_queue_delay=0.0))
    for i in range(2):
        harness.generate(ask(f"bad{i}", (1, 2)))
    with pytest.raises(RuntimeError, match="device lost its mind"):
        harness.generate(ask("bad2", (1, 2)))
