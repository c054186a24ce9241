"""Whether a request may wait at all: quotas, a full queue, and promises that cannot be kept."""

from __future__ import annotations

from math import inf

from dynamo_serve.core import policy
from dynamo_serve.core.bookings import EARLY, HORIZON, Bookings
from dynamo_serve.core.forecast import Forecast, forecast
from dynamo_serve.core.intake import Intake
from dynamo_serve.core.journal import Kind, Reason
from dynamo_serve.core.lifecycle import Lifecycle
from dynamo_serve.core.request import Refusal
from dynamo_serve.core.sequence import Sequence
from dynamo_serve.core.shares import Account, Bucket

NEVER = 3600.0  # seconds; coming again does not help, but the header has to say something
MIN_WAIT = 1.0
COMFORT = 0.8  # of the TTFT target: who is told to come back gets in with some to spare


class Admission:
    """Refuses at once what would only wait for nothing, and says when to come again."""

    def __init__(self, life: Lifecycle, intake: Intake) -> None:
        self.life = life
        self.intake = intake
        self._bookings: dict[tuple[str, Reason], Bookings] = {}
        self._refused: tuple[str, Refusal] | None = None  # the latest call with several choices

    def refuse(self, seq: Sequence, now: float) -> Refusal | None:
        """None if `seq` may wait (its quotas are then charged), else why not and until when.

        The first choice of a call answers for all of them.
        """
        count, call = seq.request.num_choices, seq.id.rpartition("-")[0]
        if not count:
            return self._refused[1] if self._refused and self._refused[0] == call else None
        account = self.life.shares.account(seq.request.tenant)
        refusal = (
            self._by_quota(seq, account, now)
            or self._by_ladder(seq, now)
            or self._by_forecast(seq, account, now)
            or self.refuse_pin(seq, now)
        )
        if refusal is None:
            account.requests.level -= count
            account.tokens.level -= _prompt_tokens(seq)
            if self._refused and self._refused[0] == call:
                self._refused = None
            return None
        self._refused = (call, refusal)
        if refusal.reason == Reason.TTFT_TARGET.value and not refusal.is_own:
            self.life.tally.refuse(seq)
        self.life.note(
            *(seq, now, Kind.SHED, refusal.reason),
            retry_after_s=refusal.retry_after,
            predicted_wait_s=refusal.predicted_wait or 0.0,
        )
        self.life.journal.remember(seq.id, seq.history)
        return refusal

    def refuse_pin(self, seq: Sequence, now: float) -> Refusal | None:
        """None if its prompt is not to be pinned, or may be: its pages count from now on."""
        if seq.request.pinned_until is None:
            return None
        shortage = self.life.pins.claim(seq.request, now)
        if shortage is None:
            return None
        wait = max(MIN_WAIT, shortage.until - now)
        return _own(Reason.PINS, shortage.text, shortage.limit, wait)

    def _booked(self, seq: Sequence, reason: Reason, now: float) -> tuple[Bookings, bool]:
        """The bookings of a tenant for what is scarce, and whether `seq` has just used one."""
        bookings = self._bookings.setdefault((seq.request.tenant, reason), Bookings())
        return bookings, bookings.redeem(_known(seq), now)

    # ── quotas ───────────────────────────────────────────────────────────────

    def _by_quota(self, seq: Sequence, account: Account, now: float) -> Refusal | None:
        quota, count = account.tenant.quota, seq.request.num_choices
        prompt = self.life.pool.pages_for(seq.prompt_len + min(1, seq.max_tokens))
        if quota.pages_burst is not None and prompt > quota.pages_burst:
            text = f"this prompt needs {prompt} KV pages, the tenant may have {quota.pages_burst}"
            return _own(Reason.TOO_LARGE, text, quota.pages_burst, NEVER)
        return (
            self._by_queue(seq, quota.queue_length, now)
            or self._by_rate(
                *(seq, Reason.REQUESTS_PER_MINUTE, quota.requests_per_minute),
                *(account.requests, count, now),
            )
            or self._by_rate(
                *(seq, Reason.TOKENS_PER_MINUTE, quota.tokens_per_minute),
                *(account.tokens, _prompt_tokens(seq), now),
            )
        )

    def _by_queue(self, seq: Sequence, limit: int | None, now: float) -> Refusal | None:
        waiting = self.life.waiting.count(seq.request.tenant)
        if limit is None or not waiting:
            return None
        bookings, is_expected = self._booked(seq, Reason.QUEUE_LENGTH, now)
        count = seq.request.num_choices
        if waiting + count + (0 if is_expected else bookings.promised(now)) <= limit:
            return None
        seen = forecast(seq, self.life, self.intake)
        each = seen.first_token / (seen.position + 1)
        due = bookings.book(now + each * count, count, each * count, _known(seq), now)
        text = f"{waiting} requests of this tenant are waiting, its queue may hold {limit}"
        return _own(Reason.QUEUE_LENGTH, text, limit, due - now, seen)

    def _by_rate(
        self,
        seq: Sequence,
        reason: Reason,
        per_minute: float | None,
        bucket: Bucket,
        amount: float,
        now: float,
    ) -> Refusal | None:
        if per_minute is None:
            bucket.level = inf
            return None
        bookings, is_expected = self._booked(seq, reason, now)
        bucket.refill(per_minute, now)
        wait = bucket.wait_for(amount + (0 if is_expected else bookings.promised(now)), per_minute)
        if wait <= EARLY:
            return None
        due = bookings.book(now + wait, amount, amount * 60 / per_minute, _known(seq), now)
        what = reason.value.replace("_", " ")
        text = f"the tenant's limit of {per_minute:g} {what} is used up"
        return _own(reason, text, per_minute, due - now)

    # ── what the server can do ───────────────────────────────────────────────

    def _by_ladder(self, seq: Sequence, now: float) -> Refusal | None:
        """A rung may say that nothing more is taken in that was promised nothing. Those who are
        told to come again come one by one, not before it can be over."""
        restraint = self.intake.brake.restraint
        if not restraint.sheds_batch or not seq.promise.is_batch:
            return None
        seen = forecast(seq, self.life, self.intake)
        bookings, _ = self._booked(seq, Reason.SHED_BATCH, now)
        each = seen.first_token / (seen.position + 1)
        earliest = max(restraint.sheds_until, now + seen.first_token, now + MIN_WAIT)
        due = bookings.book(earliest, 1, each, _known(seq), now)
        text = "promises are being missed: no requests of classes without targets are taken in"
        return _server(Reason.SHED_BATCH, text, 0, due - now, seen)

    def _by_forecast(self, seq: Sequence, account: Account, now: float) -> Refusal | None:
        request, promise = seq.request, seq.promise
        strict = promise.strict and promise.ttft < inf
        is_full = len(self.life.waiting) >= self.intake.limits.max_waiting
        if not is_full and request.deadline == inf and not strict:
            return None
        seen = forecast(seq, self.life, self.intake)
        return (
            (self._by_full_queue(seq, seen) if is_full else None)
            or self._by_deadline(seq, account, seen, now)
            or (self._by_target(seq, seen, now) if strict else None)
        )

    def _by_full_queue(self, seq: Sequence, seen: Forecast) -> Refusal | None:
        """A full queue is full for those who fill it; others have as much room again."""
        name, busy = seq.request.tenant, self.life.busy
        limit, waiting = self.intake.limits.max_waiting, len(self.life.waiting)
        part = policy.entitled(name, busy, self.life.shares.accounts) * limit
        is_over = self.life.waiting.count(name) >= part
        if not is_over and waiting < 2 * limit:
            return None
        text = f"the queue is full: {waiting} requests are waiting"
        each = seen.first_token / (seen.position + 1)
        make = _own if is_over and len(busy) > 1 else _server
        return make(Reason.QUEUE_FULL, text, limit, each, seen)

    def _by_deadline(
        self, seq: Sequence, account: Account, seen: Forecast, now: float
    ) -> Refusal | None:
        """How long an answer will be is only known of tenants that have had some."""
        left = seq.request.deadline - now
        needed = seen.finish if account.knows_lengths else seen.first_token
        if needed <= left:
            return None
        text = f"it would take {needed:.3f} s, the deadline is in {max(0.0, left):.3f} s"
        return _server(Reason.DEADLINE, text, max(0.0, left), max(MIN_WAIT, needed - left), seen)

    def _by_target(self, seq: Sequence, seen: Forecast, now: float) -> Refusal | None:
        target, tenant = seq.promise.ttft, seq.request.tenant
        shares, busy = self.life.shares, self.life.busy
        bookings, is_expected = self._booked(seq, Reason.TTFT_TARGET, now)
        wait = now - seq.request.arrival + seen.first_token
        is_calm = seen.position == 0 and self.intake.pace.has_place(seq)
        if not (is_expected or is_calm):
            wait += bookings.promised(now + target)
        is_alone = seen.position == 0 and not self.life.running
        if wait <= (target if is_expected else policy.SAFETY * target) or is_alone:
            return None
        part = policy.entitled(tenant, busy, shares.accounts)
        seconds = min(HORIZON, shares.price(seq, *self.intake.pace.prices()) / part)
        earliest = now + max(seconds, wait - COMFORT * target)
        due = bookings.book(earliest, seconds, seconds, _known(seq), now)
        text = f"the first token would take {wait:.1f} s, the target is {target:g} s"
        make = _own if self._is_over_share(tenant, busy) else _server
        return make(Reason.TTFT_TARGET, text, target, due - now, seen)

    def _is_over_share(self, tenant: str, busy: list[str]) -> bool:
        """Whether it is the tenant's own doing that there is no room for it."""
        accounts = self.life.shares.accounts
        room = policy.Room(len(self.life.running), {name: accounts[name].live for name in busy})
        return len(busy) > 1 and policy.is_over_share(tenant, room, busy, accounts)


def _prompt_tokens(seq: Sequence) -> int:
    """Of all choices of a call."""
    return seq.request.call_tokens or seq.prompt_len * seq.request.num_choices


def _known(seq: Sequence) -> int:
    """How a request is recognised when it comes again."""
    return hash((seq.request.prompt_ids, seq.request.max_tokens))


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
        retry_after=min(retry_after, NEVER),
        limit=limit,
        predicted_wait=seen.first_token if seen else None,
        queue_position=seen.position if seen else None,
    )
