"""The tensors behind the page pool, and how many pages they may have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dynamo_serve.config import CacheSection
from dynamo_serve.engines.local import int8_pages
from dynamo_serve.engines.local.attention import LayerPages, LayerSpec
from dynamo_serve.engines.local.malloc import take_memory, zeros_on_huge_pages
from dynamo_serve.engines.local.memory import free_bytes
from dynamo_serve.errors import EngineStartError

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class PoolSize:
    """How large the pool is: `num_pages` that the scheduler may hand out, in bytes per token."""

    num_pages: int
    page_size: int
    bytes_per_token: int

    @property
    def num_tokens(self) -> int:
        return self.num_pages * self.page_size

    @property
    def num_bytes(self) -> int:
        return self.num_tokens * self.bytes_per_token


def page_dtype(wish: str, dtype: torch.dtype, layers: Sequence[LayerSpec]) -> torch.dtype:
    """What pages are made of where `cache.kv_dtype` is `wish`, for a model of `dtype`.

    Raises `EngineStartError` where the heads of `layers` cannot be kept so.
    """
    if wish == "auto":
        return dtype
    for layer in layers:
        if layer.key_dim % 2 or layer.value_dim % 2:
            raise EngineStartError(
                f"cache.kv_dtype: {wish} needs heads of an even width, not {layer.key_dim} and "
                f"{layer.value_dim}; leave it out"
            )
    return torch.int8


def head_size(dim: int, dtype: torch.dtype) -> int:
    """Elements of `dtype` that pages keep for a head of `dim` numbers."""
    return int8_pages.width(dim) if dtype == torch.int8 else dim


def bytes_per_token(layers: Sequence[LayerSpec], dtype: torch.dtype) -> int:
    """Bytes of KV that all `layers` together keep for one token, in pages of `dtype`."""
    sizes = (
        layer.num_kv_heads * (head_size(layer.key_dim, dtype) + head_size(layer.value_dim, dtype))
        for layer in layers
    )
    return sum(sizes) * int(dtype.itemsize)


def size_pool(
    cache: CacheSection,
    token_bytes: int,
    useful_tokens: int,
    device: torch.device,
    reserved_bytes: int = 0,
) -> PoolSize:
    """Pages as asked for, or what fits the memory fraction; no more than `useful_tokens` need.

    `reserved_bytes` of the free memory are for others: activations, packed weights. Raises
    `EngineStartError` when the pool would not hold one page, or would not fit at all.
    """
    page_bytes = cache.page_size * token_bytes
    free = max(0, free_bytes(device) - reserved_bytes)
    if cache.num_pages:
        if cache.num_pages * page_bytes > free:
            raise EngineStartError(
                f"cache.num_pages: {cache.num_pages} pages of {page_bytes / MIB:.2f} MiB do not "
                f"fit the {free / MIB:.0f} MiB that are free on {device}; at most "
                f"{free // page_bytes} would"
            )
        return PoolSize(cache.num_pages, cache.page_size, token_bytes)
    fraction = cache.memory_fraction or (0.85 if device.type == "cuda" else 0.4)
    useful_pages = -(-useful_tokens // cache.page_size)
    num_pages = min(int(free * fraction) // page_bytes, useful_pages)
    if num_pages < 1:
        raise EngineStartError(
            f"no room for a KV page: {page_bytes / MIB:.2f} MiB each, and {fraction:.2f} of the "
            f"{free / MIB:.0f} MiB free on {device} may be used; raise cache.memory_fraction or "
            "choose a smaller model or model.dtype, or cache.kv_dtype: int8"
        )
    return PoolSize(num_pages, cache.page_size, token_bytes)


class KVCache:
    """One pair of page tensors per layer, and one page more than the scheduler knows of.

    The last page is scratch: rows that only pad a CUDA graph's batch write there. Pages start as
    zeros, because attention multiplies masked values by zero and must not meet a NaN. `dtype` is
    that of pages; int8 stands for those of `int8_pages`.
    """

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        size: PoolSize,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        head = (size.num_pages + 1, size.page_size)
        self.scratch_page = size.num_pages

        def zeros(*shape: int) -> torch.Tensor:
            if device.type == "cpu":
                return zeros_on_huge_pages(shape, dtype)
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.layers = [
            LayerPages(
                zeros(*head, layer.num_kv_heads, head_size(layer.key_dim, dtype)),
                zeros(*head, layer.num_kv_heads, head_size(layer.value_dim, dtype)),
            )
            for layer in layers
        ]
        # What of each may be NaN: all of it, or what the steps of int8 are worth.
        self._floats = [
            int8_pages.worths(tensor, dim) if dtype == torch.int8 else tensor
            for layer, pages in zip(layers, self.layers, strict=True)
            for tensor, dim in zip(pages, (layer.key_dim, layer.value_dim), strict=True)
        ]

    def take_memory(self) -> None:
        """Have the system hand over what was promised, in the background; for the CPU."""
        take_memory([tensor for pages in self.layers for tensor in pages])

    def scrub(self, page_table: Sequence[int]) -> None:
        """Replace NaN and infinity in these pages by zero: whoever gets them next reads padding."""
        index = torch.tensor(page_table, device=self.layers[0].keys.device)
        for tensor in self._floats:
            tensor[index] = torch.nan_to_num(tensor[index], nan=0.0, posinf=0.0, neginf=0.0)
