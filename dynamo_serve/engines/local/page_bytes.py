"""A page of KV of all layers as one row of bytes, and back."""

from __future__ import annotations

from ctypes import memmove

import torch

from dynamo_serve.engines.local.kv_cache import KVCache


class PageBytes:
    """Gathers the parts of a page from the tensors of all layers, and scatters them again.

    For one thread. On a CPU without torch's operators, which would wake its threads for this. On
    CUDA copies run on a stream of their own and are over when the call returns; steps have ended
    before their pages are copied, so that the streams need not wait for each other.
    """

    def __init__(self, cache: KVCache) -> None:
        tensors = [tensor for pages in cache.layers for tensor in pages]
        self._parts = [tensor.view(tensor.shape[0], -1).view(torch.uint8) for tensor in tensors]
        self._sizes = [part.shape[1] for part in self._parts]
        self.num_bytes = sum(self._sizes)
        self.device = self._parts[0].device
        self._stream: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)
            self._staged = torch.empty(self.num_bytes, dtype=torch.uint8, device=self.device)

    def gather(self, page_id: int, row: torch.Tensor) -> None:
        """Fill `row` (uint8 [num_bytes], in host memory) with a page."""
        if self._stream is None:
            to = row.data_ptr()
            for part, size in zip(self._parts, self._sizes, strict=True):
                memmove(to, part.data_ptr() + page_id * size, size)
                to += size
            return
        with torch.cuda.stream(self._stream):
            torch.cat([part[page_id] for part in self._parts], out=self._staged)
            row.copy_(self._staged, non_blocking=True)
        self._stream.synchronize()

    def scatter(self, row: torch.Tensor, page_id: int) -> None:
        """Fill a page from `row`."""
        if self._stream is None:
            source = row.data_ptr()
            for part, size in zip(self._parts, self._sizes, strict=True):
                memmove(part.data_ptr() + page_id * size, source, size)
                source += size
            return
        with torch.cuda.stream(self._stream):
            self._staged.copy_(row, non_blocking=True)
            parts = [part[page_id] for part in self._parts]
            torch._foreach_copy_(parts, list(self._staged.split(self._sizes)))
        self._stream.synchronize()
