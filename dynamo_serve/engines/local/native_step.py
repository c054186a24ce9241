"""A packed step as the kernels want it: plain arrays and their addresses."""

from __future__ import annotations

from itertools import accumulate

import torch

from dynamo_serve.engines.local.step import PackedStep
from dynamo_serve.native import structs


class NativeStep:
    """Keeps the arrays of one step alive for as long as the kernels may read them."""

    def __init__(self, step: PackedStep, page_size: int) -> None:
        used = [-(-row.kv_length // page_size) for row in step.rows]
        pages = [
            page for row, n in zip(step.rows, used, strict=True) for page in row.page_table[:n]
        ]
        starts = [0, *accumulate(row.length for row in step.rows)]
        page_starts = [0, *accumulate(used)]
        self._packed = step
        self._rows = torch.tensor([*starts, *page_starts, *pages], dtype=torch.int32)
        self._positions, self._ids = (
            step.position_ids[0].contiguous(),
            step.input_ids[0].contiguous(),
        )
        self._slots, self._samples = step.slots.contiguous(), step.sample_index.contiguous()
        self._wanted = step.sample_index[:0] if step.state_index is None else step.state_index
        first, size, count = self._rows.data_ptr(), self._rows.itemsize, len(step.rows)
        self.struct = structs.Step(
            token_ids=self._ids.data_ptr(),
            positions=self._positions.data_ptr(),
            slots=self._slots.data_ptr(),
            samples=self._samples.data_ptr(),
            wanted=self._wanted.data_ptr(),
            starts=first,
            page_starts=first + size * (count + 1),
            pages=first + size * 2 * (count + 1),
            num_tokens=len(step.slots),
            num_rows=count,
            num_samples=len(self._samples),
            num_wanted=len(self._wanted),
        )
