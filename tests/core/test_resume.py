"""Requests that go on in another scheduler, suspects that run alone, steps that are run again."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from dynamo_serve.core.batch import Batch, Phase, SequenceOutput, Work
from dynamo_serve.core.engine import EngineBroken, EngineSpec
from dynamo_serve.core.flight import HEADER, Activity, FlightRecorder, num_bytes
from dynamo_serve.core.journal import Kind
from dynamo_serve.core.limits import Limits
from dynamo_serve.core.loop import Cancel, Submit
from dynamo_serve.core.request import Finish, Request, Resumed, Sampling, TokenEvent
from dynamo_serve.core.rescue import MAX_FAILED_STEPS, Rescue
from dynamo_serve.engines.fake import FakeEngine
from tests.core.traffic import (
    MAX_TURNS,
    VOCAB_SIZE,
    Harness,
    QuickEngine,
    random_requests,
    reference,
)

LONGEST = 36


@dataclass
class Client:
    """Keeps what came of each request, and takes it to the next engine."""

    requests: list[Request]
    tokens: dict[str, list[int]] = field(default_factory=dict)
    finishes: dict[str, Finish] = field(default_factory=dict)
    firsts: dict[str, int] = field(default_factory=dict)
    parked: set[str] = field(default_factory=set)
    stalls: float = 0.0

    def see(self, events: list[TokenEvent]) -> None:
        for event in events:
            self.tokens.setdefault(event.request_id, []).extend(event.token_ids)
            if event.cached_tokens is not None:
                assert event.request_id not in self.firsts, "a second first token"
                self.firsts[event.request_id] = event.cached_tokens
            if event.finish is Finish.CANCELLED and event.request_id in self.parked:
                continue
            if event.finish:
                assert event.request_id not in self.finishes, "a second finish"
                self.finishes[event.request_id] = event.finish
                self.stalls += event.summary.stall_seconds if event.summary else 0.0

    def again(self, request: Request, now: float, *, is_suspect: bool = False) -> Submit:
        """How a request goes on."""
        tokens = tuple(self.tokens.get(request.id, ()))
        first = now - 0.5 if tokens else None
        cached = self.firsts.get(request.id, 0)
        return Submit(request, Resumed(tokens, now, "engine_lost", first, cached, is_suspect))


def harness_of(rng: random.Random, copying: float) -> Harness:
    page_size = rng.choice([1, 4, 16])
    engine = QuickEngine(
        vocab_size=VOCAB_SIZE,
        max_model_len=LONGEST,
        page_size=page_size,
        num_pages=-(-LONGEST // page_size) + rng.randint(0, 12),
        copying=copying,
    )
    limits = Limits(
        max_prefill_tokens=rng.choice([1, 5, 64]),
        max_decode_sequences=rng.choice([2, 8]),
        max_queue_delay=0.003,
        mix_phases=rng.random() < 0.5,
        max_draft_tokens=rng.choice([0, 4]),
        min_copied_tokens=1,
    )
    engine.harness = harness = Harness(engine, limits)
    return harness


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_answers_stay_the_same_however_many_engines_are_lost(first: int) -> None:
    """And however often a request is parked and comes back; suspects or not."""
    num_resumed = 0
    for seed in range(first, first + 20):
        rng = random.Random(seed)
        copying = rng.choice([0.0, 0.8])
        requests = random_requests(rng, 10, LONGEST)
        client, todo = Client(requests), list(requests)
        harness = harness_of(rng, copying)
        harness.see = client.see
        sent: dict[str, Request] = {}
        for _ in range(MAX_TURNS):
            if todo and rng.random() < 0.4:
                request = todo.pop()
                sent[request.id] = request
                harness.commands.append(Submit(request))
            live = [r for r in sent.values() if r.id not in client.finishes]
            if live and rng.random() < 0.05:  # a new engine; what was published is known
                now = harness.now
                harness = harness_of(rng, copying)
                harness.now, harness.see = now, client.see
                suspects = {r.id for r in live if rng.random() < 0.5}
                waiting = [r for r in live if r.id not in client.parked]
                harness.commands += [
                    client.again(r, now, is_suspect=r.id in suspects) for r in waiting
                ]
                num_resumed += len(waiting)
            elif live and rng.random() < 0.05:
                chosen = rng.choice(live)
                if chosen.id in client.parked:
                    client.parked.discard(chosen.id)
                    harness.commands.append(client.again(chosen, harness.now))
                else:
                    client.parked.add(chosen.id)
                    harness.commands.append(Cancel(chosen.id))
                    harness.turn()
                    if chosen.id in client.finishes:  # it was quicker
                        client.parked.discard(chosen.id)
            harness.turn()
            if not todo and not client.parked and len(client.finishes) == len(requests):
                break
        for request in requests:
            expected, reason = reference(request, copying=copying)
            assert client.tokens[request.id] == expected, (seed, request.id)
            assert client.finishes[request.id] is reason
        assert harness.scheduler.is_idle
    assert num_resumed > 40


def test_a_suspect_runs_alone_until_it_has_a_token() -> None:
    """Before everybody else, one after the other, in chunks if need be."""
    batches: list[list[str]] = []

    class Watched(FakeEngine):
        def step(self, batch: Batch) -> list[SequenceOutput]:
            batches.append([work.seq_id for work in batch.work])
            return super().step(batch)

    engine = Watched(vocab_size=VOCAB_SIZE, max_model_len=64, page_size=4, num_pages=64)
    harness = Harness(engine, Limits(max_prefill_tokens=8, mix_phases=True))
    client = Client([Request(f"r{i}", tuple(range(i, i + 12)), 6) for i in range(5)])
    harness.see = client.see
    a, b, c, d, e = client.requests
    client.tokens = {r.id: reference(r)[0][:2] for r in (a, b)}
    client.firsts = {a.id: 0, b.id: 0}
    harness.commands = [
        Submit(e),
        client.again(a, 0.0, is_suspect=True),
        client.again(c, 0.0),
        client.again(b, 0.0, is_suspect=True),
        Submit(d),
    ]
    while len(client.finishes) < 5:
        harness.turn()
    assert batches[:4] == [["r0"], ["r0"], ["r1"], ["r1"]]
    assert all(len(batch) > 1 for batch in batches[5:8])
    assert {id: list(tokens) for id, tokens in client.tokens.items()} == {
        r.id: reference(r)[0] for r in client.requests
    }
    kinds = [(e.kind, e.reason) for e in harness.scheduler.journal.entries]
    assert (Kind.RESUME, "engine_lost") in kinds and (Kind.CHUNK, "alone") in kinds


def test_what_a_request_lost_by_a_crash_counts_as_a_stall() -> None:
    engine = FakeEngine(vocab_size=VOCAB_SIZE, max_model_len=64, page_size=4, num_pages=64)
    harness = Harness(engine, now=10.0)
    request = Request("a", (1, 2), 4, arrival=1.0)
    done = Resumed(tuple(reference(request)[0][:2]), 4.0, "engine_lost", 2.0, 0)
    harness.commands = [Submit(request, done)]
    while not harness.finish_of("a"):
        harness.turn()
    assert harness.tokens_of("a") == reference(request)[0][2:]
    summary = harness.finish_of("a")[0].summary
    assert summary is not None
    assert summary.stall_seconds == pytest.approx(6.0, abs=0.1)
    assert summary.decode_seconds == pytest.approx(8.0, abs=0.1)  # since its first token
    assert summary.queue_seconds == pytest.approx(1.0)


def test_a_resumed_request_is_never_refused() -> None:
    engine = FakeEngine(vocab_size=VOCAB_SIZE, max_model_len=64, page_size=4, num_pages=64)
    harness = Harness(engine, Limits(max_waiting=1, max_decode_sequences=1))
    requests = [Request(f"r{i}", (1, i), 4) for i in range(5)]
    client = Client(requests)
    harness.commands = [client.again(request, 0.0) for request in requests]
    while len({e.request_id for e in harness.events if e.finish}) < 5:
        harness.turn()
    assert not [event for event in harness.events if event.refusal]


# ── steps that raise ─────────────────────────────────────────────────────────


class Breaking(FakeEngine):
    """Raises what `fault` says of a batch; remembers the sizes of what it was asked."""

    def __init__(self, fault: Callable[[list[str]], Exception | None]) -> None:
        super().__init__(vocab_size=VOCAB_SIZE, max_model_len=64, page_size=4, num_pages=64)
        self.fault = fault
        self.sizes: list[int] = []

    def step(self, batch: Batch) -> list[SequenceOutput]:
        self.sizes.append(len(batch.work))
        if error := self.fault([work.seq_id for work in batch.work]):
            raise error
        return super().step(batch)


def batch_of(*names: str) -> Batch:
    works = [
        Work(name, (1, 2), 0, (i,), True, Sampling(), prompt_len=2) for i, name in enumerate(names)
    ]
    return Batch(Phase.PREFILL, tuple(works))


def rescue(fault: Callable[[list[str]], Exception | None]) -> tuple[Rescue, Breaking]:
    engine = Breaking(fault)
    engine.start()
    return Rescue(engine), engine


def test_a_batch_that_fails_is_halved_until_the_culprit_is_alone() -> None:
    guard, engine = rescue(lambda ids: MemoryError("too much") if "c" in ids else None)
    outputs, is_smooth = guard.step(batch_of(*"abcdefgh"))
    assert not is_smooth
    assert [out.seq_id for out in outputs if out.finish is Finish.ERROR] == ["c"]
    assert sorted(out.seq_id for out in outputs) == list("abcdefgh")
    assert "2 tokens up to position 2, 1 pages" in str(outputs[2].error)
    assert engine.sizes == [8, 4, 2, 2, 1, 1, 1, 4]  # the culprit has two tries alone


def test_a_batch_too_large_for_the_memory_is_run_in_parts_and_nobody_fails() -> None:
    guard, _ = rescue(lambda ids: MemoryError("too much") if len(ids) > 2 else None)
    outputs, _ = guard.step(batch_of(*"abcde"))
    assert all(out.finish is None for out in outputs)
    assert [out.seq_id for out in outputs] == list("abcde")
    assert guard.step(batch_of("f")).is_smooth


def test_an_engine_with_which_nothing_works_is_lost() -> None:
    guard, _ = rescue(lambda ids: RuntimeError("no device"))
    with pytest.raises(RuntimeError, match="no device"):
        guard.step(batch_of("a", "b"))


def test_one_sequence_after_the_other_that_fails_alone_is_the_engines_fault() -> None:
    guard, _ = rescue(lambda ids: RuntimeError("no device"))
    for name in "ab"[: MAX_FAILED_STEPS - 1]:
        assert guard.step(batch_of(name)).outputs[0].finish is Finish.ERROR
    with pytest.raises(RuntimeError, match="no device"):
        guard.step(batch_of("c"))


def test_a_broken_engine_is_not_tried_again() -> None:
    guard, engine = rescue(lambda ids: EngineBroken("the device is gone"))
    with pytest.raises(EngineBroken):
        guard.step(batch_of("a", "b"))
    assert engine.sizes == [2]


def test_a_step_that_was_run_again_teaches_nothing_about_time() -> None:
    faults = [RuntimeError("once")]

    class Slow(QuickEngine):
        def step(self, batch: Batch) -> list[SequenceOutput]:
            outputs = super().step(batch)
            if faults and batch.phase is Phase.DECODE:
                self.harness.now += 100.0
                raise faults.pop()
            return outputs

    engine = Slow(vocab_size=VOCAB_SIZE, max_model_len=64, page_size=4, num_pages=64)
    engine.harness = harness = Harness(engine)
    request = Request("a", (1, 2), 30)
    assert harness.generate(request)["a"] == reference(request)[0]
    assert not faults
    assert harness.scheduler.cost.predict(harness.scheduler.bill.planned.shape) < 1.0


# ── the flight record ────────────────────────────────────────────────────────


def test_the_record_tells_what_the_loop_is_at() -> None:
    recorder = FlightRecorder(memory := bytearray(num_bytes(4)))
    watcher = FlightRecorder(memory)
    assert watcher.read().activity is Activity.STARTING
    recorder.waits(1.0)
    recorder.took(3)
    assert watcher.read()[:3] == (Activity.WAITING, 3, 1.0)
    recorder.turns(2.0)
    assert watcher.read()[:3] == (Activity.TURNING, 3, 2.0)
    outer = recorder.steps(["a", "b"], 3.0, 0.5)
    inner = recorder.steps(["c"], 3.2, 0.1)
    assert watcher.read() == (Activity.STEPPING, 3, 3.2, 0.1, ("c",))
    recorder.goes_on(inner, 0.1)
    assert watcher.read() == (Activity.STEPPING, 3, 3.1, 0.5, ("a", "b"))
    recorder.goes_on(outer, 0.6)
    assert watcher.read() == (Activity.TURNING, 3, 2.6, 0.0, ())


def test_a_state_that_is_half_written_is_not_taken_for_the_loops_age() -> None:
    recorder = FlightRecorder(memory := bytearray(num_bytes(4)))
    watcher = FlightRecorder(memory)
    recorder.turns(5.0)
    seen = watcher.read()
    whole = bytes(memory)
    for written in (0, 8, 12, 24):  # bytes of the next state, behind which all is cleared
        memory[:40] = bytes(40)
        memory[:written] = HEADER.pack(3, Activity.TURNING, 0, 0, 6.0, 0.0)[:written]
        assert watcher.read() == seen
    memory[: len(whole)] = whole
    recorder.turns(6.0)
    assert watcher.read().since == 6.0


def test_of_a_step_too_long_for_the_record_a_part_is_known() -> None:
    recorder = FlightRecorder(memory := bytearray(num_bytes(1)))
    recorder.steps([f"sequence-{i}" for i in range(100)], 0.0, 0.0)
    assert FlightRecorder(memory).read().seq_ids[0] == "sequence-0"


def test_the_loop_keeps_the_record() -> None:
    """Also of the step that failed: whoever looks after the end of the process finds it."""
    seen: list[tuple[Activity, tuple[str, ...]]] = []

    class Watched(FakeEngine):
        recorder: FlightRecorder

        def start(self) -> EngineSpec:
            return super().start()

        def step(self, batch: Batch) -> list[SequenceOutput]:
            look = self.recorder.read()
            seen.append((look.activity, look.seq_ids))
            if len(seen) == 3:
                raise EngineBroken("gone")
            return super().step(batch)

    engine = Watched(vocab_size=VOCAB_SIZE, max_model_len=64, page_size=4, num_pages=64)
    harness = Harness(engine)
    engine.recorder = harness.loop.flight
    harness.commands = [Submit(Request("a", (1, 2), 9)), Submit(Request("b", (1, 3), 9))]
    with pytest.raises(EngineBroken):
        for _ in range(10):
            harness.turn()
    assert seen == [(Activity.STEPPING, ("a", "b"))] * 3
    assert harness.loop.flight.read().seq_ids == ("a", "b")
    assert harness.loop.flight.read().num_taken == 2
