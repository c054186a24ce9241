"""Numbers and arrivals of a scenario that make no sense."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_serve.errors import ConfigError

if TYPE_CHECKING:
    from dynamo_serve.bench.scenario import Scenario

ARRIVALS = ("constant", "poisson", "gamma", "ramp", "steps", "trace")


def check_numbers(scenario: Scenario) -> None:
    above = ("rate", "burstiness", "speed", "concurrency", "requests", "duration", "processes")
    for name in (*above, "timeout", "wait", "max_context", "deadline", "bandwidth"):
        if (value := getattr(scenario, name)) is not None and not value > 0:
            raise ConfigError(f"scenario.{name} is {value!r}; allowed: numbers above 0")
    for name in ("warm_up", "warm_up_requests", "probe_rate", "grace", "metrics_every", "priority"):
        if (value := getattr(scenario, name)) < 0:
            raise ConfigError(f"scenario.{name} is {value!r}; allowed: numbers from 0")


def check_arrivals(scenario: Scenario) -> None:
    kind = scenario.arrivals
    if kind and kind not in ARRIVALS:
        raise ConfigError(f"arrivals: {kind!r}; allowed: {', '.join(ARRIVALS)}")
    _check_unused(scenario, kind)
    if kind == "ramp" and len(scenario.ramp) != 3:
        raise ConfigError("arrivals ramp: give ramp as [first rate, last rate, seconds]")
    if kind == "steps" and not scenario.steps:
        raise ConfigError("arrivals steps: give steps as [[rate, seconds], ...]")
    if kind in ("constant", "poisson", "gamma") and scenario.rate is None and not scenario.sweep:
        raise ConfigError(f"arrivals {kind}: a rate is needed")
    if not kind and scenario.rate is None and scenario.concurrency is None and not scenario.sweep:
        raise ConfigError("how much load? give a rate, a concurrency, a sweep, or arrivals")
    bounded = scenario.requests or scenario.duration or kind in ("steps", "trace")
    if not bounded:
        raise ConfigError("when does it end? give requests or a duration")
    try:
        rates = [float(number) for number in scenario.ramp]
        rates += [float(number) for rate, seconds in scenario.steps for number in (rate, seconds)]
    except (TypeError, ValueError):
        raise ConfigError("ramp and steps consist of numbers") from None
    if any(rate < 0 for rate in rates):
        raise ConfigError("ramp and steps: allowed: numbers from 0")
    if kind == "ramp" and (scenario.ramp[2] <= 0 or not max(scenario.ramp[:2])):
        raise ConfigError("ramp: it needs seconds above 0, and a rate above 0")


def _check_unused(scenario: Scenario, kind: str) -> None:
    """What is given must be used."""
    if scenario.bandwidth is not None and scenario.measure_bandwidth:
        raise ConfigError("bandwidth: is either given or measured; leave out one of them")
    for name in ("ramp", "steps"):
        if getattr(scenario, name) and kind != name:
            raise ConfigError(f"{name}: only with arrivals: {name}")
    if scenario.burstiness != 1.0 and kind not in ("", "gamma"):
        raise ConfigError(f"burstiness: only with arrivals: gamma, not {kind}")
    has_rates = kind in ("ramp", "steps", "trace")
    if scenario.rate is not None and (has_rates or scenario.sweep):
        raise ConfigError(f"rate: {kind or 'a sweep'} has its own; leave out one of them")
    if scenario.sweep and has_rates:
        raise ConfigError(f"sweep: needs arrivals with a rate, not {kind}")
