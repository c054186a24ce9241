"""The flags of `dynamo-serve bench report` and `bench compare`."""

from __future__ import annotations

import argparse

REPORT = "Report on one run, on repeats, or on runs at several loads."
COMPARE = "Say whether B differs from A, by repeated runs of both that were made in turns."


def add_report(parts: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    report = parts.add_parser("report", help=REPORT, description=REPORT, allow_abbrev=False)
    report.set_defaults(run=_report)
    report.add_argument("runs", nargs="+", metavar="RUN.jsonl", help="Files that runs left behind.")
    _add_outputs(report)
    report.add_argument(
        "--png", metavar="DIR", help="Also draw the charts there; needs chromium on the PATH."
    )


def add_compare(parts: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    compare = parts.add_parser("compare", help=COMPARE, description=COMPARE, allow_abbrev=False)
    compare.set_defaults(run=_compare)
    compare.add_argument("a", nargs="+", metavar="A.jsonl", help="Runs of A, in their order.")
    compare.add_argument(
        "--against",
        dest="b",
        nargs="+",
        required=True,
        metavar="B.jsonl",
        help="As many runs of B, in their order.",
    )
    compare.add_argument(
        "--matters",
        type=float,
        default=5.0,
        metavar="PERCENT",
        help="Differences below this do not matter.",
    )
    _add_outputs(compare)


def _add_outputs(command: argparse.ArgumentParser) -> None:
    command.add_argument("--html", metavar="FILE", help="Also write a page that needs no network.")
    command.add_argument("--json", action="store_true", help="Only the line for machines.")


def _report(arguments: argparse.Namespace) -> int:
    from dynamo_serve.cli_report import report

    return report(arguments)


def _compare(arguments: argparse.Namespace) -> int:
    from dynamo_serve.cli_report import compare

    return compare(arguments)
