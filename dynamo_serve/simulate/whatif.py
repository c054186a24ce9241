"""One simulation: settings in, a run out."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynamo_serve import __version__, settings, tenants
from dynamo_serve.bench.record import Run
from dynamo_serve.config import Config
from dynamo_serve.core.tenant import Tenancy
from dynamo_serve.errors import ConfigError
from dynamo_serve.settings import Given, Loaded
from dynamo_serve.simulate import fleet
from dynamo_serve.simulate.costs import Cost, constants
from dynamo_serve.simulate.fit import fit
from dynamo_serve.simulate.fleet import Cluster
from dynamo_serve.simulate.recording import Recording, duration, spec_of, tenancy_of
from dynamo_serve.simulate.replica import NO_SUCH_RUNGS, Setup

log = logging.getLogger(__name__)

TENANTS = "server.tenants_file"
CACHE = ("page_size", "num_pages", "prefix_sharing", "pinned_fraction", "stale_s")
TRACE = "the trace"
MEANT = (TENANTS, *(f"cache.{name}" for name in CACHE))
PIN = "scheduler.ladder_pin"
DRAFTS = ("scheduler.speculation", "scheduler.max_draft_tokens")


@dataclass(frozen=True, slots=True)
class Options:
    """`cost`: constants, or empty for a fit to the steps of the recording."""

    cost: str = ""
    cluster: Cluster = field(default_factory=Cluster)
    seed: int = 0


def load(recording: Recording, given: Sequence[Given]) -> Loaded:
    """The settings of the recording, and `given` ones on top. Raises `ConfigError`, also for one
    that changes nothing in a simulation."""
    for item in given:
        if item.key in settings.all_keys() and not _is_simulated(item.key):
            allowed = f"{', '.join(MEANT)}, scheduler.* but for drafts"
            raise ConfigError(f"{item.key}: not simulated (from {item.source}); allowed: {allowed}")
    recorded = [
        Given(key, value, TRACE, is_text=False)
        for key, value in _recorded(recording.header.settings).items()
    ]
    return settings.load(flags=[*recorded, *given])


def _recorded(told: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the recording that mean something here. A pinned rung may need another setting, of
    which only that it was set matters: tiers are as they were recorded."""
    found = {key: value for key, value in told.items() if _is_simulated(key)}
    for key in sorted(found.keys() - settings.all_keys()):
        log.warning("the trace's %s is no setting of this version: left out", key)
        del found[key]
    if PIN in found:
        found[PIN] = [rung for rung in found[PIN] if rung not in NO_SUCH_RUNGS]
        if "spill" in found[PIN]:
            found["cache.host_gib"] = told.get("cache.host_gib") or told.get("cache.disk_gib")
    return found


def _is_simulated(key: str) -> bool:
    return key in MEANT or (key.startswith("scheduler.") and key not in DRAFTS)


def cost_of(recording: Recording, options: Options) -> Cost:
    return constants(options.cost) if options.cost else fit(recording.steps, recording.arrivals)


def simulate(recording: Recording, loaded: Loaded, cost: Cost, options: Options) -> Run:
    config, header = loaded.config, recording.header
    # A page size that nobody asks for is that of the recording.
    is_told = loaded.sources["cache.page_size"] != "default"
    page_size = config.cache.page_size if is_told else header.page_size
    setup = Setup(
        config,
        tenancy_of(header, recording.arrivals, _tenancy(config.server.tenants_file)),
        spec_of(header, config.cache.num_pages, page_size),
        cost,
        header.page_size,
        options.seed,
    )
    ended = fleet.run(setup, recording.clients(), options.cluster)
    about = _about(recording, setup, options, _changed(loaded))
    return Run(about, duration(ended.records), ended.records, ended.samples)


def _changed(loaded: Loaded) -> dict[str, Any]:
    """What is not as a server has it by itself, and whatever was said on top of the recording."""
    default, found = Config(), {}
    for key, source in loaded.sources.items():
        section, _, name = key.partition(".")
        value = getattr(getattr(loaded.config, section), name)
        is_usual = value == getattr(getattr(default, section), name)
        if source != "default" and not (source == TRACE and is_usual):
            found[key] = value
    return found


def _tenancy(file: str) -> Tenancy | None:
    return tenants.read(Path(file)).tenancy if file else None


def _about(
    recording: Recording, setup: Setup, options: Options, changed: Mapping[str, Any]
) -> dict[str, Any]:
    cluster = options.cluster
    return {
        "command": "simulate",
        "loop": "open",
        "model": recording.header.model,
        "settings": dict(changed),
        "cost": setup.cost.told(),
        "replicas": cluster.replicas,
        **({"routing": cluster.routing, "look": cluster.look} if cluster.replicas > 1 else {}),
        "weights": {name: tenant.weight for name, tenant in setup.tenancy.tenants.items()},
        "versions": {"dynamo-serve": __version__, "python": platform.python_version()},
        "seed": options.seed,
        "left_out": recording.left_out,
    }
