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
from dynamo_serve.engines.local.int8_pages import dequantize, quantize
from dynamo_serve.engines.local.step import PackedStep, Row
from dynamo_serve.engines.local.torch_attention import TorchAttention

NUM_PAGES = 16  # and those of the long row
LONG = 65  # queries: a block more than kernels take at once, 64 being the most that ours do
TOLERANCE = 0.05  # of the largest value; half precision, other order of summation


def try_backend(backend: AttentionBackend, needs: BackendNeeds) -> None:
    """Compare `backend` with the reference for every kind of layer that the model has.

    Raises `BackendUnavailable` when it raises or disagrees.
    """
    for layer in dict.fromkeys(needs.layers):
        for rows in _steps(needs.page_size):
            _try_step(backend, needs, layer, _packed(rows, needs))


def _try_step(
    backend: AttentionBackend, needs: BackendNeeds, layer: LayerSpec, step: PackedStep
) -> None:
    heads, pages = _random_tensors(layer, needs, step)
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


def _steps(size: int) -> tuple[tuple[Row, ...], ...]:
    """Three kinds of rows over scattered pages, and steps of decodes and of a long chunk alone.

    Kernels are compiled for the longest row of a step, and may fit the device for one and not for
    another.
    """
    decode, fresh = Row(1, 2 * size, (9, 3, 12)), Row(size + 1, 0, (5, 1))
    second = Row(size, size + 1, (14, 2, 7))
    pages = range(NUM_PAGES, NUM_PAGES + _long_pages(size))
    return (decode, fresh, second), (decode, Row(1, 0, (5,))), (Row(LONG, 3, (*pages,)),)


def _long_pages(size: int) -> int:
    return -(-(LONG + 3) // size)


def _packed(rows: tuple[Row, ...], needs: BackendNeeds) -> PackedStep:
    size = needs.page_size
    positions = [p for row in rows for p in range(row.position, row.kv_length)]
    slots = [
        row.page_table[p // size] * size + p % size
        for row in rows
        for p in range(row.position, row.kv_length)
    ]
    tensor = torch.tensor([[0] * len(slots), positions, slots], device=needs.device)
    return PackedStep(rows, tensor[0:1], tensor[1:2], tensor[2], tensor[2, :0])


def _random_tensors(
    layer: LayerSpec, needs: BackendNeeds, step: PackedStep
) -> tuple[Heads, LayerPages]:
    generator = torch.Generator().manual_seed(0)
    num_pages = NUM_PAGES + _long_pages(needs.page_size)

    def normal(*shape: int) -> torch.Tensor:
        numbers = torch.randn(*shape, generator=generator)
        return numbers.to(device=needs.device, dtype=needs.dtype)

    count, head = len(step.slots), (num_pages, needs.page_size, layer.num_kv_heads)
    pages = LayerPages(normal(*head, layer.key_dim), normal(*head, layer.value_dim))
    key = pages.keys.flatten(0, 1)[step.slots]
    value = pages.values.flatten(0, 1)[step.slots]
    if needs.page_dtype == torch.int8:
        pages = LayerPages(*map(quantize, pages))
        key, value = (dequantize(quantize(x), x.shape[-1], x.dtype) for x in (key, value))
    return Heads(normal(count, layer.num_heads, layer.key_dim), key, value), pages
