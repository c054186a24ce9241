"""Prompts that cut in: they run while the step in flight is held between two of its layers.

For engines that can hold a step. A request that has just come, and whose first token would be late
or nearly so if it waited for the step to end, has its prompt run at once. Nothing that the step
reads or writes is touched: nobody is preempted, cancelled or finished for it but itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from dynamo_serve.core import policy
from dynamo_serve.core.batch import Phase
from dynamo_serve.core.bill import Bill, Held
from dynamo_serve.core.intake import Intake
from dynamo_serve.core.preemption import shape_of
from dynamo_serve.core.sequence import Sequence


class CutIn:
    """Chooses the prompts for which the step in flight is held."""

    def __init__(self, intake: Intake, bill: Bill) -> None:
        self.intake = intake
        self.bill = bill

    def chunks(self, newcomers: Iterable[Sequence], now: float) -> list[tuple[Sequence, int]]:
        """Those of `newcomers` that run now, each with all of its prompt. Who is admitted and would
        take too long waits for the next step."""
        held, life = self.bill.held, self.intake.life
        assert held is not None, "no step is held"
        running = list(life.running.values())
        room = self._room(held, running, now)
        if room <= 0.0:
            return []
        self.intake.take_stock()
        rivals = [*running, *(life.waiting.first(name, 1)[0] for name in life.waiting.tenants)]
        next_token = held.seconds_left + self.intake.pace.cost.predict(shape_of(running))
        admitted = [
            seq
            for seq in newcomers
            if policy.is_pressed(seq, now + held.seconds_left)
            and next_token <= policy.SAFETY * seq.promise.itl
            and policy.may_go_ahead(seq, rivals, life.shares.accounts)
            and self.intake.admit_at_once(seq, now)
            and seq.restoring is None
        ]
        return self.intake.pace.alone(admitted, room, now)

    def _room(self, held: Held, running: list[Sequence], now: float) -> float:
        """Seconds for which the step may be held: worth it, never longer than it takes itself, and
        not so long that somebody's next or first token comes late for that."""
        left = held.seconds_left
        counts = held.counts
        decoding = [seq for seq in running if seq.phase is Phase.DECODE]
        inside = [seq for seq in decoding if seq.id in counts]
        outside = [seq for seq in decoding if seq.id not in counts]
        next_step = self.intake.pace.cost.predict(shape_of(decoding))
        spare = [
            seq.due - now - left
            for seq in running
            if seq.first_token_at is None
            and seq.promise.ttft < inf
            and counts.get(seq.id) == seq.num_pending
            and seq.due > now + left  # else it is late anyway
        ]
        return min(
            policy.OWN_STEP_PART / (1 - policy.OWN_STEP_PART) * left,
            held.patience,
            policy.time_left(inside, now) - left,
            policy.time_left(outside, now) - left - next_step,
            *spare,
        )
