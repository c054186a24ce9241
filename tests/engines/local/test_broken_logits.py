"""Logits that are no numbers end the sequence they belong to, and nothing else."""

from __future__ import annotations

import torch

from dynamo_serve.core.batch import Batch, Phase
from dynamo_serve.core.limits import Limits
from dynamo_serve.core.page_pool import PagePool
from dynamo_serve.core.request import Finish, Request, Sampling
from dynamo_serve.core.scheduler import Scheduler
from tests.engines.local.driver import Driver, Seq, make_engine
from tests.engines.local.zoo import checkpoint


def test_sequence_with_broken_logits_ends_alone_and_leaves_no_trace() -> None:
    engine = make_engine(checkpoint("llama"))
    engine.start()
    assert engine._ready is not None
    driver = Driver(engine, 4, 96)
    good, bad = Seq("good", (5, 6, 7)), Seq("bad", (8, 9, 10))
    driver.step([(good, 3), (bad, 3)])
    for pages in engine._ready.cache.layers:
        pages.keys[bad.pages[0]] = float("nan")
    outputs = {
        o.seq_id: o
        for o in engine.step(Batch(Phase.DECODE, (driver.work(good, 1), driver.work(bad, 1))))
    }
    assert outputs["good"].finish is None and len(outputs["good"].token_ids) == 1
    assert outputs["bad"].finish is Finish.ERROR and outputs["bad"].token_ids == ()
    assert "not finite" in (outputs["bad"].error or "")
    assert all(torch.isfinite(t).all() for pages in engine._ready.cache.layers for t in pages)
    engine.close()


def test_broken_pages_are_not_shared_with_the_next_request() -> None:
    engine = make_engine(checkpoint("llama"), kernels="torch")  # has weights to spoil
    engine.start()
    assert engine._ready is not None
    embedding = engine._ready.runner.model.get_input_embeddings().weight
    with torch.no_grad():
        embedding[99] = float("inf")  # stands for an overflow in half precision
    scheduler = Scheduler(PagePool(96, 4), Limits(max_prefill_tokens=8))
    finishes = []
    for name in ("first", "again"):
        scheduler.add(Request(name, (99, *range(1, 24)), 3, Sampling(temperature=0.0)), 0.0)
        for now in range(1, 20):
            batch = scheduler.schedule(float(now))
            engine.drop(scheduler.take_dropped())
            if batch is None:
                break
            events = scheduler.update(batch, engine.step(batch), float(now))
            finishes += [event.finish for event in events]
        scheduler.check()
    engine.close()
    assert finishes == [Finish.ERROR, Finish.ERROR]
    assert scheduler.stats().prefix_hit_tokens_total == 0


def test_siblings_of_a_broken_sequence_go_on_as_if_it_had_never_been() -> None:
    # Rows with a long common head are attended in one call.
    engine = make_engine(checkpoint("llama"))
    engine.start()
    assert engine._ready is not None
    head = tuple(range(40))
    outputs = []
    for breaks in (False, True):
        driver = Driver(engine, 4, 96)
        giver = Seq("giver", (*head, 50, 51))
        driver.generate([giver], 1)
        sampling = Sampling(seed=3, repetition_penalty=1.2)
        seqs = [Seq(f"s{i}", (*head, 60 + i), sampling) for i in range(4)]
        chunk = Seq("chunk", (*head, *range(70, 78)))
        for seq in (*seqs, chunk):
            driver.share_prefix(giver, seq, len(head))
        driver.step([(seq, 1) for seq in seqs])
        if breaks:
            for pages in engine._ready.cache.layers:
                pages.keys[seqs[1].pages[-1]] = float("nan")
        work = [*(driver.work(seq, 1) for seq in seqs), driver.work(chunk, 4)]
        found = {o.seq_id: o for o in engine.step(Batch(Phase.PREFILL, tuple(work)))}
        assert (found.pop("s1").finish is Finish.ERROR) == breaks
        chunk.num_done += 4
        driver.generate([chunk], 3)
        outputs.append((found, chunk.output))
        engine.drop(["giver", "chunk", *(seq.id for seq in seqs)])
    engine.close()
    assert outputs[0] == outputs[1]
