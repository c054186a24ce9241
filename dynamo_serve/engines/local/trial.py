"""Try a kernel on a few random pages before trusting a model to it."""

from __future__ import annotations

import torch

from dynamo_serve.engines.local.attention import (
    AttentionBackend,
    BackendNeeds,
    BackendUnavailable,
    Heads,
    LayerPages,
    LayerSpec,
)
from dynamo_serve.engines.local.step import PackedStep, Row
from dynamo_serve.engines.local.torch_attention import TorchAttention

NUM_PAGES = 16
TOLERANCE = 0.05  # of the largest value; half precision, other order of summation


def try_backend(backend: AttentionBackend, needs: BackendNeeds) -> None:
    """Compare `backend` with the reference for every kind of layer that the model has.

    Raises `BackendUnavailable` when it raises or disagrees.
    """
    for layer in dict.fromkeys(needs.layers):
        heads, pages = _random_tensors(layer, needs)
        step = _mixed_step(needs)
        reference = TorchAttention(needs.page_size, needs.dtype, needs.device)
        reference.prepare(step)
        expected = reference.attend(layer, heads, pages)
        try:
            backend.prepare(step)
            found = backend.attend(layer, heads, pages)
            error = float((found.float() - expected.float()).abs().max())
        except Exception as reason:  # whatever a compiler or a driver may raise
            raise BackendUnavailable(f"a trial call failed: {reason}") from reason
        if not error <= TOLERANCE * float(expected.float().abs().max()):
            raise BackendUnavailable(f"a trial call was off by {error:.1e}")


def _mixed_step(needs: BackendNeeds) -> PackedStep:
    """A decode row, a fresh prompt and a second chunk, over scattered pages."""
    size = needs.page_size
    rows = (
        Row(1, 2 * size, (9, 3, 12)),
        Row(size + 1, 0, (5, 1)),
        Row(size, size + 1, (14, 2, 7)),
    )
    positions = [p for row in rows for p in range(row.position, row.kv_length)]
    slots = [
        row.page_table[p // size] * size + p % size
        for row in rows
        for p in range(row.position, row.kv_length)
    ]
    tensor = torch.tensor([[0] * len(slots), positions, slots], device=needs.device)
    return PackedStep(rows, tensor[0:1], tensor[1:2], tensor[2], tensor[2, :0])


def _random_tensors(layer: LayerSpec, needs: BackendNeeds) -> tuple[Heads, LayerPages]:
    generator = torch.Generator().manual_seed(0)
    step = _mixed_step(needs)

    def normal(*shape: int) -> torch.Tensor:
        numbers = torch.randn(*shape, generator=generator)
        return numbers.to(device=needs.device, dtype=needs.dtype)

    count, head = len(step.slots), (NUM_PAGES, needs.page_size, layer.num_kv_heads)
    pages = LayerPages(normal(*head, layer.key_dim), normal(*head, layer.value_dim))
    key = pages.keys.flatten(0, 1)[step.slots]
    value = pages.values.flatten(0, 1)[step.slots]
    return Heads(normal(count, layer.num_heads, layer.key_dim), key, value), pages
