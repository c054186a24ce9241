"""The flags of `dynamo-serve bench report` and `bench compare`."""

from __future__ import annotations

import argparse

from dynamo_serve.cli_bench_flags import add_load

REPORT = "Report on one run, on repeats, or on runs at several loads."
COMPARE = (
    "Say whether B differs from A, by repeated runs of both in turns: by files of runs, by two "
    "servers that run (--url-a, --url-b), or by two settings (--serve-set-a, --serve-set-b) of "
    "servers that are started for it, one at a time."
)
SERVE = {
    "--serve-set": "A setting of the servers that are started, of both.",
    "--serve-set-a": "A setting of A's server; may be given several times.",
    "--serve-set-b": "A setting of B's server.",
}


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
    add = compare.add_argument
    add("a", nargs="*", metavar="A.jsonl", help="Runs of A, in their order.")
    add("--against", dest="b", nargs="+", default=[], metavar="B.jsonl", help="As many of B.")
    add(
        "--matters",
        type=float,
        default=5.0,
        metavar="PERCENT",
        help="Differences below this do not matter.",
    )
    _add_outputs(compare)
    live = compare.add_argument_group("to measure both now")
    names = {action.dest for action in compare._actions}
    _add_sides(live)
    add_load(live)
    compare.set_defaults(live=tuple(a.dest for a in compare._actions if a.dest not in names))


def _add_sides(live: argparse._ArgumentGroup) -> None:
    add = live.add_argument
    add("--url-a", metavar="URL", help="Server A, with or without /v1.")
    add("--url-b", metavar="URL", help="Server B.")
    for flag, help in SERVE.items():
        add(flag, action="append", default=[], metavar="SECTION.KEY=VALUE", help=help)
    add("--serve-config", metavar="FILE", help="YAML file with settings of both servers.")
    add("--start-timeout", type=float, metavar="S", help="Until a server is ready. Else 300.")
    add("--repeat", type=int, metavar="N", help="Runs of each; fewer than 3 tell nothing. Else 3.")
    add("--out", metavar="FOLDER", help="Where runs and servers' logs go. Else 'compare'.")
    add("--dry-run", action="store_true", help="Say what would be done; needs no server.")
    for side in "ab":
        help = f"A key of the scenario for {side.upper()} alone, such as key or model."
        add(f"--set-{side}", action="append", default=[], metavar="KEY=VALUE", help=help)


def _add_outputs(command: argparse.ArgumentParser) -> None:
    command.add_argument("--html", metavar="FILE", help="Also write a page that needs no network.")
    command.add_argument("--json", action="store_true", help="Only the line for machines.")


def _report(arguments: argparse.Namespace) -> int:
    from dynamo_serve.cli_report import report

    return report(arguments)


def _compare(arguments: argparse.Namespace) -> int:
    if arguments.a or arguments.b:
        from dynamo_serve.cli_report import compare

        return compare(arguments)
    from dynamo_serve.cli_compare import compare_now

    return compare_now(arguments)
