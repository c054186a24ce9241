"""How the server is doing: targets kept and missed, who waits too long, pages, preemptions.

Only what has happened counts: first tokens, gaps between tokens, refusals, waits. `tally` counts,
`Window` looks back over the last seconds, `Evidence` says what they come to.
"""

from __future__ import annotations

from collections import deque
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

from dynamo_serve.core.journal import Kind, Reason
from dynamo_serve.core.tally import ITL_KEPT, ITL_LATE, TTFT_KEPT, TTFT_LATE, is_own_doing
from dynamo_serve.core.wear import Wear

if TYPE_CHECKING:
    from dynamo_serve.core.lifecycle import Lifecycle

WINDOW = 10.0  # seconds looked back on
LASTING = 3.0  # seconds: what is over sooner is no trouble
LEAST_FIRST_TOKENS = 3  # in the window; fewer tell nothing
LEAST_GAPS = 20
MISSED, KEPT = 0.85, 0.95  # of targets: below the one is trouble, from the other on is good
LATE, IN_TIME = 1.5, 1.0  # the longest wait, in TTFT targets: the same
FULL, ROOMY = 0.95, 0.85  # of the pool, in use by live sequences
THRASH, CALM = 0.5, 0.1  # preemptions a second for want of pages
BACKLOG = 5.0  # seconds that batch-class work waits: more than a rung's window makes it wait
HEADS = 8  # waiting requests of each tenant that are looked at, of either kind
PREEMPTIONS = (Kind.PREEMPT.value, Reason.OUT_OF_PAGES.value)  # a key of the journal's counts


class Evidence(NamedTuple):
    """What a window comes to. `ttft` and `itl`: the share of targets kept, of the class that fares
    worst; None if too little has happened. `longest_wait`: of those that wait for a first token, in
    TTFT targets. `pages`: the largest share of the pool in use; `preemptions` for want of pages, a
    second. `slowdown`: how many times as long as before steps take, if that is known.
    `batch_wait`: seconds that batch-class work waits, not for its own quota. `troubles` are what
    lasts and is worse than it may be, the worst first."""

    ttft: float | None = None
    itl: float | None = None
    longest_wait: float = 0.0
    pages: float = 0.0
    preemptions: float = 0.0
    has_batch: bool = False
    troubles: tuple[str, ...] = ()
    is_good: bool = True
    slowdown: float | None = None
    batch_wait: float = 0.0

    def score(self, trouble: str) -> float:
        """0 to 1: how far from a trouble; to see whether it gets better."""
        match trouble:
            case "ttft":
                return 1.0 if self.ttft is None else self.ttft
            case "itl":
                return 1.0 if self.itl is None else self.itl
            case "queue":
                return 1 / (1 + self.longest_wait)
        return 1 / (1 + self.preemptions)

    @property
    def numbers(self) -> dict[str, float]:
        """For the journal and the log."""
        perhaps = {"ttft_kept": self.ttft, "itl_kept": self.itl, "slowdown": self.slowdown}
        return {
            **{name: number for name, number in perhaps.items() if number is not None},
            "longest_wait": self.longest_wait,
            "pages_used": self.pages,
            "preemptions_per_s": self.preemptions,
            "batch_wait_s": self.batch_wait,
        }

    @property
    def has_backlog(self) -> bool:
        """Whether batch-class work waits that would come at once, beside work with targets."""
        is_alone = self.ttft is None and self.itl is None and not self.longest_wait
        return self.batch_wait >= BACKLOG and not is_alone


class Snapshot(NamedTuple):
    """The counts at one look; what lies between two of them is a difference."""

    at: float
    tallies: dict[str, list[int]]
    preemptions: int
    longest_wait: float
    pages: float
    has_batch: bool
    batch_wait: float


NOTHING = [0, 0, 0, 0]


