"""The command line: serve, chat, bench, replay, simulate, trace, check-config and others."""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
from collections.abc import Sequence

from dynamo_serve import __version__, settings
from dynamo_serve.cli_bench_parser import add_bench
from dynamo_serve.cli_parser import Parser
from dynamo_serve.cli_simulate_parser import add_simulate
from dynamo_serve.errors import ConfigError, DynamoServeError

# flag → the key it sets; --served-model-name is apart because it takes several names.
FLAGS = {
    "--model": ("model.path", "PATH", "Local folder, hub id, or 'bundled'."),
    "--device": ("engine.device", "DEVICE", "auto, cpu, cuda or cuda:N."),
    "--host": ("server.host", "HOST", "Address to listen on."),
    "--port": ("server.port", "PORT", "Port to listen on; 0 picks a free one."),
    "--tenants": ("server.tenants_file", "FILE", "YAML file of tenants, keys and quotas."),
}
USAGE_ERROR = 2
INTERRUPTED = 130
OUTPUT_CLOSED = 141  # as a shell reports SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 2 for a fault of the caller's, said in one line."""
    open_standard_streams()
    arguments = parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except DynamoServeError as error:
        print(f"dynamo-serve: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has enough of it: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the flush at exit fails as well
        return OUTPUT_CLOSED
    return code


def open_standard_streams() -> None:
    """Whoever closed one of them must not find a socket of ours under its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, so this one
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def parser() -> argparse.ArgumentParser:
    """Every command with its flags; docs/reference/cli.md is generated from it."""
    root: argparse.ArgumentParser = Parser(
        prog="dynamo-serve",
        description="An LLM inference server for one box.",
        allow_abbrev=False,
    )
    shown = f"dynamo-serve {__version__}"
    root.add_argument("--version", action="version", version=shown, help="Print the version.")
    commands = root.add_subparsers(metavar="COMMAND", required=True)
    serve = _command(commands, "serve", "Start the server.", _serve)
    _add_settings(serve)
    check = _command(commands, "check-config", "Check the settings without starting.", _check)
    _add_settings(check)
    check.add_argument("--print", action="store_true", help="Show every value and its source.")
    _add_chat(_command(commands, "chat", "Chat with any OpenAI endpoint in a terminal.", _chat))
    add_bench(commands)
    add_simulate(commands)
    keys = _command(commands, "hash-key", "Print a key as the tenants file has it.", _hash_key)
    keys.add_argument("--new", action="store_true", help="Make a random key and show it once.")
    _add_replay(_command(commands, "replay", "Send recorded traffic to an endpoint.", _replay))
    _add_trace(_command(commands, "trace", "Show what is in recorded traffic.", _trace))
    triton = _command(commands, "triton", "Ask NVIDIA Triton servers what they can do.", _triton)
    triton.add_argument("what", choices=["check"], help="check: connect, and get a token of each.")
    _add_settings(triton)
    _command(commands, "version", "Print the version.", _version)
    return root


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    help: str,
    run: object,
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
    command.set_defaults(run=run)
    return command


def _add_settings(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", metavar="FILE", help="YAML file with settings.")
    for flag, (key, metavar, help) in FLAGS.items():
        default = settings.all_keys()[key].default
        told = f"{help} Default: {default}." if default else help
        command.add_argument(flag, dest=key, metavar=metavar, help=told)
    command.add_argument(
        "--served-model-name",
        dest="served_names",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="Names clients may use; the first is the one reported.",
    )
    command.add_argument(
        "--set",
        dest="assignments",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="Any setting; may be given several times. The flags above win over it. "
        "'dynamo-serve check-config --print' lists them all.",
    )


def _add_chat(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--url", default="http://127.0.0.1:8000", help="Server, with or without /v1.")
    add("--api-key", default=None, help="Bearer key; else OPENAI_API_KEY is sent if it is set.")
    add("--model", default=None, help="Model name; else the first the server lists.")
    add("--system", default=None, help="System message.")
    add("--temperature", type=float, default=None, help="Else the server's default.")
    add("--max-tokens", type=int, default=None, help="Longest answer; else the server's limit.")


def _add_replay(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("traces", nargs="+", metavar="TRACE", help="Files of one recording.")
    add("url", metavar="URL", help="Server, without /v1.")
    add("--speed", type=float, default=1.0, help="2: in half the time. Default: 1.")
    add("--requests", type=int, default=None, metavar="N", help="Only the first N.")
    add("--tenants", default=None, metavar="FILE", help="YAML file: a line 'NAME: KEY' for each.")
    add("--api-key", default=None, help="For all; else OPENAI_API_KEY is sent if it is set.")
    add("--model", default="", help="Model name; else the first the server lists.")
    add("--vocab-size", type=int, default=None, help="Of the model, where nobody says.")
    add("--timeout", type=float, default=600.0, metavar="S", help="For one answer. Default: 600.")
    add(
        "--wait",
        type=float,
        default=30.0,
        metavar="S",
        help="For each answer to what is asked before. Default: 30.",
    )
    add(
        "--text",
        choices=("made", "recorded"),
        default="made",
        help="recorded: the prompts themselves, of a recording with record.text. Default: made.",
    )
    add("--out", default=None, metavar="FILE", help="Where to write the run (JSON lines).")


def _add_trace(command: argparse.ArgumentParser) -> None:
    command.add_argument("traces", nargs="+", metavar="TRACE", help="Files of one recording.")
    command.add_argument("--json", action="store_true", help="One line of JSON instead.")
    command.add_argument("--to-mooncake", metavar="FILE", help="Write it in Mooncake's format.")


def load_settings(arguments: argparse.Namespace) -> settings.Loaded:
    """The settings with this command line's flags on top. Raises `ConfigError`."""
    flags = [settings.from_set(assignment) for assignment in arguments.assignments]
    for flag, (key, _, _) in FLAGS.items():
        value = getattr(arguments, key)
        if value is not None:
            flags.append(settings.Given(key, value, f"flag {flag}", is_text=True))
    if arguments.served_names:
        names = settings.Given(
            "model.served_names", arguments.served_names, "flag --served-model-name", is_text=False
        )
        flags.append(names)
    return settings.load(arguments.config, os.environ, flags)


def _serve(arguments: argparse.Namespace) -> int:
    loaded = load_settings(arguments)
    if loaded.config.engine.process:
        from dynamo_serve.text.without_torch import leave_torch_out

        leave_torch_out()  # it is for engines
    # Imported here: torch and transformers take seconds that the other commands need not wait.
    from dynamo_serve.cli_serve import serve

    return serve(loaded.config)


def _check(arguments: argparse.Namespace) -> int:
    loaded = load_settings(arguments)
    from dynamo_serve import shared, tenants

    if loaded.config.cache.shared_prefixes:
        shared.read(loaded.config.cache.shared_prefixes)
    names = tenants.load(loaded.config.server).tenancy.tenants
    if arguments.print:
        print(settings.render(loaded), end="")
    elif loaded.config.server.tenants_file:
        print(f"settings are valid; tenants: {', '.join(names)}")
    else:
        print("settings are valid")
    return 0


def _chat(arguments: argparse.Namespace) -> int:
    from dynamo_serve import chat

    heat = arguments.temperature
    if heat is not None and not 0 <= heat < math.inf:
        raise ConfigError(f"--temperature {heat:g}: allowed: 0 or more")
    for stream in (sys.stdin, sys.stdout):
        # A byte that is no text, or a character the terminal lacks, ends no conversation.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    return chat.run(
        chat.Options(
            url=arguments.url,
            api_key=arguments.api_key or os.environ.get("OPENAI_API_KEY"),
            model=arguments.model,
            system=arguments.system,
            temperature=arguments.temperature,
            max_tokens=arguments.max_tokens,
        )
    )


def _replay(arguments: argparse.Namespace) -> int:
    from dynamo_serve.cli_replay import replay

    return replay(arguments)


def _trace(arguments: argparse.Namespace) -> int:
    from dynamo_serve.cli_replay import show

    return show(arguments)


def _hash_key(arguments: argparse.Namespace) -> int:
    from dynamo_serve.cli_keys import hash_key

    return hash_key(arguments.new)


def _triton(arguments: argparse.Namespace) -> int:
    arguments.assignments.insert(0, "engine.kind=triton")
    loaded = load_settings(arguments)
    try:
        from dynamo_serve.cli_triton import run
    except ImportError as error:
        remedy = "pip install 'dynamo-serve[triton]'"
        raise ConfigError(f"triton: {error}; install it: {remedy}") from None
    return run(loaded.config.triton)


def _version(_: argparse.Namespace) -> int:
    print(f"dynamo-serve {__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
