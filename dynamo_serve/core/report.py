"""What the scheduler says about itself after every step."""

from __future__ import annotations

from dynamo_serve.core.controller import Controller
from dynamo_serve.core.eviction import Cause
from dynamo_serve.core.lifecycle import Lifecycle
from dynamo_serve.core.spill import Spill
from dynamo_serve.core.stats import Stats, StepStats, TierStats
from dynamo_serve.core.tiers import DEVICE


def report(life: Lifecycle, controller: Controller, step: StepStats | None) -> Stats:
    totals, pool, spill = life.totals, life.pool, life.spill
    return Stats(
        num_waiting=len(life.waiting),
        num_running=len(life.running),
        pages_used=pool.num_used,
        pages_cached=pool.num_cached,
        pages_free=pool.num_free,
        prefix_asked_tokens_total=totals["prefix_asked"],
        prefix_hit_tokens_total=totals["prefix_hit"],
        prefix_copied_tokens_total=life.parts.num_copied,
        preemptions_total=totals["preemptions"],
        prompt_tokens_total=totals["prompt"],
        output_tokens_total=totals["output"],
        draft_tokens_total=totals["draft"],
        draft_accepted_tokens_total=totals["draft_accepted"],
        evicted_own_total=pool.cached.evicted[Cause.OWN],
        evicted_others_total=pool.cached.evicted[Cause.OTHERS],
        evicted_stale_total=pool.cached.evicted[Cause.STALE],
        admission_evicted_pages_total=totals["evicted_admitting"],
        lost_pages_total=spill.num_lost,
        restored_tokens_total=spill.num_restored,
        saved_seconds_total=spill.saved_seconds,
        kv_events_total=pool.events.num_events if pool.events else 0,
        kv_events_anew_total=pool.events.num_anew if pool.events else 0,
        step=step,
        rungs=controller.levels,
        rung_changes=controller.changes,
        tiers=tier_stats(spill),
        ladder=controller.take_news(),
        pages_pinned=len(life.pins.pages),
    )


def tier_stats(spill: Spill) -> tuple[TierStats, ...]:
    copied = spill.num_copied.items()
    return tuple(
        TierStats(
            *(tier.name, len(tier), tier.num_slots),
            stored=sum(n for (_, to), n in copied if to == tier.number),
            restored=spill.num_copied[tier.number, DEVICE],
            failed=spill.num_failed[tier.number],
            lost=tier.num_lost,
        )
        for tier in spill.tiers
    )
