"""Drafts leave the local engine's answers as they are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dynamo_serve.core.batch import Batch, Phase
from dynamo_serve.core.limits import Limits
from dynamo_serve.core.request import Request, Sampling
from dynamo_serve.core.step_cost import StepCost
from tests.engines.local.driver import GREEDY, Driver, Seq, make_engine
from tests.engines.local.test_with_scheduler import SAMPLED, run, some_prompts
from tests.engines.local.zoo import checkpoint

COUNT = 60
COLD = [replace(sampling, temperature=sampling.temperature * 0.15) for sampling in SAMPLED]


def requests_with(samplings: list[Sampling]) -> list[Request]:
    return [
        Request(str(i), prompt, COUNT, samplings[i % len(samplings)])
        for i, prompt in enumerate(some_prompts())
    ]


def free_tokens() -> StepCost:
    """It is believed that only steps cost time, not tokens: everything is drafted."""
    return StepCost(step_s=1.0, token_s=0.0, sequence_s=0.0)


@pytest.mark.parametrize("model", ["qwen3", "gemma2", "mistral", "llama4"])
@pytest.mark.parametrize("samplings", [[GREEDY], COLD, SAMPLED], ids=["greedy", "cold", "sampled"])
def test_streams_are_the_same_with_drafts(model: str, samplings: list[Sampling]) -> None:
    engine = make_engine(checkpoint(model), num_pages=200)
    engine.start()
    requests = requests_with(samplings)
    plain, _ = run(engine, 200, requests, Limits())
    for num_pages, limits in (
        (200, Limits(max_draft_tokens=7, mix_phases=True)),
        (40, Limits(16, 6, max_draft_tokens=3)),
    ):
        drafted, scheduler = run(engine, num_pages, requests, limits, free_tokens())
        stats = scheduler.stats()
        assert drafted == plain
        assert stats.draft_tokens_total > 0
        assert stats.draft_accepted_tokens_total or samplings is SAMPLED
    assert stats.preemptions_total > 0
    engine.close()


def test_a_draft_that_breaks_the_model_does_no_harm() -> None:
    engine = make_engine(checkpoint("llama"), kernels="torch")  # has weights to spoil
    engine.start()
    assert engine._ready is not None
    driver = Driver(engine, 4, 96)
    seqs = [Seq("a", (5, 6, 7)), Seq("b", (8, 9, 10))]
    driver.generate(seqs, 6)
    expected = [seq.output for seq in seqs]
    with torch.no_grad():  # stands for an overflow in half precision
        engine._ready.runner.model.get_input_embeddings().weight[99] = float("inf")
    driver = Driver(engine, 4, 96)
    seqs = [Seq("c", (5, 6, 7)), Seq("d", (8, 9, 10))]
    driver.generate(seqs, 2)
    work = [driver.work(seq, 1) for seq in seqs]
    broken = work[0]._replace(
        token_ids=(*work[0].token_ids, 99, 99),
        draft_len=2,
        page_table=(*work[0].page_table, driver.free.pop()),
    )
    seqs[0].pages = list(broken.page_table)
    for alone in (False, True):
        batch = (broken,) if alone else (broken, work[1])
        outputs = {o.seq_id: o for o in engine.step(Batch(Phase.DECODE, batch))}
        assert outputs["c"].token_ids == (expected[0][2],)
    assert all(torch.isfinite(t).all() for pages in engine._ready.cache.layers for t in pages)
    driver.generate(seqs, 6)
    assert [seq.output for seq in seqs] == expected
    engine.close()
