"""Defaults < file < environment < flags, made into one frozen `Config` with every value's source.

Environment: `DYNAMO_SERVE_<SECTION>__<KEY>` in capitals, for example
`DYNAMO_SERVE_SCHEDULER__MAX_PREFILL_TOKENS=256`; a list is written `a,b` or `[a, b]`.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import yaml

from dynamo_serve.config import CacheSection, Config
from dynamo_serve.errors import ConfigError
from dynamo_serve.settings_key import BadValue, Key
from dynamo_serve.settings_triton import triton_contradictions

PREFIX = "DYNAMO_SERVE_"
MAX_PORT = 65_535  # ZeroMQ cuts a larger one to 16 bits without a word

# A cluster that runs a service called dynamo-serve puts these into every container beside it.
_SERVICE_LINK = re.compile(
    PREFIX + r"(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)"
)
_SERVICE_LINK_URL = re.compile(r"(tcp|udp|sctp)://\S+")


class Given(NamedTuple):
    """One value somebody set: `value` is text from environment and flags, else a YAML value."""

    key: str
    value: object
    source: str
    is_text: bool


class Loaded(NamedTuple):
    """The settings, and where each came from ("server.port" → "flag --port")."""

    config: Config
    sources: Mapping[str, str]


@functools.cache
def all_keys() -> dict[str, Key]:
    """Every key by its path, in the order of the sections."""
    keys = {}
    for name, section in get_type_hints(Config).items():
        kinds = get_type_hints(section)
        for item in fields(section):
            path = f"{name}.{item.name}"
            keys[path] = Key(path, kinds[item.name], item.default, **item.metadata)
    return keys


def load(
    file: str | Path | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Iterable[Given] = (),
) -> Loaded:
    """The settings after every layer. Raises `ConfigError` with one line for each fault."""
    given = [
        *(from_file(Path(file)) if file else ()),
        *from_environment(environment or {}),
        *flags,
    ]
    values: dict[str, Any] = {path: key.default for path, key in all_keys().items()}
    sources = dict.fromkeys(values, "default")
    faults = []
    for item in given:
        try:
            values[item.key] = _parse(item)
            sources[item.key] = item.source
        except BadValue as bad:
            faults.append(f"{item.key}{bad} (from {item.source})")
    faults += [f"{fault} (from {sources[key]})" for key, fault in _contradictions(values)]
    if faults:
        raise ConfigError("\n".join(faults))
    return Loaded(_build(values), sources)


def _contradictions(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Values that are allowed, but not together: the key of one, and what to do."""
    key, lighter = "model.lighter", values["model.lighter"]
    if lighter and lighter == values["model.quantization"]:
        fault = "model.quantization is that already, so there is nothing lighter to switch to"
        remedy = f"leave {key} empty, or set model.quantization to 'none'"
        yield key, f"{key} = {lighter!r}: {fault}; {remedy}"
    if bool(values["cache.disk_gib"]) != bool(values["cache.disk_path"]):
        key = "cache.disk_path" if values["cache.disk_path"] else "cache.disk_gib"
        yield key, f"{key}: set cache.disk_gib and cache.disk_path, or neither"
    for key in ("cache.host_gib", "cache.disk_gib", "cache.shared_prefixes"):
        if values[key] and not values["cache.prefix_sharing"]:
            yield key, f"{key}: pages are found again by content: set cache.prefix_sharing to true"
    for key in ("record.max_mib", "record.keep", "record.steps", "record.text"):
        if values[key] != all_keys()[key].default and not values["record.path"]:
            yield key, f"{key}: nothing is recorded without a folder; set record.path, too"
    key = "scheduler.ladder_pin"
    if "lighter_weights" in values[key] and not lighter:
        yield key, f"{key}: lighter_weights needs weights to switch to; set model.lighter"
    if "spill" in values[key] and not (values["cache.host_gib"] or values["cache.disk_gib"]):
        yield key, f"{key}: spill needs a tier to go to; set cache.host_gib or cache.disk_gib"
    yield from _event_contradictions(values)
    yield from triton_contradictions(values, lambda key: values[key] != all_keys()[key].default)


