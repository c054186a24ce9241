"""Which prompts a step runs, and how many tokens of each: admission, chunks, and making room."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from dataclasses import dataclass
from math import inf

from dynamo_serve.core import policy
from dynamo_serve.core.batch import Phase
from dynamo_serve.core.journal import Kind, Reason
from dynamo_serve.core.lifecycle import Lifecycle
from dynamo_serve.core.preemption import Preemption, shape_of
from dynamo_serve.core.sequence import Sequence
from dynamo_serve.core.shares import Account
from dynamo_serve.core.step_cost import StepCost, StepShape

FULL = (Reason.SLOTS, Reason.PAGES)  # for everybody, not for one tenant
SCAN_LIMIT = 64  # waiting sequences looked at for each tenant, so that a long queue costs nothing
MIN_CHUNK = 16  # prompt tokens that a step runs whatever was promised: prefill must not stand still


@dataclass(frozen=True, slots=True)
class Limits:
    """The caps of a step: `max_queue_delay` in seconds, the others in tokens and sequences.

    With `mix_phases` a step decodes every live sequence and fills up with prompt chunks; without,
    prefill and decode steps alternate. With `fit_chunks` the size of a chunk follows from the ITL
    targets of whoever is decoding; without, only from `max_prefill_tokens`.
    """

    max_prefill_tokens: int = 512
    max_decode_sequences: int = 64
    max_queue_delay: float = 0.003
    max_waiting: int = 10_000
    mix_phases: bool = False
    fit_chunks: bool = True


class Intake:
    """Chooses prompts for one step. `policy` says who is next; here is how they get in."""

    def __init__(self, life: Lifecycle, limits: Limits, cost: StepCost) -> None:
        self.life = life
        self.limits = limits
        self.cost = cost
        self.preemption = Preemption(life, cost)
        self._is_late = False

    # ── how much ─────────────────────────────────────────────────────────────

    def budget(self, decoding: list[Sequence], base: StepShape, now: float) -> tuple[int, Reason]:
        """Prompt tokens that this step may run, and what set the limit.

        `base` is what else the step runs. Without mixed steps the next decode step has to fit into
        the same time.
        """
        cap = self.limits.max_prefill_tokens
        left = policy.time_left(decoding, now) if self.limits.fit_chunks else inf
        if left == inf:
            return cap, Reason.TOKEN_CAP
        others = base if self.limits.mix_phases else shape_of(decoding)
        needed = self.cost.predict(others)
        self._tell_if_late(needed > left, needed, left, now)
        if needed > policy.tightest_itl(decoding):
            left = policy.LEEWAY * needed
        if not self.limits.mix_phases:
            left -= needed
        chunk = self.cost.largest_chunk(base, self._deepest(), left, cap)
        return max(
            chunk, min(MIN_CHUNK, cap)
        ), Reason.ITL_TARGET if chunk < cap else Reason.TOKEN_CAP

    def _deepest(self) -> int:
        """The position of the prompt that has got furthest: attention makes it the dearest."""
        running = self.life.running.values()
        return max((seq.num_computed for seq in running if seq.phase is Phase.PREFILL), default=0)

    def _tell_if_late(self, is_late: bool, needed: float, left: float, now: float) -> None:
        """Note when decoding alone is too slow for what was promised, and when that is over."""
        if is_late and not self._is_late:
            self.life.journal.note(
                now, Kind.DEGRADE, Reason.ITL_TARGET.value, predicted_s=needed, allowed_s=left
            )
        self._is_late = is_late

    # ── who ──────────────────────────────────────────────────────────────────

    def choose(self, budget: int, limit: Reason, now: float) -> list[Sequence]:
        """Running prompts that get a chunk of this step, in the order of their turn; those that
        waited until now are admitted."""
        queues = self._queues()
        accounts = self.life.shares.accounts
        chosen: list[Sequence] = []
        left, partial = budget, policy.partial_budget(budget)
        is_full = False
        while queues and left > 0:
            name = policy.next_tenant(queues, accounts)
            seq = queues[name].popleft()
            if not queues[name]:
                del queues[name]
            part = policy.part_of(seq.num_pending, left, partial)
            if not part:  # long, and there are enough of them; a shorter one may still fit
                self._defer_heads({name: deque([seq])}, limit, now)
                continue
            if seq.id not in self.life.running:
                reason = self._admit(seq, accounts[name], now, is_full)
                is_full = is_full or reason in FULL
                if reason is not None:
                    if reason is not Reason.PREFIX:  # it keeps its place at the head of its queue
                        queues.pop(name, None)
                    continue
                part = policy.part_of(seq.num_pending, left, partial)
            chosen.append(seq)
            left -= part
            partial -= part if part < seq.num_pending else 0
        self._defer_heads(queues, limit, now)
        return [seq for seq in chosen if seq.id in self.life.running]  # some made room for others

    def _queues(self) -> dict[str, deque[Sequence]]:
        """Per tenant: prompts in progress first, then those that wait."""
        life = self.life
        queues: dict[str, deque[Sequence]] = {}
        for seq in life.running.values():
            if seq.phase is Phase.PREFILL:
                queues.setdefault(seq.request.tenant, deque()).append(seq)
        for name in life.waiting.tenants:
            queues.setdefault(name, deque()).extend(life.waiting.first(name, SCAN_LIMIT))
        if len(queues) > 1 or life.waiting:
            self.take_stock()
        return queues

    def _defer_heads(self, queues: dict[str, deque[Sequence]], reason: Reason, now: float) -> None:
        for queue in queues.values():
            if queue[0].id not in self.life.running:
                self.life.defer(queue[0], reason, now)

    def take_stock(self) -> None:
        """Bring the accounts up to date with what is running."""
        prefill, decode = self.prices()
        self.life.shares.count(self.life.running.values(), prefill, decode)

    def prices(self) -> tuple[float, float]:
        """Estimated device-seconds for one more prompt token and for one more token of output."""
        decoding = max(1, len(self.life.running))
        base = StepShape(decode_sequences=decoding, decode_context=128 * decoding)
        cap = self.limits.max_prefill_tokens
        whole = self.cost.predict(base)
        more = self.cost.predict(base.with_chunk(cap, 0))
        return max(0.0, more - whole) / cap, whole / decoding

    # ── waiting → running ────────────────────────────────────────────────────

    def _admit(self, seq: Sequence, account: Account, now: float, is_full: bool) -> Reason | None:
        """Admit a sequence, or say what it has to wait for. `is_full`: somebody whose turn was
        earlier has found no room, and nobody may take what it is waiting for."""
        reason = Reason.FAIR_SHARE if is_full else self._obstacle(seq, account, now)
        if reason is not None:
            self.life.defer(seq, reason, now, running=len(self.life.running), pages=account.pages)
            return reason
        self.life.admit(seq, now)
        account.live += 1
        account.pages += seq.page_part
        account.committed += self.life.shares.price(seq, *self.prices())
        return None

    def _obstacle(self, seq: Sequence, account: Account, now: float) -> Reason | None:
        quota = account.tenant.quota
        if quota.live_sequences is not None and account.live >= quota.live_sequences:
            return Reason.QUOTA_LIVE
        if quota.pages_burst is not None and not self._fits_burst(seq, quota.pages_burst):
            return Reason.QUOTA_PAGES
        if self._awaits_prefix(seq):
            return Reason.PREFIX
        while not self._has_room(seq):
            if not self.preemption.for_pages(seq, account, self._new_pages(seq), now):
                return Reason.PAGES
        if not self.has_place(seq) and not self._make_place(seq, now):
            return Reason.SLOTS
        return None

    def _make_place(self, seq: Sequence, now: float) -> bool:
        """Preempt whoever is over his share until there is a place; whether one place was freed.

        A place that is missing for an ITL target does not come by waiting for one end.
        """
        is_full = len(self.life.running) >= self.limits.max_decode_sequences
        if not self.preemption.for_place(seq, now, can_wait=is_full):
            return False
        while not self.has_place(seq) and self.preemption.for_place(seq, now, can_wait=False):
            pass
        return True

    def _fits_burst(self, seq: Sequence, burst: int) -> bool:
        """With a page for each that can still grow. Alone a request may always run."""
        name = seq.request.tenant
        own = [other for other in self.life.running.values() if other.request.tenant == name]
        if not own:
            return True
        pool = self.life.pool
        held = {page for other in own for page in other.page_table}
        shared = held.intersection(pool.index.match(self.life.reusable_keys(seq)))
        more = len(own) + pool.pages_for(seq.num_tokens) - len(shared)
        return len(held) + more <= burst

    def _new_pages(self, seq: Sequence) -> int:
        """Pages that come into use with a sequence."""
        return self.life.pool.new_pages(self.life.reusable_keys(seq), seq.num_tokens)

    def _awaits_prefix(self, seq: Sequence) -> bool:
        """Whether the next page it lacks is being computed right now by a running sequence.

        Computing a page twice is never faster than waiting for it: the maker is running, ahead
        of `seq` in the order of admission, and its claim falls when it ends or is preempted.
        """
        index = self.life.pool.index
        keys = self.life.reusable_keys(seq)
        matched = len(index.match(keys))
        return matched < len(keys) and index.maker(keys[matched]) is not None

    def has_place(self, seq: Sequence) -> bool:
        """Whether the batch has a place left, also in the time that ITL targets leave."""
        running = self.life.running
        if len(running) >= self.limits.max_decode_sequences:
            return False
        return not running or self._in_time([*running.values(), seq])

    def _in_time(self, seqs: list[Sequence]) -> bool:
        """Whether these can decode together within the tightest ITL target of a strict class."""
        itl = policy.strict_itl(seqs) if self.limits.fit_chunks else inf
        return itl == inf or self.cost.predict(shape_of(seqs)) <= self._allowed(itl)

    def _allowed(self, itl: float) -> float:
        """Seconds a decode step may take under an ITL target. Where one sequence alone takes
        longer than the target, serving them one by one would help nobody."""
        alone = self.cost.predict(StepShape(decode_sequences=1, decode_context=1))
        return max(policy.DECODE_PART * itl, policy.LEEWAY * alone)

    def places(self, running: list[Sequence], seq: Sequence) -> int:
        """How many sequences like these may run together."""
        cap = self.limits.max_decode_sequences
        itl = policy.strict_itl([*running, seq]) if self.limits.fit_chunks else inf
        if itl == inf:
            return cap
        context = sum(s.num_tokens for s in [*running, seq]) // (len(running) + 1)

        def seconds(count: int) -> float:
            return self.cost.predict(
                StepShape(decode_sequences=count, decode_context=count * context)
            )

        return max(1, bisect_right(range(1, cap + 1), self._allowed(itl), key=seconds))

    def usual_chunk(self, base: StepShape, itl: float) -> int:
        """Prompt tokens that fit a step beside `base`, whose tightest target is `itl`."""
        cap = self.limits.max_prefill_tokens
        if itl == inf or not base.decode_sequences or not self.limits.fit_chunks:
            return cap
        needed = self.cost.predict(base)
        left = policy.SAFETY * itl if needed <= itl else policy.LEEWAY * needed
        if not self.limits.mix_phases:
            base, left = StepShape(), left - needed
        return max(min(MIN_CHUNK, cap), self.cost.largest_chunk(base, 0, left, cap))

    def _has_room(self, seq: Sequence) -> bool:
        # A page for each running sequence that can still grow stays free: admitting one more is
        # no reason to preempt another a few tokens later.
        running = self.life.running.values()
        reserve = sum(len(s.page_table) < self._most_pages(s) for s in running)
        return self.life.pool.has_room(self.life.reusable_keys(seq), seq.num_tokens, reserve)

    def _most_pages(self, seq: Sequence) -> int:
        return self.life.pool.pages_for(seq.prompt_len + seq.request.max_tokens)
