"""However rows are grouped, every token sees exactly what is its own to see."""

from __future__ import annotations

import random
from itertools import accumulate

import pytest
import torch

from dynamo_serve.engines.local import grouping
from dynamo_serve.engines.local.attention import Heads, LayerPages, LayerSpec
from dynamo_serve.engines.local.grouping import Grouping
from dynamo_serve.engines.local.step import PackedStep, Row
from dynamo_serve.engines.local.torch_attention import TorchAttention

CPU = torch.device("cpu")
SIZE = 4
NUM_PAGES = 400


def rows_of(rng: random.Random) -> list[Row]:
    """Fresh prompts, chunks and decodes; some share a head of pages."""
    pages = list(range(NUM_PAGES))
    rng.shuffle(pages)
    rows = []
    for _ in range(rng.randrange(1, 4)):
        head = [pages.pop() for _ in range(rng.choice([0, 1, 6, 12]))]
        for _ in range(rng.randrange(1, 7)):
            at_least = len(head) * SIZE
            position = at_least + rng.choice([0, 0, 3, 9])
            length = rng.choice([1, 1, 5])
            count = -(-(position + length) // SIZE) - len(head)
            rows.append(Row(length, position, (*head, *(pages.pop() for _ in range(count + 1)))))
    return rows


def step_of(rows: list[Row]) -> PackedStep:
    positions = torch.tensor([p for row in rows for p in range(row.position, row.kv_length)])
    slots = torch.tensor(
        [
            row.page_table[p // SIZE] * SIZE + p % SIZE
            for row in rows
            for p in range(row.position, row.kv_length)
        ]
    )
    return PackedStep(tuple(rows), positions[None], positions[None], slots, slots[:0])


def slow_attention(
    layer: LayerSpec, step: PackedStep, heads: Heads, pages: LayerPages
) -> torch.Tensor:
    """One query of one head at a time."""
    out = torch.zeros(len(heads.query), layer.num_heads, layer.value_dim)
    starts = accumulate((row.length for row in step.rows), initial=0)
    for row, start in zip(step.rows, starts, strict=False):
        keys = pages.keys[list(row.page_table)].flatten(0, 1)
        values = pages.values[list(row.page_table)].flatten(0, 1)
        for i in range(row.length):
            last = row.position + i
            first = max(0, last + 1 - layer.window) if layer.window else 0
            for head in range(layer.num_heads):
                kv_head = head * layer.num_kv_heads // layer.num_heads
                scores = keys[first : last + 1, kv_head] @ heads.query[start + i, head]
                scores = scores * layer.scale
                if layer.softcap:
                    scores = layer.softcap * torch.tanh(scores / layer.softcap)
                if layer.sinks is not None:
                    scores = torch.cat([scores, layer.sinks[head : head + 1]])
                weights = scores.softmax(0)[: last + 1 - first]
                out[start + i, head] = weights @ values[first : last + 1, kv_head]
    return out


LAYERS = [
    LayerSpec(4, 2, 8, 8, 0.4),
    LayerSpec(4, 2, 8, 8, 0.4, window=6),
    LayerSpec(2, 2, 8, 4, 0.4, softcap=1.5),
    LayerSpec(4, 1, 8, 8, 0.4, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_attention_equals_one_token_at_a_time(layer: LayerSpec, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    step = step_of(rows_of(random.Random(seed)))
    shape = (NUM_PAGES, SIZE, layer.num_kv_heads)
    pages = LayerPages(
        torch.randn(*shape, layer.key_dim, generator=generator),
        torch.randn(*shape, layer.value_dim, generator=generator),
    )
    count = len(step.slots)
    heads = Heads(
        torch.randn(count, layer.num_heads, layer.key_dim, generator=generator),
        pages.keys.flatten(0, 1)[step.slots],
        pages.values.flatten(0, 1)[step.slots],
    )
    backend = TorchAttention(SIZE, torch.float32, CPU)
    backend.prepare(step)
    found = backend.attend(layer, heads, pages)
    torch.testing.assert_close(found, slow_attention(layer, step, heads, pages))


def gathered_pages(rows: list[Row], window: int | None = None) -> list[int]:
    plan = Grouping(SIZE, torch.float32, CPU).groups(rows, window, 16)
    return [0 if g.page_index is None else len(g.page_index) for g in plan]


def test_a_long_common_head_is_gathered_once() -> None:
    head = tuple(range(64))
    rows = [Row(1, 64 * SIZE, (*head, 100 + i)) for i in range(8)]
    assert gathered_pages(rows) == [64 + 8]
    chunks = [Row(16, 64 * SIZE, (*head, *range(100 + 4 * i, 104 + 4 * i))) for i in range(4)]
    assert gathered_pages(chunks) == [64 + 16]


def test_a_short_common_head_is_not_worth_the_extra_scores() -> None:
    rows = [Row(1, 30 * SIZE, (0, *range(100 + 30 * i, 130 + 30 * i))) for i in range(4)]
    assert sum(gathered_pages(rows)) == 4 * 31


def test_rows_without_anything_in_common_are_batched_with_little_padding() -> None:
    rows = [Row(1, n * SIZE - 1, tuple(range(300 * n, 301 * n))) for n in (2, 2, 9, 10, 10, 30)]
    assert gathered_pages(rows) == [4, 30, 30]


def test_a_group_stays_within_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouping, "CPU_GROUP_BYTES", 3 * SIZE * 16 * 4)
    rows = [Row(1, SIZE - 1, (i,)) for i in range(8)]
    assert gathered_pages(rows) == [3, 3, 2]


def test_a_window_gathers_no_more_pages_than_it_reaches() -> None:
    rows = [Row(1, 100 * SIZE, tuple(range(101)))]
    assert gathered_pages(rows, window=6) == [3]
