"""The native backend: kernels that read pages in place, shared beginnings once for all."""

from __future__ import annotations

import torch

from dynamo_serve.engines.local.attention import (
    BackendNeeds,
    BackendUnavailable,
    Heads,
    LayerPages,
    LayerSpec,
)
from dynamo_serve.engines.local.native_step import NativeStep
from dynamo_serve.engines.local.step import PackedStep
from dynamo_serve.engines.local.trial import try_backend
from dynamo_serve.native import structs
from dynamo_serve.native.library import Kernels, NativeUnavailable, choose
from dynamo_serve.native.packing import TYPES
from dynamo_serve.native.structs import Type

PAGE_TYPES = TYPES | {torch.int8: Type.INT8}


class NativeAttention:
    """Paged attention by the CPU kernels."""

    name = "native"

    def __init__(self, kernels: Kernels, page_size: int) -> None:
        self._kernels = kernels
        self._page_size = page_size
        self._step: NativeStep | None = None

    def prepare(self, step: PackedStep) -> None:
        self._step = NativeStep(step, self._page_size)

    def attend(self, layer: LayerSpec, heads: Heads, pages: LayerPages) -> torch.Tensor:
        assert self._step is not None, "attend before prepare"
        assert pages.keys.dtype in (heads.query.dtype, torch.int8), pages.keys.dtype
        query = heads.query
        if query.stride()[1:] != (layer.key_dim, 1):
            query = query.contiguous()
        out = query.new_empty(len(query), layer.num_heads, layer.value_dim)
        queries = structs.Queries(
            query.data_ptr(), out.data_ptr(), query.stride(0), out.stride(0), TYPES[query.dtype]
        )
        self._kernels.attend(attention_struct(layer, pages), self._step.struct, queries)
        return out


def attention_struct(layer: LayerSpec, pages: LayerPages) -> structs.Attention:
    """`layer` and its pages as the kernels know them; the caller keeps both alive."""
    assert pages.keys.is_contiguous() and pages.values.is_contiguous()
    sinks = layer.sinks
    assert sinks is None or (sinks.dtype == torch.float32 and sinks.is_contiguous())
    return structs.Attention(
        keys=pages.keys.data_ptr(),
        values=pages.values.data_ptr(),
        sinks=None if sinks is None else sinks.data_ptr(),
        scale=layer.scale,
        softcap=layer.softcap or 0.0,
        window=layer.window or 0,
        heads=layer.num_heads,
        kv_heads=layer.num_kv_heads,
        head_dim=layer.key_dim,
        page_size=pages.keys.shape[1],
        type=PAGE_TYPES[pages.keys.dtype],
    )


def build(needs: BackendNeeds) -> NativeAttention:
    """Raises `BackendUnavailable` when the kernels are not there or a layer is not for them."""
    if needs.dtype not in TYPES:
        raise BackendUnavailable(f"it has no kernels for {needs.dtype}")
    for layer in needs.layers:
        if layer.key_dim != layer.value_dim:
            raise BackendUnavailable("keys and values differ in width")
        if layer.sinks is not None and layer.sinks.dtype != torch.float32:
            raise BackendUnavailable(f"attention sinks are {layer.sinks.dtype}")
    try:
        kernels = choose(needs.kernels)
    except NativeUnavailable as reason:
        raise BackendUnavailable(str(reason)) from reason
    kernels.set_threads(torch.get_num_threads())
    backend = NativeAttention(kernels, needs.page_size)
    try_backend(backend, needs)
    return backend
