"""What a run leaves behind: one record for each request, and what the run was.

A run is a file of JSON lines: the header, then records and samples in any order. Real runs, replays
and simulations write the same, so that one report fits all. Keys that equal their defaults are
left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dynamo_serve.errors import ConfigError
from dynamo_serve.json_lines import (
    are_numbers,
    check_fields,
    check_header,
    is_number,
    numbered,
    parse,
)

FORMAT, VERSION = "dynamo-serve-run", 1
OUTCOMES = ("ok", "refused", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class Record:
    """One request as its client saw it; seconds since the run began.

    It was due at `due` and sent at `sent`: latencies count from `due` in an open loop, so that a
    client that falls behind hides nothing (coordinated omission). `first` is when the first token
    came, `gaps` the seconds between reads that brought tokens (of each of its `choices` for itself,
    one choice after the other), `end` the last byte. `outcome`:
    "ok", "refused" (429 or 503), "failed", or "cancelled" by the client's own will. `attempts`
    counts retries, too; `targets` are what was promised (ttft, itl, e2e; seconds).
    `server` has times by the server's own account, where it gives one.
    """

    number: int
    due: float
    sent: float
    outcome: str = "ok"
    status: int = 200
    kind: str = ""  # of the workload: "chat", "rag", "probe", …
    tenant: str = ""
    class_name: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    first: float | None = None
    end: float | None = None
    gaps: tuple[float, ...] = ()
    choices: int = 1
    finish: str = ""
    attempts: int = 1
    retry_after: float | None = None
    error: str = ""
    is_warm_up: bool = False
    targets: dict[str, float] = field(default_factory=dict)
    server: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sample:
    """Gauges and counters of a server at one time, by their metric names with labels."""

    at: float
    values: dict[str, float]


@dataclass(frozen=True, slots=True)
class Run:
    """`about` says what ran: command, plan, loop ("open" or "closed"), url, model, settings,
    versions, commit, machine, seed; `seconds` how long it measured (warm-up left out)."""

    about: dict[str, Any]
    seconds: float
    records: list[Record]
    samples: list[Sample] = field(default_factory=list)


def write(run: Run, path: Path) -> None:
    head = {"format": FORMAT, "format_version": VERSION, "seconds": run.seconds, "about": run.about}
    with path.open("w", encoding="utf-8") as file:
        for line in (head, *map(_plain, run.records), *map(asdict, run.samples)):
            file.write(json.dumps(line, separators=(",", ":")) + "\n")


def check_out(flag: str, name: str | None) -> None:
    """Raises `ConfigError` for a file that cannot be written: before a run, not after it."""
    if not name:
        return
    path = Path(name)
    if not path.parent.is_dir():
        raise ConfigError(f"{flag} {path}: there is no folder {path.parent}")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{flag} {path}: cannot be written; name another file")


def read(path: Path) -> Run:
    """A run from its file. Raises `ConfigError` naming what is wrong with it."""
    with path.open(encoding="utf-8") as file:
        lines = [parse(path, number, text) for number, text in numbered(file, path)]
    if not lines:
        raise ConfigError(f"{path} is empty")
    head = lines[0]
    check_header(head, path, FORMAT, VERSION)
    about, seconds = head.get("about"), head.get("seconds")
    if not isinstance(about, dict) or seconds is None or not is_number(seconds):
        raise ConfigError(f"{path}, line 1: a run has `about`, an object, and `seconds`, a number")
    records, samples = [], []
    for number, line in enumerate(lines[1:], 2):
        try:
            if "values" in line:
                samples.append(_sample(line))
            else:
                records.append(_record(line))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{path}, line {number}: {error}") from None
    return Run(about, float(seconds), records, samples)


def _record(line: dict[str, Any]) -> Record:
    """Raises `TypeError` or `ValueError` for what is none."""
    record = Record(**{**line, "gaps": tuple(line.get("gaps", ()))})
    check_fields(record)
    return record


def _sample(line: dict[str, Any]) -> Sample:
    sample = Sample(**line)
    if not is_number(sample.at) or not are_numbers(sample.values):
        raise ValueError("a sample has `at`, a number, and `values`, numbers by name")
    return sample


def _plain(record: Record) -> dict[str, Any]:
    pairs: Iterable[tuple[str, Any]] = ((f.name, getattr(record, f.name)) for f in fields(record))
    defaults = {f.name: f.default for f in fields(record)}
    return {name: value for name, value in pairs if value != defaults[name] and value != {}}
