"""What every engine owes the scheduler, whatever is behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dynamo_serve.core.batch import Batch, Phase, Work
from dynamo_serve.core.engine import Engine, EngineSpec
from dynamo_serve.core.request import Sampling
from dynamo_serve.engines.fake import FakeEngine
from tests.engines.local.driver import make_engine
from tests.engines.local.zoo import checkpoint

GREEDY = Sampling(temperature=0.0)
Started = tuple[Engine, EngineSpec]

ENGINES: dict[str, Callable[[], Engine]] = {
    "fake": lambda: FakeEngine(vocab_size=97, page_size=4, num_pages=64),
    "local": lambda: make_engine(checkpoint("llama"), page_size=4, num_pages=64),
}


@pytest.fixture(params=sorted(ENGINES))
def started(request: pytest.FixtureRequest) -> Iterator[Started]:
    engine = ENGINES[request.param]()
    yield engine, engine.start()
    engine.close()


def whole(seq_id: str, tokens: tuple[int, ...], pages: tuple[int, ...], **more: Any) -> Work:
    return Work(seq_id, tokens, 0, pages, True, GREEDY, len(tokens))._replace(**more)


def next_token(engine: Engine, *work: Work) -> int:
    """The token of the last work, run with the others in one step."""
    outputs = {o.seq_id: o for o in engine.step(Batch(Phase.PREFILL, work))}
    (token,) = outputs[work[-1].seq_id].token_ids
    return token


def test_spec_is_consistent(started: Started) -> None:
    _, spec = started
    assert spec.page_size > 0 and spec.num_pages > 0 and spec.vocab_size > 0
    assert 0 < spec.max_model_len <= spec.page_size * spec.num_pages
    assert {"architecture", "device", "attention_backend"} <= set(spec.facts)


def test_only_work_that_samples_yields_a_token(started: Started) -> None:
    engine, spec = started
    outputs = engine.step(
        Batch(
            Phase.PREFILL,
            (
                whole("a", (1, 2, 3), (0,)),
                whole("b", (4, 5), (1,), samples=False),
                whole("c", (6,), (2,)),
            ),
        )
    )
    assert sorted(o.seq_id for o in outputs) == ["a", "c"]
    for out in outputs:
        assert len(out.token_ids) == 1 and 0 <= out.token_ids[0] < spec.vocab_size
        assert out.finish is None and out.error is None and out.logprobs == ()


def test_a_step_without_sampling_yields_nothing(started: Started) -> None:
    engine, _ = started
    assert engine.step(Batch(Phase.PREFILL, (whole("a", (1, 2), (0,), samples=False),))) == []


def test_token_depends_on_the_context_not_on_pages_chunks_or_neighbours(started: Started) -> None:
    engine, _ = started
    prompt = tuple(range(30, 43))
    expected = next_token(engine, whole("a", prompt, (0, 1, 2, 3)))
    scattered = (9, 40, 3, 63)
    assert next_token(engine, whole("b", prompt, scattered)) == expected
    others = [whole(f"o{i}", tuple(range(i, i + 5)), (20 + 2 * i, 21 + 2 * i)) for i in range(6)]
    assert next_token(engine, *others, whole("c", prompt, scattered)) == expected
    for start, stop in ((0, 6), (6, 7), (7, 13)):
        token = whole("d", prompt[start:stop], (50, 51, 52, 53), position=start)
        found = engine.step(Batch(Phase.PREFILL, (token._replace(samples=stop == 13),)))
    assert found[0].token_ids == (expected,)


def test_shared_pages_stand_for_the_tokens_in_them(started: Started) -> None:
    engine, _ = started
    head, tail = tuple(range(8)), (70, 71)
    expected = next_token(engine, whole("a", head + tail, (0, 1, 2)))
    hit = Work("b", tail, 8, (0, 1, 30), True, GREEDY, 10, cached_ids=head)
    assert next_token(engine, hit) == expected


def test_a_copied_part_of_a_page_stands_for_the_tokens_in_it(started: Started) -> None:
    engine, spec = started
    assert spec.copy_seconds is not None and spec.copy_seconds >= 0
    prompt, tail = tuple(range(30, 43)), (70, 71, 72)
    for same in range(1, 4):
        head = prompt[: 4 + same]
        expected = next_token(engine, whole("a", head + tail, (0, 1, 2)))
        goes_on = next_token(engine, whole("b", prompt, (10, 11, 12, 13)))
        hit = Work("c", tail, len(head), (10, 40, 41), True, GREEDY, len(head + tail), head)
        hit = hit._replace(copied_from=11)
        other = whole("d", (5, 6, 7, 8, 9), (20, 21))
        assert next_token(engine, other, hit) == expected
        assert next_token(engine, hit) == expected, "a step may be run again"
        again = whole("b", prompt[12:], (10, 11, 12, 14), position=12, prompt_len=13)
        assert next_token(engine, again) == goes_on, "the page is as it was"


def decoded(engine: Engine, prompt: tuple[int, ...], count: int) -> list[int]:
    """What follows a prompt, one token at a time, in pages of its own."""
    pages = tuple(range(40, 60))
    tokens = [next_token(engine, whole("one", prompt, pages))]
    for position in range(len(prompt), len(prompt) + count - 1):
        tokens.append(next_token(engine, whole("one", (tokens[-1],), pages, position=position)))
    return tokens


@pytest.mark.parametrize("num_right", range(5))
def test_a_draft_counts_as_far_as_it_is_right(started: Started, num_right: int) -> None:
    engine, spec = started
    assert spec.verifies_drafts
    prompt = (5, 6, 7, 8, 9)
    expected = decoded(engine, prompt, 6)
    pages = (3, 9, 1, 30, 31)
    next_token(engine, whole("a", prompt, pages))
    wrong = (expected[num_right + 1] + 1) % spec.vocab_size
    draft = (*expected[1 : num_right + 1], *[wrong] * 4)[:4]
    work = whole("a", (expected[0], *draft), pages, position=5, prompt_len=5, draft_len=4)
    others = [whole(f"o{i}", (40 + i, 3), (20 + i,)) for i in range(3)]
    sampling = Sampling(temperature=0.0, logprobs=1)
    outputs = {
        o.seq_id: o
        for o in engine.step(Batch(Phase.MIXED, (*others, work._replace(sampling=sampling))))
    }
    kept = len(outputs["a"].token_ids)
    assert kept == num_right + 1
    assert outputs["a"].token_ids == tuple(expected[1 : kept + 1])
    assert [lp.token_id for lp in outputs["a"].logprobs] == list(outputs["a"].token_ids)
    # What the rest of the draft has left in the pages is overwritten by what comes next.
    last = whole("a", (expected[kept],), pages, position=5 + kept, prompt_len=5)
    if kept < 5:
        assert next_token(engine, last) == expected[kept + 1]


def test_banned_token_is_never_picked(started: Started) -> None:
    engine, spec = started
    favourite = next_token(engine, whole("a", (1, 2, 3), (0,)))
    second = next_token(engine, whole("b", (1, 2, 3), (1,), banned_ids=frozenset({favourite})))
    assert second != favourite
    all_but_one = frozenset(range(spec.vocab_size)) - {5}
    assert next_token(engine, whole("c", (1, 2, 3), (2,), banned_ids=all_but_one)) == 5


def test_logprobs_come_as_asked(started: Started) -> None:
    engine, _ = started
    sampling = Sampling(temperature=0.0, logprobs=3)
    work = whole("a", (1, 2, 3), (0,), sampling=sampling)
    (out,) = engine.step(Batch(Phase.PREFILL, (work,)))
    (logprob,) = out.logprobs
    assert logprob.token_id == out.token_ids[0]
    assert logprob.logprob <= 0 and len(logprob.top) == 3
    values = [value for _, value in logprob.top]
    assert values == sorted(values, reverse=True)
    assert logprob.top[0] == (logprob.token_id, logprob.logprob)  # greedy: the likeliest


def test_dropped_sequences_may_come_back_and_unknown_ones_are_no_error(started: Started) -> None:
    engine, _ = started
    sampling = Sampling(temperature=0.0, repetition_penalty=1.3)
    first = next_token(engine, whole("a", (1, 2, 3), (0,), sampling=sampling))
    engine.drop(["a", "nobody"])
    engine.drop(["a"])
    assert next_token(engine, whole("a", (1, 2, 3), (7,), sampling=sampling)) == first


def test_close_may_be_called_twice(started: Started) -> None:
    engine, _ = started
    engine.close()
    engine.close()
