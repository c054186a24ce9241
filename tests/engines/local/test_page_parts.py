"""Parts of pages that are copied: the same logits as computing them, and nothing else touched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from dynamo_serve.core.batch import Batch, PageCopy, Phase, SequenceOutput, Work
from dynamo_serve.core.limits import Limits
from dynamo_serve.core.page_pool import PagePool
from dynamo_serve.core.request import Request, TokenEvent
from dynamo_serve.core.scheduler import Scheduler
from dynamo_serve.engines.local import LocalEngine
from tests.engines.local.driver import GREEDY, make_engine
from tests.engines.local.zoo import checkpoint

PROMPT = tuple(range(30, 43))
TAIL = (70, 71, 72)


def work(tokens: tuple[int, ...], position: int, pages: tuple[int, ...], **more: Any) -> Work:
    end = position + len(tokens)
    return Work("s", tokens, position, pages, True, GREEDY, end)._replace(**more)


def logits(engine: LocalEngine, *works: Work) -> torch.Tensor:
    """Of the last work, once all have been run in one step."""
    assert engine._ready is not None
    named = [w._replace(seq_id=str(i)) for i, w in enumerate(works)]
    engine.step(Batch(Phase.PREFILL, tuple(named)))
    with torch.inference_mode():
        return engine._ready.run([named[-1]]).logits.clone()


def content(engine: LocalEngine, page_id: int) -> list[torch.Tensor]:
    assert engine._ready is not None
    return [t[page_id].clone() for pages in engine._ready.cache.layers for t in pages]


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3"])
def test_logits_are_those_of_a_prompt_that_was_computed(
    name: str, kernels: str, kv_dtype: str
) -> None:
    engine = make_engine(checkpoint(name), kernels=kernels, kv_dtype=kv_dtype)
    engine.start()
    near = 1e-4 if kv_dtype == "auto" else 0.01  # a number may be rounded the other way
    for same in range(1, 4):
        head = PROMPT[: 4 + same]
        logits(engine, work(head, 0, (0, 1)))
        expected = logits(engine, work(TAIL, len(head), (0, 1, 2)))
        logits(engine, work(PROMPT, 0, (10, 11, 12, 13)))
        source, target = content(engine, 11), content(engine, 40)
        hit = work(TAIL, len(head), (10, 40, 41), cached_ids=head, copied_from=11)
        found = logits(engine, work((5, 6, 7), 0, (20,)), hit)
        torch.testing.assert_close(found, expected, atol=near, rtol=1e-4)
        for before, after in zip(source, content(engine, 11), strict=True):
            assert torch.equal(before, after), "what is shared was written to"
        for is_now, copied, before in zip(content(engine, 40), source, target, strict=True):
            assert torch.equal(is_now[:same], copied[:same])
            filled = min(4, same + len(TAIL))
            assert torch.equal(is_now[filled:], before[filled:])
    engine.close()


def test_a_copy_in_a_step_that_cuts_in_leaves_the_held_one_as_it_was() -> None:
    engine = make_engine(checkpoint("llama"))
    if not engine.start().holds_steps:
        pytest.skip("no native kernels: no step can be held")
    logits(engine, work(PROMPT, 0, (10, 11, 12, 13)))
    head = PROMPT[:6]
    logits(engine, work(head, 0, (0, 1)))
    alone = engine.step(Batch(Phase.PREFILL, (work(TAIL, 6, (0, 1, 2)),)))
    held = work((44, 45, 46), 13, (10, 11, 12, 13, 14))  # it reads the page that is copied
    expected = engine.step(Batch(Phase.PREFILL, (held,)))
    inside: list[SequenceOutput] = []

    def between() -> None:
        if not inside:
            hit = work(TAIL, 6, (10, 40, 41), seq_id="t", cached_ids=head, copied_from=11)
            inside.extend(engine.step(Batch(Phase.PREFILL, (hit,))))

    engine.hold_for(between, 0.0)
    assert engine.step(Batch(Phase.PREFILL, (held,))) == expected
    assert [out.token_ids for out in inside] == [out.token_ids for out in alone]
    engine.close()


def test_a_copy_takes_the_first_tokens_of_every_layer_and_its_time_is_known() -> None:
    engine = make_engine(checkpoint("llama"))
    spec = engine.start()
    assert engine._ready is not None and spec.copy_seconds is not None
    assert 0 < spec.copy_seconds < 0.1
    for pages in engine._ready.cache.layers:
        for tensor in pages:
            tensor[7] = torch.randn_like(tensor[7])
            tensor[9] = 0
    engine._ready.parts.copy([PageCopy(7, 9, 3)])
    for seven, nine in zip(content(engine, 7), content(engine, 9), strict=True):
        assert torch.equal(seven[:3], nine[:3]) and not nine[3:].any()
    engine.close()


def answers(
    copy_seconds: float | None, prompts: Sequence[tuple[int, ...]], **wishes: Any
) -> tuple[list[list[int]], list[int]]:
    """What follows each of `prompts`, one after the other, and how much of it was found."""
    engine = make_engine(checkpoint("qwen3"), **wishes)
    engine.start()
    limits = Limits(copy_seconds=copy_seconds, min_copied_tokens=1, max_queue_delay=0.0)
    scheduler = Scheduler(PagePool(96, 4), limits)
    events: list[TokenEvent] = []
    for i, prompt in enumerate(prompts):
        scheduler.add(Request(str(i), prompt, 9, GREEDY), float(i))
        while batch := scheduler.schedule(float(i)):
            events += scheduler.update(batch, engine.step(batch), float(i))
            scheduler.check()
            engine.drop(scheduler.take_dropped())
    engine.close()
    tokens: list[list[int]] = [[] for _ in prompts]
    for event in events:
        tokens[int(event.request_id)] += event.token_ids
    return tokens, [e.cached_tokens for e in events if e.cached_tokens is not None]


SOME = (PROMPT, PROMPT[:7], (*PROMPT[:6], *TAIL), (*PROMPT[:11], 3), PROMPT[:8])


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_the_scheduler_and_the_engine_give_the_same_tokens_with_parts_and_without(
    kernels: str,
) -> None:
    expected, cached = answers(None, SOME, kernels=kernels)
    assert cached == [0, 4, 4, 8, 4]
    assert answers(0.0, SOME, kernels=kernels) == (expected, [0, 6, 6, 11, 7])
