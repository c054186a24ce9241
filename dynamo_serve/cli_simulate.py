"""`dynamo-serve simulate`: what would be, on the traffic of a trace."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from dynamo_serve import settings
from dynamo_serve.bench import record
from dynamo_serve.bench.record import Run
from dynamo_serve.errors import ConfigError
from dynamo_serve.settings import Given
from dynamo_serve.simulate import recording, routing, whatif
from dynamo_serve.simulate.costs import Cost
from dynamo_serve.simulate.figures import differences, figures, itl_of_steps, table
from dynamo_serve.simulate.fit import Fitted
from dynamo_serve.simulate.fleet import Cluster
from dynamo_serve.simulate.recording import Recording
from dynamo_serve.simulate.whatif import Options

NOTES = {
    "drafts": "the recording has steps with drafts; none are simulated, so answers come slower",
    "left out": "requests of the trace that no scheduler saw are left out: {}",
}


def run(arguments: argparse.Namespace) -> int:
    options = _options(arguments)
    record.check_out("--out", arguments.out)
    record.check_out("--diff-out", arguments.diff_out)
    recorded = recording.read([Path(name) for name in arguments.traces])
    given = [settings.from_set(said) for said in arguments.set]
    if arguments.tenants:
        given.append(Given(whatif.TENANTS, arguments.tenants, "flag --tenants", is_text=True))
    other = [settings.from_set(said) for said in arguments.diff_set]
    if arguments.diff_out and not other:
        raise ConfigError("--diff-out: there is nothing to write without --diff-set")
    # Wrong settings are told before anything takes time.
    loaded = whatif.load(recorded, given)
    changed = whatif.load(recorded, [*given, *other]) if other else None
    cost = whatif.cost_of(recorded, options)
    run = whatif.simulate(recorded, loaded, cost, options)
    again = whatif.simulate(recorded, changed, cost, options) if changed else None
    for made, name in ((run, arguments.out), (again, arguments.diff_out)):
        if made and name:
            _write(made, Path(name))
    _tell(Told(recorded, cost, run, again, is_as_recorded=not given and options == Options()))
    return 0


def _options(arguments: argparse.Namespace) -> Options:
    for flag in ("replicas", "processes"):
        if getattr(arguments, flag) < 1:
            raise ConfigError(f"--{flag} {getattr(arguments, flag)}: allowed: 1 or more")
    if not 0.001 <= arguments.look <= 60:
        raise ConfigError(f"--look {arguments.look:g}: allowed: 0.001 to 60 seconds")
    routing.policy(arguments.routing)
    cluster = Cluster(arguments.replicas, arguments.routing, arguments.look, arguments.processes)
    return Options(arguments.cost, cluster, arguments.seed)


def _write(run: Run, path: Path) -> None:
    try:
        record.write(run, path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot write this file: {error.strerror}") from None


@dataclass(frozen=True, slots=True)
class Told:
    recorded: Recording
    cost: Cost
    run: Run
    again: Run | None
    is_as_recorded: bool


def _tell(told: Told) -> None:
    seen = figures(told.run)
    plain: dict[str, object] = {"about": told.run.about, "simulated": seen}
    if isinstance(told.cost, Fitted):
        before = figures(told.recorded.run()) | itl_of_steps(told.recorded.steps)
        change = differences(before, seen)
        plain |= {"recorded": before, "error" if told.is_as_recorded else "difference": change}
        for name, error in told.cost.errors.items():
            print(
                f"{name} steps, {error.steps} of them not fitted: predicted within "
                f"{100 * error.median:.1f} % (median), {100 * error.p90:.1f} % (p90)"
            )
        if any(way := told.cost.way):
            print(f"on the way {1e3 * way.there:.2f} ms there, {1e3 * way.back:.2f} ms back")
        print("\n" + table("recorded", before, "simulated", seen))
    else:
        print(table("simulated", seen))
    if told.again:
        other = figures(told.again)
        plain |= {"other": other, "changed": differences(seen, other)}
        plain["other_settings"] = told.again.about["settings"]
        print("\n" + table("simulated", seen, "with --diff-set", other))
    if told.recorded.has_drafts:
        print(f"note: {NOTES['drafts']}", file=sys.stderr)
    if told.recorded.left_out:
        print(f"note: {NOTES['left out'].format(told.recorded.left_out)}", file=sys.stderr)
    print(json.dumps(plain, default=str))
