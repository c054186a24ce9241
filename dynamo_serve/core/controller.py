"""The healing ladder: one rung at a time when promises are being missed, and back down again.

A look, four times a second: is something wrong that lasts? Then the first rung that could help is
taken, and the next only if the evidence since then has not become better. When all has been well
for a while, the last one taken is undone. A rung that is needed again soon after its undo is kept
twice as long the next time: a load that hovers at the threshold does not make it flap. Where a
backlog waits for the undo, that is foreseen first; if it did harm, the rung is held for minutes."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import dropwhile
from typing import NamedTuple

from dynamo_serve.core.evidence import WINDOW, Evidence, Window
from dynamo_serve.core.journal import Kind, Reason
from dynamo_serve.core.ladder import ENGINE_SECONDS, RUNGS, SETTLE_SECONDS, Mode, Restraint, Rung
from dynamo_serve.core.lifecycle import Lifecycle
from dynamo_serve.core.limits import Limits
from dynamo_serve.core.outlook import Ease
from dynamo_serve.core.stats import Standing
from dynamo_serve.core.wear import Wear

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.25
MARGIN, CLEAR_LOOKS = 0.7, 3  # of a TTFT target, if a backlog is let in; in a row
GAIN = 0.05  # of a score: less is no improvement
MOST_CALM = 12.0  # times what a rung has to begin with
RESTART_SECONDS = 3600.0  # between two rungs that have no undo
RELAPSE_SECONDS = 300.0  # a rung taken again within that was undone too soon
BLAME_SECONDS = 30.0  # trouble within that of an undo is its doing
HOLD_SECONDS, MOST_HOLD = 120.0, 960.0  # what it is then held while a backlog waits for its undo
HISTORY = 100  # changes that are kept
OPERATOR = "operator"  # the trigger of a change that somebody asked for


@dataclass
class State:
    """How one rung stands. `after` is the evidence since it was taken, up to the next change."""

    rung: Rung
    calm: float
    is_possible: bool = True  # there is something for it to act on
    mode: Mode = Mode.AUTO
    level: int = 0
    since: float | None = None
    trigger: str = ""
    before: Evidence | None = None
    after: Evidence | None = None
    undone_at: float | None = None
    undone_for: str = ""
    left_at: float | None = None  # the same, until it is taken again
    hold: float = 0.0  # seconds, from its last relapse
    held_until: float = 0.0  # while a backlog stands
    is_held: bool = False  # for the backlog: else it would be undone by now
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

    def __init__(
        self,
        life: Lifecycle,
        restraint: Restraint,
        wear: Wear,
        limits: Limits,
        foresee: Callable[[float], float] = lambda now: 0.0,  # see `Outlook.worst`
    ) -> None:
        self._foresee = foresee
        self.is_on = limits.ladder
        self.life = life
        self.restraint = restraint
        self.states = {rung.name: State(rung, rung.calm) for rung in RUNGS}
        self.states[Reason.LIGHTER_WEIGHTS.value].is_possible = limits.lighter
        self.states[Reason.SPILL.value].is_possible = bool(life.spill.tiers)
        self.history: deque[Change] = deque(maxlen=HISTORY)
        self.evidence = Evidence()
        self.good_since: float | None = None
        self._window = Window(life, wear)
        self._began = 0.0  # this engine
        self._taken: list[State] = []  # in this order; one with two levels may be in it twice
        self._changed_at, self._settled_at = 0.0, 0.0
        self._num_clear, self._next_look, self._next_outlook = 0, 0.0, 0.0
        self._ease = Ease(restraint)
        self._reading: tuple[str, float] | None = None  # a trouble, and its score at the last rung
        self.has_news = False  # a rung was taken or undone since `take_news`

    def look(self, now: float) -> None:
        """Look at the evidence, if it is time to, and take or undo at most one rung."""
        if now < self._next_look or not self.is_on:
            return
        self._next_look = now + LOOK_SECONDS
        seen = self.evidence = self._window.look(now)
        if self._taken and self.history and self.history[-1].direction == "up":
            last = self.states[self.history[-1].rung]
            if now - self._changed_at >= last.rung.settle:
                last.after = seen
        if not seen.is_good:
            self.good_since = None
        elif self.good_since is None:
            self.good_since = now
        if seen.troubles:
            self._climb(seen, now)
        elif seen.is_good:
            self._reading = None
            self._descend(seen, now)
        self._ease.look(self.states[Reason.WIDEN_WINDOW.value].is_held, seen.is_good, now)
        good = now if self.good_since is None else self.good_since
        # What was taken later is undone sooner.
        later = dropwhile(lambda state: state.rung.reason is not Reason.SHED_BATCH, self._taken)
        self.restraint.sheds_until = max(good, self._changed_at) + sum(s.calm for s in later)

    def _climb(self, seen: Evidence, now: float) -> None:
        if now < self._settled_at:
            return
        trouble = seen.troubles[0]
        score = seen.score(trouble)
        if self._reading and self._reading[0] == trouble and score > self._reading[1] + GAIN:
            self._reading, self._settled_at = (trouble, score), now + SETTLE_SECONDS
            return  # it gets better: no more is needed yet
        able = [state for state in self.states.values() if self._is_able(state, seen, now)]
        blamed = self._blamed(now)
        # That of which the undo brought the trouble comes first: all was well with it.
        state = blamed if blamed in able else next(iter(able), None)
        if state is None:
            return
        if state.left_at is not None and now - state.left_at < RELAPSE_SECONDS:
            state.calm = min(2 * state.calm, MOST_CALM * state.rung.calm)
        elif not state.level:
            state.calm, state.hold = state.rung.calm, 0.0
        settle = state.rung.settle
        if state is blamed:
            state.hold = min(max(HOLD_SECONDS, 2 * state.hold), MOST_HOLD)
            state.held_until = now + state.hold
            settle = max(settle, WINDOW)  # what was let in meanwhile is still there
        state.left_at = None
        self._take(state, trouble, now)
        self._reading, self._settled_at = (trouble, score), now + settle
        self._window.forget()  # what comes from now on is its doing

    def _is_able(self, state: State, seen: Evidence, now: float) -> bool:
        """Whether a rung may be taken, and could help."""
        rung = state.rung
        if state.level >= rung.levels:
            return False
        is_soon = rung.settle == ENGINE_SECONDS and now - self._began < ENGINE_SECONDS
        if not rung.has_undo and state.left_at is not None:
            is_soon = is_soon or now - state.left_at < RESTART_SECONDS
        return state.mode is Mode.AUTO and state.is_possible and rung.fits(seen) and not is_soon

    def _blamed(self, now: float) -> State | None:
        """The rung of which the undo, just now, may have brought what is wrong."""
        if not self.history or self.history[-1].direction == "up":
            return None
        last = self.history[-1]
        is_its = last.trigger != OPERATOR and now - last.at < BLAME_SECONDS
        return self.states[last.rung] if is_its else None

    def _descend(self, seen: Evidence, now: float) -> None:
        able = (s for s in reversed(self._taken) if s.mode is Mode.AUTO and s.rung.has_undo)
        state = next(able, None)
        if state is None or self.good_since is None:
            return
        if now - max(self.good_since, self._changed_at) >= state.calm:
            state.is_held = seen.has_backlog and self._is_needed(state, now)
            if not state.is_held:
                self._undo(state, "calm", now)

    def _is_needed(self, state: State, now: float) -> bool:
        """Whether the backlog would break promises if it came in: as it did, or is foreseen to."""
        if now < state.held_until or not state.rung.lets_in:
            return now < state.held_until
        if now < self._next_outlook:
            return True  # as before: to look ahead takes a while
        self._next_outlook = now + SETTLE_SECONDS
        as_is = replace(self.restraint)
        state.rung.apply(self.restraint, state.level - 1)
        worst = self._foresee(now)
        self.restraint.take_over(as_is)
        self._num_clear = self._num_clear + 1 if worst <= MARGIN else 0
        return self._num_clear < CLEAR_LOOKS

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
        state.is_held = False
        state.num_undone += 1
        self._set(state, state.level - 1, "down", trigger, now)
        if not state.level:
            state.since = None

    def _set(self, state: State, level: int, direction: str, trigger: str, now: float) -> None:
        rung, seen = state.rung, self.evidence
        state.level = level
        rung.apply(self.restraint, level)
        self._changed_at, self.has_news, self._num_clear = now, True, 0
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
            state.mode, state.is_held = mode, False
            state.rung.apply(self.restraint, state.level)  # whole, if it has been eased
            while mode is Mode.PIN and state.level < state.rung.levels:
                self._take(state, OPERATOR, now)
            while mode is Mode.FORBID and state.level:
                self._undo(state, OPERATOR, now)

    # ── from engine to engine ────────────────────────────────────────────────

    @property
    def standing(self) -> Standing:
        states = {name: {**vars(s), "rung": "", "mode": ""} for name, s in self.states.items()}
        taken, history = tuple(s.rung.name for s in self._taken), tuple(self.history)
        return Standing({}, taken, self._changed_at, states, history)

    def recall(self, standing: Standing, now: float) -> None:
        """Go on where the ladder stood in the engine before, with its restraints in force. What has
        no undo is over with that engine."""
        for name, kept in standing.states.items():
            state = self.states[name]
            seen = {key: kept[key] and Evidence(*kept[key]) for key in ("before", "after")}
            own = {"rung": state.rung, "mode": state.mode, "is_possible": state.is_possible}
            vars(state).update({**kept, **seen, **own})
            if state.level and not state.rung.has_undo:
                state.level, state.since, state.left_at = 0, None, state.since
            state.rung.apply(self.restraint, state.level)
        taken = (self.states[name] for name in standing.taken)
        self._taken = [state for state in taken if state.level]
        self._began, self._settled_at = now, now + SETTLE_SECONDS
        self._changed_at = standing.changed_at
        self.history.extend(Change(*(*told, Evidence(*seen))) for *told, seen in standing.history)
        self.has_news = bool(standing.states)

    # ── what others need to know ─────────────────────────────────────────────

    def wake_at(self) -> float | None:
        """When to look again though nothing runs; None if there is nothing to undo."""
        is_waiting = self.is_on and any(state.mode is Mode.AUTO for state in self._taken)
        return self._next_look if is_waiting else None

    def take_news(self) -> Standing | None:
        """How the ladder stands, if a rung was taken or undone since this was asked last."""
        has_news, self.has_news = self.has_news, False
        return self.standing if has_news else None

    @property
    def levels(self) -> tuple[int, ...]:
        """Of each rung, in their order."""
        return tuple([state.level for state in self.states.values()])

    @property
    def changes(self) -> tuple[tuple[int, int], ...]:
        """How often each was taken and undone."""
        return tuple([(state.num_taken, state.num_undone) for state in self.states.values()])
