"""The healing ladder: one rung at a time when promises are being missed, and back down again.

A look, four times a second: is something wrong that lasts? Then the first rung that could help is
taken, and the next only if the evidence since then has not become better. When all has been well
for a while, the last one taken is undone. A rung that is needed again soon after its undo is kept
twice as long the next time: a load that hovers at the threshold does not make it flap.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from dynamo_serve.core.evidence import Evidence, Window
from dynamo_serve.core.journal import Kind, Reason
from dynamo_serve.core.ladder import RUNGS, Mode, Restraint, Rung
from dynamo_serve.core.lifecycle import Lifecycle

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.25
SETTLE_SECONDS = 3.0  # what a rung gets to show an effect
GAIN = 0.05  # of a score: less is no improvement
CALM_SECONDS = 10.0  # good evidence before a rung is undone
MOST_CALM_SECONDS = 120.0
RELAPSE_SECONDS = 300.0  # a rung taken again within that was undone too soon
HISTORY = 100  # changes that are kept
OPERATOR = "operator"  # the trigger of a change that somebody asked for


@dataclass(slots=True)
class State:
    """How one rung stands. `after` is the evidence since it was taken, up to the next change."""

    rung: Rung
    mode: Mode = Mode.AUTO
    level: int = 0
    since: float | None = None
    trigger: str = ""
    before: Evidence | None = None
    after: Evidence | None = None
    undone_at: float | None = None
    undone_for: str = ""
    left_at: float | None = None  # the same, until it is taken again
    calm: float = CALM_SECONDS
    num_taken: int = 0
    num_undone: int = 0

    @property
    def has_helped(self) -> bool | None:
        """Whether what it was taken for is better since; None if that is not known (yet)."""
        if self.before is None or self.after is None or self.trigger == OPERATOR:
            return None
        return self.after.score(self.trigger) > self.before.score(self.trigger) + GAIN


class Change(NamedTuple):
    """A rung was taken ("up") or undone ("down"), and is at `level` now."""

    at: float
    rung: str
    direction: str
    level: int
    trigger: str
    evidence: Evidence


class Controller:
    """Decides which rungs are taken. `now` is an argument of everything that depends on time."""

    def __init__(self, life: Lifecycle, restraint: Restraint, *, is_on: bool = True) -> None:
        self.is_on = is_on
        self.life = life
        self.restraint = restraint
        self.states = {rung.name: State(rung) for rung in RUNGS}
        self.history: deque[Change] = deque(maxlen=HISTORY)
        self.evidence = Evidence()
        self.good_since: float | None = None
        self._window = Window(life)
        self._taken: list[State] = []  # in this order; one with two levels may be in it twice
        self._changed_at = 0.0
        self._next_look = 0.0
        self._reading: tuple[str, float] | None = None  # a trouble, and its score at the last rung
        self._settled_at = 0.0
        self._has_news = False

    def look(self, now: float) -> None:
        """Look at the evidence, if it is time to, and take or undo at most one rung."""
        if now < self._next_look or not self.is_on:
            return
        self._next_look = now + LOOK_SECONDS
        seen = self.evidence = self._window.look(now)
        if self._taken and now - self._changed_at >= SETTLE_SECONDS and self.history:
            last = self.history[-1]
            if last.direction == "up":
                self.states[last.rung].after = seen
        if not seen.is_good:
            self.good_since = None
        elif self.good_since is None:
            self.good_since = now
        if seen.troubles:
            self._climb(seen, now)
        elif seen.is_good:
            self._reading = None
            self._descend(seen, now)
        good = now if self.good_since is None else self.good_since
        shed = self.states[Reason.SHED_BATCH.value]
        self.restraint.sheds_until = max(good, self._changed_at) + shed.calm

    def _climb(self, seen: Evidence, now: float) -> None:
        if now < self._settled_at:
            return
        trouble = seen.troubles[0]
        score = seen.score(trouble)
        if self._reading and self._reading[0] == trouble and score > self._reading[1] + GAIN:
            self._reading, self._settled_at = (trouble, score), now + SETTLE_SECONDS
            return  # it gets better: no more is needed yet
        able = (s for s in self.states.values() if s.mode is Mode.AUTO and s.rung.fits(seen))
        state = next((state for state in able if state.level < state.rung.levels), None)
        if state is None:
            return
        if state.left_at is not None and now - state.left_at < RELAPSE_SECONDS:
            state.calm = min(2 * state.calm, MOST_CALM_SECONDS)
        elif not state.level:
            state.calm = CALM_SECONDS
        state.left_at = None
        self._take(state, trouble, now)
        self._reading, self._settled_at = (trouble, score), now + SETTLE_SECONDS
        self._window.forget()  # what comes from now on is its doing

    def _descend(self, seen: Evidence, now: float) -> None:
        state = next((s for s in reversed(self._taken) if s.mode is Mode.AUTO), None)
        if state is None or self.good_since is None:
            return
        if now - max(self.good_since, self._changed_at) >= state.calm:
            self._undo(state, "calm", now)

    def _take(self, state: State, trigger: str, now: float) -> None:
        if not state.level:
            state.since = now
        state.trigger, state.before, state.after = trigger, self.evidence, None
        state.num_taken += 1
        self._taken.append(state)
        self._set(state, state.level + 1, "up", trigger, now)

    def _undo(self, state: State, trigger: str, now: float) -> None:
        at = max(i for i, taken in enumerate(self._taken) if taken is state)
        del self._taken[at]
        state.undone_at, state.undone_for = now, trigger
        state.left_at = now
        state.num_undone += 1
        self._set(state, state.level - 1, "down", trigger, now)
        if not state.level:
            state.since = None

    def _set(self, state: State, level: int, direction: str, trigger: str, now: float) -> None:
        rung, seen = state.rung, self.evidence
        state.level = level
        rung.apply(self.restraint, level)
        self._changed_at, self._has_news = now, True
        self.history.append(Change(now, rung.name, direction, level, trigger, seen))
        kind = Kind.TAKE_RUNG if direction == "up" else Kind.UNDO_RUNG
        self.life.journal.note(now, kind, rung.name, "", "", level=level, **seen.numbers)
        numbers = ", ".join(f"{name} {number:.3g}" for name, number in seen.numbers.items())
        done, what = ("taken", rung.effect) if direction == "up" else ("undone", rung.undo)
        log.warning(
            "rung %s %s, level %d, for %s: %s; %s", rung.name, done, level, trigger, what, numbers
        )

    # ── operators ────────────────────────────────────────────────────────────

    def steer(self, modes: Mapping[str, Mode], now: float) -> None:
        """Other modes for the rungs that are named. Pinned ones are taken, forbidden ones undone at
        once; what is released is undone like any other, when all has been well for a while."""
        for name, mode in modes.items():
            state = self.states[name]
            state.mode = mode
            while mode is Mode.PIN and state.level < state.rung.levels:
                self._take(state, OPERATOR, now)
            while mode is Mode.FORBID and state.level:
                self._undo(state, OPERATOR, now)

    # ── what others need to know ─────────────────────────────────────────────

    def wake_at(self) -> float | None:
        """When to look again though nothing runs; None if there is nothing to undo."""
        is_waiting = self.is_on and any(state.mode is Mode.AUTO for state in self._taken)
        return self._next_look if is_waiting else None

    def take_news(self) -> bool:
        """Whether a rung was taken or undone since this was asked last."""
        has_news, self._has_news = self._has_news, False
        return has_news

    @property
    def levels(self) -> tuple[int, ...]:
        """Of each rung, in their order."""
        return tuple(state.level for state in self.states.values())

    @property
    def changes(self) -> tuple[tuple[int, int], ...]:
        """How often each was taken and undone."""
        return tuple((state.num_taken, state.num_undone) for state in self.states.values())
