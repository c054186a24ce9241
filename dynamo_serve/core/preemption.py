"""Who has to go, so that somebody with more right to a place or to pages gets in or goes on."""

from __future__ import annotations

from collections.abc import Collection

from dynamo_serve.core import policy
from dynamo_serve.core.journal import Reason
from dynamo_serve.core.lifecycle import Lifecycle
from dynamo_serve.core.sequence import Sequence
from dynamo_serve.core.shares import Account
from dynamo_serve.core.step_cost import StepCost, StepShape


class Preemption:
    """Takes places and pages from running sequences. The accounts must be up to date."""

    def __init__(self, life: Lifecycle, cost: StepCost) -> None:
        self.life = life
        self.cost = cost

    def victim(self, grower: Sequence, now: float) -> Sequence:
        """Whoever goes when a running sequence has to grow and there are no pages left. What a
        tenant was guaranteed goes only for its own sequences."""
        running = list(self.life.running.values())
        # Whoever waits for copies would free little: these hold its pages until they have ended.
        running = [seq for seq in running if not seq.restoring] or running
        busy = self.life.busy
        if len(busy) < 2:
            return policy.victim(running, now)
        accounts = self.life.shares.accounts
        room = self._pages(busy)
        dues = room.dues(busy, accounts)
        over = frozenset(name for name in busy if room.held[name] > dues[name])
        own = accounts[grower.request.tenant]
        spared = {seq.id for seq in running if self._spare(seq) >= 0}
        others = [s for s in running if s.id in spared and s.request.tenant != own.tenant.name]
        if others and own.pages + 1 <= own.tenant.quota.pages_guaranteed:
            return policy.victim(others, now, over)
        open_to = [s for s in running if s.id in spared or s.request.tenant == own.tenant.name]
        return policy.victim(open_to, now, over)

    def for_pages(self, seq: Sequence, account: Account, need: int, now: float) -> bool:
        """Preempt one sequence of somebody who holds more pages than are due to them, if `seq` has
        a right to that many and cannot wait for it; whether one was."""
        if account.pages + need <= account.tenant.quota.pages_guaranteed:
            others = [
                other
                for other in self.life.running.values()
                if other.request.tenant != seq.request.tenant and self._spare(other) >= 0
            ]
            if self._preempt(others, Reason.GUARANTEE, now):
                return True
        busy = self.life.busy
        room = self._pages(busy)
        if not self._is_due(seq, need, room, busy) or now + self._next_place() <= seq.due:
            return False
        return self._for_share(seq, room, busy, now)

    def for_place(self, seq: Sequence, now: float, *, can_wait: bool) -> bool:
        """The same for a place in the batch; not if one will be free in time and it can wait."""
        busy = self.life.busy
        accounts = self.life.shares.accounts
        held = {name: accounts[name].live for name in busy}
        room = policy.Room(len(self.life.running), held)
        if not self._is_due(seq, 1, room, busy):
            return False
        if can_wait and now + self._next_place() <= policy.aim(seq):
            return False
        return self._for_share(seq, room, busy, now)

    def keep_within_burst(self, seq: Sequence, now: float) -> None:
        """A tenant whose sequences have outgrown its quota loses the place of one of them."""
        name = seq.request.tenant
        burst = self.life.shares.account(name).tenant.quota.pages_burst
        if burst is None:
            return
        own = [other for other in self.life.running.values() if other.request.tenant == name]
        while len(own) > 1 and not keeps_within(self.life, burst, own, 1):
            victim = policy.victim(own, now)
            self.life.preempt(victim, Reason.QUOTA_PAGES, now)
            own.remove(victim)
            if victim is seq:
                return

    def _is_due(self, seq: Sequence, need: int, room: policy.Room, busy: list[str]) -> bool:
        """Whether so much more is due to its tenant while others compete. Asked first: to look for
        the next end takes longer, and whoever is at the head of a queue asks at every step."""
        accounts = self.life.shares.accounts
        return len(busy) > 1 and policy.keeps_within(seq.request.tenant, need, room, busy, accounts)

    def _for_share(self, seq: Sequence, room: policy.Room, busy: list[str], now: float) -> bool:
        """For one to whom so much is due."""
        taker, has_pages = seq.request.tenant, bool(room.guaranteed)
        dues = room.dues(busy, self.life.shares.accounts)
        others = [
            other
            for other in self.life.running.values()
            if self._spare(other) >= 0
            and policy.may_take_from(
                *(other.request.tenant, taker, room, dues),
                gives=other.page_part if has_pages else 1.0,
            )
        ]
        return self._preempt(others, Reason.OVER_SHARE, now)

    def _pages(self, busy: list[str]) -> policy.Room:
        accounts = self.life.shares.accounts
        return policy.Room(
            self.life.pool.num_pages,
            {name: accounts[name].pages for name in busy},
            {name: accounts[name].tenant.quota.pages_guaranteed for name in busy},
        )

    def _spare(self, seq: Sequence) -> float:
        """Pages beyond its guarantee that a tenant has left without this sequence."""
        account = self.life.shares.accounts[seq.request.tenant]
        guaranteed = account.tenant.quota.pages_guaranteed
        return account.pages - seq.page_part - guaranteed if guaranteed else 0.0

    def _preempt(self, candidates: list[Sequence], reason: Reason, now: float) -> bool:
        if not candidates:
            return False
        seq = policy.victim(candidates, now)
        account = self.life.shares.account(seq.request.tenant)
        account.live -= 1
        account.pages -= seq.page_part
        self.life.preempt(seq, reason, now)
        return True

    def _next_place(self) -> float:
        """Seconds until the first of the running sequences ends, if it is as long as usual."""
        running = self.life.running.values()
        fewest = min(map(self.life.shares.steps, running), default=0.0)
        return fewest * self.cost.predict(shape_of(running))


def keeps_within(life: Lifecycle, burst: int, own: Collection[Sequence], more: int) -> bool:
    """Whether a tenant's sequences (there is one) and pins hold, with so many pages more, no more
    than `burst`. A page that several of them share counts once."""
    pinned = life.pins.pages_of(next(iter(own)).request.tenant)
    if sum(len(seq.page_table) for seq in own) + len(pinned) + more <= burst:
        return True
    return len({page for seq in own for page in seq.page_table}.union(pinned)) + more <= burst


def shape_of(decoding: Collection[Sequence]) -> StepShape:
    """A step that decodes these."""
    context = sum([len(seq.tokens) for seq in decoding])
    return StepShape(decode_sequences=len(decoding), decode_context=context)
