"""`dynamo-serve bench compare` of two servers: runs of both in turns, then what differs."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dynamo_serve import settings
from dynamo_serve.bench import about, assembly, own_server, record, scenario, targets
from dynamo_serve.bench.assembly import Assembled
from dynamo_serve.bench.compare import compare, turns
from dynamo_serve.bench.outcomes import nothing_answered
from dynamo_serve.bench.record import Run
from dynamo_serve.bench.run import execute
from dynamo_serve.bench.scenario import Scenario
from dynamo_serve.cli_bench import assign, keys, planned, write
from dynamo_serve.cli_progress import Progress
from dynamo_serve.cli_report import check, tell
from dynamo_serve.errors import ConfigError, DynamoServeError

MISSED, BROKEN, INTERRUPTED = 1, 2, 130
REPEATS, START_TIMEOUT_S, FOLDER = 3, 300.0, "compare"
OURS = ("server.host", "server.port")  # where a server listens is this program's business


@dataclass(frozen=True, slots=True)
class Side:
    """`name` is "a" or "b". Without a `url`, a server is started with `settings` for each turn."""

    name: str
    scenario: Scenario
    url: str
    settings: tuple[str, ...] = ()
    config: str = ""

    @property
    def words(self) -> list[str]:
        """Behind `dynamo-serve serve`."""
        words = ["--config", self.config] if self.config else []
        return words + [word for given in self.settings for word in ("--set", given)]

    def told(self) -> dict[str, Any]:
        if self.url:
            return {"url": self.url}
        return {"serve": about.command(["serve", *self.words])}


def compare_now(arguments: argparse.Namespace) -> int:
    """0; 1 if a run missed a target or nothing of it was answered; 2 if a server was lost; 130
    after a Ctrl-C. Complete pairs are compared in any case. Raises `ConfigError`, and what becomes
    of servers if no pair is complete.
    """
    check(arguments)
    sides = sides_of(arguments)
    repeats = REPEATS if arguments.repeat is None else arguments.repeat
    if repeats < 1:
        raise ConfigError(f"--repeat {repeats}: allowed: 1 or more")
    if arguments.dry_run:
        told = {name: {**side.told(), **planned(side.scenario)} for name, side in sides.items()}
        order = [f"{name.upper()}{repeat + 1}" for name, repeat in turns(repeats)]
        print(json.dumps({"turns": order, **told}, indent=None if arguments.json else 2))
        return 0
    folder = made_folder(Path(arguments.out or FOLDER))
    match = Match(sides, folder, repeats, arguments.start_timeout or START_TIMEOUT_S)
    fault = match.play()
    pairs = min(map(len, match.runs.values()))
    if not pairs:
        say(f"no pair of runs is complete, so nothing is compared; what there is is in {folder}")
        if fault is not None:
            raise fault
        return match.code
    if fault is not None:
        say(f"{fault}; the pairs before it are compared")
    found = compare(match.runs["a"][:pairs], match.runs["b"][:pairs], arguments.matters / 100)
    tell(found, arguments)
    return match.code


class Match:
    """All turns. What they share is found out in the first: texts, limits, the memory's speed."""

    def __init__(
        self, sides: dict[str, Side], folder: Path, repeats: int, start_timeout: float
    ) -> None:
        self.runs: dict[str, list[Run]] = {"a": [], "b": []}
        self.code = 0
        self._sides, self._folder, self._repeats = sides, folder, repeats
        self._start_timeout = start_timeout
        self._first: Assembled | None = None
        self._draw = Progress(sys.stderr)

    def play(self) -> DynamoServeError | None:
        """Every turn, as far as it gets; returns what ended it before its time."""
        try:
            self._look_at_both()
            for name, repeat in turns(self._repeats):
                run = self._turn(self._sides[name], repeat)
                if run.about["interrupted"]:
                    self.code = INTERRUPTED
                    break
                self.runs[name].append(run)
        except KeyboardInterrupt:
            self.code = INTERRUPTED
        except DynamoServeError as error:
            self.code = BROKEN
            return error
        return None

    def _look_at_both(self) -> None:
        """Servers that run already are asked before anything is measured: the smaller context is
        that of the plan, and a wrong address is known at once."""
        urls = [side.url for side in self._sides.values()]
        if not all(urls):
            return
        if len(set(urls)) == 1:
            say("A and B are one server: whoever comes second finds prompts of the first cached")
        found = [assembly.assemble(side.url, side.scenario) for side in self._sides.values()]
        self._first = min(found, key=lambda one: one.context or float("inf"))

    def _turn(self, side: Side, repeat: int) -> Run:
        name = f"{side.name.upper()}{repeat + 1}"
        if side.url:
            return self._measured(side, repeat, name, side.url)
        log = self._folder / f"{side.name}-{repeat + 1}.log"
        say(f"{name}: starting {side.told()['serve']}")

        def waiting(seconds: float) -> None:
            self._draw(f"start {name}", seconds / self._start_timeout, f"{seconds:.0f} s")

        with (
            stoppable(),
            own_server.running(side.words, log, self._start_timeout, waiting) as url,
        ):
            self._draw(f"start {name}", 1.0)
            return self._measured(side, repeat, name, url)

    def _measured(self, side: Side, repeat: int, name: str, url: str) -> Run:
        """The same plan for both sides of a pair: the seed is the pair's, the rest the first
        turn's."""
        wanted = replace(side.scenario, seed=side.scenario.seed + repeat)
        assembled = self._alike(assembly.assemble(url, wanted), name)
        options = assembled.options(url, lambda share, note: self._draw(name, share, note))
        also = {"repeat": repeat, **({} if side.url else {"url": "", **side.told()})}
        options = replace(options, about={**options.about, **also})
        with stoppable_after():
            run = execute(assembled.plan(), options)
        path = self._folder / f"{side.name}-{repeat + 1}.jsonl"
        write(run, path)
        self._judge(run, wanted, name, path)
        return run

    def _alike(self, found: Assembled, name: str) -> Assembled:
        first = self._first = self._first or found
        if found.context and first.context and found.context < first.context:
            raise ConfigError(
                f"{name} has room for {found.context} tokens, the other side for {first.context}; "
                f"give --set max_context={found.context}, so that both are asked the same"
            )
        wanted = replace(found.scenario, max_context=first.context)
        return replace(found, scenario=wanted, texts=first.texts, bandwidth=first.bandwidth)

    def _judge(self, run: Run, wanted: Scenario, name: str, path: Path) -> None:
        verdicts = targets.verdicts(run, targets.checked(wanted.targets))
        why = nothing_answered(run)
        say(f"{name}: {len(run.records)} records in {path}")
        for verdict in verdicts:
            if not verdict.is_met:
                say(f"{name}: {verdict}")
        if why:
            say(f"{name}: {why}")
        if run.about["client"]["warning"]:
            say(f"{name}: warning: {run.about['client']['warning']}")
        if why or not all(verdict.is_met for verdict in verdicts):
            self.code = MISSED


