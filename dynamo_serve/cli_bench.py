"""`dynamo-serve bench run`: from flags and a scenario to a file of records and an exit code."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dynamo_serve.bench import assembly, record, report, scenario, targets
from dynamo_serve.bench.outcomes import nothing_answered
from dynamo_serve.bench.record import Run
from dynamo_serve.bench.run import execute
from dynamo_serve.bench.scenario import Scenario
from dynamo_serve.bench.sweep import Level, levels_of, sweep
from dynamo_serve.bench.workloads import shape_of_plan
from dynamo_serve.cli_bench_flags import FLAGS, SWITCHES
from dynamo_serve.cli_progress import Progress
from dynamo_serve.errors import ConfigError

MISSED, INTERRUPTED = 1, 130
DRY_CALLS = 10_000  # of a plan that has no end of its own


def run(arguments: argparse.Namespace) -> int:
    """0; 1 if a target was missed or nothing was answered; 130 after a Ctrl-C, with what there is
    written.

    Raises `ConfigError`, and `EndpointError` if there is no server.
    """
    plain = keys(arguments)
    if arguments.sweep:
        plain.setdefault("sweep", {"first": 1.0})
    wanted = scenario.scenario_of(plain)
    if arguments.dry_run:
        print(json.dumps(planned(wanted), indent=None if arguments.json else 2))
        return 0
    out = Path(arguments.out)
    record.check_out("--out", arguments.out)
    if wanted.sweep:
        levels_of(wanted.sweep)
    assembled = assembly.assemble(arguments.url, wanted)
    draw = Progress(sys.stderr)
    if wanted.sweep:
        return _swept(arguments, assembled, out, draw)
    options = assembled.options(arguments.url, lambda share, note: draw("load", share, note))
    made = execute(assembled.plan(), options)
    write(made, out)
    return _say(made, wanted, out, arguments.json)


def write(made: Run, path: Path) -> None:
    """What was measured is told even if the disk is full."""
    try:
        record.write(made, path)
    except OSError as error:
        print(f"warning: {path} is not whole: {error.strerror}", file=sys.stderr)


def keys(arguments: argparse.Namespace) -> dict[str, Any]:
    """The scenario's file, with the flags on top. Raises `ConfigError`."""
    plain = scenario.read(Path(arguments.scenario)) if arguments.scenario else {}
    for assignment in arguments.assignments:
        assign(plain, assignment)
    names = [flag.removeprefix("--").replace("-", "_") for flag in FLAGS]
    given = {name: getattr(arguments, name) for name in names}
    given["key"] = arguments.api_key
    for name in (flag.removeprefix("--").replace("-", "_") for flag in SWITCHES):
        given[name] = getattr(arguments, name) or None
    given = {name: value for name, value in given.items() if value is not None}
    _check_parts(plain, given)
    plain |= given
    return plain


def _check_parts(plain: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """A flag that no part of a mix would hear of is not taken."""
    mix = plain.get("mix")
    parts = [part for part in mix if isinstance(part, dict)] if isinstance(mix, list) else []
    for name in scenario.OWN:
        if name in given and parts and all(name in part for part in parts):
            flag = "--api-key" if name == "key" else f"--{name}"
            raise ConfigError(
                f"{flag}: every part of the mix has its own {name}; edit the scenario"
            )


def assign(plain: dict[str, Any], assignment: str) -> None:
    path, is_given, text = assignment.partition("=")
    *tables, last = path.split(".", 1) if path.startswith("targets.") else path.split(".")
    if not is_given or not last:
        raise ConfigError(f"--set {assignment}: must be KEY=VALUE")
    table = plain
    for name in tables:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {assignment}: {name} is no table")
    try:
        table[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {assignment}: {error}") from None


def planned(wanted: Scenario) -> dict[str, Any]:
    """What would be sent, as far as no server has to be asked."""
    assembled = assembly.without_server(wanted)
    rate = levels_of(wanted.sweep)["first"] if wanted.sweep else None
    plan = assembled.plan(rate)
    shown = [call for call, _ in zip(plan, range(DRY_CALLS), strict=False)]
    return {**assembled.about()["plan"], **shape_of_plan(shown)}


def _swept(
    arguments: argparse.Namespace, assembled: assembly.Assembled, out: Path, draw: Progress
) -> int:
    """Every level in a file of its own; targets are those of the best one."""

    def measure(number: int, rate: float) -> Run:
        stage = f"{rate:.3g}/s"
        show: Callable[[float, str], None] = lambda share, note: draw(stage, share, note)  # noqa: E731
        made = execute(assembled.plan(rate, number), assembled.options(arguments.url, show))
        made.about["plan"]["rate"] = rate
        path = out.with_name(f"{out.stem}-{number:02d}{out.suffix}")
        write(made, path)
        return made

    levels = sweep(assembled.scenario.sweep, measure)
    if not arguments.json:
        print(table(levels))
    best = max(levels, key=lambda level: level.good)
    number = levels.index(best)
    path = out.with_name(f"{out.stem}-{number:02d}{out.suffix}")
    code = _say(best.run, assembled.scenario, path, arguments.json)
    return INTERRUPTED if levels[-1].run.about["interrupted"] else code


def table(levels: Sequence[Level]) -> str:
    lines = [f"{'rate/s':>8} {'good/s':>8} {'ttft p50 ms':>12} {'ttft p99 ms':>12} {'tokens/s':>9}"]
    for level in levels:
        load = [r for r in level.run.records if not r.is_warm_up and r.kind != "probe"]
        names = ("ttft_p50_ms", "ttft_p99_ms", "output_tokens_per_s")
        seconds = level.run.seconds
        p50, p99, tokens = (targets.value(load, n, seconds, is_open=True) or 0.0 for n in names)
        lines.append(f"{level.rate:8.3g} {level.good:8.3g} {p50:12.1f} {p99:12.1f} {tokens:9.1f}")
    return "\n".join(lines)


def _say(made: Run, wanted: Scenario, out: Path, is_json: bool) -> int:
    verdicts = targets.verdicts(made, targets.checked(wanted.targets))
    warning = made.about["client"]["warning"]
    summary = report.summary(made)
    if not is_json:
        print(report.text(summary), end="\n\n")
        for verdict in verdicts:
            print(verdict)
        print(f"{len(made.records)} records in {out}")
    why = nothing_answered(made)
    for told_apart in (warning and f"warning: {warning}", why and f"error: {why}"):
        if told_apart:
            print(told_apart, file=sys.stderr)
    told = {v.name: {"wanted": v.wanted, "found": v.found, "met": v.is_met} for v in verdicts}
    line = {**json.loads(report.line(summary)), "out": str(out), "targets": told}
    print(json.dumps(line, separators=(",", ":")))
    if made.about["interrupted"]:
        return INTERRUPTED
    return 0 if not why and all(verdict.is_met for verdict in verdicts) else MISSED
