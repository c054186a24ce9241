"""All that a run of the load generator can be told, from a YAML file, flags, or both."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from dynamo_serve.bench import scenario_checks, shapes, targets
from dynamo_serve.bench.odd import odd_ones
from dynamo_serve.bench.plan import RETRIES, Behaviour, Call
from dynamo_serve.bench.shapes import TRACES, Shape
from dynamo_serve.bench.workloads import Part
from dynamo_serve.errors import ConfigError

PROMPTS = ("auto", "words", "ids")
PROMISES = {"ttft_ms": "ttft", "itl_ms": "itl", "tpot_ms": "tpot", "e2e_ms": "e2e"}
TIMED = ("mooncake", "burstgpt")
TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "Table": (dict,),
    "Rows": (list, tuple),
}
Table = Mapping[str, Any]
Rows = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Scenario:
    """docs/load.md describes each. Times are seconds, or milliseconds where the name says so;
    `bandwidth` is in GB/s."""

    name: str = ""
    about: str = ""
    workload: str = "chat"
    shape: Table = field(default_factory=dict)
    file: str = ""
    speed: float = 1.0
    mix: Rows = ()
    arrivals: str = ""
    rate: float | None = None
    burstiness: float = 1.0
    ramp: Rows = ()
    steps: Rows = ()
    concurrency: int | None = None
    sweep: Table = field(default_factory=dict)
    requests: int | None = None
    duration: float | None = None
    warm_up: float = 0.0
    warm_up_requests: int = 0
    probe_rate: float = 0.0
    processes: int = 1
    seed: int = 0
    model: str = ""
    key: str = ""
    metrics_key: str = ""
    prompts: str = "auto"
    tokenizer: str = ""
    max_context: int | None = None
    ignore_eos: bool = False
    stream: bool = True
    usage: bool = True
    extra: Table = field(default_factory=dict)
    timeout: float = 600.0
    grace: float = 60.0
    metrics_every: float = 1.0
    wait: float = 30.0
    bandwidth: float | None = None
    measure_bandwidth: bool = False
    tenant: str = ""
    class_name: str = ""
    priority: int = 0
    deadline: float | None = None
    retry: str = "none"
    misbehaviour: Table = field(default_factory=dict)
    promises: Table = field(default_factory=dict)
    targets: Table = field(default_factory=dict)


# What a part of a mix may say for itself; the rest is the same for all.
OWN = (
    *("workload", "shape", "file", "speed", "key", "tenant", "class_name", "priority", "stream"),
    *("deadline", "retry", "misbehaviour", "promises", "extra"),
)


@dataclass(frozen=True, slots=True)
class Source:
    """A part and where its sessions come from: a shape, or a file of the trace format `trace`.

    `weight` is what the server gives its tenant, for the report's fairness.
    """

    part: Part
    shape: Shape
    trace: str = ""
    path: Path = Path()
    speed: float = 1.0
    weight: float = 1.0


def read(path: Path) -> dict[str, Any]:
    """The keys of a scenario's file. Raises `ConfigError`."""
    try:
        plain = yaml.safe_load(path.read_text())
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(plain, dict):
        raise ConfigError(f"{path}: not a table of keys")
    return plain


def scenario_of(plain: Mapping[str, Any]) -> Scenario:
    """A scenario, with everything checked that can be without a server. Raises `ConfigError`."""
    scenario = Scenario(**_typed(plain, "scenario", [item.name for item in fields(Scenario)]))
    scenario_checks.check_numbers(scenario)
    scenario_checks.check_arrivals(scenario)
    if scenario.prompts not in PROMPTS:
        raise ConfigError(f"prompts: {scenario.prompts!r}; allowed: {', '.join(PROMPTS)}")
    if scenario.prompts == "ids" and scenario.tokenizer:
        raise ConfigError("prompts: ids need no tokenizer; leave one of them out")
    targets.checked(scenario.targets)
    found = sources(scenario)
    _check_files(scenario, found)
    _check_processes(scenario, found)
    return scenario


def _check_processes(scenario: Scenario, found: Sequence[Source]) -> None:
    """Processes inherit the whole plan, so it has to have an end: not only when time is up."""
    has_times = scenario.arrivals or scenario.rate is not None or scenario.sweep
    has_end = has_times or scenario.requests or any(source.trace for source in found)
    if scenario.processes > 1 and not has_end:
        raise ConfigError("processes: a closed loop of several has to have an end: give requests")


