"""The Triton-language backend, for CUDA where torch's own paged attention is not to be had."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from dynamo_serve.engines.local.attention import (
    BackendNeeds,
    BackendUnavailable,
    Heads,
    LayerPages,
    LayerSpec,
)
from dynamo_serve.engines.local.ragged import RaggedArgs, ragged_args
from dynamo_serve.engines.local.step import PackedStep
from dynamo_serve.engines.local.trial import try_backend

MAX_HEAD_DIM = 256
MIN_DIM = 16  # the smallest side of a matrix product in the language
MAX_ROWS = 64
# Compiled for compute capability 8.6, which has 99 KiB of shared memory for a program, 64 rows of
# 128 float32 took 112 KiB, and of 256 half-precision numbers 68 KiB.
FLOAT32_BLOCK = 4096


class TritonAttention:
    """One kernel launch per layer, over pages in place."""

    name = "triton"

    def __init__(self, page_size: int, device: torch.device) -> None:
        self._kernel: Any = importlib.import_module(
            "dynamo_serve.engines.local.triton_kernel"
        ).paged_attention
        self._page_size = page_size
        self._device = device
        self.args: RaggedArgs | None = None

    def prepare(self, step: PackedStep) -> None:
        self.args = ragged_args(step.rows, self._page_size, self._device)

    def attend(self, layer: LayerSpec, heads: Heads, pages: LayerPages) -> torch.Tensor:
        assert self.args is not None
        query = heads.query.contiguous()
        out = query.new_empty(len(query), layer.num_heads, layer.value_dim)
        group = layer.num_heads // layer.num_kv_heads
        wanted = _power_of_two(self.args.max_query * group)
        rows = max(MIN_DIM, min(wanted, most_rows(layer.key_dim, query.dtype)))
        grid = (
            len(self.args.kv_lengths),
            -(-self.args.max_query * group // rows),
            layer.num_kv_heads,
        )
        sinks = query if layer.sinks is None else layer.sinks.contiguous()  # read if HAS_SINKS
        self._kernel[grid](
            *(out, query, pages.keys, pages.values, sinks),
            *(self.args.query_starts, self.args.kv_lengths, self.args.page_table),
            self.args.page_table.shape[1],
            layer.scale,
            PAGE_SIZE=self._page_size,
            KV_HEADS=layer.num_kv_heads,
            GROUP=group,
            KEY_DIM=layer.key_dim,
            VALUE_DIM=layer.value_dim,
            KEY_BLOCK=max(MIN_DIM, _power_of_two(layer.key_dim)),
            VALUE_BLOCK=max(MIN_DIM, _power_of_two(layer.value_dim)),
            ROWS=rows,
            KV_BLOCK=32 if layer.key_dim > 128 else 64,
            SOFTCAP=layer.softcap or 0.0,
            WINDOW=layer.window or 0,
            HAS_SINKS=layer.sinks is not None,
        )
        return out


def build(needs: BackendNeeds) -> TritonAttention:
    """Raises `BackendUnavailable` when the compiler, the device, or the model do not allow it."""
    if needs.page_dtype != needs.dtype:
        raise BackendUnavailable(f"it reads no pages of {needs.page_dtype}")
    for layer in needs.layers:
        if max(layer.key_dim, layer.value_dim) > MAX_HEAD_DIM:
            raise BackendUnavailable(f"it has no kernel for heads of {layer.key_dim}")
    try:
        backend = TritonAttention(needs.page_size, needs.device)
    except ImportError as error:
        raise BackendUnavailable(f"the Triton compiler is not installed: {error}") from error
    try_backend(backend, needs)
    backend.args = None
    return backend


def most_rows(key_dim: int, dtype: torch.dtype) -> int:
    """Query rows of one program whose products fit the shared memory of small GPUs."""
    if dtype.itemsize < torch.float32.itemsize:
        return MAX_ROWS
    return max(MIN_DIM, min(MAX_ROWS, FLOAT32_BLOCK // _power_of_two(key_dim)))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
