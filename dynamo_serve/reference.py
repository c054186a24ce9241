"""What is generated from the code: the reference pages, the JSON schema, configs/default.yaml.

`python -m dynamo_serve.reference` in the repository's root writes them; a test checks that they
are current.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dynamo_serve import cli, settings
from dynamo_serve.metrics_declared import (
    ALIASES,
    DECLARED,
    FORWARDED,
    SCRAPED,
    TOKENS,
    Declared,
)
from dynamo_serve.metrics_histogram import SECONDS
from dynamo_serve.reference_http import http_page
from dynamo_serve.reference_tables import GENERATED, cell, code, table
from dynamo_serve.settings_key import Key

SCHEMA_LINE = "# yaml-language-server: $schema=schema.json\n"
JSON_TYPES = {int: "integer", float: "number", bool: "boolean", str: "string"}


def schema() -> dict[str, Any]:
    """The JSON schema of a settings file, for editors."""
    sections: dict[str, dict[str, Any]] = {}
    for path, key in settings.all_keys().items():
        section, leaf = path.split(".")
        sections.setdefault(section, {})[leaf] = _property(key)
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "dynamo_serve settings",
        "type": ["object", "null"],
        "additionalProperties": False,
        "properties": {
            name: {
                "type": ["object", "null"],
                "additionalProperties": False,
                "properties": properties,
            }
            for name, properties in sections.items()
        },
    }


def _property(key: Key) -> dict[str, Any]:
    described = {"description": key.help, "default": key.shown(key.default)}
    text: dict[str, Any] = {"type": "string"}
    if key.pattern:
        text["pattern"] = f"^(?:{key.pattern})$"
    if key.is_list:
        return {**described, "type": "array", "items": text}
    if key.choices:
        return {**described, "enum": list(key.choices)}
    if key.kind is str:
        return {**described, **text}
    bounds = {"minimum": key.low, "maximum": key.high}
    kind = {"type": JSON_TYPES[key.kind]}
    return {**described, **kind, **{name: at for name, at in bounds.items() if at is not None}}


def default_yaml() -> str:
    """Every setting with its default, as a file to copy from."""
    lines = ["# Every setting with its default. A file needs only what it changes."]
    section = ""
    for path, key in settings.all_keys().items():
        name, leaf = path.split(".")
        if name != section:
            section = name
            lines += ["", f"{name}:"]
        allowed = "" if key.kind is bool else f" Allowed: {key.allowed}."
        lines += textwrap.wrap(
            key.help + allowed, 96, initial_indent="  # ", subsequent_indent="  # "
        )
        lines.append(f"  {leaf}: {json.dumps(key.shown(key.default))}")
    return SCHEMA_LINE + "\n".join(lines) + "\n"


def config_page() -> str:
    rows = [
        (
            f"`{path}`",
            code(json.dumps(key.shown(key.default))),
            code(key.allowed) if key.choices or key.kind is bool else cell(key.allowed),
            key.help,
        )
        for path, key in settings.all_keys().items()
    ]
    return (
        GENERATED + "# Settings\n\n"
        "Defaults < file (`--config FILE`) < environment < `--set` < the flags with a name of\n"
        "their own. `dynamo-serve check-config --print` shows every value and its source.\n\n"
        "In the environment, `section.key` is `DYNAMO_SERVE_SECTION__KEY`, all capitals:\n"
        f"`{settings.variable('scheduler.max_prefill_tokens')}=256`. A list is `a,b` or `[a, b]`.\n"
        "A variable that begins with `DYNAMO_SERVE_` and names no key is refused, except those\n"
        "that a cluster injects for a service of that name (`DYNAMO_SERVE_SERVICE_HOST`, …).\n\n"
        + table(("Key", "Default", "Allowed", "Meaning"), rows)
    )


def metrics_page() -> str:
    return (
        GENERATED + "# Metrics\n\n"
        f"`GET /metrics`, Prometheus text. Buckets of seconds run from {SECONDS[0]:g} to "
        f"{SECONDS[-1]:g}, of tokens\nfrom {TOKENS[0]:g} to {TOKENS[-1]:g}. Counters go on when "
        "the engine is restarted.\n\n"
        + _metrics_table(DECLARED.values())
        + "\n## Triton servers\n\n"
        "Only with `engine.kind: triton`; the last ones, and all that the servers tell themselves "
        "(`nv_*`, with the label `endpoint`), only with\n`triton.metrics_endpoints`.\n\n"
        + _metrics_table([*FORWARDED.values(), *SCRAPED.values()])
        + "\n## Names other dashboards know\n\n"
        "The same numbers under the names that gateways made for vLLM scrape.\n\n"
        + _metrics_table(ALIASES.values())
    )


def _metrics_table(metrics: Iterable[Declared]) -> str:
    rows = [
        (f"`{metric.wire_name}`", metric.kind, code(", ".join(metric.labels)), metric.help)
        for metric in metrics
    ]
    return table(("Name", "Kind", "Labels", "Meaning"), rows)


def cli_page() -> str:
    root = cli.parser()
    parts = [GENERATED, f"# Command line\n\n{root.description}\n", *_commands(root)]
    parts.append(
        "\n## Exit codes\n\n"
        "0: done, or drained after a signal. 1: a piped chat question failed. 2: a fault of the\n"
        "caller's, said in one line (flags, settings, port in use, no such model). 128 + n: ended\n"
        "at once by a second signal n.\n"
    )
    return "".join(parts)


def _commands(parser: argparse.ArgumentParser) -> list[str]:
    """A section for each command, and for the commands below one."""
    parts = []
    for action in parser._actions:
        for command in (
            action.choices.values() if isinstance(action, argparse._SubParsersAction) else ()
        ):
            parts.append(f"\n## {command.prog}\n\n{command.description}\n")
            flags = [a for a in command._actions if a.dest != "help" and a.nargs != argparse.PARSER]
            if flags:
                head = ("Flag", "Default", "Meaning")
                parts.append("\n" + table(head, [_flag(a) for a in flags]))
            parts += _commands(command)
    return parts


def _flag(action: argparse.Action) -> tuple[str, str, str]:
    metavar = action.metavar or ("" if action.nargs == 0 else action.dest.upper())
    several = " …" if action.nargs == "+" else ""
    flag = f"{''.join(action.option_strings[:1])} {metavar}".strip() + several
    default = code(str(action.default)) if action.default and action.nargs != 0 else ""
    return f"`{flag}`", default, action.help or ""


OUTPUTS: dict[str, Callable[[], str]] = {
    "configs/schema.json": lambda: json.dumps(schema(), indent=2) + "\n",
    "configs/default.yaml": default_yaml,
    "docs/reference/cli.md": cli_page,
    "docs/reference/config.md": config_page,
    "docs/reference/http.md": http_page,
    "docs/reference/metrics.md": metrics_page,
}


def stale(root: Path) -> list[str]:
    """The generated files under `root` that are not what the code says now."""
    return [
        name
        for name, make in OUTPUTS.items()
        if not (root / name).is_file() or (root / name).read_text(encoding="utf-8") != make()
    ]


def main() -> int:
    """Write what is stale, relative to the working directory."""
    for name in stale(Path()):
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(OUTPUTS[name](), encoding="utf-8")
        sys.stdout.write(f"wrote {name}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
