"""Prompts that cut in: they run while the step in flight is held between two of its layers.

For engines that can hold a step. A request that has just come, and whose first token would be late
or nearly so if it waited for the step to end, has its prompt run at once. Nothing that the step
reads or writes is touched: nobody is preempted, cancelled or finished for it but itself.
"""

from __future__ import annotations

from collections.abc import Iterable

from dynamo_serve.core import policy
from dynamo_serve.core.batch import Phase
from dynamo_serve.core.bill import Bill
from dynamo_serve.core.intake import Intake
from dynamo_serve.core.sequence import Sequence


class CutIn:
    """Chooses the prompts for which the step in flight is held."""

    def __init__(self, intake: Intake, bill: Bill) -> None:
        self.intake = intake
        self.bill = bill

    def chunks(self, newcomers: Iterable[Sequence], now: float) -> list[tuple[Sequence, int]]:
        """Those of `newcomers` that run now, each with all of its prompt. Who is admitted and would
        take too long waits for the next step."""
        held, life, pace = self.bill.held, self.intake.life, self.intake.pace
        assert held is not None, "no step is held"
        others = [seq for seq, _ in held.step.items if seq.id in life.running]
        end = now + held.seconds_left
        self.intake.take_stock()
        admitted = [
            seq
            for seq in newcomers
            if policy.is_pressed(seq, end)
            and policy.may_go_ahead(seq, others, life.shares.accounts)
            and self.intake.admit_at_once(seq, now)
        ]
        decoding = [seq for seq in others if seq.phase is Phase.DECODE]
        saved = policy.OWN_STEP_PART / (1 - policy.OWN_STEP_PART) * held.seconds_left
        itl = policy.time_left(decoding, now) - held.seconds_left
        # Never held for longer than it takes itself.
        return pace.alone(admitted, min(saved, itl, held.patience), now)
