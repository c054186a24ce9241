"""One four-method seam carries engines that are no paged language model."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from dynamo_serve.core.batch import Batch, Phase, SequenceOutput, Work
from dynamo_serve.core.engine import EngineSpec
from dynamo_serve.core.limits import Limits
from dynamo_serve.core.loop import Submit
from dynamo_serve.core.request import NO_ID, Finish, Request, Resumed
from dynamo_serve.engines.fake import next_token
from tests.core.traffic import VOCAB_SIZE, Harness, reference


class RemoteEngine:
    """Batches for itself and answers when it pleases; a slot is one very large page."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.streams: dict[str, list[int]] = {}
        self.most_streams = 0

    def start(self) -> EngineSpec:
        return EngineSpec(max_model_len=64, page_size=64, num_pages=8, vocab_size=VOCAB_SIZE)

    def step(self, batch: Batch) -> list[SequenceOutput]:
        for work in batch.work:
            if batch.phase is Phase.PREFILL:
                self.streams.setdefault(work.seq_id, []).extend(work.token_ids)
        self.most_streams = max(self.most_streams, len(self.streams))
        return [self.burst(w.seq_id) for w in batch.work if w.samples and self.rng.random() < 0.6]

    def burst(self, seq_id: str) -> SequenceOutput:
        context, tokens = self.streams[seq_id], []
        for _ in range(self.rng.randint(1, 3)):
            tokens.append(next_token(context, VOCAB_SIZE, frozenset()))
            context.append(tokens[-1])
        return SequenceOutput(seq_id, tuple(tokens))

    def drop(self, seq_ids: Iterable[str]) -> None:
        for seq_id in seq_ids:
            self.streams.pop(seq_id, None)

    def close(self) -> None:
        pass


class DiffusionEngine:
    """Prefill encodes the prompt; each decode step is a denoising step; an image comes last."""

    num_steps = 6

    def __init__(self) -> None:
        self.latents: dict[str, int] = {}

    def start(self) -> EngineSpec:
        return EngineSpec(max_model_len=64, page_size=64, num_pages=4, vocab_size=100)

    def step(self, batch: Batch) -> list[SequenceOutput]:
        return [self.denoise(work.seq_id) for work in batch.work]

    def denoise(self, seq_id: str) -> SequenceOutput:
        done = self.latents[seq_id] = self.latents.get(seq_id, -1) + 1
        if done < self.num_steps:
            return SequenceOutput(seq_id, (done,))  # the token is a progress tick
        return SequenceOutput(seq_id, finish=Finish.STOP, artifact=b"PNG")

    def drop(self, seq_ids: Iterable[str]) -> None:
        for seq_id in seq_ids:
            self.latents.pop(seq_id, None)

    def close(self) -> None:
        pass


@pytest.mark.parametrize("seed", range(20))
def test_a_remote_engine_streams_through_all_its_slots(seed: int) -> None:
    rng = random.Random(seed)
    engine = RemoteEngine(rng)
    harness = Harness(engine, Limits(max_prefill_tokens=rng.choice([3, 64]), max_queue_delay=0.0))
    requests = [
        Request(
            f"r{i}",
            tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 20))),
            max_tokens=rng.randint(4, 20),
            stop_ids=frozenset({13}),
        )
        for i in range(16)
    ]
    answers = harness.generate(*requests)
    assert answers == {r.id: reference(r)[0] for r in requests}
    assert engine.streams == {}
    assert harness.published[-1].prefix_hit_tokens_total == 0
    assert harness.published[-1].preemptions_total == 0


def test_every_slot_of_a_remote_engine_is_used() -> None:
    engine = RemoteEngine(random.Random(0))
    harness = Harness(engine, Limits(max_queue_delay=0.0))
    harness.generate(*(Request(f"r{i}", (1, i), 20) for i in range(16)))
    assert engine.most_streams == 8


def test_images_come_as_artifacts_after_their_ticks() -> None:
    harness = Harness(DiffusionEngine(), Limits(max_queue_delay=0.0))
    ticks = harness.generate(*(Request(f"i{n}", (1, 2, 3), 50) for n in range(7)))
    assert all(tokens == [0, 1, 2, 3, 4, 5] for tokens in ticks.values())
    for name in ticks:
        assert [e.artifact for e in harness.finish_of(name)] == [b"PNG"]


class TextEngine(RemoteEngine):
    """Says words, of which it knows no ids, and goes on behind what has been said."""

    def step(self, batch: Batch) -> list[SequenceOutput]:
        return [self.word(work) for work in batch.work if work.samples and self.rng.random() < 0.6]

    def word(self, work: Work) -> SequenceOutput:
        assert work.request is not None
        count = len(work.said.split())
        texts = tuple(f" {work.request.id}{count + i}" for i in range(self.rng.randint(1, 2)))
        return SequenceOutput(work.seq_id, (NO_ID,) * len(texts), texts=texts)


def said(harness: Harness, name: str) -> str:
    return "".join(t for e in harness.events if e.request_id == name for t in e.texts)


@pytest.mark.parametrize("seed", range(5))
def test_text_comes_beside_its_tokens_and_no_more_than_was_asked_for(seed: int) -> None:
    harness = Harness(TextEngine(random.Random(seed)), Limits(max_queue_delay=0.0))
    counts = {f"r{n}": n + 1 for n in range(9)}
    answers = harness.generate(*(Request(n, (1, 2), count) for n, count in counts.items()))
    for name, count in counts.items():
        assert answers[name] == [NO_ID] * count
        assert said(harness, name).split() == [f"{name}{i}" for i in range(count)]


def test_who_is_resumed_goes_on_behind_his_text() -> None:
    harness = Harness(TextEngine(random.Random(3)), Limits(max_queue_delay=0.0))
    done = Resumed((NO_ID, NO_ID), 0.0, "engine_lost", 0.0, text=" r0 r1")
    harness.commands.append(Submit(Request("r", (1, 2), 4), done))
    for _ in range(50):
        harness.turn()
    assert said(harness, "r") == " r2 r3"


def test_a_fault_of_somebody_else_is_told_with_the_error() -> None:
    engine = TextEngine(random.Random(0))
    failure = SequenceOutput("r", finish=Finish.ERROR, error="away", fault="unavailable")
    engine.step = lambda batch: [failure]  # type: ignore[method-assign]
    harness = Harness(engine, Limits(max_queue_delay=0.0))
    harness.generate(Request("r", (1, 2), 4))
    (last,) = harness.finish_of("r")
    assert (last.finish, last.error, last.fault) == (Finish.ERROR, "away", "unavailable")


@pytest.mark.parametrize(
    ("count", "told", "finish"),
    [
        (4, Finish.STOP, Finish.STOP),
        (4, None, Finish.LENGTH),
        (5, Finish.STOP, Finish.LENGTH),  # it has gone on for longer than it was to
        (3, Finish.STOP, Finish.STOP),
    ],
)
def test_who_ends_by_himself_with_the_last_token_has_not_been_cut(
    count: int, told: Finish | None, finish: Finish
) -> None:
    engine = RemoteEngine(random.Random(0))
    engine.step = lambda batch: [  # type: ignore[method-assign]
        SequenceOutput(work.seq_id, (5,) * count, finish=told) for work in batch.work
    ]
    harness = Harness(engine, Limits(max_queue_delay=0.0))
    harness.generate(Request("r", (1, 2), 4))
    (last,) = harness.finish_of("r")
    assert last.finish is finish
