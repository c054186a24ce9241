"""The ladder told as plain data: what it sees, which rungs are taken and why, what has changed."""

from __future__ import annotations

from typing import Any

from dynamo_serve.core.controller import Change, Controller, State
from dynamo_serve.core.evidence import Evidence


def ladder(controller: Controller, now: float) -> dict[str, Any]:
    """Seconds ago, where a time is told."""
    seen = controller.evidence
    good_since = controller.good_since
    return {
        "is_on": controller.is_on,
        "troubles": list(seen.troubles),
        "good_for_s": None if good_since is None else now - good_since,
        "evidence": _evidence(seen),
        "rungs": [_rung(state, now) for state in controller.states.values()],
        "history": [_change(change, now) for change in controller.history],
    }


def _rung(state: State, now: float) -> dict[str, Any]:
    rung = state.rung
    return {
        "rung": rung.name,
        "mode": state.mode.value,
        "is_possible": state.is_possible,
        "level": state.level,
        "levels": rung.levels,
        "answers": sorted(rung.answers),
        "effect": rung.effect,
        "undo": rung.undo,
        "taken_s_ago": _ago(state.since, now),
        "trigger": state.trigger or None,
        "before": _evidence(state.before),
        "after": _evidence(state.after),
        "has_helped": state.has_helped,
        "undone_s_ago": _ago(state.undone_at, now),
        "undone_for": state.undone_for or None,
        "calm_s": state.calm,
        "held_for_backlog": state.is_held,
        "num_taken": state.num_taken,
        "num_undone": state.num_undone,
    }


def _change(change: Change, now: float) -> dict[str, Any]:
    return {
        "s_ago": now - change.at,
        "rung": change.rung,
        "direction": change.direction,
        "level": change.level,
        "trigger": change.trigger,
        "evidence": _evidence(change.evidence),
    }


def _evidence(seen: Evidence | None) -> dict[str, Any] | None:
    return None if seen is None else {**seen.numbers, "has_batch": seen.has_batch}


def _ago(at: float | None, now: float) -> float | None:
    return None if at is None else now - at
