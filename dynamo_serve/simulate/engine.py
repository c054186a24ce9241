"""An engine that computes nothing: its steps take virtual time, its answers are as long as in the
trace."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil, inf

from dynamo_serve.core.batch import Batch, SequenceOutput, Work
from dynamo_serve.core.engine import EngineSpec
from dynamo_serve.core.request import Finish
from dynamo_serve.core.step_cost import StepShape
from dynamo_serve.core.tiers import Copied, Copy, Found
from dynamo_serve.simulate.costs import Times
from dynamo_serve.simulate.texts import STOP, Text


@dataclass(slots=True)
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True, slots=True)
class Answer:
    """So many tokens, the last of them a stop token unless `max_tokens` ends it."""

    text: Text
    length: int
    stops: bool

    def token(self, place: int) -> int:
        return STOP if self.stops and place + 1 >= self.length else self.text.token(place)


@dataclass(slots=True, eq=False)
class VirtualEngine:
    """`shape` tells what the step in flight runs, `next_arrival` when the next command comes."""

    spec: EngineSpec
    clock: Clock
    times: Times
    shape: Callable[[], StepShape]
    next_arrival: Callable[[], float]
    answers: dict[str, Answer]
    between: Callable[[], None] | None = None
    every: float = 0.0
    is_held: bool = False
    copies: deque[tuple[float, Copied]] | None = None
    copies_end: float = 0.0

    def start(self) -> EngineSpec:
        return self.spec

    def step(self, batch: Batch) -> list[SequenceOutput]:
        self._run(self.times.step(self.shape()))
        return [self._answer(work) for work in batch.work if work.samples]

    def _run(self, seconds: float) -> None:
        """Let so much time pass, with a look between two layers at who has come meanwhile."""
        clock, began = self.clock, self.clock.now
        end = began + seconds
        look = self._next_look(began)
        while self.between and not self.is_held and look < end:
            clock.now = look
            self.is_held = True
            self.between()
            self.is_held = False
            held = clock.now - look
            end, began = end + held, began + held
            # Who was not let in beside others may be now; else nothing changes till somebody comes.
            look = clock.now + self.every if held else self._next_look(began)
        clock.now = end

    def _next_look(self, began: float) -> float:
        """The first look after the next command has come."""
        comes = self.next_arrival()
        if not self.every or comes == inf:
            return inf
        looks = ceil((comes - began) / self.every)
        return max(began + looks * self.every, self.clock.now + self.every)

    def _answer(self, work: Work) -> SequenceOutput:
        if work.pooling is not None:
            return SequenceOutput(work.seq_id, finish=Finish.STOP, artifact=b"")
        place = work.position + len(work.token_ids) - work.prompt_len
        return SequenceOutput(work.seq_id, (self.answers[work.seq_id].token(place),))

    def drop(self, seq_ids: Iterable[str]) -> None:
        pass

    def close(self) -> None:
        pass

    def hold_for(self, between: Callable[[], None], every: float) -> None:
        self.between, self.every = between, every

    def copy(self, copies: Sequence[Copy]) -> None:
        """One after the other, each as long as its tier says."""
        page_seconds = {tier.number: tier.page_seconds for tier in self.spec.tiers}
        self.copies = self.copies if self.copies is not None else deque()
        for copy in copies:
            seconds = page_seconds[max(copy.source.tier, copy.target.tier)]
            self.copies_end = max(self.copies_end, self.clock.now) + seconds
            self.copies.append((self.copies_end, Copied(copy.ticket, seconds)))

    def copied(self) -> list[Copied | Found]:
        ended: list[Copied | Found] = []
        while self.copies and self.copies[0][0] <= self.clock.now:
            ended.append(self.copies.popleft()[1])
        return ended
