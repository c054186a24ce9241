"""The rungs: small steps by which a server in trouble helps itself, mildest first.

A rung changes a `Restraint`, which says how far work that was promised nothing is held back; level
0 is its undo. Whether a rung is taken is decided in `controller`. The last two ask for another
engine, which only whoever watches this one from outside can start: they have no effect in here,
but are told (`standing`), and the next engine goes on with the ladder where this one was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from itertools import chain
from math import inf
from typing import NamedTuple

from dynamo_serve.core import policy
from dynamo_serve.core.evidence import Evidence
from dynamo_serve.core.journal import Reason
from dynamo_serve.core.lifecycle import Lifecycle
from dynamo_serve.core.sequence import Sequence

CHUNK_FLOOR = 32  # prompt tokens beside decoding, however far they are cut: one tile
BATCH_WINDOW = 2.0  # seconds between two groups of batch-class prompts
SLOW = 2.0  # times what steps took before: the process itself has become slow
SETTLE_SECONDS = 3.0  # what a rung gets to show an effect
CALM_SECONDS = 10.0  # good evidence before a rung is undone
ENGINE_SECONDS = 60.0  # both, and what an engine runs at least, where it takes another engine
BATCH_PARTS = (1.0, 0.25, 0.0625)  # of max_decode_sequences, for batch-class sequences, by level


@dataclass(slots=True)
class Restraint:
    """What the rungs change in the limits of a step. As it begins, it changes nothing."""

    chunk_part: float = 1.0  # of the caps, in tokens and time, of prompts beside decoding
    batch_window: float = 0.0
    batch_part: float = 1.0
    spills_batch: bool = False
    sheds_batch: bool = False
    sheds_until: float = 0.0  # the soonest that this can end, as far as is known

    def take_over(self, other: Restraint) -> None:
        """Be as `other`; whoever looks at this one goes on doing so."""
        for name in self.__slots__:
            setattr(self, name, getattr(other, name))

    @property
    def places_part(self) -> float:
        """Of the places, for batch-class sequences."""
        return min(self.batch_part, BATCH_PARTS[self.spills_batch])

    def chunk_cap(self, cap: int) -> int:
        """Prompt tokens beside decoding, of the `cap` that there is without rungs."""
        return min(cap, max(CHUNK_FLOOR, int(self.chunk_part * cap)))


class Mode(Enum):
    AUTO = "auto"
    PIN = "pin"  # taken, whatever the evidence
    FORBID = "forbid"  # never taken


class Rung(NamedTuple):
    """One step of the ladder. `answers` are the troubles that it is taken for; `apply` sets what it
    changes for a level, 0 to `levels`; `effect` is that, in words."""

    reason: Reason
    answers: frozenset[str]
    apply: Callable[[Restraint, int], None]
    effect: str
    undo: str
    levels: int = 1
    needs_batch: bool = True  # it holds back batch-class work: without any it would be idle
    settle: float = SETTLE_SECONDS
    calm: float = CALM_SECONDS
    has_undo: bool = True  # without, it is for an engine that has become slow
    lets_in: bool = False  # its undo lets in, all at once, what it has kept waiting

    @property
    def name(self) -> str:
        return self.reason.value

    def fits(self, seen: Evidence) -> bool:
        """Whether it could help."""
        is_idle = self.needs_batch and not seen.has_batch
        is_idle = is_idle or not (self.has_undo or (seen.slowdown or 0.0) >= SLOW)
        return not is_idle and not self.answers.isdisjoint(seen.troubles)


def _shrink_chunks(restraint: Restraint, level: int) -> None:
    restraint.chunk_part = 0.5**level


def _widen_window(restraint: Restraint, level: int) -> None:
    restraint.batch_window = BATCH_WINDOW * level


def _cap_batch(restraint: Restraint, level: int) -> None:
    restraint.batch_part = BATCH_PARTS[level]


def _spill(restraint: Restraint, level: int) -> None:
    restraint.spills_batch = bool(level)


def _shed_batch(restraint: Restraint, level: int) -> None:
    restraint.sheds_batch = bool(level)


def _ask(restraint: Restraint, level: int) -> None:
    """For another engine: it is told, not done."""


RUNGS = (
    Rung(
        Reason.SHRINK_CHUNKS,
        frozenset({"itl"}),
        _shrink_chunks,
        "prompt tokens beside decoding are at most half as many, at level 2 a quarter",
        "as many as the settings say",
        levels=2,
        needs_batch=False,
    ),
    Rung(
        Reason.WIDEN_WINDOW,
        frozenset({"itl", "ttft", "queue"}),
        _widen_window,
        f"batch-class prompts are admitted in groups, {BATCH_WINDOW:g} s apart, while work with"
        " targets is live",
        "they are admitted as they come",
        lets_in=True,
    ),
    Rung(
        Reason.CAP_BATCH,
        frozenset({"itl", "ttft", "queue", "pages"}),
        _cap_batch,
        "batch-class sequences take at most a quarter of the places, at level 2 a sixteenth, and"
        " get scheduler.ladder_max_tokens if nobody stated a length; what runs, stays as it is",
        "they take every place that fair share gives them, and all the room there is",
        levels=2,
        lets_in=True,
    ),
    Rung(
        Reason.SPILL,
        frozenset({"ttft", "queue", "pages"}),
        _spill,
        "running batch-class sequences beyond a quarter of the places (or what cap_batch says) wait"
        " again, one a step, while work with targets is live; their pages go to the tier below",
        "they are admitted again, and their pages come back",
        lets_in=True,
    ),
    Rung(
        Reason.SHED_BATCH,
        frozenset({"itl", "ttft", "queue", "pages"}),
        _shed_batch,
        "new batch-class requests are refused with a Retry-After; what has been taken in, stays",
        "they are taken in",
    ),
    Rung(
        Reason.LIGHTER_WEIGHTS,
        frozenset({"itl", "ttft", "queue"}),
        _ask,
        "the engine is started again with lighter weights; everybody goes on with other numbers",
        "the engine is started again with the usual weights",
        needs_batch=False,
        settle=ENGINE_SECONDS,
        calm=ENGINE_SECONDS,
    ),
    Rung(
        Reason.RESTART_ENGINE,
        frozenset({"itl", "ttft", "queue"}),
        _ask,
        f"the engine, whose steps take {SLOW:g} times as long as before, is started again",
        "none: the next engine is a new one",
        needs_batch=False,
        settle=ENGINE_SECONDS,
        has_undo=False,
    ),
)
NAMES = tuple(rung.name for rung in RUNGS)


def modes_of(pin: Iterable[str], forbid: Iterable[str]) -> dict[str, Mode]:
    """The mode of each rung that is named; forbidding wins."""
    return {**dict.fromkeys(pin, Mode.PIN), **dict.fromkeys(forbid, Mode.FORBID)}


class Brake:
    """Keeps waiting batch-class requests back, as far as the rungs say. Nothing waits for ever: it
    is open whenever nothing runs, and every `batch_window` seconds."""

    def __init__(self, life: Lifecycle, restraint: Restraint, places: int, most: int) -> None:
        self.life = life
        self.restraint = restraint
        self._places = places
        self._most_tokens = most
        self._group_at = -inf  # when the last group was admitted
        self._left = 0
        self._is_shut = False
        self._kept_back: set[str] = set()  # tenants, in the last plan

    @property
    def cap(self) -> int:
        """Places for batch-class sequences."""
        return max(1, int(self.restraint.places_part * self._places))

    def lets_pass(self, seq: Sequence) -> bool:
        """Whether it goes past whatever batch-class work waits, but for one group at a time."""
        return seq.promise.is_promised and self.restraint.batch_window > 0

    def bound(self, seq: Sequence) -> None:
        """Say how long the answer may get of one that has not been admitted yet: less than there is
        room for only where nobody stated a length, for no answer is cut that was asked for."""
        if seq.admitted_at is None:
            request, is_capped = seq.request, self.restraint.batch_part < 1.0
            seq.max_tokens = request.max_tokens
            if is_capped and request.is_open_ended and seq.promise.is_batch:
                seq.max_tokens = min(seq.max_tokens, max(self._most_tokens, request.min_tokens))

    def begin(self, now: float) -> None:
        """A step is being planned."""
        window, running = self.restraint.batch_window, self.life.running.values()
        if self._kept_back:
            self.life.shares.forgo(self._kept_back, self.life.busy)
            self._kept_back.clear()
        if self.restraint.places_part < 1.0:
            self._left = self.cap - sum(seq.promise.is_batch for seq in running)
        self._is_shut = (
            now - self._group_at < window
            and now > self._group_at
            and any(seq.promise.is_promised for seq in running)
        )

    def spill(self, now: float) -> None:
        """Send one running batch-class sequence back to the queue, if there are too many for the
        rung and somebody is there for whom."""
        if not self.restraint.spills_batch:
            return
        running, waiting = self.life.running.values(), self.life.waiting
        batch = [seq for seq in running if seq.promise.is_batch and seq.restoring is None]
        heads = (seq for name in waiting.tenants for seq in waiting.scan(name, 1))
        if len(batch) > self.cap and any(s.promise.is_promised for s in chain(running, heads)):
            self.life.preempt(policy.victim(batch, now), Reason.SPILL, now)

    def obstacle(self, seq: Sequence) -> Reason | None:
        """The rung that keeps a waiting request back, if one does."""
        reason = None
        if seq.promise.is_batch and self.restraint.places_part < 1.0 and self._left <= 0:
            reason = Reason.CAP_BATCH if self.restraint.batch_part < 1.0 else Reason.SPILL
        elif seq.promise.is_batch and self._is_shut:
            reason = Reason.WIDEN_WINDOW
        if reason:
            self._kept_back.add(seq.request.tenant)
        return reason

    def pass_through(self, seq: Sequence, now: float) -> None:
        """It is admitted."""
        if seq.promise.is_batch:
            self._left -= 1
            self._group_at = now
