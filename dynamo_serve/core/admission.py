"""Whether a request may wait at all: quotas, a full queue, and promises that cannot be kept."""

from __future__ import annotations

from math import inf

from dynamo_serve.core import policy
from dynamo_serve.core.bookings import Bookings
from dynamo_serve.core.forecast import Forecast, forecast
from dynamo_serve.core.intake import Intake
from dynamo_serve.core.journal import Kind, Reason
from dynamo_serve.core.lifecycle import Lifecycle
from dynamo_serve.core.request import Refusal
from dynamo_serve.core.sequence import Sequence
from dynamo_serve.core.shares import Account, Bucket

COMFORT = 0.8  # of the TTFT target: who is told to come back gets in with some to spare


class Admission:
    """Refuses at once what would only wait for nothing, and says when to come again."""

    def __init__(self, life: Lifecycle, intake: Intake) -> None:
        self.life = life
        self.intake = intake
        self._bookings: dict[str, Bookings] = {}

    def refuse(self, seq: Sequence, now: float) -> Refusal | None:
        """None if `seq` may wait (its quotas are then charged), else why not and until when."""
        account = self.life.shares.account(seq.request.tenant)
        refusal = self._by_quota(seq, account, now) or self._by_forecast(seq, account, now)
        if refusal is None:
            account.requests.level -= 1
            account.tokens.level -= seq.prompt_len
            return None
        self.life.journal.note(
            *(now, Kind.SHED, refusal.reason, seq.id, seq.request.tenant),
            retry_after_s=refusal.retry_after,
            predicted_wait_s=refusal.predicted_wait or 0.0,
        )
        return refusal

    # ── quotas ───────────────────────────────────────────────────────────────

    def _by_quota(self, seq: Sequence, account: Account, now: float) -> Refusal | None:
        quota = account.tenant.quota
        waiting = self.life.waiting.count(seq.request.tenant)
        most = self.life.pool.pages_for(seq.prompt_len + seq.request.max_tokens)
        if quota.pages_burst is not None and most > quota.pages_burst:
            text = f"this request may need {most} KV pages, the tenant may have {quota.pages_burst}"
            return _own(Reason.TOO_LARGE, text, quota.pages_burst, 60.0)
        if quota.queue_length is not None and waiting >= quota.queue_length:
            text = f"{waiting} requests of this tenant are waiting, the limit of its queue"
            seen = forecast(seq, self.life, self.intake)
            wait = seen.first_token / max(1, seen.position)
            return _own(Reason.QUEUE_LENGTH, text, quota.queue_length, wait, seen)
        rates = (
            (Reason.REQUESTS_PER_MINUTE, quota.requests_per_minute, account.requests, 1),
            (Reason.TOKENS_PER_MINUTE, quota.tokens_per_minute, account.tokens, seq.prompt_len),
        )
        for reason, limit, bucket, amount in rates:
            wait = _wait_for(bucket, limit, amount, now)
            if wait > 0.0:
                text = (
                    f"the tenant's limit of {limit:g} {reason.value.replace('_', ' ')} is used up"
                )
                return _own(reason, text, limit or 0.0, wait)
        return None

    # ── what the server can do ───────────────────────────────────────────────

    def _by_forecast(self, seq: Sequence, account: Account, now: float) -> Refusal | None:
        request, promise = seq.request, seq.promise
        waiting, limit = len(self.life.waiting), self.intake.limits.max_waiting
        strict = promise.strict and promise.ttft < inf
        if waiting < limit and request.deadline == inf and not strict:
            return None
        seen = forecast(seq, self.life, self.intake)
        if waiting >= limit:
            text = f"the queue is full: {waiting} requests are waiting"
            wait = seen.first_token / max(1, seen.position)
            return _server(Reason.QUEUE_FULL, text, limit, wait, seen)
        if now + seen.finish > request.deadline:
            left = request.deadline - now
            text = (
                f"the answer would be ready in {seen.finish:.1f} s, the deadline is in {left:.1f} s"
            )
            wait = max(1.0, seen.finish - left)
            return _server(Reason.DEADLINE, text, left, wait, seen)
        return self._too_late(seq, account, seen, now) if strict else None

    def _too_late(
        self, seq: Sequence, account: Account, seen: Forecast, now: float
    ) -> Refusal | None:
        target, tenant = seq.promise.ttft, seq.request.tenant
        shares, busy = self.life.shares, self.life.busy
        bookings = self._bookings.setdefault(tenant, Bookings())
        known = hash((seq.request.prompt_ids, seq.request.max_tokens))
        part = policy.entitled(tenant, busy, shares.accounts)
        seconds = shares.price(seq, *self.intake.prices()) / part
        is_expected = bookings.redeem(known, now) is not None
        wait = now - seq.request.arrival + seen.first_token
        if not is_expected:
            wait += bookings.promised(now + target)
        is_alone = seen.position == 0 and not self.life.running
        if wait <= (target if is_expected else policy.SAFETY * target) or is_alone:
            return None
        due = bookings.book(now + max(seconds, wait - COMFORT * target), seconds, known)
        text = f"the first token would take {wait:.1f} s, the target is {target:g} s"
        maker = _own if self._is_over_share(tenant, busy) else _server
        return maker(Reason.TTFT_TARGET, text, target, due - now, seen)

    def _is_over_share(self, tenant: str, busy: list[str]) -> bool:
        """Whether it is the tenant's own doing that there is no room for it."""
        accounts = self.life.shares.accounts
        room = policy.Room(len(self.life.running), {name: accounts[name].live for name in busy})
        return len(busy) > 1 and policy.is_over_share(tenant, room, busy, accounts)


def _wait_for(bucket: Bucket, per_minute: float | None, amount: float, now: float) -> float:
    """Seconds until a bucket has so much; a quota that is new begins with a full one."""
    if per_minute is None:
        bucket.level = inf
        return 0.0
    if bucket.level == inf:
        bucket.level, bucket.updated = per_minute, now
    bucket.refill(per_minute, now)
    return bucket.wait_for(amount, per_minute)


def _own(
    reason: Reason, text: str, limit: float, retry_after: float, seen: Forecast | None = None
) -> Refusal:
    """The tenant's own limit or share is at fault: 429."""
    return _refusal(reason, text, limit, retry_after, seen, is_own=True)


def _server(
    reason: Reason, text: str, limit: float, retry_after: float, seen: Forecast | None = None
) -> Refusal:
    """The server is at fault: 503."""
    return _refusal(reason, text, limit, retry_after, seen, is_own=False)


def _refusal(
    reason: Reason,
    text: str,
    limit: float,
    retry_after: float,
    seen: Forecast | None,
    *,
    is_own: bool,
) -> Refusal:
    return Refusal(
        reason=reason.value,
        message=text,
        is_own=is_own,
        retry_after=retry_after,
        limit=limit,
        predicted_wait=seen.first_token if seen else None,
        queue_position=seen.position if seen else None,
    )
