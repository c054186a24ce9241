"""An engine whose copies take their time, fail and come to harm, for tests of the tiers."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence

from dynamo_serve.core.batch import Batch, SequenceOutput
from dynamo_serve.core.limits import Limits
from dynamo_serve.core.tiers import DEVICE, DISK, HOST, Copied, Copy, Found, Place
from tests.core.traffic import VOCAB_SIZE, Harness, QuickEngine


class RoughEngine(QuickEngine):
    """Each copy ends after a random number of looks, and some of them fail: then the target holds
    garbage. Raises AssertionError if a step or another copy touches what a copy is using."""

    def __init__(self, rng: random.Random, *, failing: float, slowest: int, **sizes: int) -> None:
        super().__init__(
            vocab_size=sizes["vocab_size"],
            max_model_len=sizes["max_model_len"],
            page_size=sizes["page_size"],
            num_pages=sizes["num_pages"],
            below={HOST: sizes["host_pages"], DISK: sizes["disk_pages"]},
        )
        self.rng = rng
        self.failing = failing
        self.slowest = slowest
        self.under_way: dict[int, tuple[Copy, int]] = {}  # by ticket, with the looks that it takes
        self.num_looks = 0
        self.num_failed = 0

    def copy(self, copies: Sequence[Copy]) -> None:
        for copy in copies:
            busy = {other.target for other, _ in self.under_way.values()}
            assert copy.target not in busy and copy.source not in busy, f"{copy} is too soon"
            reading = {other.source for other, _ in self.under_way.values()}
            assert copy.target not in reading, f"{copy} writes to what is being read"
            end = self.num_looks + self.rng.randint(0, self.slowest)
            self.under_way[copy.ticket] = copy, end

    def copied(self) -> list[Copied | Found]:
        ended: list[Copied | Found] = []
        self.num_looks += 1
        for copy, end in list(self.under_way.values()):
            if end >= self.num_looks:
                continue
            del self.under_way[copy.ticket]
            if self.rng.random() < self.failing:
                self.num_failed += 1
                self._put(copy.target, array("q", [-7]) * self.spec.page_size)
                ended.append(Copied(copy.ticket, 1e-6, "made to fail"))
            else:
                self._put(copy.target, self._get(copy.source))
                ended.append(Copied(copy.ticket, 1e-6))
        return ended

    def step(self, batch: Batch) -> list[SequenceOutput]:
        targets = {copy.target for copy, _ in self.under_way.values()}
        sources = {copy.source for copy, _ in self.under_way.values()}
        for work in batch.work:
            size = self.spec.page_size
            for page_id in work.page_table:
                assert Place(DEVICE, page_id) not in targets, f"{work.seq_id} reads too soon"
            for position in range(work.position, work.position + len(work.token_ids)):
                written = Place(DEVICE, work.page_table[position // size])
                assert written not in sources, f"{work.seq_id} writes to what is being copied"
        return super().step(batch)


def serve(
    *, pages: int = 20, host: int = 64, disk: int = 0, slowest: int = 0, longest: int = 64
) -> Harness:
    """A scheduler over such an engine with pages of four tokens; no copy fails."""
    engine = RoughEngine(
        random.Random(1),
        failing=0.0,
        slowest=slowest,
        vocab_size=VOCAB_SIZE,
        max_model_len=longest,
        page_size=4,
        num_pages=pages,
        host_pages=host,
        disk_pages=disk,
    )
    engine.harness = harness = Harness(engine, Limits(mix_phases=True))
    return harness
