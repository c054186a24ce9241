"""Clients that do not behave, by name: what a scenario may ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynamo_serve.bench.plan import Behaviour
from dynamo_serve.bench.workloads import Odd
from dynamo_serve.errors import ConfigError

# name → its keys besides `share`, and what they are if nothing is said
KINDS: dict[str, dict[str, float | None]] = {
    "slow": {"bytes_per_s": 2000.0},
    "hang_up": {"after_tokens": None, "after_s": None},
    "deadline": {"seconds": 2.0},
    "storm": {"attempts": 10},
    "obey": {"attempts": 10},
}
HANGS_UP_AFTER = 8  # tokens


def odd_ones(given: Mapping[str, Any], usual: Behaviour, where: str) -> tuple[Odd, ...]:
    """`{"slow": 0.1}` or `{"slow": {"share": 0.1, "bytes_per_s": 500}}`. Raises `ConfigError`."""
    made = []
    for name, value in given.items():
        if name not in KINDS:
            raise ConfigError(f"{where}: unknown {name!r}; allowed: {', '.join(KINDS)}")
        keys = dict(value) if isinstance(value, Mapping) else {"share": value}
        share = _number(keys.pop("share", None), f"{where}.{name}.share", most=1.0)
        if unknown := keys.keys() - KINDS[name].keys():
            allowed = ", ".join(("share", *KINDS[name]))
            raise ConfigError(f"{where}.{name}: unknown {min(unknown)!r}; allowed: {allowed}")
        numbers = {key: _number(v, f"{where}.{name}.{key}") for key, v in keys.items()}
        made.append(_odd(name, share, {**KINDS[name], **numbers}, usual))
    if sum(odd.share for odd in made) > 1:
        raise ConfigError(f"{where}: the shares add up to more than 1")
    return tuple(made)


def _odd(name: str, share: float, keys: dict[str, float | None], usual: Behaviour) -> Odd:
    if name == "deadline":
        return Odd(name, share, usual, deadline=keys["seconds"])
    if name == "slow":
        return Odd(name, share, Behaviour(bytes_per_s=keys["bytes_per_s"], retry=usual.retry))
    if name == "hang_up":
        tokens, seconds = keys["after_tokens"], keys["after_s"]
        if tokens is None and seconds is None:
            tokens = HANGS_UP_AFTER
        left = None if tokens is None else max(1, int(tokens))
        return Odd(name, share, Behaviour(leaves_after_tokens=left, leaves_after_s=seconds))
    return Odd(name, share, Behaviour(retry=name, max_attempts=max(1, int(keys["attempts"] or 1))))


def _number(value: Any, where: str, most: float = float("inf")) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
        allowed = f"above 0 up to {most:g}" if most < float("inf") else "above 0"
        raise ConfigError(f"{where} is {value!r}; allowed: numbers {allowed}")
    return float(value)
