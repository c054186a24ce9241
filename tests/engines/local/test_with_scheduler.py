"""The real scheduler drives the real engine: still the tokens that transformers gives."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from dynamo_serve.core.limits import Limits
from dynamo_serve.core.page_pool import PagePool
from dynamo_serve.core.request import Finish, Request, Sampling
from dynamo_serve.core.scheduler import Scheduler
from dynamo_serve.core.step_cost import StepCost
from dynamo_serve.engines.local import LocalEngine
from tests.engines.local.driver import GREEDY, make_engine
from tests.engines.local.zoo import checkpoint, expected_tokens

COUNT = 12
MAX_STEPS = 2000


def run(
    engine: LocalEngine,
    num_pages: int,
    requests: Sequence[Request],
    limits: Limits,
    cost: StepCost | None = None,
) -> tuple[dict[str, tuple[int, ...]], Scheduler]:
    """Every request's tokens; all requests arrive at once."""
    scheduler = Scheduler(PagePool(num_pages, 4), limits, cost=cost)
    tokens: dict[str, tuple[int, ...]] = {request.id: () for request in requests}
    finished: list[str] = []
    for request in requests:
        scheduler.add(request, 0.0)
    for turn in range(100, MAX_STEPS):  # from 100: whatever arrived at 0 has been waited for
        now = turn / 100
        batch = scheduler.schedule(now)
        engine.drop(scheduler.take_dropped())
        if batch is None:
            break
        for event in scheduler.update(batch, engine.step(batch), now + 0.005):
            tokens[event.request_id] += event.token_ids
            if event.finish is not None:
                assert event.finish is Finish.LENGTH, event
                finished.append(event.request_id)
        scheduler.check()
    engine.drop(scheduler.take_dropped())
    assert sorted(finished) == sorted(tokens)
    assert len(engine._histories) == 0
    return tokens, scheduler


def greedy(name: str, prompt: tuple[int, ...]) -> Request:
    return Request(name, prompt, COUNT, GREEDY)


def some_prompts() -> list[tuple[int, ...]]:
    """Different lengths; some share a head, two are equal."""
    rng = random.Random(3)
    head = tuple(rng.randrange(128) for _ in range(17))
    tails = [tuple(rng.randrange(128) for _ in range(n)) for n in (1, 5, 9, 14, 3)]
    return [*(head + tail for tail in tails), head + tails[1], tails[3], tails[4], (6,)]


@pytest.fixture(scope="module", params=["qwen3", "gemma2", "mistral", "phi3"])
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize(
    ("num_pages", "chunk", "live", "preempts"),
    [(200, 512, 64, False), (200, 7, 4, False), (22, 16, 64, True), (12, 5, 3, True)],
)
def test_tokens_are_exact_whatever_the_limits(
    model: str, num_pages: int, chunk: int, live: int, preempts: bool
) -> None:
    engine = make_engine(checkpoint(model), num_pages=num_pages)
    engine.start()
    requests = [greedy(str(i), prompt) for i, prompt in enumerate(some_prompts())]
    tokens, scheduler = run(engine, num_pages, requests, Limits(chunk, live))
    engine.close()
    for request in requests:
        expected = expected_tokens(model, request.prompt_ids, COUNT)
        assert tokens[request.id] == expected, request.id
    stats = scheduler.stats()
    assert stats.prefix_hit_tokens_total > 0
    assert (stats.preemptions_total > 0) == preempts


SAMPLED = [
    Sampling(temperature=0.9, seed=1),
    Sampling(temperature=1.2, seed=2, top_k=9),
    Sampling(temperature=0.7, seed=3, top_p=0.8, logprobs=2),
    Sampling(temperature=1.0, seed=4, min_p=0.05),
    Sampling(temperature=1.0, seed=5, repetition_penalty=1.5, frequency_penalty=0.4),
    Sampling(temperature=0.0, presence_penalty=1.5, logit_bias=((9, 3.0),)),
    Sampling(temperature=1.0, seed=7, logit_bias=((5, -100.0),)),
    Sampling(temperature=0.0),
]


def test_sampled_tokens_are_the_same_alone_in_a_batch_and_after_preemption() -> None:
    prompts = some_prompts()
    requests = [
        Request(str(i), prompts[i % len(prompts)], COUNT, sampling)
        for i, sampling in enumerate(SAMPLED * 2)
    ]
    engine = make_engine(checkpoint("llama"), num_pages=200)
    engine.start()
    alone: dict[str, tuple[int, ...]] = {}
    for request in requests:
        alone |= run(engine, 200, [request], Limits())[0]
    together, _ = run(engine, 200, requests, Limits())
    squeezed, scheduler = run(engine, 20, requests, Limits(6, 5))
    engine.close()
    assert scheduler.stats().preemptions_total > 0
    assert together == alone
    assert squeezed == alone
    assert len(set(alone.values())) > len(SAMPLED)


def test_siblings_share_the_prompt_and_differ_by_seed() -> None:
    prompt = some_prompts()[3]
    siblings = [
        Request(f"r-{i}", prompt, COUNT, Sampling(temperature=1.5, seed=100 + i)) for i in range(4)
    ]
    engine = make_engine(checkpoint("qwen2"), num_pages=100)
    engine.start()
    tokens, scheduler = run(engine, 100, siblings, Limits())
    engine.close()
    assert len(set(tokens.values())) == 4
    full_pages = (len(prompt) - 1) // 4
    assert scheduler.stats().prefix_hit_tokens_total == 3 * 4 * full_pages
