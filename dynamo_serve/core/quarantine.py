"""Sequences of which an engine may have died: each runs alone until it has yielded a token.

If the next engine dies, too, it is plain of whom: the step in flight holds one sequence.
"""

from __future__ import annotations

from math import inf

from dynamo_serve.core import policy
from dynamo_serve.core.intake import Intake
from dynamo_serve.core.journal import Reason
from dynamo_serve.core.sequence import Sequence
from dynamo_serve.core.step_cost import StepShape


class Quarantine:
    """Plans the steps of suspects. They come before everybody else, for until it is known who
    is to blame everybody is at risk."""

    def __init__(self, intake: Intake) -> None:
        self.intake = intake
        self._suspects: dict[str, Sequence] = {}  # in order of arrival; some are cleared or gone

    def add(self, seq: Sequence) -> None:
        self._suspects[seq.id] = seq

    def chunk(self, now: float) -> tuple[Sequence, int] | None:
        """The part of a prompt that has the next step for itself; None if nobody is suspected."""
        life = self.intake.life
        while self._suspects:
            seq = next(iter(self._suspects.values()))
            is_live = life.running.get(seq.id) is seq or life.waiting.get(seq.id) is seq
            if not (seq.is_suspect and is_live):
                del self._suspects[seq.id]
                continue
            if seq.id not in life.running and not self._admit(seq, now):
                return None
            limits, count = self.intake.limits, seq.num_pending
            if not limits.whole_prompts:
                count = min(count, self.intake.pace.usual_chunk(StepShape(), inf))
            self.intake.note_chunk(seq, count, Reason.ALONE, now)
            return seq, count
        return None

    def __len__(self) -> int:
        return len(self._suspects)

    def _admit(self, seq: Sequence, now: float) -> bool:
        """Whatever the quotas say: it had its place before the engine died. False while copies hold
        the pages that it needs."""
        life = self.intake.life
        places = self.intake.limits.max_decode_sequences
        while life.running and (len(life.running) >= places or not self.intake.has_room(seq)):
            life.preempt(policy.victim(list(life.running.values()), now), Reason.OUT_OF_PAGES, now)
        if not self.intake.has_room(seq):
            return False
        life.admit(seq, now)
        return True
