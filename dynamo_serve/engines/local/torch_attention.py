"""The reference backend: gathers pages and calls torch's own attention, on any device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from dynamo_serve.engines.local.attention import Heads, LayerPages, LayerSpec
from dynamo_serve.engines.local.step import PackedStep, Row

# Gathered KV of one call that is meant to stay in a CPU core's cache between copy and use
# (measured on 2 cores, 32 sequences of 176 tokens: 1.8 ms a layer against 2.3 ms in one call).
CPU_GROUP_BYTES = 1 << 20
CUDA_GROUP_BYTES = 1 << 28
MAX_PADDING = 1.25  # gathered pages may be this much more than the pages in use


@dataclass(frozen=True, slots=True)
class Group:
    """Neighbouring rows of equal length, attended in one call; tokens `start` to `stop`.

    `page_index` [rows * pages] gathers their KV; None when no row has any but this step's own.
    `mask` is additive, broadcastable to [rows, heads, length, kv length]; None is plain causal.
    """

    start: int
    stop: int
    num_rows: int
    page_index: torch.Tensor | None
    mask: torch.Tensor | None

    @property
    def length(self) -> int:
        return (self.stop - self.start) // self.num_rows


class TorchAttention:
    """Batched scaled-dot-product attention over gathered pages."""

    name = "torch"

    def __init__(self, page_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._page_size = page_size
        self._dtype = dtype
        self._device = device
        self._group_bytes = CUDA_GROUP_BYTES if device.type == "cuda" else CPU_GROUP_BYTES
        self._rows: tuple[Row, ...] = ()
        self._plans: dict[tuple[int | None, int], list[Group]] = {}
        self._workspace: dict[str, torch.Tensor] = {}

    def prepare(self, step: PackedStep) -> None:
        self._rows = step.rows
        self._plans = {}

    def attend(self, layer: LayerSpec, heads: Heads, pages: LayerPages) -> torch.Tensor:
        token_bytes = layer.values_per_token * self._dtype.itemsize
        plan = self._plans.get((layer.window, token_bytes))
        if plan is None:
            plan = list(self._groups(layer.window, token_bytes))
            self._plans[layer.window, token_bytes] = plan
        out = heads.query.new_empty(len(heads.query), layer.num_heads, layer.value_dim)
        for group in plan:
            rows = [x[group.start : group.stop].unflatten(0, (group.num_rows, -1)) for x in heads]
            query, key, value = rows
            if group.page_index is not None:
                key = self._gather("keys", pages.keys, group)
                value = self._gather("values", pages.values, group)
            result = _attend(layer, query, key, value, group.mask)  # [rows, heads, length, dim]
            out[group.start : group.stop] = result.transpose(1, 2).flatten(0, 1)
        return out

    def _gather(self, which: str, pages: torch.Tensor, group: Group) -> torch.Tensor:
        """The group's pages in order: [rows, kv length, num_kv_heads, dim], in our workspace."""
        assert group.page_index is not None
        count, row_size = len(group.page_index), pages[0].numel()
        space = self._workspace.get(which)
        if space is None or space.numel() < count * row_size:
            # Reused by all layers and steps: fresh memory would be faulted in at every call.
            space = torch.empty(count * row_size, dtype=pages.dtype, device=pages.device)
            self._workspace[which] = space
        found = space[: count * row_size].view(count, row_size)
        torch.index_select(pages.view(len(pages), row_size), 0, group.page_index, out=found)
        return found.view(group.num_rows, -1, *pages.shape[2:])

    def _groups(self, window: int | None, token_bytes: int) -> Iterator[Group]:
        start, i = 0, 0
        while i < len(self._rows):
            size = self._group_size(self._rows[i:], window, token_bytes)
            rows = self._rows[i : i + size]
            stop = start + sum(row.length for row in rows)
            yield self._group(start, stop, rows, window)
            start, i = stop, i + size

    def _group_size(self, rows: Sequence[Row], window: int | None, token_bytes: int) -> int:
        """How many of the first `rows` may go in one call."""
        longest = used = size = 0
        for row in rows:
            if row.length != rows[0].length or (row.position == 0) != (rows[0].position == 0):
                break
            pages = len(self._pages(row, window))
            longest, used = max(longest, pages), used + pages
            padded = longest * (size + 1)
            too_large = padded * self._page_size * token_bytes > self._group_bytes
            if size and (too_large or padded > MAX_PADDING * used):
                break
            size += 1
        return size

    def _pages(self, row: Row, window: int | None) -> tuple[int, ...]:
        """The pages that hold what `row`'s tokens may see."""
        stop = -(-row.kv_length // self._page_size)
        return row.page_table[self._first_page(row, window) : stop]

    def _first_page(self, row: Row, window: int | None) -> int:
        return 0 if window is None else max(0, row.position + 1 - window) // self._page_size

    def _group(self, start: int, stop: int, rows: Sequence[Row], window: int | None) -> Group:
        length = rows[0].length
        if rows[0].position == 0 and (window is None or window >= length):
            return Group(start, stop, len(rows), page_index=None, mask=None)
        tables = [self._pages(row, window) for row in rows]
        width = max(map(len, tables))
        # A short table is padded with its own first page: its tokens are masked, and finite.
        flat = [page for t in tables for page in (*t, *t[:1] * (width - len(t)))]
        index = torch.tensor(flat, dtype=torch.int64).to(self._device)
        mask = self._mask(rows, window, width * self._page_size)
        return Group(start, stop, len(rows), page_index=index, mask=mask)

    def _mask(self, rows: Sequence[Row], window: int | None, kv_length: int) -> torch.Tensor:
        """Additive mask [rows, 1, length, kv_length]: 0 where a query may look, else -inf."""
        spans = [[row.position, self._first_page(row, window) * self._page_size] for row in rows]
        query_start, kv_start = torch.tensor(spans).to(self._device).T
        query = query_start[:, None] + torch.arange(rows[0].length, device=self._device)
        kv = kv_start[:, None] + torch.arange(kv_length, device=self._device)
        distance = query[:, :, None] - kv[:, None, :]
        hidden = distance < 0
        if window is not None:
            hidden |= distance >= window
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
        return mask.masked_fill_(hidden, float("-inf")).unsqueeze(1)


def _attend(
    layer: LayerSpec,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """[rows, length, heads, dim] each in, [rows, heads, length, value_dim] out."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if layer.softcap is not None or layer.sinks is not None:
        return _attend_by_hand(layer, query, key, value, mask)
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None and query.shape[2] > 1,
        scale=layer.scale,
        enable_gqa=layer.num_heads != layer.num_kv_heads,
    )


def _attend_by_hand(
    layer: LayerSpec,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """What torch's attention does not offer: soft-capped scores, attention sinks."""
    num_rows, _, length, _ = query.shape
    if mask is None:
        hidden = torch.ones(length, length, dtype=torch.bool, device=query.device).triu_(1)
        mask = torch.zeros_like(hidden, dtype=query.dtype).masked_fill_(hidden, float("-inf"))
        mask = mask[None, None]
    grouped = query.unflatten(1, (layer.num_kv_heads, -1))  # [rows, kv heads, group, length, dim]
    scores = torch.matmul(grouped, key.unsqueeze(2).transpose(-1, -2)) * layer.scale
    if layer.softcap is not None:
        scores = torch.tanh(scores / layer.softcap) * layer.softcap
    scores = (scores + mask.unsqueeze(1)).float()
    if layer.sinks is not None:
        sinks = layer.sinks.float().view(1, layer.num_kv_heads, -1, 1, 1)
        sinks = sinks.expand(num_rows, -1, -1, length, -1)
        weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    return torch.matmul(weights.to(query.dtype), value.unsqueeze(2)).flatten(1, 2)
