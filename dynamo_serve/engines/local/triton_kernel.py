"""A paged attention kernel in the Triton language."""

from __future__ import annotations

import importlib
from typing import Any

# Not import statements: only CUDA builds of torch come with this compiler, and the type checker
# has nothing to say about its language.
triton: Any = importlib.import_module("triton")
tl: Any = importlib.import_module("triton.language")

HIDDEN = tl.constexpr(-1.0e30)  # a score nobody sees; not -inf, whose differences are NaN


# fmt: off
# Not compiled anew for page tables of another width.
@triton.jit(do_not_specialize=["width"])  # type: ignore[untyped-decorator]
def paged_attention(  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917
    out, query, keys, values, sinks, query_starts, kv_lengths, page_table, width, scale,
    PAGE_SIZE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, KV_BLOCK: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, HAS_SINKS: tl.constexpr,
):
    """Program (sequence, block of rows, KV head): ROWS rows of that head's query group.

    Row r is query token r // GROUP of head r % GROUP, so that the heads sharing a KV head read it
    once. `query` and `out` are [T, KV_HEADS * GROUP, dim], the pages [pages, PAGE_SIZE, KV_HEADS,
    dim], all contiguous. SOFTCAP and WINDOW are 0 for none.
    """
    sequence, kv_head = tl.program_id(0), tl.program_id(2)
    start = tl.load(query_starts + sequence)
    length = tl.load(query_starts + sequence + 1) - start
    kv_length = tl.load(kv_lengths + sequence)
    first_row = tl.program_id(1) * ROWS
    if first_row < length * GROUP:
        row = first_row + tl.arange(0, ROWS)
        head = kv_head * GROUP + row % GROUP
        flat = (start + row // GROUP).to(tl.int64) * (KV_HEADS * GROUP) + head
        valid = row < length * GROUP
        q = _load_rows(query, flat, valid, KEY_DIM, KEY_BLOCK)
        top = tl.full([ROWS], HIDDEN, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        if HAS_SINKS:  # a logit that takes part in the softmax and adds no value
            top = tl.load(sinks + head).to(tl.float32)
            total += 1.0
        result = _over_pages(
            q, top, total, keys, values, page_table + sequence * width, kv_head,
            kv_length - length + row // GROUP, kv_length - length + first_row // GROUP, kv_length,
            scale, PAGE_SIZE, KV_HEADS, KEY_DIM, VALUE_DIM, KEY_BLOCK, VALUE_BLOCK,
            ROWS, KV_BLOCK, SOFTCAP, WINDOW,
        )
        dim = tl.arange(0, VALUE_BLOCK)
        tl.store(
            out + flat[:, None] * VALUE_DIM + dim[None, :], result.to(out.dtype.element_ty),
            mask=valid[:, None] & (dim[None, :] < VALUE_DIM),
        )


@triton.jit  # type: ignore[untyped-decorator]
def _over_pages(  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917
    q, top, total, keys, values, table, kv_head, position, first_position, kv_length, scale,
    PAGE_SIZE: tl.constexpr, KV_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, KV_BLOCK: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
):
    """The softmax-weighted values [ROWS, VALUE_BLOCK], blocks of KV in order of position.

    The order does not depend on the batch, so neither does the rounding.
    """
    result = tl.zeros([ROWS, VALUE_BLOCK], tl.float32)
    begin_at = 0
    if WINDOW > 0:
        begin_at = tl.maximum(first_position + 1 - WINDOW, 0) // KV_BLOCK * KV_BLOCK
    stop = tl.minimum(tl.max(position, 0) + 1, kv_length)
    for begin in range(begin_at, stop, KV_BLOCK):
        kv = begin + tl.arange(0, KV_BLOCK)
        exists = kv < kv_length
        page = tl.load(table + kv // PAGE_SIZE, mask=exists, other=0).to(tl.int64)
        flat = (page * PAGE_SIZE + kv % PAGE_SIZE) * KV_HEADS + kv_head
        k = _load_rows(keys, flat, exists, KEY_DIM, KEY_BLOCK)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if SOFTCAP > 0:  # tanh by way of exp, which every version of the language has
            scores = SOFTCAP * (1.0 - 2.0 / (tl.exp(2.0 * scores / SOFTCAP) + 1.0))
        seen = kv[None, :] <= position[:, None]
        if WINDOW > 0:
            seen = seen & (kv[None, :] > position[:, None] - WINDOW)
        scores = tl.where(seen, scores, HIDDEN)
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.where(seen, tl.exp(scores - new_top[:, None]), 0.0)
        shrink = tl.exp(top - new_top)
        v = _load_rows(values, flat, exists, VALUE_DIM, VALUE_BLOCK)
        update = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        result = result * shrink[:, None] + update
        total = total * shrink + tl.sum(weights, 1)
        top = new_top
    return result / total[:, None]


@triton.jit  # type: ignore[untyped-decorator]
def _load_rows(base, flat, valid, DIM: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Vectors number `flat` of `base` [any, DIM]: [rows, BLOCK], zero where there is nothing."""
    dim = tl.arange(0, BLOCK)
    mask = valid[:, None] & (dim[None, :] < DIM)
    return tl.load(base + flat[:, None] * DIM + dim[None, :], mask=mask, other=0.0)
# fmt: on
