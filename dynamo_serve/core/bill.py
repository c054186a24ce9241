"""What a step was expected to take, what it took, and who pays for it."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import NamedTuple

from dynamo_serve.core.batch import SequenceOutput
from dynamo_serve.core.lifecycle import Lifecycle
from dynamo_serve.core.request import Finish
from dynamo_serve.core.sequence import Sequence
from dynamo_serve.core.shares import Holder
from dynamo_serve.core.step_cost import Item, StepCost, StepShape
from dynamo_serve.core.wear import Wear

DIVIDE_SECONDS = 0.1  # between two looks at who shares pages with whom


class Step(NamedTuple):
    """The step in flight, as the cost model sees it: whom it runs, and what of each."""

    seqs: list[Sequence]
    items: list[Item]
    shape: StepShape
    began: float
    predicted_seconds: float


class Held(NamedTuple):
    """A step that is held, since when, and for how long it has been in all before that."""

    step: Step
    since: float
    before: float

    @property
    def seconds_left(self) -> float:
        """Until it ends, once it goes on."""
        return max(0.0, self.step.began + self.step.predicted_seconds - self.since)

    @property
    def counts(self) -> dict[str, int]:
        """By sequence, the tokens of it that the step runs."""
        rows = zip(self.step.seqs, self.step.items, strict=True)
        return {seq.id: count for seq, (count, _, _) in rows}

    @property
    def patience(self) -> float:
        """Seconds that it may still be held: never for longer than it takes itself."""
        return self.step.predicted_seconds - self.before


class Bill:
    """Teaches the cost model, and divides what was measured among the sequences."""

    def __init__(self, life: Lifecycle, cost: StepCost) -> None:
        self.life = life
        self.cost = cost
        self.wear = Wear()
        self.step: Step | None = None
        self.held: Held | None = None
        self.is_smooth = True  # the step in flight ran at the first try
        self._held_seconds = 0.0  # of the step in flight
        self._charged_at = -inf  # until when the pages held are paid for
        self._divided_at = -inf

    def begin(self, now: float) -> None:
        """A step is about to be planned; what nobody holds costs nothing."""
        self.step = None
        if not self.life.running:
            self._charged_at = now

    def expect(self, seqs: list[Sequence], items: list[Item], now: float) -> None:
        """This is the plan."""
        shape = StepShape.of(items)
        self.step = Step(seqs, items, shape, now, self.cost.predict(shape))
        if self.held is None:
            self._held_seconds = 0.0

    def hold(self, now: float) -> None:
        """The step in flight stands still from now on."""
        assert self.step is not None and self.held is None, "there is no step to hold"
        self.held = Held(self.step, now, self._held_seconds)
        self.life.flight_seconds = self.held.seconds_left
        self.life.flight_tokens = self.held.counts

    @property
    def planned(self) -> Step:
        """The step in flight."""
        assert self.step is not None, "a step without a plan"
        return self.step

    @property
    def is_patient(self) -> bool:
        """Whether the step in flight may still be held."""
        return self.step is not None and self._held_seconds < self.step.predicted_seconds

    def resume(self, now: float) -> None:
        """It goes on; the time in between is not its own."""
        assert self.held is not None, "no step is held"
        step, since, before = self.held
        self._held_seconds = before + now - since
        self.step = step._replace(began=step.began + now - since)
        self.held = None
        self.life.flight_seconds, self.life.flight_tokens = 0.0, {}

    def settle(self, produced: Mapping[str, SequenceOutput], now: float) -> None:
        """The step has ended. A failed one is paid for, and teaches nothing."""
        shares, pool = self.life.shares, self.life.pool
        self._divide_pages(now)
        holders: list[Holder] = [*self.life.running.values(), *self.life.pins.by_id.values()]
        shares.charge_pages(holders, pool.num_used, pool.num_pages, now - self._charged_at)
        self._charged_at = now
        step = self.step
        assert step is not None, "an update without a plan"
        seconds = now - step.began
        if seconds <= 0.0:
            return
        if self.is_smooth and Finish.ERROR not in [out.finish for out in produced.values()]:
            self.cost.observe(step.shape, seconds)
            self.wear.observe(step.shape, seconds, now)
        self.is_smooth = True
        parts = self.cost.shares(step.items, step.shape)
        shares.charge_step(step.seqs, step.items, parts, seconds)

    def _divide_pages(self, now: float) -> None:
        """Who shares pages with whom changes with every admission; looking at all tables every
        time would cost more than it tells."""
        if now - self._divided_at >= DIVIDE_SECONDS:
            self._divided_at = now
            for seq in self.life.running.values():
                seq.page_part = self.life.pool.part_of(seq.page_table)
            self.life.pins.divide()
