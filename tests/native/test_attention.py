"""Attention over pages against the reference backend: every kernel, every kind of layer."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import islice

import pytest
import torch

from dynamo_serve.engines.local.attention import Heads, LayerPages, LayerSpec
from dynamo_serve.engines.local.int8_pages import dequantize, quantize, worths
from dynamo_serve.engines.local.native_attention import NativeAttention
from dynamo_serve.engines.local.step import PackedStep, Row
from dynamo_serve.engines.local.torch_attention import TorchAttention
from dynamo_serve.native.library import Kernels

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02}  # of the largest value
NUM_PAGES = 2000


def spec(
    rng: random.Random,
    dim: int,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
) -> LayerSpec:
    kv_heads, group = rng.choice([1, 2, 3]), rng.choice([1, 2, 4, 7, 12])
    numbers = torch.randn(kv_heads * group) if sinks else None
    return LayerSpec(kv_heads * group, kv_heads, dim, dim, dim**-0.5, window, softcap, numbers)


LAYERS: dict[str, Callable[[random.Random, int], LayerSpec]] = {
    "plain": spec,
    "window": lambda rng, dim: spec(rng, dim, window=rng.choice([1, 5, 40, 300])),
    "soft cap": lambda rng, dim: spec(rng, dim, softcap=2.0),
    "sinks": lambda rng, dim: spec(rng, dim, sinks=True),
    "all of them": lambda rng, dim: spec(rng, dim, window=20, softcap=5.0, sinks=True),
}


def rows_of(rng: random.Random, page_size: int) -> tuple[Row, ...]:
    """Decodes and chunks, short, and so long that they are cut into parts; most begin with the
    same pages."""
    free = list(range(NUM_PAGES))
    rng.shuffle(free)
    shared = [free.pop() for _ in range(-(-700 // page_size))]
    rows = []
    for _ in range(rng.randint(1, 7)):
        position, length = (
            rng.choice([0, 3, 17, 150, 200, 700]),
            rng.choice([1, 1, 1, 2, 9, 70, 140]),
        )
        count = -(-(position + length) // page_size)
        head = shared[: position // page_size] if rng.random() < 0.7 else []
        rows.append(Row(length, position, (*head, *(free.pop() for _ in range(count - len(head))))))
    return tuple(sorted(rows, key=lambda row: row.page_table[0]))


def in_parts(layer: LayerSpec) -> LayerSpec:
    """The same for few queries, with a window that reaches over parts."""
    window, heads = layer.window and 300, 2 * layer.num_kv_heads
    sinks = None if layer.sinks is None else torch.randn(heads)
    return replace(layer, num_heads=heads, window=window, sinks=sinks)


def long_rows(page_size: int) -> tuple[Row, ...]:
    """Decodes and a chunk of few tokens, whose KV is cut into parts."""
    pages = iter(range(NUM_PAGES))
    shapes = [(1, 700), (4, 381), (1, 500)]
    return tuple(
        Row(length, position, tuple(islice(pages, -(-(position + length) // page_size))))
        for length, position in shapes
    )


def packed(rows: tuple[Row, ...], page_size: int) -> PackedStep:
    places = [(row, p) for row in rows for p in range(row.position, row.kv_length)]
    positions = [p for _, p in places]
    slots = [row.page_table[p // page_size] * page_size + p % page_size for row, p in places]
    tensor = torch.tensor([[0] * len(slots), positions, slots])
    return PackedStep(rows, tensor[0:1], tensor[1:2], tensor[2], tensor[2, :0])


@pytest.mark.parametrize("page_dtype", ["auto", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_attention_is_the_reference_s(
    kernels: Kernels, kind: str, dtype: torch.dtype, page_dtype: str
) -> None:
    rng = random.Random(f"{kind} {dtype}")
    torch.manual_seed(rng.randrange(1000))
    for dim, is_long in (
        (32, False),
        (64, False),
        (128, False),
        (40, False),
        (96, False),
        (64, True),
    ):
        layer, page_size = LAYERS[kind](rng, dim), rng.choice([4, 16])
        rows = rows_of(rng, page_size)
        if is_long:
            layer, rows = in_parts(layer), long_rows(page_size)
        step = packed(rows, page_size)
        shape = (NUM_PAGES, page_size, layer.num_kv_heads, dim)
        pages = LayerPages(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype))
        if page_dtype == "int8":
            held = LayerPages(*map(quantize, pages))
            pages = LayerPages(*(dequantize(page, dim, dtype) for page in held))
        heads = Heads(
            torch.randn(len(step.slots), layer.num_heads, dim).to(dtype),
            pages.keys.flatten(0, 1)[step.slots],
            pages.values.flatten(0, 1)[step.slots],
        )
        if page_dtype == "int8":
            pages = held
        reference = TorchAttention(page_size, dtype, CPU)
        reference.prepare(step)
        expected = reference.attend(layer, heads, pages).float()
        native = NativeAttention(kernels, page_size)
        native.prepare(step)
        found = native.attend(layer, heads, pages).float()
        worst = float((found - expected).abs().max() / expected.abs().max())
        assert worst < TOLERANCE[dtype], (dim, page_size, layer, rows)


def test_a_value_that_is_no_number_reaches_only_those_that_see_it(kernels: Kernels) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        layer = LayerSpec(4, 2, 64, 64, 0.125)
        rows = (
            *(Row(1, 40, (1, 2, 3)), Row(20, 3, (4, 5)), Row(1, 40, (6, 7, 8))),
            *(Row(1, 600, tuple(range(10, 48))), Row(1, 600, tuple(range(50, 88)))),
        )
        step = packed(rows, 16)
        pages = LayerPages(*(torch.ones(90, 16, 2, 64).to(dtype) for _ in "kv"))
        in_8_bits = LayerPages(*map(quantize, pages))
        for bad in (4, 20):  # the latter in the midst of what is read in parts
            worths(in_8_bits.values, 64)[bad] = pages.values[bad] = float("nan")
        for held in (pages, in_8_bits):
            native = NativeAttention(kernels, 16)
            native.prepare(step)
            query = torch.ones(24, 4, 64).to(dtype)
            found = native.attend(layer, Heads(query, query[:, :2], query[:, :2]), held)
            assert torch.isnan(found[1:21]).any(dim=-1).all() and torch.isnan(found[22]).all()
            assert torch.isfinite(found[[0, 21, 23]]).all()
