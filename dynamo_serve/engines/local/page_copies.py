"""Copies of parts of pages within the device, before a step reads them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from ctypes import memmove
from statistics import median

import torch

from dynamo_serve.core.batch import PageCopy
from dynamo_serve.engines.local.kv_cache import KVCache

TRIALS = 9


class PageCopier:
    """For the thread that runs the steps: on CUDA copies are in the stream of these.

    On a CPU without torch's operators, which would wake its threads for this.
    """

    def __init__(self, cache: KVCache) -> None:
        self._tensors = [tensor for pages in cache.layers for tensor in pages]
        self._scratch_page = cache.scratch_page
        self._device = self._tensors[0].device
        # Where a tensor begins, and the bytes of its pages and tokens.
        self._places = [
            (t.data_ptr(), t.stride(0) * t.itemsize, t.stride(1) * t.itemsize)
            for t in self._tensors
        ]

    def copy(self, copies: Iterable[PageCopy]) -> None:
        for source, target, num_tokens in copies:
            if self._device.type == "cpu":
                for begin, page, token in self._places:
                    memmove(begin + target * page, begin + source * page, num_tokens * token)
            else:
                torch._foreach_copy_(
                    [tensor[target, :num_tokens] for tensor in self._tensors],
                    [tensor[source, :num_tokens] for tensor in self._tensors],
                )

    def measure(self) -> float:
        """Seconds that copying a page takes, of which the caches know nothing."""
        size, took = self._tensors[0].shape[1], []
        for page_id in range(min(TRIALS, self._scratch_page)):
            began = time.perf_counter()
            self.copy([PageCopy(page_id, self._scratch_page, size)])
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            took.append(time.perf_counter() - began)
        return median(took)
