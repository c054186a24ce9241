"""Recorded traffic: who asked when, for how much, and what became of it; never what was said.

A trace is JSON lines, gzipped if its name ends in `.gz`. The first line is the header; every other
one is an arrival or a step, told apart by its `kind`. Keys that equal their defaults are left out.
docs/traces.md describes the format for other programs.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from dynamo_serve.errors import ConfigError
from dynamo_serve.json_lines import check_fields, check_header, numbered, parse

FORMAT, VERSION = "dynamo-serve-trace", 1
MOST_TOKENS = 1 << 24  # of one prompt or answer


@dataclass(frozen=True, slots=True)
class Header:
    """What was recorded where. `began_at` is a Unix time; `spec` has facts of the engine
    (num_pages, max_model_len, …), `settings` by key what was decided by, and what else differs from
    its default."""

    began_at: float = 0.0
    model: str = ""
    page_size: int = 16
    spec: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    tenancy: dict[str, Any] = field(default_factory=dict)  # `core.tenant.Tenancy` as plain data
    version: str = ""  # of the server
    part: int = 0  # files of one recording are counted from 0


@dataclass(frozen=True, slots=True)
class Arrival:
    """One choice of a request, written when it is over. Times are seconds.

    `at`: since `Header.began_at`. `pages`: the full pages of its prompt as runs [first, count] of
    numbers; equal numbers mean equal text up to there, within a recording. `output_pages`: the
    full pages behind these, which its answer completes: a later prompt that goes on with the
    answer has the same numbers. `ended`: a `Finish` ("stop", "length", "cancelled", "error",
    "deadline") or "refused". `transit`: until the scheduler
    had it; `waited`: until it was admitted, with that; `prefill`: from then until the engine had
    its first token. `gone_at`: when its client hung up, after so many seconds. `reading`:
    bytes per second that a slow reader took, where one was noticed. Waiting, first token and end
    are since `at`. Without prompt tokens it was refused before anybody looked at its prompt.

    Of several choices of one call, which share a number `call`, the first has how many they are in
    `num_choices`, and the others have 0, as in `core.request.Request`.
    """

    at: float
    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    pages: tuple[tuple[int, int], ...] = ()
    output_pages: tuple[tuple[int, int], ...] = ()
    tenant: str = "default"
    class_name: str = ""
    priority: int = 0
    num_choices: int = 1
    call: int | None = None
    group: str = ""  # stands for its `prompt_cache_key`
    salt: str = ""  # stands for its `cache_salt`
    is_stream: bool = True
    is_open_ended: bool = False
    deadline: float | None = None
    has_class_deadline: bool = False  # its client named none: it is the default of its class
    ended: str = "length"
    status: int = 200
    retry_after: float | None = None
    cached_tokens: int = 0
    transit: float | None = None
    waited: float | None = None
    prefill: float | None = None
    first_token: float | None = None
    end: float | None = None
    gone_at: float | None = None
    reading: float | None = None
    preemptions: int = 0
    pooling: str = ""  # the kind of vector that it asked for instead of tokens
    text: str | None = None  # the prompt, only where the operator asked for it
    kind: str = "arrival"


@dataclass(frozen=True, slots=True)
class Step:
    """One engine step: what it ran (`core.step_cost.StepShape`, in its order) and its seconds."""

    at: float
    seconds: float
    shape: tuple[float, ...]
    kind: str = "step"


Line = Arrival | Step
KINDS: dict[str, type[Arrival] | type[Step]] = {"arrival": Arrival, "step": Step}
DEFAULTS = {name: [(f.name, f.default) for f in fields(kind)] for name, kind in KINDS.items()}
# Made once: a million lines are read.
KNOWN = {kind: {f.name for f in fields(kind)} for kind in (Header, Arrival, Step)}
NEEDED = {
    kind: {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
    for kind in (Header, Arrival, Step)
}
ENCODE = json.JSONEncoder(separators=(",", ":")).encode  # made once: many lines are written
T = TypeVar("T", Header, Arrival, Step)


def dump(line: Header | Line) -> str:
    """One line of JSON, without its end."""
    if isinstance(line, Header):
        return json.dumps({"format": FORMAT, "format_version": VERSION, **asdict(line)})
    plain = {
        name: value
        for name, default in DEFAULTS[line.kind]
        if (value := getattr(line, name)) != default or name == "kind"
    }
    return ENCODE(plain)


def open_trace(path: Path, mode: str) -> IO[str]:
    if path.suffix == ".gz":
        return cast(IO[str], gzip.open(path, mode + "t", encoding="utf-8"))
    return path.open(mode, encoding="utf-8")


def read(path: Path) -> tuple[Header, Iterator[Line]]:
    """The header and the lines of a trace, read as they are asked for. Raises `ConfigError` naming
    the line at fault; a last line that was cut off is left out."""
    file = open_trace(path, "r")
    texts = numbered(file, path)
    try:
        number, text = next(texts, (1, ""))
        first = parse(path, number, text)
        check_header(first, path, FORMAT, VERSION)
        header = _made(Header, first, path, 1)
        if not 1 <= header.page_size <= MOST_TOKENS:
            raise ConfigError(f"{path}, line 1: pages of {header.page_size} tokens")
    except ConfigError:
        file.close()
        raise
    return header, _lines(file, texts, path)


def _lines(file: IO[str], texts: Iterator[tuple[int, str]], path: Path) -> Iterator[Line]:
    with file:
        for number, text in texts:
            if not text.endswith("\n"):
                return  # whoever wrote it was killed
            plain = parse(path, number, text)
            kind = KINDS.get(str(plain.get("kind", "")))
            if kind is None:
                raise ConfigError(f"{path}, line {number}: unknown kind {plain.get('kind')!r}")
            try:
                for name in ("pages", "output_pages"):
                    if name in plain:
                        plain[name] = tuple((first, count) for first, count in plain[name])
                if "shape" in plain:
                    plain["shape"] = tuple(plain["shape"])
            except (TypeError, ValueError):
                raise ConfigError(f"{path}, line {number}: bad pages or shape") from None
            made: Line = _made(kind, plain, path, number)  # type: ignore[type-var]
            if isinstance(made, Arrival) and (fault := _fault(made)):
                raise ConfigError(f"{path}, line {number}: {fault}")
            yield made


def _fault(arrival: Arrival) -> str:
    """What makes no sense in an arrival, or is more than anybody has room for."""
    for name in ("prompt_tokens", "output_tokens", "max_tokens", "cached_tokens"):
        if not 0 <= (value := getattr(arrival, name)) <= MOST_TOKENS:
            return f"{name} cannot be {value}; allowed: 0 to {MOST_TOKENS}"
    runs = (*arrival.pages, *arrival.output_pages)
    if any(first < 0 or count < 1 for first, count in runs):
        return "a page number below 0, or an empty run of them"
    if sum(count for _, count in runs) > arrival.prompt_tokens + arrival.output_tokens:
        return "more full pages than tokens"
    return ""


def _made(kind: type[T], plain: dict[str, Any], path: Path, number: int) -> T:
    if unknown := plain.keys() - KNOWN[kind]:
        raise ConfigError(f"{path}, line {number}: unknown key {min(unknown)!r}")
    if missing := NEEDED[kind] - plain.keys():
        raise ConfigError(f"{path}, line {number}: {min(missing)!r} is missing")
    made = kind(**plain)
    try:
        check_fields(made, plain)
    except ValueError as error:
        raise ConfigError(f"{path}, line {number}: {error}") from None
    return made
