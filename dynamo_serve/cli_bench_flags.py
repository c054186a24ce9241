"""The flags of `dynamo-serve bench run`: the keys of a scenario that one changes most."""

from __future__ import annotations

import argparse
from collections.abc import Callable

HELP = "Send load to an OpenAI endpoint, and record what its users would feel."
# flag → type, metavar, help; the key it sets has the flag's name with underscores.
FLAGS: dict[str, tuple[Callable[[str], object], str, str]] = {
    "--workload": (str, "NAME", "chat, rag, long, agentic, code, plain; sharegpt, mooncake, "
                   "burstgpt with --file."),
    "--file": (str, "FILE", "Of the workload sharegpt, mooncake or burstgpt."),
    "--arrivals": (str, "KIND", "constant, poisson, gamma, ramp, steps or trace. Else poisson."),
    "--rate": (float, "R", "Sessions begin so often per second: an open loop."),
    "--burstiness": (float, "B", "Shape of gamma arrivals: 1 is poisson, less comes in bursts."),
    "--concurrency": (int, "N", "Places, each with one session at a time: a closed loop; with a "
                      "rate, the most at a time."),
    "--requests": (int, "N", "Ends with so many."),
    "--duration": (float, "SECONDS", "Nothing begins after it."),
    "--warm-up": (float, "SECONDS", "What is due before is marked, and not measured."),
    "--warm-up-requests": (int, "N", "The first ones are marked, and not measured."),
    "--probe-rate": (float, "R", "Short requests beside the load, so many per second."),
    "--processes": (int, "N", "Of the client, where one cannot keep up."),
    "--seed": (int, "N", "Same seed, same plan."),
    "--model": (str, "NAME", "Else the first that the server lists."),
    "--prompts": (str, "HOW", "words, or ids: token ids, only for completions."),
    "--tokenizer": (str, "FOLDER", "With tokenizer.json: prompts are of exact length."),
    "--retry": (str, "HOW", "Who is refused: none gives up, obey waits for Retry-After, storm "
                "comes back at once."),
    "--wait": (float, "SECONDS", "For each answer to what is asked before the load. Else 30."),
    "--bandwidth": (float, "GB/S", "Of the memory that the server's model is in: what a decode "
                    "step is held against."),
}  # fmt: skip
SWITCHES = {
    "--ignore-eos": "Ask for answers just as long as planned.",
    "--measure-bandwidth": "Measure it on this machine before the load: for a server on its CPU.",
}


def add_run(parts: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = parts.add_parser("run", help=HELP, description=HELP, allow_abbrev=False)
    command.set_defaults(run=_run)
    add = command.add_argument
    add("url", metavar="URL", help="Server, with or without /v1.")
    add_load(command)
    add("--sweep", action="store_true", help="Higher and higher rates until no more is served.")
    add("--out", metavar="FILE", default="run.jsonl", help="Where the records go.")
    add("--dry-run", action="store_true", help="Say what would be sent; needs no server.")
    add("--json", action="store_true", help="Only the line for machines.")


def add_load(command: argparse._ActionsContainer) -> None:
    """The flags that say what is sent: all of them are keys of a scenario."""
    add = command.add_argument
    add("--scenario", metavar="FILE", help="YAML file; the flags below win over it.")
    for flag, (kind, metavar, help) in FLAGS.items():
        add(flag, type=kind, metavar=metavar, help=help)
    add("--api-key", metavar="KEY", help="Bearer key, or $NAME of a variable that has it.")
    for flag, help in SWITCHES.items():
        add(flag, action="store_true", help=help)
    add(
        "--set",
        dest="assignments",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="Any key of a scenario, with dots: targets.ttft_p99_ms=500.",
    )


def _run(arguments: argparse.Namespace) -> int:
    from dynamo_serve.cli_bench import run

    return run(arguments)
