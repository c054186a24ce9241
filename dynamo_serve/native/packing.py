"""Weights in the layout of one set of kernels, on memory of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from dynamo_serve.native import structs
from dynamo_serve.native.library import Kernels, Memory
from dynamo_serve.native.structs import Type

PANEL = 32  # outputs that the kernels take together
TYPES = {torch.float32: Type.FLOAT32, torch.bfloat16: Type.BFLOAT16}


class PackedLinear(NamedTuple):
    """A product's weights and the structure that points at them; keep both together."""

    struct: structs.Linear
    weights: Memory
    scales: torch.Tensor | None
    bias: torch.Tensor | None


def pack_linear(
    kernels: Kernels,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None] = (),
    *,
    kind: Type,
    gated: bool = False,
) -> PackedLinear:
    """`weights` [outputs, inputs] stacked; `gated` wants the gates first and as many ups behind.

    float32 or bfloat16 in; `kind` is what is kept. INT8 is symmetric, one scale per output.
    """
    rows = torch.cat([w.detach() for w in weights]) if len(weights) > 1 else weights[0].detach()
    rows = rows.contiguous()
    outputs, inputs = rows.shape
    padded = -(-outputs // PANEL) * PANEL
    memory = Memory(kernels.packed_bytes(outputs, inputs, kind))
    scales = torch.empty(padded, dtype=torch.float32) if kind == Type.INT8 else None
    address = None if scales is None else scales.data_ptr()
    kernels.pack(
        memory.address, address, rows.data_ptr(), TYPES[rows.dtype], (outputs, inputs), kind, gated
    )
    bias = _columns([b for b in biases if b is not None], padded, gated)
    struct = structs.Linear(
        memory.address,
        address,
        None if bias is None else bias.data_ptr(),
        outputs,
        inputs,
        kind,
        gated,
    )
    return PackedLinear(struct, memory, scales, bias)


def _columns(biases: Sequence[torch.Tensor], padded: int, gated: bool) -> torch.Tensor | None:
    """One number per column of each panel, as the kernels walk them."""
    if not biases:
        return None
    values = torch.cat([b.detach().float() for b in biases])
    if gated:
        gates, ups = values.chunk(2)
        half = torch.zeros(2, padded // 2)
        half[0, : len(gates)], half[1, : len(ups)] = gates, ups
        return half.view(2, -1, PANEL // 2).transpose(0, 1).contiguous().flatten()
    columns = torch.zeros(padded)
    columns[: len(values)] = values
    return columns
