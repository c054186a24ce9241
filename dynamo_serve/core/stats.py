"""What the scheduler reports about itself, as data; `metrics.py` alone knows Prometheus."""

from __future__ import annotations

from typing import Any, NamedTuple

OUTCOMES = (  # of promises: of which, and what became of it
    ("ttft", "kept"),
    ("ttft", "late"),
    ("itl", "kept"),
    ("itl", "late"),
    ("ttft", "refused"),  # on arrival, because it would have been late
    ("ttft", "never"),  # it failed, or had waited too long when it ended
    ("itl", "paused"),  # for longer than a gap may be, while its engine was lost or changed
)


class StepStats(NamedTuple):
    """One engine step: `phase` is "prefill", "decode" or "mixed", `seconds` its duration."""

    phase: str
    seconds: float
    num_tokens: int
    num_sequences: int
    predicted_seconds: float | None = None  # what the cost model said before
    shape: tuple[float, ...] = ()  # `StepShape`, if it is wanted and the step ran at the first try


class TierStats(NamedTuple):
    """One tier below the device: pages in it, room for pages, and pages that were copied into it,
    restored from it, could not be copied, and had to go with no tier below that has them."""

    name: str
    num_pages: int
    num_slots: int
    stored: int
    restored: int
    failed: int
    lost: int


class Standing(NamedTuple):
    """How the ladder stands, as plain data: what an engine tells, and the next one goes on with.

    `modes` are those that operators have set. `taken` names the rungs in the order in which they
    were taken, one at two levels twice. `states` and `history` are of `controller`; its times are
    of the monotonic clock, which all engines on a machine share.
    """

    modes: dict[str, str] = {}  # noqa: RUF012 - nobody writes to it
    taken: tuple[str, ...] = ()
    changed_at: float = 0.0
    states: dict[str, dict[str, Any]] = {}  # noqa: RUF012
    history: tuple[tuple[Any, ...], ...] = ()


class Stats(NamedTuple):
    """Gauges as of now, and counters since the engine started (names ending in `_total`)."""

    num_waiting: int = 0
    num_running: int = 0
    pages_used: int = 0  # held by a live sequence, or pinned
    pages_cached: int = 0  # held by nobody, content kept for reuse
    pages_free: int = 0  # blank
    prefix_asked_tokens_total: int = 0
    prefix_hit_tokens_total: int = 0
    prefix_copied_tokens_total: int = 0  # of the hits, in pages that match in part
    preemptions_total: int = 0
    prompt_tokens_total: int = 0
    output_tokens_total: int = 0
    draft_tokens_total: int = 0
    draft_accepted_tokens_total: int = 0
    evicted_own_total: int = 0  # pages of the device, by cause as in `eviction.Cause`
    evicted_others_total: int = 0
    evicted_stale_total: int = 0
    admission_evicted_pages_total: int = 0  # of these, to admit a request
    lost_pages_total: int = 0  # of the evicted, nowhere below
    restored_tokens_total: int = 0
    saved_seconds_total: float = 0.0  # by restoring, as predicted
    kv_events_total: int = 0
    kv_events_anew_total: int = 0  # how often all of them were told from the beginning
    step: StepStats | None = None
    rungs: tuple[int, ...] = ()  # the level of each, in the order of `ladder.RUNGS`
    rung_changes: tuple[tuple[int, int], ...] = ()  # how often it was taken and undone
    tiers: tuple[TierStats, ...] = ()
    ladder: Standing | None = None  # where it has changed since it was told last
    pages_pinned: int = 0

    @property
    def evicted_pages_total(self) -> int:
        return self.evicted_own_total + self.evicted_others_total + self.evicted_stale_total
