"""What the scheduler decided, and why: a ring of entries."""

from __future__ import annotations

from collections import OrderedDict, deque
from enum import Enum
from typing import NamedTuple


class Kind(Enum):
    """What was decided."""

    RESUME = "resume"  # it was accepted before; the reason is that of `request.Resumed`
    ADMIT = "admit"
    DEFER = "defer"  # it waits, from now on for this reason
    CHUNK = "chunk"
    PREEMPT = "preempt"
    EVICT = "evict"
    RESTORE = "restore"  # pages are copied up from a tier below
    SHED = "shed"
    DEGRADE = "degrade"
    DRAFT = "draft"  # its first one
    FINISH = "finish"
    TAKE_RUNG = "take_rung"
    UNDO_RUNG = "undo_rung"


class Reason(Enum):
    """Why. The comment says what the numbers of an entry tell."""

    # admit
    TURN = "turn"  # cached_tokens (of these copied_tokens), pages, waited_s
    # defer: what a waiting request waits for
    STEP = "step"  # the running step has to end first
    MERGE_WINDOW = "merge_window"  # others may join within the delay
    SLOTS = "slots"  # max_decode_sequences, or as many as the ITL target allows
    PAGES = "pages"  # not enough pages are free
    FAIR_SHARE = "fair_share"  # another tenant is further below its share
    ORDER = "order"  # earlier or tighter requests of the same tenant
    QUOTA_LIVE = "quota_live"  # the tenant's live_sequences
    QUOTA_PAGES = "quota_pages"  # the tenant's pages_burst
    PREFIX = "prefix"  # a running sequence is computing its prefix
    # chunk: what cut it (tokens, position)
    WHOLE = "whole"  # nothing: the prompt's end
    TOKEN_CAP = "token_cap"  # max_prefill_tokens, max_mixed_tokens
    STEP_TIME = "step_time"  # max_step_ms
    ITL_TARGET = "itl_target"  # the tightest running sequence
    SHARED = "shared"  # other prompts got their part
    AHEAD = "ahead"  # nothing: it goes ahead of others, for its TTFT target
    CUT_IN = "cut_in"  # nothing: the running step is held for it
    ALONE = "alone"  # an engine may have died of it: nobody else is in its steps
    # draft
    PAYS = "pays"  # it will save more time than it costs (tokens, matched)
    # preempt
    OVER_SHARE = "over_share"  # makes room for a tenant further below its share
    GUARANTEE = "guarantee"  # makes room for pages that were guaranteed to somebody
    OUT_OF_PAGES = "out_of_pages"  # a running sequence had to grow
    NOT_RESTORED = "not_restored"  # a page that it waited for was corrupt, gone or slow
    # restore
    SOONER = "sooner"  # than computing them (pages, predicted_s, computing_s)
    # shed
    REQUESTS_PER_MINUTE = "requests_per_minute"
    TOKENS_PER_MINUTE = "tokens_per_minute"
    QUEUE_LENGTH = "queue_length"
    PINS = "pins"  # more pages than may be pinned
    TOO_LARGE = "too_large"  # more pages than the tenant may ever have
    QUEUE_FULL = "queue_full"
    TTFT_TARGET = "ttft_target"
    DEADLINE = "deadline"
    # take_rung, undo_rung (level, and the evidence); also what they make others do: a chunk is
    # smaller, a request waits or is shed
    SHRINK_CHUNKS = "shrink_chunks"
    WIDEN_WINDOW = "widen_window"
    CAP_BATCH = "cap_batch"
    SPILL = "spill"
    SHED_BATCH = "shed_batch"
    LIGHTER_WEIGHTS = "lighter_weights"
    RESTART_ENGINE = "restart_engine"
    # finish: the values of request.Finish


class Entry(NamedTuple):
    """One decision. `at` is a reading of the scheduler's clock; `reason` the value of a `Reason`
    or, of a finish, of a `Finish`; `numbers` are what it was decided on."""

    at: float
    kind: Kind
    reason: str
    request_id: str
    tenant: str
    numbers: dict[str, float]


class Journal:
    """The last `size` decisions, and those about the last `remembered` requests that are gone."""

    def __init__(self, size: int = 10_000, remembered: int = 1000) -> None:
        self.entries: deque[Entry] = deque(maxlen=size)
        self.counts: dict[tuple[str, str], int] = {}
        self.gone: OrderedDict[str, list[Entry]] = OrderedDict()
        self._remembered = remembered

    def keep(self, size: int, remembered: int) -> None:
        """Be content with less from now on."""
        self.entries = deque(self.entries, maxlen=size)
        self._remembered = remembered

    def note(
        self,
        at: float,
        kind: Kind,
        reason: str,
        request_id: str = "",
        tenant: str = "",
        **numbers: float,
    ) -> Entry:
        entry = Entry(at, kind, reason, request_id, tenant, numbers)
        self.entries.append(entry)
        key = (kind.value, reason)
        self.counts[key] = self.counts.get(key, 0) + 1
        return entry

    def remember(self, request_id: str, history: list[Entry]) -> None:
        """Keep the history of a request that is gone, and forget the oldest."""
        self.gone[request_id] = history
        while len(self.gone) > self._remembered:
            self.gone.popitem(last=False)
