"""`dynamo-serve bench report` and `bench compare`: from files of runs to words and pages."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from dynamo_serve.bench import compare_text, page, png, record, several, text
from dynamo_serve.bench.compare import Comparison
from dynamo_serve.bench.compare import compare as compare_runs
from dynamo_serve.bench.record import Run
from dynamo_serve.bench.summary import summary
from dynamo_serve.errors import ConfigError


def report(arguments: argparse.Namespace) -> int:
    """Words for people, then one line of JSON. Raises `ConfigError` for a file it cannot use."""
    runs = _read(arguments.runs)
    if len(runs) == 1:
        found = summary(runs[0])
        words, line = text.text(found), text.line(found)
    else:
        words, line = several.text(runs), several.line(runs)
    written = [_write(arguments.html, page.html(*runs))] if arguments.html else []
    if arguments.png:
        written += [str(path) for path in png.write(runs, Path(arguments.png))]
    _say(words, line, written, arguments.json)
    return 0


def compare(arguments: argparse.Namespace) -> int:
    """Of files of runs."""
    check(arguments)
    for name in arguments.live:
        given = getattr(arguments, name)
        if not (given is None or given is False or given == []):  # 0 was given
            flag = "--set" if name == "assignments" else "--" + name.replace("_", "-")
            raise ConfigError(f"{flag}: only to measure both now; leave out the files, or the flag")
    tell(compare_runs(_read(arguments.a), _read(arguments.b), arguments.matters / 100), arguments)
    return 0


def check(arguments: argparse.Namespace) -> None:
    """Before runs that take long. Raises `ConfigError`."""
    if not 0 <= arguments.matters < math.inf:
        raise ConfigError(f"--matters {arguments.matters:g}: allowed: 0 or more percent")
    record.check_out("--html", arguments.html)


def tell(found: Comparison, arguments: argparse.Namespace) -> None:
    written = [_write(arguments.html, page.comparison(found))] if arguments.html else []
    _say(compare_text.text(found), compare_text.line(found), written, arguments.json)


def _read(paths: Sequence[str]) -> list[Run]:
    runs = []
    for path in paths:
        try:
            runs.append(record.read(Path(path)))
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; allowed: a file of a run") from None
    return runs


def _write(path: str, content: str) -> str:
    try:
        Path(path).write_text(content, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--html {path}: {error.strerror}") from None
    return path


def _say(words: str, line: str, written: Sequence[str], is_terse: bool) -> None:
    if not is_terse:
        files = "".join(f"written: {path}\n" for path in written)
        sys.stdout.write(f"{words}\n\n{files}")
    sys.stdout.write(line + "\n")
