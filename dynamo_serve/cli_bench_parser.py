"""The flags of `dynamo-serve bench`."""

from __future__ import annotations

import argparse

from dynamo_serve.cli_bench_flags import add_run
from dynamo_serve.cli_report_flags import add_compare, add_report

HELP = "Measure a server, report on it, compare two."


def add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    bench = commands.add_parser("bench", help=HELP, description=HELP, allow_abbrev=False)
    parts = bench.add_subparsers(metavar="COMMAND", required=True)
    add_run(parts)
    add_report(parts)
    add_compare(parts)
