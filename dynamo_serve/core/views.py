"""Answers about the scheduler as plain data, for people and programs that ask.

Times are in seconds; what happened is told from the request's arrival on, what will, from now.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from math import isfinite
from typing import TYPE_CHECKING, Any

from dynamo_serve.core import views_cache
from dynamo_serve.core.forecast import forecast
from dynamo_serve.core.journal import Entry, Kind, Reason
from dynamo_serve.core.ladder import NAMES
from dynamo_serve.core.sequence import Sequence
from dynamo_serve.core.shares import Account
from dynamo_serve.core.views_ladder import ladder

if TYPE_CHECKING:
    from dynamo_serve.core.scheduler import Scheduler

MOST_LISTED = 200  # sequences or journal entries in one answer


def answer(
    scheduler: Scheduler, what: str, id: str, now: float, about: tuple[Any, ...] = ()
) -> Any:
    """What an `Inspect` asks for: one request and its choices, everything, who used what, the
    latest decisions, how the ladder stands, the pinned prefixes, what is cached, or why a prompt is
    not."""
    answers: dict[str, Callable[[], Any]] = {
        "request": lambda: requests(scheduler, id, now),
        "state": lambda: state(scheduler, now),
        "pins": lambda: pins(scheduler, now),
        "costs": lambda: costs(scheduler),
        "journal": lambda: journal(scheduler, int(id), now),
        "controller": lambda: ladder(scheduler.controller, now),
        "cache": lambda: views_cache.answer(scheduler, what, about, now),
        "prompt": lambda: views_cache.answer(scheduler, what, about, now),
    }
    return answers[what]()


def requests(scheduler: Scheduler, id: str, now: float) -> list[dict[str, Any]]:
    """The requests called `id` or `id`-0, `id`-1, …: live ones, and those not forgotten yet."""
    own = [seq for seq in (*scheduler.running.values(), *scheduler.waiting) if _belongs(seq.id, id)]
    live = [{**_live(scheduler, seq, now), "timeline": _timeline(seq)} for seq in own]
    for seq, facts in zip(own, live, strict=True):
        if facts["state"] == "waiting":  # the first of a call tells enough; it takes a while
            seen = forecast(seq, scheduler.life, scheduler.intake)
            facts["queue_position"] = seen.position
            facts["predicted_first_token_in_s"] = seen.first_token
            break
    gone = scheduler.journal.gone.items()
    return live + [_gone(history) for at, history in gone if _belongs(at, id)]


def _belongs(request_id: str, id: str) -> bool:
    return request_id == id or request_id.rpartition("-")[0] == id


def _live(scheduler: Scheduler, seq: Sequence, now: float) -> dict[str, Any]:
    request, summary = seq.request, seq.summary(now)
    is_running = seq.id in scheduler.running
    facts: dict[str, Any] = {
        "id": seq.id,
        "tenant": request.tenant,
        "class": seq.promise.name,
        "priority": request.priority,
        "state": "running" if is_running else "waiting",
        "phase": seq.phase.value,
        "age_s": now - request.arrival,
        "deadline_in_s": request.deadline - now if isfinite(request.deadline) else None,
        "ttft_target_s": _finite(seq.promise.ttft),
        "itl_target_s": _finite(seq.promise.itl),
        "prompt_tokens": seq.prompt_len,
        "computed_tokens": seq.num_computed,
        "output_tokens": seq.num_outputs,
        "max_tokens": seq.max_tokens,
        "pages": len(seq.page_table),
        "waits": _waits(scheduler, seq, now),
        **summary._asdict(),
    }
    if not is_running:
        facts["waits_for"] = _waits_for(scheduler, seq)
    return facts


def _waits_for(scheduler: Scheduler, seq: Sequence) -> str:
    """What a request waits for now: behind others of its tenant it is they, whatever they need; but
    a rung that keeps it back does so wherever it stands."""
    if seq.waits_for in NAMES:
        return seq.waits_for
    return Reason.ORDER.value if scheduler.waiting.ahead_of(seq) else seq.waits_for


def _waits(scheduler: Scheduler, seq: Sequence, now: float) -> dict[str, float]:
    """Seconds by what they were waited for, up to now."""
    waits = dict(seq.waits)
    if seq.id not in scheduler.running:
        reason = _waits_for(scheduler, seq)
        waits[reason] = waits.get(reason, 0.0) + now - seq.waits_since
    return waits


def _timeline(seq: Sequence) -> list[dict[str, Any]]:
    return [_told(entry, seq.request.arrival) for entry in seq.history]


def _gone(history: list[Entry]) -> dict[str, Any]:
    last = history[-1]
    return {
        "id": last.request_id,
        "tenant": last.tenant,
        "state": "shed" if last.kind is Kind.SHED else "finished",
        "finish": last.reason,
        "timeline": [_told(entry, history[0].at) for entry in history],
    }


def _told(entry: Entry, since: float) -> dict[str, Any]:
    return {
        "at_s": entry.at - since,
        "decision": entry.kind.value,
        "reason": entry.reason,
        **entry.numbers,
    }


def state(scheduler: Scheduler, now: float) -> dict[str, Any]:
    """The whole picture, cut to the first `MOST_LISTED` of each list."""
    scheduler.intake.take_stock()
    pool = scheduler.pool
    waiting = islice(scheduler.waiting, MOST_LISTED)
    return {
        "num_running": len(scheduler.running),
        "num_waiting": len(scheduler.waiting),
        "pages": {
            "used": pool.num_used,
            "cached": pool.num_cached,
            "free": pool.num_free,
            "total": pool.num_pages,
            "pinned": len(scheduler.pins.pages),
        },
        "step_cost": {
            "median_error": scheduler.cost.error,
            "prices_s": scheduler.intake.pace.prices(),
        },
        "drafts": {
            "credit_steps": scheduler.speculation.credit,
            "rates": scheduler.speculation.rates,
        },
        "limits": asdict(scheduler.limits),
        "tenants": {name: _account(scheduler, a) for name, a in scheduler.shares.accounts.items()},
        "running": [_brief(s, now) for s in islice(scheduler.running.values(), MOST_LISTED)],
        "waiting": [{**_brief(s, now), "waits_for": _waits_for(scheduler, s)} for s in waiting],
        "decisions": {
            f"{kind}/{reason}": n for (kind, reason), n in scheduler.journal.counts.items()
        },
        "journal": journal(scheduler, MOST_LISTED, now),
    }


def pins(scheduler: Scheduler, now: float) -> dict[str, dict[str, Any]]:
    """The pins whose pages are there, by id; `below` are the tiers that have all of these, too."""
    return {
        id: {
            "hits": pinned.num_hits,
            "last_hit_age_s": None if pinned.last_hit is None else now - pinned.last_hit,
            "below": [
                tier.name
                for tier in scheduler.spill.tiers
                if all(key in tier for key in pinned.keys)
            ],
        }
        for id, pinned in scheduler.pins.by_id.items()
        if pinned.page_table
    }


def journal(scheduler: Scheduler, most: int, now: float) -> list[dict[str, Any]]:
    """The latest decisions, oldest first; times are relative to now."""
    latest = list(scheduler.journal.entries)[-most:]
    return [
        {**_told(entry, now), "request": entry.request_id, "tenant": entry.tenant}
        for entry in latest
    ]


def _brief(seq: Sequence, now: float) -> dict[str, Any]:
    return {
        "id": seq.id,
        "tenant": seq.request.tenant,
        "class": seq.promise.name,
        "phase": seq.phase.value,
        "age_s": now - seq.request.arrival,
        "prompt_tokens": seq.prompt_len,
        "output_tokens": seq.num_outputs,
        "pages": len(seq.page_table),
    }


def _account(scheduler: Scheduler, account: Account) -> dict[str, Any]:
    name = account.tenant.name
    return {
        "weight": account.tenant.weight,
        "class": account.tenant.class_name,
        "live": account.live,
        "waiting": scheduler.waiting.count(name),
        "pages": account.pages,
        "cost_s": account.cost,
        "virtual_time_s": account.virtual_time,
        "committed_s": account.committed,
        "quota": asdict(account.tenant.quota),
    }


def costs(scheduler: Scheduler) -> dict[str, Any]:
    """Who used what since the engine started (the tenants' parts add up to the whole), and which
    promises were kept."""
    scheduler.intake.take_stock()
    shares = scheduler.shares
    return {
        "whole": {"device_seconds": shares.device_seconds, "page_seconds": shares.page_seconds},
        "tenants": {
            name: {
                "device_seconds": account.device_seconds,
                "page_seconds": account.page_seconds,
                "cost_seconds": account.cost,
                "prefill_tokens": account.prefill_tokens,
                "saved_tokens": account.saved_tokens,
                "output_tokens": account.output_tokens,
                "requests": account.num_requests,
                "live": account.live,
                "waiting": scheduler.waiting.count(name),
                "promises": scheduler.life.tally.told(name),
            }
            for name, account in shares.accounts.items()
        },
    }


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None