def _check_files(scenario: Scenario, found: Sequence[Source]) -> None:
    if scenario.arrivals != "trace":
        if any(source.speed != 1.0 for source in found):
            raise ConfigError("speed: only with arrivals: trace")
        return
    if [source.trace in TIMED for source in found] != [True]:
        raise ConfigError(f"arrivals trace: needs one file, of {' or '.join(TIMED)}")


def sources(scenario: Scenario) -> list[Source]:
    """The parts of the mix; without one, the scenario itself is the only part."""
    if not scenario.mix:
        return [_source(scenario, {}, "scenario")]
    found = []
    for number, given in enumerate(scenario.mix):
        where = f"mix.{number}"
        if not isinstance(given, Mapping):
            raise ConfigError(f"{where}: not a table of keys")
        found.append(_source(scenario, given, where))
    return found


def _source(scenario: Scenario, given: Table, where: str) -> Source:
    rest = {key: value for key, value in given.items() if key not in ("name", "share", "weight")}
    own = {name: getattr(scenario, name) for name in OWN} | _typed(rest, where, OWN)
    workload = own["workload"]
    share, weight = (_above_0(given.get(key, 1), f"{where}.{key}") for key in ("share", "weight"))
    usual = _behaviour(own["retry"], where)
    call = Call(
        kind=str(given.get("name", workload)),
        tenant=own["tenant"],
        api_key=_key(own["key"], where),
        class_name=own["class_name"],
        priority=own["priority"],
        deadline=own["deadline"],
        is_stream=own["stream"],
        extra={**({"ignore_eos": True} if scenario.ignore_eos else {}), **own["extra"]},
        behaviour=usual,
        targets=_promises(own["promises"], where),
    )
    if not call.is_stream and call.targets.keys() - {"e2e"}:
        raise ConfigError(
            f"{where}.promises: without a stream nobody sees tokens come: only e2e_ms"
        )
    part = Part(call.kind, share, call, odd_ones(own["misbehaviour"], usual, where))
    if workload not in TRACES:
        if own["file"]:
            raise ConfigError(f"{where}.file: only for {', '.join(TRACES)}, not for {workload}")
        return Source(
            part, shapes.shape_of(workload, dict(own["shape"])), speed=own["speed"], weight=weight
        )
    if not own["file"]:
        raise ConfigError(f"{where}: the workload {workload} needs a file")
    if unknown := own["shape"].keys() - {"is_chat"}:
        raise ConfigError(f"{where}.shape.{min(unknown)}: a file has lengths of its own")
    shape = shapes.shape_of("plain", {"is_chat": True, **own["shape"]})
    return Source(part, shape, workload, Path(own["file"]), own["speed"], weight)


def _above_0(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ConfigError(f"{where} is {value!r}; allowed: numbers above 0")
    return value


def _typed(plain: Mapping[str, Any], where: str, allowed: Sequence[str]) -> dict[str, Any]:
    kinds: dict[str, str] = {item.name: str(item.type) for item in fields(Scenario)}
    found: dict[str, Any] = {}
    for given, value in plain.items():
        name = "class_name" if given == "class" else given
        if name not in allowed:
            known = ", ".join("class" if key == "class_name" else key for key in allowed)
            raise ConfigError(f"{where}: unknown key {given!r}; allowed: {known}")
        kind, _, nothing = kinds[name].partition(" | ")
        is_number = isinstance(value, bool) and kind != "bool"
        if (value is None and not nothing) or (
            value is not None and (is_number or not isinstance(value, TYPES[kind]))
        ):
            raise ConfigError(f"{where}.{given} is {value!r}; allowed: {_name(kind)}")
        found[name] = tuple(value) if isinstance(value, list) else value
    return found


def _name(kind: str) -> str:
    names = {"str": "text", "int": "whole numbers", "float": "numbers", "bool": "true or false"}
    return names.get(kind, "a table of keys" if kind == "Table" else "a list")


def _behaviour(retry: str, where: str) -> Behaviour:
    if retry not in RETRIES:
        raise ConfigError(f"{where}.retry: {retry!r}; allowed: {', '.join(RETRIES)}")
    return Behaviour(retry=retry)


def _promises(given: Table, where: str) -> dict[str, float]:
    for name, value in given.items():
        if name not in PROMISES:
            raise ConfigError(f"{where}.promises: {name!r}; allowed: {', '.join(PROMISES)}")
        _above_0(value, f"{where}.promises.{name}")
    return {PROMISES[name]: value / 1e3 for name, value in given.items()}


def _key(key: str, where: str) -> str:
    """A key, or the environment's variable that has it."""
    if not key.startswith("$"):
        return key
    if key[1:] not in os.environ:
        raise ConfigError(f"{where}.key: the environment has no {key[1:]}")
    return os.environ[key[1:]]
