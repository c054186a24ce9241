"""Log probabilities of prompts: all of them, once, whatever becomes of the request meanwhile."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from dynamo_serve.core.batch import Batch, SequenceOutput
from dynamo_serve.core.journal import Kind
from dynamo_serve.core.limits import Limits
from dynamo_serve.core.loop import Submit
from dynamo_serve.core.request import Request, Resumed, Sampling, TokenLogprob
from dynamo_serve.engines.fake import FakeEngine, next_token
from tests.core.traffic import VOCAB_SIZE, Harness, random_requests, reference

LONGEST = 36
NOBODY: frozenset[int] = frozenset()


def expected(request: Request) -> tuple[TokenLogprob, ...]:
    """What the fake model thinks of a prompt, worked out without pages or scheduler."""
    ids, scores = request.prompt_ids, []
    for at in range(1, len(ids)):
        picked = next_token(ids[:at], VOCAB_SIZE, NOBODY)
        rank = (ids[at] - picked) % VOCAB_SIZE + 1
        top = tuple(((picked + i) % VOCAB_SIZE, (i + 1) * math.log(0.5)) for i in range(2))
        scores.append(TokenLogprob(ids[at], rank * math.log(0.5), top, rank))
    return tuple(scores)


def scored(requests: list[Request]) -> list[Request]:
    """Every second one asks for them."""
    return [
        replace(request, sampling=Sampling(prompt_logprobs=2)) if i % 2 else request
        for i, request in enumerate(requests)
    ]


def check(harness: Harness, requests: list[Request]) -> None:
    for request in requests:
        events = [event for event in harness.events if event.request_id == request.id]
        assert [t for event in events for t in event.token_ids] == reference(request)[0]
        first, *rest = events
        assert all(event.prompt_logprobs == () for event in rest)
        if request.sampling.prompt_logprobs is None:
            assert first.prompt_logprobs == ()
        else:
            assert first.prompt_logprobs == expected(request)
            assert first.cached_tokens == 0, "all of it was computed"


@pytest.mark.parametrize("seed", range(20))
def test_every_prompt_has_them_once_in_mixed_traffic(seed: int) -> None:
    rng = random.Random(seed)
    page_size = rng.choice([1, 4, 16])
    engine = FakeEngine(
        vocab_size=VOCAB_SIZE,
        max_model_len=LONGEST,
        page_size=page_size,
        num_pages=-(-LONGEST // page_size) + rng.randint(0, 6),
    )
    limits = Limits(max_prefill_tokens=rng.choice([3, 8, 64]), mix_phases=rng.random() < 0.5)
    harness = Harness(engine, limits)
    requests = scored(random_requests(rng, 12, LONGEST))
    harness.generate(*requests)
    check(harness, requests)


def test_a_preempted_prompt_is_computed_again() -> None:
    """Pages for two prompts and not for their answers."""
    engine = FakeEngine(vocab_size=VOCAB_SIZE, max_model_len=32, page_size=4, num_pages=9)
    harness = Harness(engine, Limits(max_prefill_tokens=5))
    requests = [
        Request(f"r{i}", tuple(range(i, i + 12)), 16, Sampling(prompt_logprobs=2)) for i in range(3)
    ]
    harness.generate(*requests)
    assert harness.scheduler.life.totals["preemptions"] > 0
    check(harness, requests)


def test_what_was_told_of_lost_pages_is_forgotten() -> None:
    """A prompt that has to go halfway, for somebody who was there before."""
    engine = FakeEngine(vocab_size=VOCAB_SIZE, max_model_len=32, page_size=4, num_pages=8)
    harness = Harness(engine, Limits(max_prefill_tokens=1, mix_phases=True))
    first = Request("first", (1, 2, 3), 20)
    second = Request("second", tuple(range(16)), 4, Sampling(prompt_logprobs=2), arrival=0.001)
    harness.generate(first, second)
    (entry,) = [e for e in harness.scheduler.journal.entries if e.kind is Kind.PREEMPT]
    assert entry.request_id == "second" and entry.numbers["output_tokens"] == 0
    check(harness, [first, second])


def test_others_find_what_it_has_computed() -> None:
    harness = Harness(FakeEngine(vocab_size=VOCAB_SIZE, page_size=4))
    prompt = tuple(range(17))
    first = Request("first", prompt, 2)
    scores = Request("scores", prompt, 2, Sampling(prompt_logprobs=2))
    for request in (first, scores, replace(first, id="again")):
        harness.generate(request)
        check(harness, [request])
    (event, *_) = harness.events
    assert event.cached_tokens == 16, "nothing is lost for those that may use it"


class Fragile(FakeEngine):
    """Loses its mind at a step, once."""

    fails_at = 3

    def step(self, batch: Batch) -> list[SequenceOutput]:
        self.fails_at -= 1
        if self.fails_at == 0:
            raise RuntimeError("a step that fails")
        return super().step(batch)


def test_a_step_that_is_run_again_tells_nothing_twice() -> None:
    harness = Harness(Fragile(vocab_size=VOCAB_SIZE, page_size=4), Limits(max_prefill_tokens=4))
    requests = [
        Request(f"r{i}", tuple(range(i, i + 9)), 3, Sampling(prompt_logprobs=2)) for i in range(2)
    ]
    harness.generate(*requests)
    check(harness, requests)


@pytest.mark.parametrize("num_done", [0, 2])
def test_a_request_that_goes_on_in_another_engine(num_done: int) -> None:
    """Before its first token all is computed again; after it they have been told."""
    harness = Harness(FakeEngine(vocab_size=VOCAB_SIZE, page_size=4), Limits(max_prefill_tokens=4))
    request = Request("r", tuple(range(9)), 5, Sampling(prompt_logprobs=2))
    tokens = reference(request)[0]
    first_at = 0.0 if num_done else None
    done = Resumed(tuple(tokens[:num_done]), 0.0, "engine_lost", first_at)
    harness.commands.append(Submit(request, done))
    harness.generate()
    told = [score for event in harness.events for score in event.prompt_logprobs]
    assert tuple(told) == (() if num_done else expected(request))
    assert harness.tokens_of("r") == tokens[num_done:]
