"""A backlog that waits for an undo: what it would do to promises, and how it is let in slowly."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from math import inf

from dynamo_serve.core.forecast import forecast
from dynamo_serve.core.intake import Intake
from dynamo_serve.core.ladder import BATCH_WINDOW, CALM_SECONDS, Restraint
from dynamo_serve.core.lifecycle import Lifecycle
from dynamo_serve.core.sequence import Sequence

LEAST_WINDOW = 0.0625  # seconds between two groups of batch-class prompts
LONG_SECONDS = 120.0  # without a miss, before a window that was too narrow is tried again


class Outlook:
    """Plays the queue forward with the restraints as they are set for the moment."""

    def __init__(self, life: Lifecycle, intake: Intake) -> None:
        self.life = life
        self.intake = intake

    def worst(self, now: float) -> float:
        """The wait for a first token, in TTFT targets, of a request like the latest of each class
        that has one: the longest."""
        waits, beside = [0.0], self._let_in()
        for request, promise in self.life.tally.latest.values():
            if promise.ttft < inf:
                newcomer = replace(request, id="", arrival=now, priority=0)
                seq = Sequence.of(newcomer, promise)
                told = forecast(seq, self.life, self.intake, beside)
                waits.append(told.first_token / promise.ttft)
        return max(waits)

    def _let_in(self) -> list[Sequence]:
        """The batch-class work that will have taken the places it may have."""
        life = self.life
        room = self.intake.brake.cap - sum(s.promise.is_batch for s in life.running.values())
        heads = (s for name in life.waiting.tenants for s in life.waiting.scan(name, max(0, room)))
        return list(islice((seq for seq in heads if seq.promise.is_batch), max(0, room)))


class Ease:
    """Lets a backlog in bit by bit while the window of batch-class prompts is held for it.

    All well for a while: half the window. A promise missed: all of it again, and not as narrow as
    it was then until much time has passed.
    """

    def __init__(self, restraint: Restraint) -> None:
        self.restraint = restraint
        self._least = LEAST_WINDOW
        self._since: float | None = None  # the last change, or the last thing that was wrong

    def look(self, is_held: bool, is_good: bool, now: float) -> None:
        window = self.restraint.batch_window
        is_idle = not window or (window == BATCH_WINDOW and not is_held)
        if is_idle or self._since is None:  # an engine may begin with a rung that is held
            self._since = now
        elif not is_good:
            if window < BATCH_WINDOW:
                self._least = min(2 * window, BATCH_WINDOW)
            self.restraint.batch_window, self._since = BATCH_WINDOW, now
        elif window > self._least and now - self._since >= CALM_SECONDS:
            self.restraint.batch_window, self._since = window / 2, now
        elif now - self._since >= LONG_SECONDS:
            self._least, self._since = max(self._least / 2, LEAST_WINDOW), now
