"""What each tenant holds, has used, and may still use: the books behind fair share and quotas.

Fair share is weighted fair queueing (Parekh and Gallager 1993; for tokens of language models:
Sheng et al., OSDI 2024): each tenant has a virtual time, its cost so far divided by its weight, and
the busy tenant whose virtual time is least goes next. Cost is measured, not guessed: the seconds of
each step are divided among the sequences in it, and the pages they hold count as a share of the
pool for as long as they hold them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from math import inf
from typing import Protocol

from dynamo_serve.core.request import Request
from dynamo_serve.core.sequence import Sequence
from dynamo_serve.core.step_cost import Item
from dynamo_serve.core.tenant import Tenancy, Tenant

MEMORY = 0.9  # of what was learned about lengths, for each finished request
FIRST_GUESS = 256.0  # tokens of an answer that ends by itself, before any was seen
KNOWN_AFTER = 8  # finished requests
PROMPT_GAIN = 0.1  # of what one prompt tells about how long they are
PACE_GAIN = 0.01  # of what one step of one sequence tells about how many tokens steps bring


@dataclass(slots=True)
class Bucket:
    """A token bucket that holds one minute's worth; it may be overdrawn."""

    level: float
    updated: float

    def refill(self, per_minute: float, now: float) -> None:
        """Up to now; a quota that is new begins with a full bucket."""
        if self.level == inf:
            self.level, self.updated = per_minute, now
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
    pages: float = 0.0  # a shared page counts in parts
    cost: float = 0.0
    device_seconds: float = 0.0
    page_seconds: float = 0.0
    prefill_tokens: int = 0
    saved_tokens: int = 0
    output_tokens: int = 0
    num_requests: int = 0
    last_arrival: float = -inf
    usual_prompt: float = 0.0  # tokens of a prompt that are not cached
    num_finished: int = 0
    runs_full: float = 0.5  # part of its requests that use all of max_tokens
    usual_outputs: float = FIRST_GUESS  # tokens of the others
    requests: Bucket = field(default_factory=lambda: Bucket(inf, 0.0))
    tokens: Bucket = field(default_factory=lambda: Bucket(inf, 0.0))

    @property
    def knows_lengths(self) -> bool:
        """Whether it has finished enough requests to say how long the next will be."""
        return self.num_finished >= KNOWN_AFTER

    @property
    def lead(self) -> float:
        """Its virtual time once all it has been given is paid for; the least goes next."""
        return self.virtual_time + self.committed / self.tenant.weight


class Holder(Protocol):
    """A sequence or a pin, as far as its pages are concerned."""

    page_part: float
    page_seconds: float

    @property
    def request(self) -> Request: ...


