"""The attention function that transformers' models call, and what a backend behind it must do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from dynamo_serve.engines.local.int8_pages import dequantize, quantize
from dynamo_serve.engines.local.step import PackedStep


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What one attention layer asks for, as seen when the model called us.

    `window` counts the tokens a query sees, itself included; None is all of them. `sinks` is
    [num_heads]: a logit per head that takes part in the softmax and carries no value.
    """

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @property
    def values_per_token(self) -> int:
        """Numbers of KV that the layer keeps for each token."""
        return self.num_kv_heads * (self.key_dim + self.value_dim)


class LayerPages(NamedTuple):
    """One layer's part of the KV pool: [num_pages, page_size, num_kv_heads, dim] each.

    The last one is `int8_pages.width(dim)` where they are int8.
    """

    keys: torch.Tensor
    values: torch.Tensor


class Heads(NamedTuple):
    """A step's projections in one layer, T tokens end to end: [T, heads, dim] each."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


class AttentionBackend(Protocol):
    """One way to attend over pages. A further one (a native kernel) is one more module."""

    name: str

    def prepare(self, step: PackedStep) -> None:
        """Work out, once for all layers, what `step` needs."""
        ...

    def attend(self, layer: LayerSpec, heads: Heads, pages: LayerPages) -> torch.Tensor:
        """Attend every token of the prepared step, causally, within its own sequence.

        The step's own KV is in `pages` already. Returns [T, num_heads, value_dim].
        """
        ...


class BackendNeeds(NamedTuple):
    """What the model and the settings ask of a backend; `kernels` is `engine.kernels`."""

    layers: Sequence[LayerSpec]
    page_size: int
    dtype: torch.dtype
    device: torch.device
    kernels: str = "auto"
    kv_dtype: torch.dtype | None = None  # of pages; None: `dtype`

    @property
    def page_dtype(self) -> torch.dtype:
        return self.kv_dtype or self.dtype


class BackendUnavailable(Exception):
    """A backend cannot run here; the message says why."""


class PagedAttention:
    """Writes each layer's KV to our pages and lets the backend attend over them.

    One per engine, registered with `AttentionInterface`; the engine calls `begin` before each
    forward, so no state is shared between engines.
    """

    def __init__(
        self,
        layers: dict[int, tuple[LayerSpec, LayerPages]],
        backend: AttentionBackend,
    ) -> None:
        self._layers = layers  # keyed by id() of the attention module
        self._backend = backend
        self._slots: torch.Tensor | None = None

    @property
    def windows(self) -> set[int]:
        """The sliding windows of the layers that have one, in tokens."""
        return {layer.window for layer, _ in self._layers.values() if layer.window is not None}

    def begin(self, step: PackedStep) -> None:
        """Make `step` the one that the following forward runs."""
        self._slots = step.slots
        self._backend.prepare(step)

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **_: Any,  # the layer's settings, recorded when the model was examined
    ) -> tuple[torch.Tensor, None]:
        """Attend for one layer: [1, heads, T, dim] in, [1, T, heads, dim] out."""
        layer, pages = self._layers[id(module)]
        heads = Heads(
            query[0].transpose(0, 1),
            self._write(pages.keys, key[0].transpose(0, 1)),
            self._write(pages.values, value[0].transpose(0, 1)),
        )
        return self._backend.attend(layer, heads, pages).unsqueeze(0), None

    def _write(self, pages: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Put the step's `numbers` [T, heads, dim] into `pages`; returns them as they are there, so
        that what a token sees does not depend on how its prompt was cut."""
        flat = pages.view(-1, *pages.shape[2:])
        if pages.dtype != torch.int8:
            flat.index_copy_(0, self._slots, numbers)
            return numbers
        packed = quantize(numbers)
        flat.index_copy_(0, self._slots, packed)
        return dequantize(packed, numbers.shape[-1], numbers.dtype)
