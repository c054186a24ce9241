"""An engine whose copies take their time, fail and come to harm, for tests of the tiers."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence

from dynamo_serve.core.batch import Batch, SequenceOutput
from dynamo_serve.core.tiers import DEVICE, Copied, Copy, Found, Place
from tests.core.traffic import QuickEngine


class RoughEngine(QuickEngine):
    """Each copy ends after a random number of looks, and some of them fail: then the target holds
    garbage. Raises AssertionError if a step or another copy touches what a copy is using."""

    def __init__(self, rng: random.Random, *, failing: float, slowest: int, **sizes: int) -> None:
        super().__init__(
            vocab_size=sizes["vocab_size"],
            max_model_len=sizes["max_model_len"],
            page_size=sizes["page_size"],
            num_pages=sizes["num_pages"],
            host_pages=sizes.get("host_pages", 0),
            disk_pages=sizes.get("disk_pages", 0),
        )
        self.rng = rng
        self.failing = failing
        self.slowest = slowest
        self.under_way: list[list[int | Copy]] = []  # looks left, copy
        self.num_failed = 0

    def copy(self, copies: Sequence[Copy]) -> None:
        for copy in copies:
            busy = {other.target for _, other in self.under_way}
            assert copy.target not in busy and copy.source not in busy, f"{copy} is too soon"
            reading = {other.source for _, other in self.under_way}
            assert copy.target not in reading, f"{copy} writes to what is being read"
            self.under_way.append([self.rng.randint(0, self.slowest), copy])

    def copied(self) -> list[Copied | Found]:
        ended: list[Copied | Found] = []
        for item in list(self.under_way):
            if item[0]:
                item[0] -= 1
                continue
            self.under_way.remove(item)
            copy = item[1]
            if self.rng.random() < self.failing:
                self.num_failed += 1
                self._put(copy.target, array("q", [-7]) * self.spec.page_size)
                ended.append(Copied(copy.ticket, 1e-6, "made to fail"))
            else:
                self._put(copy.target, self._get(copy.source))
                ended.append(Copied(copy.ticket, 1e-6))
        return ended

    def step(self, batch: Batch) -> list[SequenceOutput]:
        targets = {copy.target for _, copy in self.under_way}
        sources = {copy.source for _, copy in self.under_way}
        for work in batch.work:
            size = self.spec.page_size
            for page_id in work.page_table:
                assert Place(DEVICE, page_id) not in targets, f"{work.seq_id} reads too soon"
            for position in range(work.position, work.position + len(work.token_ids)):
                written = Place(DEVICE, work.page_table[position // size])
                assert written not in sources, f"{work.seq_id} writes to what is being copied"
        return super().step(batch)
