"""Who goes next, who must go, and what a step is for: pure functions of state and time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import inf
from typing import NamedTuple

from dynamo_serve.core.batch import Phase
from dynamo_serve.core.sequence import Sequence as Seq
from dynamo_serve.core.shares import Account

SAFETY = 0.9  # of the time that an ITL target leaves; the rest is for what no model foresees
DECODE_PART = 0.75  # of an ITL target, for decoding; what is left keeps the prompts moving
LEEWAY = 1.5  # of the time that decoding takes alone, where that is more than was promised
MAX_PARTIAL = 4  # prompts in one step that do not end in it


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


def next_tenants(names: Iterable[str], accounts: Mapping[str, Account]) -> list[str]:
    """Tenants in the order of their turn: who has had least for its weight goes first."""
    return sorted(names, key=lambda name: (accounts[name].lead, name))


def entitled(name: str, busy: Iterable[str], accounts: Mapping[str, Account]) -> float:
    """The part of the server, 0 to 1, that is a tenant's while `busy` ones (and it) compete."""
    weights = {other: accounts[other].tenant.weight for other in {*busy, name}}
    return weights[name] / sum(weights.values())


class Room(NamedTuple):
    """Places in the batch or pages of the pool, and how many of them each tenant holds."""

    total: int
    held: Mapping[str, int]


def is_over_share(
    name: str, room: Room, busy: Sequence[str], accounts: Mapping[str, Account]
) -> bool:
    """Whether a tenant holds more than its part of a room."""
    return room.held.get(name, 0) > entitled(name, busy, accounts) * room.total


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
    taker: str,
    giver: str,
    need: int,
    room: Room,
    busy: Sequence[str],
    accounts: Mapping[str, Account],
) -> bool:
    """Whether preempting `giver` for `taker` brings both nearer to their parts of a room.

    The taker stays within its part and the giver is left with at least its own: the same two can
    never be turned round again, so nobody is preempted back and forth.
    """
    part = entitled(taker, busy, accounts) * room.total
    left = entitled(giver, busy, accounts) * room.total
    return (
        taker != giver
        and room.held.get(taker, 0) + need <= max(part, 1.0)
        and room.held.get(giver, 0) - need >= left
    )


# ── what a step is for ───────────────────────────────────────────────────────


def time_left(decoding: Iterable[Seq], now: float) -> float:
    """Seconds that a step may take so that every decoding sequence gets its next token within
    its class's ITL target; inf if nobody was promised anything."""
    return min((SAFETY * slack(seq, now) for seq in decoding if seq.promise.itl < inf), default=inf)


def tightest_itl(seqs: Iterable[Seq]) -> float:
    return min((seq.promise.itl for seq in seqs), default=inf)


def part_of(pending: int, left: int) -> int:
    """What one prompt gets of the `left` tokens of a step: all it needs if that fits, else half,
    so that a long prompt never keeps out the short ones behind it."""
    return pending if pending <= left else -(-left // 2)


def split(pending: Sequence[int], budget: int) -> list[int]:
    """The tokens of a step for prompts in the order of their turn; they add up to the budget if
    there is that much to do."""
    parts: list[int] = []
    left = budget
    for count in pending:
        parts.append(part_of(count, left))
        left -= parts[-1]
    for i, count in enumerate(pending):
        extra = min(count - parts[i], left)
        parts[i] += extra
        left -= extra
    return parts
