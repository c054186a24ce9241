"""What each tenant holds, has used, and may still use: the books behind fair share and quotas.

Fair share is weighted fair queueing (Parekh and Gallager 1993; for tokens of language models:
Sheng et al., OSDI 2024): each tenant has a virtual time, its cost so far divided by its weight, and
the busy tenant whose virtual time is least goes next. Cost is measured, not guessed: the seconds of
each step are divided among the sequences in it, and the pages they hold count as a share of the
pool for as long as they hold them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from dynamo_serve.core.sequence import Sequence
from dynamo_serve.core.step_cost import Item
from dynamo_serve.core.tenant import Tenancy, Tenant

RATIO_MEMORY = 0.9  # of the learned output lengths, for each finished request


@dataclass(slots=True)
class Bucket:
    """A token bucket that holds one minute's worth; it may be overdrawn."""

    level: float
    updated: float

    def refill(self, per_minute: float, now: float) -> None:
        self.level = min(per_minute, self.level + (now - self.updated) * per_minute / 60)
        self.updated = now

    def wait_for(self, amount: float, per_minute: float) -> float:
        """Seconds until `amount` can be taken (or all there can ever be, if that is less)."""
        return max(0.0, min(amount, per_minute) - self.level) * 60 / per_minute


@dataclass(slots=True)
class Account:
    """One tenant's. Seconds are device-seconds, `cost` adds its share of the pool's."""

    tenant: Tenant
    virtual_time: float = 0.0
    committed: float = 0.0  # what its running sequences will still cost, an estimate
    live: int = 0
    pages: int = 0
    cost: float = 0.0
    device_seconds: float = 0.0
    page_seconds: float = 0.0
    prefill_tokens: int = 0
    saved_tokens: int = 0
    output_tokens: int = 0
    num_requests: int = 0
    output_ratio: float = 1.0  # of max_tokens, what its requests use
    requests: Bucket = field(default_factory=lambda: Bucket(float("inf"), 0.0))
    tokens: Bucket = field(default_factory=lambda: Bucket(float("inf"), 0.0))

    @property
    def lead(self) -> float:
        """Its virtual time once all it has been given is paid for; the least goes next."""
        return self.virtual_time + self.committed / self.tenant.weight


class Shares:
    """All accounts; one is opened when its tenant is first heard of."""

    def __init__(self, tenancy: Tenancy) -> None:
        self.tenancy = tenancy
        self.accounts: dict[str, Account] = {}
        self.device_seconds = 0.0
        self.page_seconds = 0.0

    def configure(self, tenancy: Tenancy) -> None:
        self.tenancy = tenancy
        for name, account in self.accounts.items():
            account.tenant = tenancy.tenant(name)

    def account(self, name: str) -> Account:
        account = self.accounts.get(name)
        if account is None:
            account = self.accounts[name] = Account(self.tenancy.tenant(name))
        return account

    def wake(self, name: str, busy: Iterable[str]) -> None:
        """A tenant that had nothing to do has something now: what it did not use is not saved up
        (else it could shut out all others for as long as it was away)."""
        others = [self.accounts[other].virtual_time for other in busy if other != name]
        account = self.account(name)
        account.virtual_time = max([account.virtual_time, *([min(others)] if others else [])])

    def count(self, running: Iterable[Sequence], prefill_price: float, decode_price: float) -> None:
        """Bring `live`, `pages` and `committed` up to date, at so many seconds per token."""
        for account in self.accounts.values():
            account.live = account.pages = 0
            account.committed = 0.0
        for seq in running:
            account = self.accounts[seq.request.tenant]
            account.live += 1
            account.pages += len(seq.page_table)
            account.committed += self.price(seq, prefill_price, decode_price)

    def price(self, seq: Sequence, prefill_price: float, decode_price: float) -> float:
        """What is still to be paid for a sequence, in seconds."""
        ratio = self.accounts[seq.request.tenant].output_ratio
        outputs = max(1.0, ratio * seq.request.max_tokens - seq.num_outputs)
        return seq.num_pending * prefill_price + outputs * decode_price

    def charge_step(
        self, items: Iterable[tuple[Sequence, Item]], parts: Iterable[float], seconds: float
    ) -> None:
        """Divide the measured seconds of a step among its sequences; `parts` add up to 1."""
        self.device_seconds += seconds
        for (seq, (num_tokens, _, is_prefill)), part in zip(items, parts, strict=True):
            account = self.accounts[seq.request.tenant]
            share = seconds * part
            seq.device_seconds += share
            account.device_seconds += share
            account.prefill_tokens += num_tokens if is_prefill else 0
            self._add(account, share)

    def charge_pages(self, running: list[Sequence], used: int, total: int, seconds: float) -> None:
        """The pages held by `running` for so long. A page with several holders is divided among
        them: so the parts add up to the `used` pages."""
        held = sum(len(seq.page_table) for seq in running)
        if not held or seconds <= 0.0:
            return
        self.page_seconds += used * seconds
        for seq in running:
            part = len(seq.page_table) * used / held * seconds
            account = self.accounts[seq.request.tenant]
            seq.page_seconds += part
            account.page_seconds += part
            self._add(account, part / total)

    def _add(self, account: Account, cost: float) -> None:
        account.cost += cost
        account.virtual_time += cost / account.tenant.weight

    def learn_ratio(self, seq: Sequence) -> None:
        """How much of `max_tokens` a request used that ended by itself."""
        account = self.accounts[seq.request.tenant]
        used = seq.num_outputs / seq.request.max_tokens
        account.output_ratio += (1 - RATIO_MEMORY) * (used - account.output_ratio)
