"""Answers about the scheduler as plain data, for people and programs that ask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynamo_serve.core.scheduler import Scheduler


def answer(scheduler: Scheduler, what: str, id: str, now: float) -> Any:
    """What an `Inspect` asks for: one request and its choices, everything, or who used what."""
    match what:
        case "request":
            return requests(scheduler, id, now)
        case "state":
            return {"now": now, "tenants": {}, "running": [], "waiting": [], "journal": []}
        case "costs":
            return {"whole": {}, "tenants": {}}
    raise AssertionError(f"nobody answers {what!r}")


def requests(scheduler: Scheduler, id: str, now: float) -> list[dict[str, Any]]:
    """The requests called `id` or `id`-0, `id`-1, …: live ones, and those not forgotten yet."""
    live = {**scheduler.running, **scheduler.waiting}
    return [
        {"id": seq.id, "tenant": seq.request.tenant, "state": "live"}
        for seq in live.values()
        if seq.id == id or seq.id.rpartition("-")[0] == id
    ]
