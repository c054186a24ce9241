"""How long things are: a number, or a distribution named in a few characters."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

from dynamo_serve.errors import ConfigError

Draw = Callable[[random.Random], float]
FORMS = (
    "128, uniform:LOW,HIGH, normal:MEAN,DEVIATION[,MAX], lognormal:MEDIAN,SIGMA[,MAX], "
    "exponential:MEAN[,MAX], file:PATH (a number in each line)"
)


def lengths(text: str | float) -> Draw:
    """A distribution by its name. Raises `ConfigError` that lists the forms."""
    kind, _, rest = str(text).partition(":")
    if kind == "file":
        return _from_file(Path(rest))
    try:
        if not rest:
            fixed = _checked(float(kind))
            return lambda rng: fixed
        numbers = [_checked(float(number)) for number in rest.split(",")]
        return _named(kind, numbers)
    except (ValueError, KeyError):
        raise ConfigError(f"{text!r} is no length; allowed: {FORMS}") from None


def _named(kind: str, numbers: list[float]) -> Draw:
    """Raises `KeyError` for an unknown name and `ValueError` for a wrong number of numbers."""
    if kind == "uniform":
        low, high = numbers
        return lambda rng: rng.uniform(low, high)
    most, least = {"normal": (3, 2), "lognormal": (3, 2), "exponential": (2, 1)}[kind]
    if not least <= len(numbers) <= most:
        raise ValueError
    cap = numbers.pop() if len(numbers) == most else math.inf
    if kind == "exponential":
        return lambda rng: min(cap, rng.expovariate(1 / numbers[0]))
    middle, spread = numbers
    if kind == "normal":
        return lambda rng: min(cap, max(0.0, rng.gauss(middle, spread)))
    log = math.log(middle)
    return lambda rng: min(cap, rng.lognormvariate(log, spread))


def _from_file(path: Path) -> Draw:
    try:
        found = [_checked(float(line)) for line in path.read_text().split()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not found:
        raise ConfigError(f"{path}: no lengths")
    return lambda rng: rng.choice(found)


def _checked(number: float) -> float:
    if not 0 <= number < math.inf:
        raise ValueError(f"{number:g} is no length")
    return number


def whole(draw: Draw, rng: random.Random) -> int:
    """A length in tokens or turns: at least 1."""
    return max(1, round(draw(rng)))
