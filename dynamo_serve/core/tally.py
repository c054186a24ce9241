"""Promises kept and missed: counted as tokens come, by tenant and class, since the start."""

from __future__ import annotations

from itertools import chain
from math import inf

from dynamo_serve.core.journal import Reason
from dynamo_serve.core.request import Finish, Request
from dynamo_serve.core.sequence import Sequence
from dynamo_serve.core.shares import Account
from dynamo_serve.core.stats import OUTCOMES
from dynamo_serve.core.tenant import Class

TTFT_KEPT, TTFT_LATE, ITL_KEPT, ITL_LATE, REFUSED, NEVER, PAUSED = range(7)  # `OUTCOMES`
OWN_QUOTA = (Reason.QUOTA_LIVE.value, Reason.QUOTA_PAGES.value)


class Tally:
    """What became of each first token and of each gap after it, where a class has a target for it.

    Waits that are a tenant's own doing (`is_own_doing`), and first tokens of requests that have put
    themselves behind others (`priority`) or whose readers left before, count as neither kept nor
    missed. Nobody reads what is to be pinned.
    """

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, list[int]]] = {}  # tenant → class → as `OUTCOMES`
        self.num_batch = 0  # arrivals without a target
        self.latest: dict[str, tuple[Request, Class]] = {}  # with a target, by class

    def arrive(self, seq: Sequence) -> None:
        if seq.promise.is_batch:
            self.num_batch += 1
        elif seq.promise.is_promised:
            self._of(seq)
            self.latest[seq.promise.name] = seq.request, seq.promise

    def token(self, seq: Sequence, now: float) -> None:
        """A token has come of one that is watched; the times in `seq` are those of the tokens
        before it."""
        promise = seq.promise
        if seq.last_token_at is not None:
            if promise.itl < inf:
                self._of(seq)[ITL_KEPT + (now - seq.last_token_at > promise.itl)] += 1
        elif _counts_first(seq):
            self._of(seq)[TTFT_KEPT + (now - seq.request.arrival > promise.ttft)] += 1

    def refuse(self, seq: Sequence) -> None:
        """It would have got its first token too late."""
        if seq.is_watched and not seq.request.priority:
            self._of(seq)[REFUSED] += 1

    def end(self, seq: Sequence, finish: Finish, now: float) -> None:
        """It has ended; if it was watched, and without a token, perhaps later than promised."""
        if not seq.is_watched or seq.first_token_at is not None:
            return
        is_late = finish is Finish.ERROR or now - seq.request.arrival > seq.promise.ttft
        if is_late and _counts_first(seq):
            self._of(seq)[NEVER] += 1

    def pause(self, seq: Sequence, seconds: float) -> None:
        """Another engine goes on with it after so long."""
        if seq.is_watched and seq.first_token_at is not None and seconds > seq.promise.itl:
            self._of(seq)[PAUSED] += 1

    def by_class(self) -> dict[str, list[int]]:
        """The first four of `OUTCOMES`, of all tenants; whom a class has refused was late."""
        found: dict[str, list[int]] = {}
        for name, counts in chain.from_iterable(of.items() for of in self.counts.values()):
            whole = found.setdefault(name, [0, 0, 0, 0])
            for place in (TTFT_KEPT, TTFT_LATE, ITL_KEPT, ITL_LATE):
                whole[place] += counts[place]
            whole[TTFT_LATE] += counts[REFUSED]
        return found

    def told(self, tenant: str) -> dict[str, dict[str, int]]:
        """Of one tenant: by class, how many of each outcome, `ttft_kept` and so on."""
        names = [f"{promise}_{outcome}" for promise, outcome in OUTCOMES]
        return {
            name: dict(zip(names, counts, strict=True))
            for name, counts in self.counts.get(tenant, {}).items()
        }

    def _of(self, seq: Sequence) -> list[int]:
        # Also of one that did not arrive here: another engine had it first.
        own = self.counts.setdefault(seq.request.tenant, {})
        counts = own.get(seq.promise.name)
        if counts is None:
            counts = own[seq.promise.name] = [0] * len(OUTCOMES)
        return counts


def _counts_first(seq: Sequence) -> bool:
    if seq.promise.ttft == inf or seq.request.priority or seq.was_left:
        return False
    return not is_own_doing(seq, seq.account)


def is_own_doing(seq: Sequence, account: Account) -> bool:
    """Whether its tenant's own quota is what makes a request wait, or one of those before it."""
    waits = (*seq.waits, seq.waits_for)
    most = account.tenant.quota.live_sequences
    is_behind = most is not None and account.live >= most and Reason.ORDER.value in waits
    return is_behind or any(reason in waits for reason in OWN_QUOTA)