class Window:
    """The last seconds, as snapshots: the first is what the others are compared with."""

    def __init__(self, life: Lifecycle, wear: Wear) -> None:
        self.life = life
        self.wear = wear
        self._shots: deque[Snapshot] = deque()
        self._num_batch = 0

    def forget(self) -> None:
        """What was before the latest look counts no more."""
        while len(self._shots) > 1:
            self._shots.popleft()

    def look(self, now: float) -> Evidence:
        """The evidence as of now. Where nobody was promised anything, nothing is wrong."""
        if not self.life.tally.counts:
            return Evidence()
        shots = self._shots
        shots.append(self._snapshot(now))
        while len(shots) > 1 and shots[1].at <= now - WINDOW:
            shots.popleft()
        ttft, itl = self._shares(TTFT_KEPT), self._shares(ITL_KEPT)
        first, last = shots[0], shots[-1]
        seconds = max(LASTING, last.at - first.at)
        seen = Evidence(
            ttft=min((share for share, _, _ in ttft), default=None),
            itl=min((share for share, _, _ in itl), default=None),
            longest_wait=last.longest_wait,
            pages=max(shot.pages for shot in shots),
            preemptions=(last.preemptions - first.preemptions) / seconds,
            has_batch=any(shot.has_batch for shot in shots),
            slowdown=self.wear.factor(now),
            batch_wait=last.batch_wait,
        )
        found = [
            *(["itl"] if self._is_missed(itl, LEAST_GAPS, ITL_LATE) else ()),
            *(["ttft"] if self._is_missed(ttft, LEAST_FIRST_TOKENS, TTFT_LATE) else ()),
            *(["queue"] if self._is_late() else ()),
            *(["pages"] if self._is_thrashing(seen) else ()),
        ]
        found.sort(key=seen.score)
        return seen._replace(troubles=tuple(found), is_good=not found and _is_good(seen))

    def _snapshot(self, now: float) -> Snapshot:
        life, tally, waiting = self.life, self.life.tally, self.life.waiting
        has_batch = (
            tally.num_batch > self._num_batch
            or any(seq.promise.is_batch for seq in life.running.values())
            or any(
                seq.promise.is_batch for name in waiting.tenants for seq in waiting.scan(name, 1)
            )
        )
        self._num_batch = tally.num_batch
        return Snapshot(
            at=now,
            tallies=tally.by_class(),
            preemptions=life.journal.counts.get(PREEMPTIONS, 0),
            longest_wait=self._longest_wait(now),
            pages=life.pool.num_used / life.pool.num_pages,
            has_batch=has_batch,
            batch_wait=self._batch_wait(now),
        )

    def _batch_wait(self, now: float) -> float:
        heads = (
            seq
            for name in self.life.waiting.tenants
            for seq in self.life.waiting.scan(name, 1)
            if seq.promise.is_batch and not is_own_doing(seq, self.life.shares.account(name))
        )
        return max((now - seq.request.arrival for seq in heads), default=0.0)

    def _longest_wait(self, now: float) -> float:
        waiting, shares, longest = self.life.waiting, self.life.shares, 0.0
        for name in waiting.tenants:
            for seq in waiting.scan(name, HEADS):
                wait = (now - seq.request.arrival) / seq.promise.ttft  # 0 where there is no target
                if wait <= longest or seq.first_token_at is not None or seq.request.priority:
                    continue
                if not is_own_doing(seq, shares.account(name)):
                    longest = wait
        return longest

    def _shares(self, kept: int) -> list[tuple[float, int, str]]:
        """Of each class that had something: the share that was kept, of how many, and its name."""
        found, before = [], self._shots[0].tallies
        for name, tally in self._shots[-1].tallies.items():
            old = before.get(name, NOTHING)
            good, late = tally[kept] - old[kept], tally[kept + 1] - old[kept + 1]
            if good + late:
                found.append((good / (good + late), good + late, name))
        return found

    def _is_missed(self, shares: list[tuple[float, int, str]], least: int, late: int) -> bool:
        """Whether a class misses a target, not in one bad moment."""
        return any(
            share < MISSED
            and count >= least
            and self._lasts([shot.tallies.get(name, NOTHING)[late] for shot in self._shots])
            for share, count, name in shares
        )

    def _is_late(self) -> bool:
        """Whether somebody has waited too long at every look for a while."""
        late = list(takewhile(lambda shot: shot.longest_wait >= LATE, reversed(self._shots)))
        return bool(late) and late[0].at - late[-1].at >= LASTING

    def _is_thrashing(self, seen: Evidence) -> bool:
        """Whether sequences go on taking each other's pages."""
        is_much = seen.pages >= FULL and seen.preemptions >= THRASH
        return is_much and self._lasts([shot.preemptions for shot in self._shots])

    def _lasts(self, counts: list[int]) -> bool:
        """Whether the first rise of a count and the last are far apart."""
        rises = [i for i in range(1, len(counts)) if counts[i] > counts[i - 1]]
        return bool(rises) and self._shots[rises[-1]].at - self._shots[rises[0]].at >= LASTING


def _is_good(seen: Evidence) -> bool:
    return (
        (seen.ttft is None or seen.ttft >= KEPT)
        and (seen.itl is None or seen.itl >= KEPT)
        and seen.longest_wait <= IN_TIME
        and (seen.pages <= ROOMY or seen.preemptions <= CALM)
    )
