"""What a step takes in a simulation: from constants, or as a fit to recorded steps (`fit`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, Protocol

from dynamo_serve.core.step_cost import StepShape
from dynamo_serve.errors import ConfigError
from dynamo_serve.settings import read_yaml

UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9, "%": 1e-2, "": 1.0}
NUMBER = re.compile(r"(\d+(?:\.\d*)?(?:e[+-]?\d+)?)\s*(s|ms|us|µs|ns|%|)", re.IGNORECASE)


class Times(Protocol):
    """What the steps of one replica take, one after the other."""

    def step(self, shape: StepShape) -> float: ...

    def between(self, num_sequences: int) -> float:
        """From the end of a step of so many sequences to the plan of the next one."""
        ...


class Way(NamedTuple):
    """Seconds beside the steps: until a scheduler has a request, and from the step that yields a
    token until it has left the server."""

    there: float = 0.0
    back: float = 0.0


class Cost(Protocol):
    """What takes time, common to all replicas."""

    @property
    def way(self) -> Way: ...

    def times(self, rng: Random) -> Times: ...

    def told(self) -> dict[str, Any]:
        """What it is, as plain data for whoever reads a run."""
        ...


@dataclass(frozen=True, slots=True)
class Constants:
    """Seconds of a step: fixed, and for each token, decoding sequence, token whose KV is read, and
    pair of a prompt token and one that it attends to; `between` two steps; on the way `there` to
    the scheduler, and `back`. `noise`: how far steps are from that, as a share of it (the standard
    deviation of its logarithm)."""

    fixed: float = 0.0
    token: float = 0.0
    sequence: float = 0.0
    read: float = 0.0
    pair: float = 0.0
    between: float = 0.0
    noise: float = 0.0
    there: float = 0.0
    back: float = 0.0

    @property
    def way(self) -> Way:
        return Way(self.there, self.back)

    def predict(self, shape: StepShape) -> float:
        return (
            self.fixed
            + self.token * shape.tokens
            + self.sequence * shape.decode_sequences
            + self.read * (shape.decode_context + shape.prefill_reads)
            + self.pair * shape.prefill_context
        )

    def times(self, rng: Random) -> Times:
        return _ConstantTimes(self, rng)

    def told(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in fields(self)}


@dataclass(slots=True)
class _ConstantTimes:
    cost: Constants
    rng: Random

    def step(self, shape: StepShape) -> float:
        seconds = self.cost.predict(shape)
        noise = self.cost.noise
        return seconds * self.rng.lognormvariate(0.0, noise) if noise else seconds

    def between(self, num_sequences: int) -> float:
        return self.cost.between


def constants(said: str) -> Constants:
    """From `fixed=2ms,token=20us` or the name of a YAML file with such lines. Raises
    `ConfigError`."""
    if "=" not in said:
        tree = read_yaml(Path(said))
        if not isinstance(tree, dict):
            raise ConfigError(f"{said}: not a mapping; allowed: lines such as 'fixed: 2ms'")
        return _constants({str(key): str(value) for key, value in tree.items()}, said)
    pairs = (part.partition("=") for part in said.split(","))
    return _constants({key.strip(): value for key, _, value in pairs}, "--cost")


def _constants(given: Mapping[str, str], source: str) -> Constants:
    names = [item.name for item in fields(Constants)]
    values = {}
    for name, text in given.items():
        if name not in names:
            raise ConfigError(f"{source}: {name!r} is no cost; allowed: {', '.join(names)}")
        match = NUMBER.fullmatch(text.strip())
        if match is None or (match[2] == "%") > (name == "noise"):
            raise ConfigError(f"{source}: {name} = {text!r}; allowed: numbers such as 2ms or 20us")
        values[name] = float(match[1]) * UNITS[match[2].lower()]
    made = Constants(**values)
    if made.fixed + made.token + made.sequence <= 0:
        raise ConfigError(f"{source}: a step has to take time; set fixed, token or sequence")
    return made
