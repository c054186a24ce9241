"""torch's own paged FlashAttention, for CUDA; needs a FlashAttention that reads pages (FA3)."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
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
PARAMETERS = {"block_table", "seqused_k", "num_splits", "enable_gqa", "window_size", "scale"}


class VarlenAttention:
    """One `varlen_attn_out` call per layer, over pages in place."""

    name = "varlen"

    def __init__(self, function: Callable[..., Any], page_size: int, device: torch.device) -> None:
        self._function = function
        self._page_size = page_size
        self._device = device
        self.args: RaggedArgs | None = None

    def prepare(self, step: PackedStep) -> None:
        self.args = ragged_args(step.rows, self._page_size, self._device)

    def attend(self, layer: LayerSpec, heads: Heads, pages: LayerPages) -> torch.Tensor:
        assert self.args is not None
        query = heads.query.contiguous()
        out = torch.empty_like(query)
        left = -1 if layer.window is None else layer.window - 1  # it counts those before the query
        self._function(
            out,
            query,
            pages.keys,
            pages.values,
            self.args.query_starts,
            None,
            self.args.max_query,
            self.args.max_kv,
            scale=layer.scale,
            window_size=(left, 0),
            enable_gqa=layer.num_heads != layer.num_kv_heads,
            seqused_k=self.args.kv_lengths,
            block_table=self.args.page_table,
            num_splits=1,  # one order of summation, whoever else is in the batch
        )
        return out


def build(needs: BackendNeeds) -> VarlenAttention:
    """Raises `BackendUnavailable` when torch, the device, or the model do not allow it."""
    _check_model(needs)
    function = _find_function()
    backend = VarlenAttention(function, needs.page_size, needs.device)
    try:
        try_backend(backend, needs)
    except BackendUnavailable as reason:
        # torch's built-in FlashAttention 2 takes no page table; version 3 is a package of its own.
        restore = _activate_fa3(reason)
        try:
            try_backend(backend, needs)
        except BackendUnavailable:
            restore()
            raise
    backend.args = None
    return backend


def _check_model(needs: BackendNeeds) -> None:
    if needs.dtype not in (torch.bfloat16, torch.float16):
        raise BackendUnavailable(f"it has no kernel for {needs.dtype}")
    if needs.page_dtype != needs.dtype:
        raise BackendUnavailable(f"it reads no pages of {needs.page_dtype}")
    for layer in needs.layers:
        if layer.softcap is not None or layer.sinks is not None:
            raise BackendUnavailable("it has neither soft caps nor attention sinks")
        if layer.key_dim != layer.value_dim or layer.key_dim > MAX_HEAD_DIM:
            raise BackendUnavailable(f"it has no kernel for heads of {layer.key_dim}")


def _find_function() -> Callable[..., Any]:
    try:
        module = importlib.import_module("torch.nn.attention.varlen")
        function: Callable[..., Any] = module.varlen_attn_out
    except (ImportError, AttributeError) as error:
        raise BackendUnavailable(f"torch {torch.__version__} has no varlen_attn_out") from error
    missing = PARAMETERS - set(inspect.signature(function).parameters)
    if missing:
        raise BackendUnavailable(f"torch's varlen_attn_out has no {', '.join(sorted(missing))}")
    return function


def _activate_fa3(reason: BackendUnavailable) -> Callable[[], None]:
    """Make torch use FlashAttention 3; returns how to undo that."""
    attention = importlib.import_module("torch.nn.attention")
    try:
        attention.activate_flash_attention_impl("FA3")
    except Exception as error:  # not installed, not for this GPU, or torch knows no such call
        raise BackendUnavailable(f"{reason}; FlashAttention 3: {error}") from error
    restore: Callable[[], None] = attention.restore_flash_attention_impl
    return restore
