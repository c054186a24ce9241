"""What attention kernels that read pages in place want to know of a step, as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from dynamo_serve.engines.local.step import Row


class RaggedArgs(NamedTuple):
    """A step of n rows for a paged kernel; all tensors int32.

    `query_starts` [n + 1] are the offsets of the rows' tokens, `kv_lengths` [n] the tokens each
    may see, `page_table` [n, width] its pages (zero beyond its own). `max_query` and `max_kv`
    bound the lengths.
    """

    query_starts: torch.Tensor
    kv_lengths: torch.Tensor
    page_table: torch.Tensor
    max_query: int
    max_kv: int


def ragged_args(
    rows: Sequence[Row], page_size: int, device: torch.device, width: int | None = None
) -> RaggedArgs:
    """`width` fixes the page table's columns (a CUDA graph needs that); None takes the longest."""
    used = [-(-row.kv_length // page_size) for row in rows]
    columns = max(used) if width is None else width
    starts = [0]
    for row in rows:
        starts.append(starts[-1] + row.length)
    # Only the pages in use pass through Python: a graph's table is as wide as the longest sequence.
    page_table = torch.zeros(len(rows), columns, dtype=torch.int32)
    pages = [page for row, n in zip(rows, used, strict=True) for page in row.page_table[:n]]
    in_use = torch.arange(columns) < torch.tensor(used)[:, None]
    page_table[in_use] = torch.tensor(pages, dtype=torch.int32)
    return RaggedArgs(
        query_starts=torch.tensor(starts, dtype=torch.int32).to(device),
        kv_lengths=torch.tensor([r.kv_length for r in rows], dtype=torch.int32).to(device),
        page_table=page_table.to(device),
        max_query=max(row.length for row in rows),
        max_kv=columns * page_size if width is not None else max(row.kv_length for row in rows),
    )
