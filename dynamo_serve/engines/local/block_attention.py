"""Attention of encoders: sequences end to end, each within itself and in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention


class Block(NamedTuple):
    """Neighbours of one length, attended in one call: tokens `start` to `stop`."""

    start: int
    stop: int
    num_texts: int


class BlockAttention:
    """The attention function that transformers' encoders call. `begin` says what lies where.

    `objections` says what of a model it has met that it would get wrong.
    """

    def __init__(self) -> None:
        self.objections: list[str] = []
        self.modules: set[int] = set()  # ids of those that have called
        self._blocks: list[Block] = []

    def begin(self, lengths: Sequence[int]) -> None:
        """The following forward runs sequences of these lengths; like beside like saves calls."""
        self._blocks, start = [], 0
        for length, alike in groupby(lengths):
            count = len(list(alike))
            self._blocks.append(Block(start, start + count * length, count))
            start += count * length

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **settings: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attend for one layer: [1, heads, T, dim] in, [1, T, heads, dim] out."""
        self.modules.add(id(module))
        self._object(module, query, attention_mask, settings)
        out = query.new_empty(query.shape[2], query.shape[1], value.shape[3])
        for block in self._blocks:
            q, k, v = (
                x[0, :, block.start : block.stop]
                .unflatten(1, (block.num_texts, -1))
                .transpose(0, 1)
                for x in (query, key, value)
            )
            result = scaled_dot_product_attention(
                *(q, k, v),
                attn_mask=_near(q, settings.get("sliding_window")),
                scale=settings.get("scaling"),
                enable_gqa=q.shape[1] != k.shape[1],
            )
            out[block.start : block.stop] = result.transpose(1, 2).flatten(0, 1)
        return out.unsqueeze(0), None

    def _object(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        attention_mask: torch.Tensor | None,
        settings: dict[str, Any],
    ) -> None:
        causal = settings.get("is_causal")
        if getattr(module, "is_causal", False) if causal is None else causal:
            self.objections.append("its attention is causal")
        if query.shape[0] != 1:
            self.objections.append("its attention reshapes the batch")
        if attention_mask is not None:
            self.objections.append("it builds its own attention mask")
        for name in ("position_bias", "softcap", "s_aux"):
            if settings.get(name) is not None:
                self.objections.append(f"its attention has a {name}")


def _near(query: torch.Tensor, window: int | None) -> torch.Tensor | None:
    """True [length, length] where a token is less than `window` away; None: everywhere."""
    length = query.shape[2]
    if window is None or length <= window:
        return None
    places = torch.arange(length, device=query.device)
    return (places[:, None] - places[None]).abs() < window