class Shares:
    """All accounts; one is opened when its tenant is first heard of."""

    def __init__(self, tenancy: Tenancy) -> None:
        self.tenancy = tenancy
        self.accounts: dict[str, Account] = {}
        self.device_seconds = 0.0
        self.page_seconds = 0.0
        self.virtual_time = 0.0  # of the whole: how far whoever was busy has got
        self.tokens_per_step = 1.0  # of a decoding sequence; more with drafts

    def configure(self, tenancy: Tenancy) -> None:
        """A tenant that is gone keeps its weight and quotas for what it still has here."""
        self.tenancy = tenancy
        for name, account in self.accounts.items():
            account.tenant = tenancy.tenants.get(name, account.tenant)

    def account(self, name: str) -> Account:
        account = self.accounts.get(name)
        if account is None:
            account = self.accounts[name] = Account(self.tenancy.tenant(name))
        return account

    def wake(self, name: str) -> None:
        """A tenant that had nothing to do has something now. What it did not use is not saved up
        (else it could shut out the others for as long as it was away), and what others used while
        nobody else was there is not held against them."""
        account = self.account(name)
        account.virtual_time = max(account.virtual_time, self.virtual_time)

    def advance(self, busy: Iterable[str]) -> None:
        """Move the virtual time of the whole to that of the busy tenant that has had least."""
        least = min((self.account(name).virtual_time for name in busy), default=0.0)
        self.virtual_time = max(self.virtual_time, least)

    def forgo(self, names: Collection[str], busy: Iterable[str]) -> None:
        """A rung keeps these tenants' work back. What they miss for that is not made up for later,
        or its undo would be worse for the others than what it was taken for."""
        others = [self.account(name).virtual_time for name in busy if name not in names]
        for name in names:
            account = self.account(name)
            account.virtual_time = max(account.virtual_time, min(others, default=-inf))

    def rest(self, name: str) -> None:
        """A tenant has nothing to do any more; if nobody has, the next begin level with it."""
        self.virtual_time = max(self.virtual_time, self.account(name).virtual_time)

    def count(self, running: Iterable[Sequence], prefill_price: float, decode_price: float) -> None:
        """Bring `live`, `pages` and `committed` up to date, at so many seconds per token."""
        for account in self.accounts.values():
            account.live = 0
            account.pages = account.committed = 0.0
        for seq in running:
            account = seq.account
            account.live += 1
            account.pages += seq.page_part
            pending = len(seq.tokens) - seq.num_computed
            account.committed += pending * prefill_price + _outputs(seq, account) * decode_price

    def price(self, seq: Sequence, prefill_price: float, decode_price: float) -> float:
        """What is still to be paid for a sequence, in seconds."""
        return seq.num_pending * prefill_price + self.outputs(seq) * decode_price

    def outputs(self, seq: Sequence) -> float:
        """Tokens that a sequence will probably still produce."""
        return _outputs(seq, self.account(seq.request.tenant))

    def steps(self, seq: Sequence) -> float:
        """Decode steps that a sequence will probably still take."""
        return max(1.0, self.outputs(seq) / self.tokens_per_step)

    def learn_pace(self, num_tokens: int) -> None:
        """A step has brought a decoding sequence so many tokens."""
        self.tokens_per_step += PACE_GAIN * (num_tokens - self.tokens_per_step)

    def learn_prompt(self, name: str, num_tokens: int) -> None:
        """A tenant's request has come with so many tokens that are not cached."""
        account = self.account(name)
        gain = PROMPT_GAIN if account.usual_prompt else 1.0
        account.usual_prompt += gain * (num_tokens - account.usual_prompt)

    def charge_step(
        self,
        seqs: Iterable[Sequence],
        items: Iterable[Item],
        parts: Iterable[float],
        seconds: float,
    ) -> None:
        """Divide the measured seconds of a step among its sequences; `parts` add up to 1."""
        self.device_seconds += seconds
        owed: defaultdict[str, float] = defaultdict(float)
        for seq, (num_tokens, _, is_prefill), part in zip(seqs, items, parts, strict=True):
            name, share = seq.request.tenant, seconds * part
            seq.device_seconds += share
            owed[name] += share
            if is_prefill:
                self.accounts[name].prefill_tokens += num_tokens
        for name, share in owed.items():
            account = self.accounts[name]
            account.device_seconds += share
            self._add(account, share)

    def charge_pages(
        self, holders: Collection[Holder], used: int, total: int, seconds: float
    ) -> None:
        """The `used` of `total` pages, held by `holders` for so long. A page with several holders
        is divided among them; the parts add up to the pages in use."""
        parts = sum([holder.page_part for holder in holders])
        if not parts or seconds <= 0.0:
            return
        self.page_seconds += used * seconds
        owed: defaultdict[str, float] = defaultdict(float)
        for holder in holders:
            page_seconds = holder.page_part / parts * used * seconds
            holder.page_seconds += page_seconds
            owed[holder.request.tenant] += page_seconds
        for name, page_seconds in owed.items():
            account = self.accounts[name]
            account.page_seconds += page_seconds
            self._add(account, page_seconds / total)

    def _add(self, account: Account, cost: float) -> None:
        account.cost += cost
        account.virtual_time += cost / account.tenant.weight

    def learn_length(self, seq: Sequence, ran_full: bool) -> None:
        """How long an answer was that ended by itself or by the `max_tokens` of its request; one
        that a rung has cut tells nothing."""
        account = self.accounts[seq.request.tenant]
        account.num_finished += 1
        gain = max(1 - MEMORY, 1 / account.num_finished)
        account.runs_full += gain * (ran_full - account.runs_full)
        if not ran_full:
            account.usual_outputs += gain * (seq.num_outputs - account.usual_outputs)


def _outputs(seq: Sequence, account: Account) -> float:
    most, made = seq.max_tokens, len(seq.tokens) - len(seq.request.prompt_ids)
    least = made if made > seq.request.min_tokens else seq.request.min_tokens
    usual = account.usual_outputs if account.usual_outputs > least else least
    usual = usual if usual < most else most
    may_stop = seq.request.stop_ids or seq.request.is_open_ended or seq.request.grammar
    runs_full = account.runs_full if may_stop else 1.0
    left = runs_full * most + (1 - runs_full) * usual - made
    return left if left > 1.0 else 1.0