def sides_of(arguments: argparse.Namespace) -> dict[str, Side]:
    """A and B. Raises `ConfigError`."""
    urls = {"a": arguments.url_a, "b": arguments.url_b}
    given = {"a": arguments.serve_set_a, "b": arguments.serve_set_b}
    serves = any((*given.values(), arguments.serve_set, arguments.serve_config))
    if serves and any(urls.values()):
        raise ConfigError("--url-a and --url-b are servers that run; leave out --serve-…")
    if not serves and not all(urls.values()):
        raise ConfigError(
            "what is compared? give A1.jsonl … --against B1.jsonl …, or --url-a and --url-b, or "
            "--serve-set-a and --serve-set-b"
        )
    timeout = arguments.start_timeout
    if not serves and timeout is not None:
        raise ConfigError("--start-timeout: only for servers that are started")
    if timeout is not None and not 0 < timeout < math.inf:
        raise ConfigError(f"--start-timeout {timeout:g}: allowed: more than 0")
    sides = {
        name: Side(
            name,
            scenario_of(arguments, name),
            urls[name] or "",
            (*arguments.serve_set, *given[name]),
            arguments.serve_config or "",
        )
        for name in "ab"
    }
    if serves:
        for side in sides.values():
            check_settings(side)
    return sides


def scenario_of(arguments: argparse.Namespace, name: str) -> Scenario:
    plain = keys(arguments)
    for assignment in getattr(arguments, f"set_{name}"):
        assign(plain, assignment)
    if plain.get("sweep"):
        raise ConfigError("sweep: a comparison is made at one load; take it out of the scenario")
    return scenario.scenario_of(plain)


def check_settings(side: Side) -> None:
    """A wrong setting is told before the first server is started. Raises `ConfigError`."""
    given = [settings.from_set(assignment) for assignment in side.settings]
    for one in given:
        if one.key in OURS:
            raise ConfigError(f"{one.key}: servers of a comparison listen where they are told to")
    settings.load(side.config or None, os.environ, given)


def made_folder(folder: Path) -> Path:
    """Raises `ConfigError`: runs of an earlier comparison are not to be mixed with these."""
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder}: {error.strerror}") from None
    if any(folder.glob("[ab]-*.jsonl")):
        raise ConfigError(f"--out {folder}: has runs of an earlier comparison; name another folder")
    record.check_out("--out", str(folder / "a-1.jsonl"))
    return folder


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM is like a Ctrl-C within: servers that were started are to be stopped."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def stoppable_after() -> Iterator[None]:
    """The same as it was behind a run, which has handlers of its own and forgets these."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _interrupted(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
