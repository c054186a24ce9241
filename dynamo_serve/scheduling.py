"""Builds the scheduler from settings and from what the engine is: for servers and simulations."""

from __future__ import annotations

from math import inf

from dynamo_serve.config import Config, SchedulerSection
from dynamo_serve.core.engine import EngineSpec
from dynamo_serve.core.ladder import Mode, modes_of
from dynamo_serve.core.limits import Limits
from dynamo_serve.core.page_pool import PagePool
from dynamo_serve.core.pins import Pinning
from dynamo_serve.core.scheduler import Scheduler
from dynamo_serve.core.stats import Standing
from dynamo_serve.core.tenant import Tenancy


def build_scheduler(config: Config, tenancy: Tenancy, spec: EngineSpec) -> Scheduler:
    cache = config.cache
    pool = PagePool(
        *(spec.num_pages, spec.page_size),
        prefix_sharing=cache.prefix_sharing,
        stale_seconds=cache.stale_s or inf,
    )
    longest = pool.pages_for(spec.max_model_len)
    pinning = Pinning.of(spec.num_pages, longest, cache.pinned_fraction)
    limits = limits_of(config, spec)
    return Scheduler(pool, limits, tenancy, tiers=spec.tiers, pinning=pinning)


def limits_of(config: Config, spec: EngineSpec) -> Limits:
    drafts = spec.verifies_drafts and config.scheduler.speculation == "auto"
    return Limits(
        max_prefill_tokens=config.scheduler.max_prefill_tokens,
        max_mixed_tokens=config.scheduler.max_mixed_tokens,
        max_step_seconds=config.scheduler.max_step_ms / 1000 or inf,
        max_decode_sequences=config.scheduler.max_decode_sequences,
        max_queue_delay=config.scheduler.max_queue_delay_ms / 1000,
        max_waiting=config.scheduler.max_waiting,
        mix_phases=config.scheduler.mix_phases,
        fit_chunks=config.scheduler.fit_chunks,
        max_draft_tokens=config.scheduler.max_draft_tokens if drafts else 0,
        hold_steps=spec.holds_steps and config.scheduler.hold_steps,
        ladder=config.scheduler.ladder == "auto",
        ladder_max_tokens=config.scheduler.ladder_max_tokens,
        lighter=bool(config.model.lighter),
        copy_seconds=spec.copy_seconds if config.cache.partial_pages else None,
        whole_prompts=spec.whole_prompts,
    )


def recall_ladder(
    scheduler: Scheduler, section: SchedulerSection, standing: Standing, now: float
) -> None:
    """Begin as the engine before ended; what operators said counts for more than settings."""
    controller = scheduler.controller
    controller.recall(standing, now)
    modes = modes_of(section.ladder_pin, section.ladder_forbid)
    said = {name: Mode(mode) for name, mode in standing.modes.items()}
    controller.steer({**modes, **said}, now)
