"""Who goes next, who must go, and what a step is for: pure functions of state and time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import inf
from types import MappingProxyType
from typing import NamedTuple

from dynamo_serve.core.batch import Phase
from dynamo_serve.core.sequence import AGING_SECONDS
from dynamo_serve.core.sequence import Sequence as Seq
from dynamo_serve.core.shares import Account

SAFETY = 0.9  # of the time that an ITL target leaves; the rest is for what no model foresees
DECODE_PART = 0.75  # of an ITL target, for decoding; what is left keeps the prompts moving
NEWCOMER_PART = 0.5  # of a TTFT target, for the step that runs when somebody comes
OWN_STEP_PART = 0.75  # of the time beside others: what a prompt may take alone, to go ahead
LATELY = 30.0  # seconds
STRETCH = 4.0  # of the time that decoding takes alone: what any step may take with prompts
LEEWAY = 1.5  # of the time that decoding takes alone, where that is more than was promised
PARTIAL_PART = 0.75  # of a step's prompt tokens, for a prompt that does not end in it


def phase_order(last: Phase) -> tuple[Phase, Phase]:
    """Which phase to try first: they alternate, so that neither can starve the other."""
    if last is Phase.DECODE:
        return Phase.PREFILL, Phase.DECODE
    return Phase.DECODE, Phase.PREFILL


def merge_until(
    waiting: Iterable[Seq], *, delay: float, tokens: int, sequences: int, enough: int = 64
) -> float:
    """When arrivals stop being merged and the prefill starts; -inf means now.

    The window of each request opens with its arrival and closes after its class's delay (else
    `delay`), in seconds; the first to close starts the prefill. A full step (`tokens`) or every
    free place (`sequences`) already spoken for starts it at once. It is only asked about while
    nothing else could run; more than `enough` requests are not worth waiting for.
    """
    closes = inf
    for seq in waiting:
        own = seq.promise.max_queue_delay
        closes = min(closes, seq.request.arrival + (delay if own is None else own))
        tokens -= seq.num_pending
        sequences -= 1
        enough -= 1
        if tokens <= 0 or sequences <= 0 or enough <= 0 or seq.num_preemptions:
            return -inf
    return closes


# ── between tenants ──────────────────────────────────────────────────────────


def next_tenant(
    queues: Mapping[str, Sequence[Seq]], accounts: Mapping[str, Account], now: float
) -> str:
    """Whose turn it is: who has had least for its weight. But a tenant of which nothing runs, and
    whose first request is long overdue, goes before: the smallest share is still served."""
    for name, queue in queues.items():
        if not accounts[name].live and now - queue[0].due > AGING_SECONDS:
            return name
    return min(queues, key=lambda name: (accounts[name].lead, name))


def turns(
    queues: Mapping[str, Sequence[Seq]], accounts: Mapping[str, Account], now: float
) -> list[str]:
    """The order, the last one first, in which `next_tenant` takes them if nobody is given anything
    meanwhile."""

    def turn(name: str) -> tuple[bool, float, str]:
        account = accounts[name]
        is_overdue = not account.live and now - queues[name][0].due > AGING_SECONDS
        return not is_overdue, account.lead, name

    return sorted(queues, key=turn, reverse=True)


def entitled(name: str, busy: Iterable[str], accounts: Mapping[str, Account]) -> float:
    """The part of the server, 0 to 1, that is a tenant's while `busy` ones (and it) compete."""
    weights = {other: accounts[other].tenant.weight for other in {*busy, name}}
    return weights[name] / sum(weights.values())


def parts(busy: Iterable[str], accounts: Mapping[str, Account]) -> dict[str, float]:
    """What each of the `busy` tenants is entitled to; asked one by one, each sums up all."""
    weights = {name: accounts[name].tenant.weight for name in {*busy}}
    whole = sum(weights.values())
    return {name: weight / whole for name, weight in weights.items()}


class Room(NamedTuple):
    """Places in the batch or pages of the pool: how many there are, how many of them each tenant
    holds, and how many are guaranteed to it."""

    total: int
    held: Mapping[str, float]
    guaranteed: Mapping[str, int] = MappingProxyType({})

    def due_to(self, name: str, busy: Iterable[str], accounts: Mapping[str, Account]) -> float:
        """What nobody may take from a tenant: its part while `busy` ones compete, or what it was
        guaranteed, if that is more."""
        part = entitled(name, busy, accounts) * self.total
        return max(part, self.guaranteed.get(name, 0))

    def dues(self, busy: Iterable[str], accounts: Mapping[str, Account]) -> dict[str, float]:
        """The same for each of the `busy` tenants."""
        own = parts(busy, accounts).items()
        return {name: max(part * self.total, self.guaranteed.get(name, 0)) for name, part in own}


