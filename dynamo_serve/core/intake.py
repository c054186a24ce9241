"""Which prompts a step runs, and how many tokens of each: admission, chunks, and making room."""

from __future__ import annotations

from collections import deque
from math import inf

from dynamo_serve.core import policy
from dynamo_serve.core.batch import Phase
from dynamo_serve.core.journal import Kind, Reason
from dynamo_serve.core.ladder import Brake, Restraint
from dynamo_serve.core.lifecycle import Lifecycle
from dynamo_serve.core.limits import Limits
from dynamo_serve.core.pace import Pace, Prompts
from dynamo_serve.core.preemption import Preemption
from dynamo_serve.core.sequence import Sequence
from dynamo_serve.core.shares import Account
from dynamo_serve.core.step_cost import StepCost, StepShape

FULL = (Reason.SLOTS, Reason.PAGES)  # for everybody, not for one tenant
# It keeps its place at the head of its queue, and whoever is behind it may overtake.
STEPS_ASIDE = (Reason.PREFIX, Reason.WIDEN_WINDOW, Reason.CAP_BATCH, Reason.SPILL)
SCAN_LIMIT = 64  # of each tenant's waiting sequences, of either kind: a long queue costs nothing


class Intake:
    """Chooses prompts for one step. `policy` says who is next; here is how they get in."""

    def __init__(
        self, life: Lifecycle, limits: Limits, cost: StepCost, restraint: Restraint
    ) -> None:
        self.life = life
        self.limits = limits
        self.brake = Brake(life, restraint, limits.max_decode_sequences, limits.ladder_max_tokens)
        self.pace = Pace(life, limits, cost, restraint)
        self.preemption = Preemption(life, cost)

    def chunks(
        self, decoding: list[Sequence], base: StepShape, now: float, *, may_go_ahead: bool
    ) -> Prompts:
        """Prompts for this step, or, if some `may_go_ahead`, for one that makes others wait."""
        budget = self.pace.budget(decoding, base, now)
        chosen = self.choose(budget.tokens, budget.limit, now)
        pending = [seq.num_pending for seq in chosen]
        parts = pending if self.limits.whole_prompts else policy.split(pending, budget.tokens)
        chunks = [(seq, part) for seq, part in zip(chosen, parts, strict=True) if part]
        if budget.seconds < inf:
            chunks = self.pace.refit(chunks, base, budget.seconds)
        ahead = self.pace.ahead(chosen, chunks, decoding, now) if may_go_ahead else Prompts([])
        prompts = ahead if ahead.chunks else Prompts(chunks)
        limit = Reason.SHARED if len(chunks) > 1 else budget.limit
        for seq, part in prompts.chunks:
            reason = Reason.WHOLE if part == seq.num_pending else limit
            self.note_chunk(seq, part, Reason.AHEAD if prompts.ahead else reason, now)
        return prompts

    def note_chunk(self, seq: Sequence, part: int, reason: Reason, now: float) -> None:
        self.life.note(
            *(seq, now, Kind.CHUNK, reason.value), tokens=part, position=seq.num_computed
        )

    # ── who ──────────────────────────────────────────────────────────────────

    def merge_until(self) -> float:
        """When those that wait begin, if nothing runs: more may join them until then."""
        return policy.merge_until(
            self.life.waiting,
            delay=self.limits.max_queue_delay,
            tokens=self.limits.max_prefill_tokens,
            sequences=self.limits.max_decode_sequences,
        )

    def choose(self, budget: int, limit: Reason, now: float) -> list[Sequence]:
        """Running prompts that get a chunk of this step, in the order of their turn; those that
        waited until now are admitted."""
        queues = self._queues()
        self.brake.begin(now)
        accounts = self.life.shares.accounts
        chosen: list[Sequence] = []
        left, partial = budget, policy.partial_budget(budget)
        is_full = False
        turns: list[str] = []
        while queues and left > 0:
            if is_full:  # nobody gets in any more, so nobody's turn changes
                turns = turns or policy.turns(queues, accounts, now)
                while turns[-1] not in queues:
                    turns.pop()
                name = turns[-1]
            else:
                name = policy.next_tenant(queues, accounts, now)
            seq = queues[name].popleft()
            if not queues[name]:
                del queues[name]
            part = self._part(seq, left, partial, chosen)
            if not part:  # long, and one long prompt is enough; a shorter one may still fit
                self._defer_heads({name: deque([seq])}, limit, now)
                continue
            if seq.id not in self.life.running:
                reason = self._admit(seq, accounts[name], now, is_full)
                is_full = is_full or reason in FULL
                if reason is not None:
                    if reason not in STEPS_ASIDE:
                        queues.pop(name, None)
                    continue
                if seq.restoring:
                    continue
                part = self._part(seq, left, partial, chosen)
            chosen.append(seq)
            left -= part
            partial = 0 if part < seq.num_pending else partial
        self._defer_heads(queues, limit, now)
        return [seq for seq in chosen if seq.id in self.life.running]  # some made room for others

    def _part(self, seq: Sequence, left: int, partial: int, chosen: list[Sequence]) -> int:
        """What of a prompt a step runs beside those that are `chosen`."""
        if not self.limits.whole_prompts:
            return policy.part_of(seq.num_pending, left, partial)
        return seq.num_pending if seq.num_pending <= left or not chosen else 0

    def _queues(self) -> dict[str, deque[Sequence]]:
        """Per tenant: prompts in progress first, then those that wait."""
        life = self.life
        queues: dict[str, deque[Sequence]] = {}
        for seq in life.running.values():
            if seq.phase is Phase.PREFILL and seq.restoring is None:
                queues.setdefault(seq.request.tenant, deque()).append(seq)
        for name in life.waiting.tenants:
            queues.setdefault(name, deque()).extend(life.waiting.scan(name, SCAN_LIMIT))
        if len(queues) > 1 or life.waiting:
            self.take_stock()
        return queues

    def _defer_heads(self, queues: dict[str, deque[Sequence]], reason: Reason, now: float) -> None:
        for queue in queues.values():
            if queue[0].id not in self.life.running:
                self.life.defer(queue[0], reason, now)

    def take_stock(self) -> None:
        """Bring the accounts up to date with what is running."""
        prefill, decode = self.pace.prices()
        self.life.shares.count(self.life.running.values(), prefill, decode)
        self.life.pins.take_stock()

    # ── waiting → running ────────────────────────────────────────────────────

    def _admit(self, seq: Sequence, account: Account, now: float, is_full: bool) -> Reason | None:
        """Admit a sequence, or say what it has to wait for. `is_full`: somebody whose turn was
        earlier has found no room, and nobody may take what it is waiting for."""
        reason = self.brake.obstacle(seq)
        if reason is None:
            reason = Reason.FAIR_SHARE if is_full else self._obstacle(seq, account, now)
        if reason is not None:
            self.life.defer(seq, reason, now, running=len(self.life.running), pages=account.pages)
            return reason
        self._take_in(seq, account, now)
        return None

    def admit_at_once(self, seq: Sequence, now: float) -> bool:
        """Admit a sequence while a step is running, if it is the next of its tenant, nobody has to
        go for it, nobody waits for what it takes, and it leaves a place for each tenant that waits;
        whether it was."""
        waiting, account = self.life.waiting, self.life.shares.account(seq.request.tenant)
        heads = [waiting.first(name, 1)[0] for name in waiting.tenants]
        if seq not in heads or any(Reason(head.waits_for) in FULL for head in heads):
            return False
        if len(self.life.running) + len(heads) > self.limits.max_decode_sequences:
            return False
        if self._obstacle(seq, account, now, may_preempt=False) is not None:
            return False
        self._take_in(seq, account, now)
        return True

    def _take_in(self, seq: Sequence, account: Account, now: float) -> None:
        is_new = seq.admitted_at is None
        self.brake.bound(seq)
        self.life.admit(seq, now)
        if is_new and seq.cut_to is not None:
            cut = Reason.CAP_BATCH.value
            self.life.note(seq, now, Kind.DEGRADE, cut, max_tokens=seq.max_tokens)
        self.brake.pass_through(seq, now)
        account.live += 1
        account.pages += seq.page_part
        account.committed += self.life.shares.price(seq, *self.pace.prices())

    def _obstacle(
        self, seq: Sequence, account: Account, now: float, *, may_preempt: bool = True
    ) -> Reason | None:
        quota = account.tenant.quota
        if quota.live_sequences is not None and account.live >= quota.live_sequences:
            return Reason.QUOTA_LIVE
        if quota.pages_burst is not None and not self._fits_burst(seq, quota.pages_burst):
            return Reason.QUOTA_PAGES
        if self._awaits_prefix(seq):
            return Reason.PREFIX
        while not self.has_room(seq):
            need = self._new_pages(seq)
            if not may_preempt or not self.preemption.for_pages(seq, account, need, now):
                return Reason.PAGES
        if not self.pace.has_place(seq) and not (may_preempt and self._make_place(seq, now)):
            return Reason.SLOTS
        return None

    def _make_place(self, seq: Sequence, now: float) -> bool:
        """Preempt whoever is over his share until there is a place; whether one place was freed.

        A place that is missing for an ITL target does not come by waiting for one end.
        """
        is_full = len(self.life.running) >= self.limits.max_decode_sequences
        if not self.preemption.for_place(seq, now, can_wait=is_full):
            return False
        while not self.pace.has_place(seq) and self.preemption.for_place(seq, now, can_wait=False):
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
        held.update(self.life.pins.pages_of(name))
        shared = held.intersection(pool.match(self.life.reusable_keys(seq)))
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
        pool, keys = self.life.pool, self.life.reusable_keys(seq)
        found = pool.match(keys)
        lacking = [keys[i] for i, page_id in enumerate(found) if page_id is None]
        lacking += keys[len(found) : len(found) + 1]
        return any(pool.index.maker(key) is not None for key in lacking)

    def has_room(self, seq: Sequence) -> bool:
        # A page for each running sequence that can still grow stays free: admitting one more is
        # no reason to preempt another a few tokens later. Mostly there is one for every sequence.
        pool, keys, running = self.life.pool, self.life.reusable_keys(seq), self.life.running
        if pool.has_room(keys, seq.num_tokens, len(running)):
            return True
        reserve = sum(map(self._can_grow, running.values()))
        return pool.has_room(keys, seq.num_tokens, reserve)

    def _can_grow(self, seq: Sequence) -> bool:
        most = len(seq.request.prompt_ids) + seq.max_tokens
        return self.life.pool.page_size * len(seq.page_table) < most
