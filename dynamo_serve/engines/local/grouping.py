"""Which rows of a step the reference backend attends in one call, over which pages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from dynamo_serve.engines.local.step import Row

# Gathered KV of one call. On a CPU it should still be in cache when it is used (2 cores, 32
# sequences of 176 tokens, ms a layer: 3.1 one at a time, 1.8 by two, 1.9 by four, 2.5 by eight),
# but every call wakes all threads.
CPU_GROUP_BYTES = 3 << 20
CUDA_GROUP_BYTES = 1 << 28
MAX_PADDING = 1.25  # gathered pages may be this much more than the pages in use
MIN_SAVING = 0.7  # sharing rows are joined when they gather no more than this of their pages
MAX_EXTRA_SCORES = 2.0  # and compute at most this much more scores than they need


@dataclass(frozen=True, slots=True)
class Group:
    """Neighbouring rows attended in one call: tokens `start` to `stop`, as `num_rows` equal rows.

    `page_index` [num_rows * pages] gathers their KV; None when they have only this step's own.
    `mask` is additive, broadcastable to [num_rows, heads, length, kv length]; None means causal.
    """

    start: int
    stop: int
    num_rows: int
    page_index: torch.Tensor | None
    mask: torch.Tensor | None


class Grouping:
    """Cuts the rows of steps into groups; `window` is a layer's sliding window in tokens."""

    def __init__(self, page_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._page_size = page_size
        self._dtype = dtype
        self._device = device
        self._group_bytes = CUDA_GROUP_BYTES if device.type == "cuda" else CPU_GROUP_BYTES

    def groups(
        self, rows: Sequence[Row], window: int | None, values_per_token: int
    ) -> Iterator[Group]:
        """All of `rows`, in order; a layer keeps `values_per_token` numbers of KV."""
        most_pages = self._group_bytes // (
            self._page_size * values_per_token * int(self._dtype.itemsize)
        )
        start = i = 0
        declined = -1  # a first page whose holders have been looked at: not again for each of them
        while i < len(rows):
            looks = window is None and rows[i].page_table[0] != declined
            shared = self._num_sharing(rows[i:]) if looks else 1
            if shared == 1:
                declined = rows[i].page_table[0]
            count = shared if shared > 1 else self._num_alike(rows[i:], window, most_pages)
            some = rows[i : i + count]
            stop = start + sum(row.length for row in some)
            if shared > 1:
                yield self._joined(start, stop, some)
            else:
                yield self._batched(start, stop, some, window)
            start, i = stop, i + count

    # ── rows side by side, each with its own pages ───────────────────────────

    def _num_alike(self, rows: Sequence[Row], window: int | None, most_pages: int) -> int:
        """How many of the first rows have one length and nearly as many pages."""
        longest = used = count = 0
        for row in rows:
            if row.length != rows[0].length or (row.position == 0) != (rows[0].position == 0):
                break
            pages = len(self._pages(row, window))
            longest, used = max(longest, pages), used + pages
            padded = longest * (count + 1)
            if count and (padded > most_pages or padded > MAX_PADDING * used):
                break
            count += 1
        return count

    def _batched(self, start: int, stop: int, rows: Sequence[Row], window: int | None) -> Group:
        length = rows[0].length
        if rows[0].position == 0 and (window is None or window >= length):
            return Group(start, stop, len(rows), page_index=None, mask=None)
        tables = [self._pages(row, window) for row in rows]
        width = max(map(len, tables))
        # A short table is padded with its own first page: its tokens are masked, and finite.
        flat = [page for t in tables for page in (*t, *t[:1] * (width - len(t)))]
        spans = [[row.position, self._first_page(row, window) * self._page_size] for row in rows]
        query_start, kv_start = torch.tensor(spans).T
        query = query_start[:, None] + torch.arange(length)
        kv = kv_start[:, None] + torch.arange(width * self._page_size)
        distance = query[:, :, None] - kv[:, None, :]
        hidden = distance < 0
        if window is not None:
            hidden |= distance >= window
        return self._group(start, stop, len(rows), flat, hidden)

    def _pages(self, row: Row, window: int | None) -> tuple[int, ...]:
        """The pages that hold what `row`'s tokens may see."""
        return row.page_table[self._first_page(row, window) : self._num_pages(row)]

    def _first_page(self, row: Row, window: int | None) -> int:
        return 0 if window is None else max(0, row.position + 1 - window) // self._page_size

    def _num_pages(self, row: Row) -> int:
        return -(-row.kv_length // self._page_size)

    # ── rows with a common head, which is gathered and read once ─────────────

    def _num_sharing(self, rows: Sequence[Row]) -> int:
        """How many of the first rows are better run as one; 1 when none are."""
        best = 1
        common = self._num_pages(rows[0])
        gathered = queries = needed_scores = 0
        for count, row in enumerate(rows, 1):
            common = _common_head(rows[0].page_table[:common], row.page_table)
            common = min(common, self._num_pages(row) - 1)
            if common <= 0:
                break
            gathered += self._num_pages(row)
            queries += row.length
            needed_scores += row.length * self._num_pages(row)
            joined = gathered - (count - 1) * common
            saves = joined <= MIN_SAVING * gathered
            if saves and queries * joined <= MAX_EXTRA_SCORES * needed_scores:
                best = count
        return best

    def _joined(self, start: int, stop: int, rows: Sequence[Row]) -> Group:
        """One row of all queries over the common pages, then everybody's own."""
        common = min(self._num_pages(row) - 1 for row in rows)
        for row in rows[1:]:
            common = _common_head(rows[0].page_table[:common], row.page_table)
        own = [row.page_table[common : self._num_pages(row)] for row in rows]
        flat = [*rows[0].page_table[:common], *(page for pages in own for page in pages)]
        everybody = -1
        query = torch.tensor(
            [(i, p) for i, row in enumerate(rows) for p in range(row.position, row.kv_length)]
        )
        numbers = [
            *((everybody, n) for n in range(common)),
            *((i, common + n) for i, pages in enumerate(own) for n in range(len(pages))),
        ]
        owner, number = torch.tensor(numbers).repeat_interleave(self._page_size, 0).T
        kv = number * self._page_size + torch.arange(len(number)) % self._page_size
        foreign = (owner != everybody) & (owner != query[:, :1])
        hidden = foreign | (kv > query[:, 1:])
        return self._group(start, stop, 1, flat, hidden[None])

    def _group(
        self, start: int, stop: int, num_rows: int, pages: list[int], hidden: torch.Tensor
    ) -> Group:
        """`hidden` is [num_rows, length, kv length]."""
        mask = torch.zeros(hidden.shape, dtype=self._dtype).masked_fill_(hidden, float("-inf"))
        index = torch.tensor(pages, dtype=torch.int64)
        return Group(
            start, stop, num_rows, index.to(self._device), mask.to(self._device).unsqueeze(1)
        )


def _common_head(some: Sequence[int], others: Sequence[int]) -> int:
    """How many leading entries of `some` are also those of `others`."""
    for count, (a, b) in enumerate(zip(some, others, strict=False)):
        if a != b:
            return count
    return min(len(some), len(others))
