"""What CUDA graphs are fed: padded batches of a few sizes, checked without a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dynamo_serve.core.batch import Batch, Phase, Work
from dynamo_serve.core.request import Sampling
from dynamo_serve.engines.local.graphs import (
    DecodeGraphs,
    PageGeometry,
    RaggedBackend,
    graph_sizes,
    padded,
    static_inputs,
)
from dynamo_serve.engines.local.runner import ModelRunner
from dynamo_serve.engines.local.startup import Ready
from dynamo_serve.engines.local.torch_attention import TorchAttention
from dynamo_serve.engines.local.varlen_attention import VarlenAttention
from tests.engines.local.driver import Driver, Seq, make_engine
from tests.engines.local.zoo import checkpoint

CPU = torch.device("cpu")


@pytest.fixture
def ready() -> Iterator[tuple[Driver, Ready]]:
    engine = make_engine(checkpoint("mistral"), kernels="torch")
    engine.start()
    assert engine._ready is not None
    yield Driver(engine, 4, 96), engine._ready
    engine.close()


@pytest.mark.parametrize("largest", [1, 2, 3, 7, 8, 20, 64])
def test_graph_sizes_cover_every_batch_with_little_padding(largest: int) -> None:
    sizes = graph_sizes(largest)
    assert sizes[-1] == largest
    for count in range(1, largest + 1):
        size = min(s for s in sizes if s >= count)
        assert size <= max(2 * count, count + 7)


def test_padding_changes_neither_answers_nor_anybodys_pages(ready: tuple[Driver, Ready]) -> None:
    driver, engine = ready
    seqs = [Seq(str(i), tuple(range(i, 9 + 4 * i))) for i in range(3)]
    driver.step([(seq, len(seq.prompt)) for seq in seqs])
    work = [driver.work(seq, 1) for seq in seqs]
    with torch.inference_mode():
        expected = engine.run(work).logits
        before = [pages.keys[:-1].clone() for pages in engine.cache.layers]
        found = engine.run(padded(work, 8, engine.cache.scratch_page)).logits
    assert found.shape[0] == 8
    torch.testing.assert_close(found[:3], expected)
    for pages, kept in zip(engine.cache.layers, before, strict=True):
        torch.testing.assert_close(pages.keys[:-1], kept)


def test_static_shapes_depend_on_the_size_alone() -> None:
    geometry = PageGeometry(page_size=4, width=10, scratch_page=96)
    work = [
        Work(str(i), (i,), 5 * i, tuple(range(i, i + 9)), True, Sampling(), 1) for i in range(3)
    ]
    shapes = []
    for some in ((), work[:1], work):
        step, args = static_inputs(some, 4, geometry, CPU)
        assert step.state_index is None
        tensors = [*step[1:5], args.query_starts, args.kv_lengths, args.page_table]
        shapes.append([(t.shape, t.dtype) for t in tensors] + [args.max_query, args.max_kv])
        assert args.page_table[-1].tolist() == [96] + [0] * 9
        assert int(step.slots[-1]) == 96 * 4 and int(args.kv_lengths[-1]) == 1
    assert shapes[0] == shapes[1] == shapes[2]
    assert args.kv_lengths.tolist() == [1, 6, 11, 1]
    assert args.query_starts.tolist() == [0, 1, 2, 3, 4]


def test_only_small_pure_decode_steps_are_replayed(ready: tuple[Driver, Ready]) -> None:
    _, engine = ready
    geometry = PageGeometry(4, 10, 96)
    assert isinstance(engine.runner, ModelRunner)
    graphs = DecodeGraphs(engine.runner, VarlenAttention(print, 4, CPU), geometry)
    graphs._sizes = [1, 2]
    one = Work("a", (1,), 3, (0,), True, Sampling(), 1)
    assert graphs.takes([one]) and graphs.takes([one, one])
    assert not graphs.takes([one] * 3)
    assert not graphs.takes([one._replace(token_ids=(1, 2))])
    assert not graphs.takes([one._replace(samples=False)])


def test_backends_that_can_be_recorded_are_told_from_those_that_cannot() -> None:
    assert isinstance(VarlenAttention(print, 4, CPU), RaggedBackend)
    assert not isinstance(TorchAttention(4, torch.float32, CPU), RaggedBackend)


def test_batch_order_does_not_matter(ready: tuple[Driver, Ready]) -> None:
    driver, _ = ready
    seqs = [Seq(str(i), tuple(range(20 - i, 40 - 3 * i))) for i in range(4)]
    work = [driver.work(seq, len(seq.prompt)) for seq in seqs]
    forth = driver.engine.step(Batch(Phase.PREFILL, tuple(work)))
    back = driver.engine.step(Batch(Phase.PREFILL, tuple(reversed(work))))
    assert {o.seq_id: o.token_ids for o in forth} == {o.seq_id: o.token_ids for o in back}
