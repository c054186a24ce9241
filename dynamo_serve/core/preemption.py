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

    def victim(self, now: float) -> Sequence:
        """Whoever goes when a running sequence has to grow and there are no pages left."""
        running = list(self.life.running.values())
        busy = self.life.busy
        if len(busy) < 2:
            return policy.victim(running, now)
        accounts = self.life.shares.accounts
        room = policy.Room(self.life.pool.num_used, {name: accounts[name].pages for name in busy})
        over = (name for name in busy if policy.is_over_share(name, room, busy, accounts))
        return policy.victim(running, now, frozenset(over))

    def make_room(self, seq: Sequence, account: Account, short: Reason, now: float) -> bool:
        """Preempt one sequence of somebody who holds more than is due to them, if `seq` has a
        right to what is short (places or pages) and cannot wait for it; whether one was."""
        guaranteed = account.tenant.quota.pages_guaranteed
        if short is Reason.PAGES and account.pages + self._pages_missing(seq) <= guaranteed:
            return self._preempt_one(self._beyond_guarantee(account), Reason.GUARANTEE, now)
        if len(self.life.shares.accounts) < 2 or now + self._next_place() <= seq.due:
            return False
        return self._preempt_one(self._over_share(seq, short), Reason.OVER_SHARE, now)

    def _preempt_one(self, candidates: list[Sequence], reason: Reason, now: float) -> bool:
        if not candidates:
            return False
        seq = policy.victim(candidates, now)
        account = self.life.shares.account(seq.request.tenant)
        account.live -= 1
        account.pages -= len(seq.page_table)
        self.life.preempt(seq, reason, now)
        return True

    def _pages_missing(self, seq: Sequence) -> int:
        matched = len(self.life.pool.index.match(self.life.reusable_keys(seq)))
        return self.life.pool.pages_for(seq.num_tokens) - matched

    def _beyond_guarantee(self, account: Account) -> list[Sequence]:
        accounts = self.life.shares.accounts
        return [
            seq
            for seq in self.life.running.values()
            if (other := accounts[seq.request.tenant]) is not account
            and other.pages > other.tenant.quota.pages_guaranteed
        ]

    def _over_share(self, seq: Sequence, short: Reason) -> list[Sequence]:
        accounts = self.life.shares.accounts
        busy = self.life.busy
        if short is Reason.PAGES:
            need = self._pages_missing(seq)
            held = {name: accounts[name].pages for name in busy}
            room = policy.Room(self.life.pool.num_pages, held)
        else:
            need = 1
            held = {name: accounts[name].live for name in busy}
            room = policy.Room(len(self.life.running), held)
        taker = seq.request.tenant
        return [
            other
            for other in self.life.running.values()
            if policy.may_take_from(taker, other.request.tenant, need, room, busy, accounts)
        ]

    def _next_place(self) -> float:
        """Seconds until the first of the running sequences ends, if it uses all its tokens."""
        running = self.life.running.values()
        fewest = min((s.request.max_tokens - s.num_outputs for s in running), default=0)
        return fewest * self.cost.predict(shape_of(running))


def shape_of(decoding: Collection[Sequence]) -> StepShape:
    """A step that decodes these."""
    context = sum(seq.num_tokens for seq in decoding)
    return StepShape(decode_sequences=len(decoding), decode_context=context)
