"""The reference backend: gathers pages and calls torch's own attention, on any device."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from dynamo_serve.engines.local.attention import Heads, LayerPages, LayerSpec
from dynamo_serve.engines.local.grouping import Group, Grouping
from dynamo_serve.engines.local.int8_pages import dequantize
from dynamo_serve.engines.local.step import PackedStep, Row


class TorchAttention:
    """Batched scaled-dot-product attention over gathered pages."""

    name = "torch"

    def __init__(self, page_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._grouping = Grouping(page_size, dtype, device)
        self._rows: tuple[Row, ...] = ()
        self._plans: dict[tuple[int | None, int], list[Group]] = {}
        self._workspace: dict[str, torch.Tensor] = {}

    def prepare(self, step: PackedStep) -> None:
        self._rows = step.rows
        self._plans = {}

    def attend(self, layer: LayerSpec, heads: Heads, pages: LayerPages) -> torch.Tensor:
        kind = (layer.window, layer.values_per_token)  # most models have one kind, or two
        plan = self._plans.get(kind)
        if plan is None:
            plan = self._plans[kind] = list(self._grouping.groups(self._rows, *kind))
        out = heads.query.new_empty(len(heads.query), layer.num_heads, layer.value_dim)
        for group in plan:
            rows = [x[group.start : group.stop].unflatten(0, (group.num_rows, -1)) for x in heads]
            query, key, value = rows
            if group.page_index is not None:
                key = _numbers(self._gather("keys", pages.keys, group), key)
                value = _numbers(self._gather("values", pages.values, group), value)
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


def _numbers(found: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What pages hold, in the width and type of `like`."""
    if found.dtype != torch.int8:
        return found
    return dequantize(found, like.shape[-1], like.dtype)


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
