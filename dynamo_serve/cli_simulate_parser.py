"""The flags of `dynamo-serve simulate`."""

from __future__ import annotations

import argparse

HELP = "Simulate a server, or many, on recorded traffic."
ROUTING = ("round_robin", "least_loaded", "prefix_affinity", "share_aware")


def add_simulate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("simulate", help=HELP, description=HELP, allow_abbrev=False)
    command.set_defaults(run=_run)
    add = command.add_argument
    add("traces", nargs="+", metavar="TRACE", help="Recorded traffic: all parts of one recording.")
    add("--tenants", metavar="FILE", help="YAML file of tenants, instead of the recorded ones.")
    for flag, what in (
        ("--set", "Another setting than in the recording; may be given several times."),
        ("--diff-set", "Simulate again, with this setting on top, and show the difference."),
    ):
        add(
            *(flag,),
            dest=flag.strip("-").replace("-", "_"),
            action="append",
            default=[],
            metavar="SECTION.KEY=VALUE",
            help=what,
        )
    add(
        "--cost",
        default="",
        metavar="COSTS",
        help="What steps take, as fixed=2ms,token=20us or a YAML file; else as in the recording.",
    )
    add("--replicas", type=int, default=1, help="Servers that share the traffic.")
    add("--routing", default="round_robin", help=f"{', '.join(ROUTING)}.")
    add("--look", type=float, default=0.1, help="Seconds between two looks of the router at loads.")
    add("--processes", type=int, default=1, help="Processes that simulate replicas.")
    add("--seed", type=int, default=0, help="Of what is drawn; equal seeds give equal runs.")
    add("--out", metavar="FILE", help="Write the run, for reports.")
    add("--diff-out", metavar="FILE", help="Write the one with --diff-set.")


def _run(arguments: argparse.Namespace) -> int:
    from dynamo_serve.cli_simulate import run  # noqa: PLC0415 - other commands need none of it

    return run(arguments)