def is_over_share(
    name: str, room: Room, busy: Sequence[str], accounts: Mapping[str, Account]
) -> bool:
    """Whether a tenant holds more than is due to it."""
    return room.held.get(name, 0) > room.due_to(name, busy, accounts)


# ── who must go ──────────────────────────────────────────────────────────────


def slack(seq: Seq, now: float) -> float:
    """Seconds until a running sequence breaks its promise: the next token's or the first's."""
    if seq.last_token_at is None:
        return seq.due - now
    return seq.last_token_at + seq.promise.itl - now


def victim(
    running: Sequence[Seq], now: float = 0.0, over_share: frozenset[str] = frozenset()
) -> Seq:
    """The sequence to preempt: over its share first, then the lowest class, then the one with most
    slack, then the newest admission, which has the least to lose."""
    order = enumerate(running)
    return max(
        order,
        key=lambda at: (
            at[1].request.tenant in over_share,
            at[1].promise.rank,
            slack(at[1], now),
            at[0],
        ),
    )[1]


def may_take_from(
    giver: str, taker: str, room: Room, dues: Mapping[str, float], gives: float
) -> bool:
    """Whether preempting a sequence of `giver` (that `gives` so much) for one of `taker` brings
    both nearer to what is due to them.

    The taker stays within it (`keeps_within`, asked before) and the giver is left with at least as
    much: the same two can never be turned round again, so nobody is preempted back and forth.
    """
    return taker != giver and room.held.get(giver, 0) - gives >= dues[giver]


def keeps_within(
    taker: str, need: float, room: Room, busy: Sequence[str], accounts: Mapping[str, Account]
) -> bool:
    """Whether a tenant that gets so much more stays within what is due to it."""
    return room.held.get(taker, 0) + need <= max(room.due_to(taker, busy, accounts), 1.0)


# ── what a step is for ───────────────────────────────────────────────────────


def time_left(decoding: Iterable[Seq], now: float) -> float:
    """Seconds that a step may take so that every decoding sequence gets its next token within
    its class's ITL target; inf if nobody was promised anything."""
    due = min(
        [
            seq.due if seq.last_token_at is None else seq.last_token_at + seq.promise.itl
            for seq in decoding
            if seq.promise.itl < inf
        ],
        default=inf,
    )
    return SAFETY * (due - now)


def tightest_itl(seqs: Iterable[Seq]) -> float:
    return min({seq.promise.itl for seq in seqs}, default=inf)


def strict_itl(seqs: Iterable[Seq]) -> float:
    """The tightest ITL target that the batch must not outgrow."""
    return min({seq.promise.itl for seq in seqs if seq.promise.strict}, default=inf)


def aim(seq: Seq) -> float:
    """By when its first token should come: half of a TTFT target is for what nobody foresees."""
    ttft = seq.promise.ttft
    return seq.due if ttft == inf else seq.due - (1 - NEWCOMER_PART) * min(ttft, AGING_SECONDS)


def is_pressed(seq: Seq, end: float) -> bool:
    """Whether a first token at `end` would be late for a TTFT target, or nearly."""
    return seq.first_token_at is None and seq.promise.ttft < inf and end > aim(seq)


def may_go_ahead(seq: Seq, others: Iterable[Seq], accounts: Mapping[str, Account]) -> bool:
    """Whether others may be held up for a prompt: not for one whose tenant has had more."""
    return has_right_of_way(accounts[seq.request.tenant], others, accounts)


def has_right_of_way(
    account: Account, others: Iterable[Seq], accounts: Mapping[str, Account]
) -> bool:
    """Whether a tenant has had no more than any of those whom his prompt would hold up."""
    names = {other.request.tenant for other in others}
    return all(account.lead <= accounts[name].lead for name in names)


def part_of(pending: int, left: int, left_for_partial: int) -> int:
    """What one prompt gets of the `left` tokens of a step: all it needs if that fits, else what
    there is for one that does not end in this step. That is less than the whole, so that long
    prompts never keep out the short ones behind them; and it goes to one prompt alone: each reads
    all of its own context again, and side by side they would all come late."""
    return pending if pending <= left else min(left, left_for_partial)


def split(pending: Sequence[int], budget: int) -> list[int]:
    """The tokens of a step for prompts in the order of their turn; they add up to the budget if
    there is that much to do."""
    parts: list[int] = []
    left, partial = budget, partial_budget(budget)
    for count in pending:
        part = part_of(count, left, partial)
        parts.append(part)
        left -= part
        partial = 0 if part < count else partial
    for i, count in enumerate(pending):
        extra = min(count - parts[i], left)
        parts[i] += extra
        left -= extra
    return parts


def partial_budget(budget: int) -> int:
    """Tokens for a prompt that does not end in this step, while there may be others."""
    return max(1, int(PARTIAL_PART * budget))