def _event_contradictions(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    key, default = "cache.kv_events", CacheSection()
    if not values[key]:
        for name in ("kv_events_topic", "kv_events_replay", "kv_events_buffer"):
            if values[f"cache.{name}"] != getattr(default, name):
                yield f"cache.{name}", f"cache.{name}: set {key}, too, or neither"
        return
    for key in ("cache.kv_events", "cache.kv_events_replay"):
        endpoint: str = values[key]
        if endpoint and not 1 <= int(endpoint.rpartition(":")[2]) <= MAX_PORT:
            yield key, f"{key} = {endpoint!r}: allowed: ports from 1 to {MAX_PORT}"
    if not values["cache.prefix_sharing"]:
        yield "cache.kv_events", "cache.kv_events: it needs cache.prefix_sharing"
    if values["cache.kv_events"] == values[key]:
        yield key, f"{key}: it needs an address of its own"


def _build(values: Mapping[str, Any]) -> Config:
    sections = {}
    for name, section in get_type_hints(Config).items():
        inside = {item.name: values[f"{name}.{item.name}"] for item in fields(section)}
        sections[name] = section(**inside)
    return Config(**sections)


def _parse(item: Given) -> object:
    key = all_keys().get(item.key)
    if key is None:
        raise BadValue(f": unknown key; {suggestion(item.key)}")
    return key.from_text(str(item.value)) if item.is_text else key.from_yaml(item.value)


def suggestion(path: str) -> str:
    """What the writer of an unknown key probably meant, and what there is to choose from."""
    section, _, leaf = path.rpartition(".")
    known = [tuple(key.split(".")) for key in all_keys()]
    sections = dict.fromkeys(where for where, _ in known)
    near = [f"{where}.{name}" for where, name in known if name == leaf]
    inside = [name for where, name in known if where == section]
    if inside and not near:  # else the section alone would make any two keys of it look alike
        near = [f"{section}.{name}" for name in difflib.get_close_matches(leaf, inside, n=1)]
    elif not near:
        near = difflib.get_close_matches(path, [*all_keys(), *sections], n=1)
    allowed = inside or [f"{where}.*" for where in sections]
    return (f"did you mean {near[0]}? " if near else "") + "allowed: " + ", ".join(allowed)


# --- the layers


def from_file(path: Path) -> Iterator[Given]:
    """The values in a YAML file. Raises `ConfigError` if it is none, or says a thing twice."""
    source, tree = f"file {path}", read_yaml(path)
    for name, section in _mapping(tree, str(path), "sections such as 'server:'").items():
        if not any(known.startswith(f"{name}.") for known in all_keys()):
            raise ConfigError(f"{name}: unknown section; {suggestion(str(name))} (from {source})")
        for key, value in _mapping(section, f"{path}: {name}", "'key: value' lines").items():
            yield Given(f"{name}.{key}", value, source, is_text=False)


def read_yaml(path: Path) -> object:
    """The tree in a YAML file. Raises `ConfigError` if it is none, or says a thing twice."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read this file: {error.strerror}") from error
    # ValueError: 2020-13-01; the others: tags such as !!bool before what is none
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {_problem(error)}") from error


def _problem(error: Exception) -> str:
    """What is wrong and where. The library's own text quotes the line, which may hold a key."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"{error.problem} in line {mark.line + 1}, column {mark.column + 1}"
    return " ".join(str(error).split())


def _mapping(tree: object, where: str, allowed: str) -> dict[Any, Any]:
    if tree is None:  # an empty file, or a section whose every line is commented out
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: got {type(tree).__name__}; allowed: {allowed}")
    return tree


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, where YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # not hashable: refused below
            if key.value in seen:
                problem = f"key {key.value!r} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def from_environment(environment: Mapping[str, str]) -> Iterator[Given]:
    """The values in variables that begin with `DYNAMO_SERVE_`.

    Raises `ConfigError` for one that names no key: a misspelt setting must not pass unnoticed.
    Variables that a cluster injects for a service of the same name are none of ours.
    """
    known = {variable(path): path for path in all_keys()}
    for name in sorted(environment):
        if not name.startswith(PREFIX) or _is_service_link(name, environment[name]):
            continue
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"allowed: {PREFIX}<SECTION>__<KEY>"
            raise ConfigError(f"{name}: unknown environment variable; {hint}")
        yield Given(known[name], environment[name], f"environment {name}", is_text=True)


def _is_service_link(name: str, value: str) -> bool:
    if _SERVICE_LINK.fullmatch(name):
        return True
    return name.endswith("_PORT") and bool(_SERVICE_LINK_URL.fullmatch(value))


def variable(path: str) -> str:
    """The environment variable of a key: "server.port" → "DYNAMO_SERVE_SERVER__PORT"."""
    return PREFIX + path.upper().replace(".", "__")


def from_set(assignment: str) -> Given:
    """The value in `--set section.key=value`."""
    path, equals, value = assignment.partition("=")
    if not equals:
        raise ConfigError(f"--set {assignment}: no '='; allowed: --set section.key=value")
    return Given(path.strip(), value, f"flag --set {path.strip()}", is_text=True)


# --- for people


def render(loaded: Loaded) -> str:
    """The settings as YAML, each with its source; secrets are masked."""
    lines: list[str] = []
    section = ""
    for path, key in all_keys().items():
        name, leaf = path.split(".")
        if name != section:
            section = name
            lines.append(f"{name}:")
        value = getattr(getattr(loaded.config, name), leaf)
        shown = json.dumps(key.shown(value), ensure_ascii=False)
        lines.append(f"  {f'{leaf}: {shown}':<40}  # {loaded.sources[path]}")
    return "\n".join(lines) + "\n"
