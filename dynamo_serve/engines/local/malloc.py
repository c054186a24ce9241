"""Keep large freed blocks in the process: a step's activations are as large as the last one's."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import mmap
import threading
from collections.abc import Sequence

import torch

from dynamo_serve.engines.local.background import LEAST, step_back

logger = logging.getLogger(__name__)

M_TRIM_THRESHOLD = -1  # from glibc's malloc.h
M_MMAP_THRESHOLD = -3
KEEP_BYTES = 1 << 30
MADV_HUGEPAGE = 14  # from Linux' mman-common.h
MADV_POPULATE_WRITE = 23
TAKEN_AT_ONCE = 2 << 20  # one huge page: while it is taken, nobody can have memory mapped


def zeros_on_huge_pages(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Zeros on the CPU, in memory of their own, on huge pages where the system has them to give.

    Pages of KV lie anywhere in gigabytes: with 4 KiB pages each access waits for its address, too.
    The memory is promised, but not taken yet: see `take_memory`.
    """
    count = math.prod(shape)
    size = max(1, count) * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):  # a system without huge pages
        memory.madvise(MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(*shape)


def take_memory(tensors: Sequence[torch.Tensor]) -> threading.Thread:
    """Have the system hand over the memory of `tensors` in idle moments (Linux 5.14).

    A step that is there first takes what it touches by itself, a few milliseconds later. Contents
    do not change. Returns the thread, which ends by itself. It gives way: where memory is slow to
    come, as in virtual machines, it would take a core from the steps for half a minute.
    """

    def take() -> None:
        step_back(LEAST)
        madvise = getattr(ctypes.CDLL(None), "madvise", None)
        if madvise is None:
            return
        for tensor in tensors:
            first, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.itemsize
            for start in range(first, end, TAKEN_AT_ONCE):
                size = min(TAKEN_AT_ONCE, end - start)
                address = ctypes.c_void_p(start)
                if madvise(address, ctypes.c_size_t(size), MADV_POPULATE_WRITE):
                    return  # an older system, or no memory left: steps will see

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    return thread


def keep_freed_memory() -> bool:
    """Tell glibc not to hand blocks below 1 GiB back to the kernel; False where it is not glibc.

    By default every block above 128 KiB may be mapped anew, so that each operator faults its
    output in page by page (0.6B model, 2 cores, 512-token prefill: 90,000 faults a step, none
    with this).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    done = bool(mallopt(M_MMAP_THRESHOLD, KEEP_BYTES)) and bool(
        mallopt(M_TRIM_THRESHOLD, KEEP_BYTES)
    )
    logger.info("freed memory is %s", "kept for reuse" if done else "given back: mallopt failed")
    return done
