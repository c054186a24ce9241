"""`dynamo-serve replay` and `dynamo-serve trace`: recorded traffic, sent again or looked at."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from dynamo_serve.bench import endpoint, record, recorded, text
from dynamo_serve.bench.bodies import BodyExtras
from dynamo_serve.bench.client import Client
from dynamo_serve.bench.driver import Driving
from dynamo_serve.bench.outcomes import nothing_answered
from dynamo_serve.bench.record import Record, Run
from dynamo_serve.bench.recorded import Recording
from dynamo_serve.bench.replay import Notes, Wishes, calls_of, check_keys, is_sent, plan_of
from dynamo_serve.bench.run import Options, execute
from dynamo_serve.bench.spread import percentile
from dynamo_serve.bench.summary import summary
from dynamo_serve.cli_progress import Progress
from dynamo_serve.errors import ConfigError
from dynamo_serve.settings import read_yaml
from dynamo_serve.trace import Arrival

METRICS_EVERY_S = 1.0
FAILED, INTERRUPTED = 1, 130


def show(arguments: argparse.Namespace) -> int:
    recording = recorded.load([Path(name) for name in arguments.traces])
    told = recorded.described(recording)
    if arguments.to_mooncake:
        lines = (line + "\n" for line in recorded.mooncake(recording))
        _write(arguments.to_mooncake, lambda path: path.write_text("".join(lines)))
    print(json.dumps(told) if arguments.json else recorded.text(told))
    return 0


def replay(arguments: argparse.Namespace) -> int:
    """0; 1 if no request was answered; 130 after a Ctrl-C. Raises `ConfigError`, and
    `EndpointError` if there is no server."""
    recording = recorded.load([Path(name) for name in arguments.traces])
    _check(arguments)
    check_texts(recording, arguments.text)
    keys = None if arguments.tenants is None else keys_in(Path(arguments.tenants))
    key = arguments.api_key or os.environ.get("OPENAI_API_KEY") or ""
    facts = asyncio.run(_facts(arguments, key or next(iter((keys or {}).values()), "")))
    wishes = Wishes(
        vocab_size=_vocab_size(arguments, recording, facts),
        speed=arguments.speed,
        requests=arguments.requests,
        keys=keys,
        api_key=key,
        is_ours=bool(facts.server),
        context=facts.context,
        with_texts=arguments.text == "recorded",
    )
    recording = first_calls(recording, arguments.requests)
    check_keys(recording, wishes)
    _tell(recording, wishes)
    notes = Notes()
    run = execute(plan_of(recording, wishes, notes), _options(arguments, recording, facts, key))
    for note in notes.lines():
        print(note, file=sys.stderr)
    if arguments.out:
        _write(arguments.out, lambda path: record.write(run, path))
    told = compared(recording, run)
    print(text.text(summary(run)))
    print("\nbeside what was recorded:\n" + recorded.text(told))
    print(json.dumps(told))
    if run.about["interrupted"]:
        return INTERRUPTED
    if why := nothing_answered(run):
        print(f"error: {why}", file=sys.stderr)
    return FAILED if why else 0


def _check(arguments: argparse.Namespace) -> None:
    """What is wrong with the flags is told before anything is sent. Raises `ConfigError`."""
    for name in ("speed", "timeout", "wait"):
        if not 0 < (value := getattr(arguments, name)) < math.inf:
            raise ConfigError(f"--{name} {value:g}: allowed: more than 0")
    if arguments.requests is not None and arguments.requests < 1:
        raise ConfigError(f"--requests {arguments.requests}: allowed: 1 or more")
    record.check_out("--out", arguments.out)


def check_texts(recording: Recording, wanted: str) -> None:
    if wanted == "recorded" and not any(a.text is not None for a in recording.arrivals):
        raise ConfigError("--text recorded: there is no text in it; it needs record.text = true")


def first_calls(recording: Recording, most: int | None) -> Recording:
    """What is sent of it, so that it is compared with nothing else."""
    calls = (call for call in calls_of(recording.arrivals) if is_sent(call))
    kept = {id(arrival) for call in islice(calls, most) for arrival in call}
    if most is None or not kept:
        return recording
    return replace(recording, arrivals=[a for a in recording.arrivals if id(a) in kept])


def _options(
    arguments: argparse.Namespace, recording: Recording, facts: endpoint.Facts, key: str
) -> Options:
    progress = Progress(sys.stderr)
    extras = BodyExtras(model=facts.model, explain=bool(facts.server))
    return Options(
        url=arguments.url,
        driving=Driving(extras=extras, timeout=arguments.timeout),
        metrics_every=METRICS_EVERY_S if facts.has_metrics else None,
        metrics_key=key,
        total=min(len(recording.arrivals), arguments.requests or len(recording.arrivals)),
        progress=lambda fraction, note: progress("replay", fraction, note),
        about={
            "plan": {"traces": arguments.traces, "speed": arguments.speed, "text": arguments.text},
            "model": facts.model,
            "settings": facts.server,
        },
    )


def keys_in(path: Path) -> Mapping[str, str]:
    """The key of each tenant, from lines 'NAME: KEY'. Raises `ConfigError`."""
    tree = read_yaml(path)
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree.values()):
        raise ConfigError(f"{path}: allowed: a line 'NAME: KEY' for each tenant, the key as text")
    return {str(name): key for name, key in tree.items()}


async def _facts(arguments: argparse.Namespace, key: str) -> endpoint.Facts:
    client = Client(arguments.url)
    try:
        patience = endpoint.Patience(arguments.wait)
        return await endpoint.facts(client, arguments.model, key, patience)
    finally:
        await client.close()


def _vocab_size(arguments: argparse.Namespace, recording: Recording, facts: endpoint.Facts) -> int:
    known = arguments.vocab_size or facts.vocab_size or recording.header.spec.get("vocab_size")
    if not isinstance(known, int):
        raise ConfigError("nobody says how large the vocabulary is; give it with --vocab-size")
    return known


def _tell(recording: Recording, wishes: Wishes) -> None:
    tenants = {arrival.tenant for arrival in recording.arrivals}
    said = f"{len(recording.arrivals)} requests of {len(tenants)} tenant(s) in "
    said += f"{recording.span / wishes.speed:.1f} s"
    if wishes.keys is None and tenants != {"default"}:
        said += "; all are sent as one tenant, in its class: --tenants gives each its own key"
    if not wishes.is_ours:
        said += "; not a dynamo_serve server: answers may end early, for ignore_eos is not asked"
    print(said, file=sys.stderr)


def compared(recording: Recording, run: Run) -> dict[str, Any]:
    """The replay beside what was recorded."""
    told = recorded.described(recording)
    records = run.records
    return {
        "requests": len(records),
        "outcomes": dict(Counter(r.outcome for r in records).most_common()),
        "recorded_ended": told["ended"],
        "output_tokens": sum(r.output_tokens for r in records),
        "recorded_output_tokens": told["output_tokens"],
        "cached_share": round(_share(records), 4),
        "recorded_cached_share": round(recorded.cached_share(_whole(recording)), 4),
        "ttft_s": _times([r.first - r.due for r in records if r.first is not None]),
        "recorded_ttft_s": _times(
            [a.first_token for a in recording.arrivals if a.is_stream and a.first_token is not None]
        ),
    }


def _times(values: Sequence[float]) -> dict[str, float]:
    """Of streams: of other answers a client does not see the first token."""
    if not values:
        return {}
    return {f"p{100 * p:g}": round(percentile(values, p), 4) for p in (0.5, 0.99)}


def _whole(recording: Recording) -> list[Arrival]:
    """As clients see it: calls, and those that came to their end."""
    ended = [arrival for arrival in recording.arrivals if arrival.ended in ("stop", "length")]
    return [arrival for arrival in ended if arrival.num_choices]


def _share(records: Sequence[Record]) -> float:
    """Of answers that came to their end: of others a client does not learn it."""
    asked = sum(r.prompt_tokens for r in records if r.outcome == "ok")
    return sum(r.cached_tokens for r in records if r.outcome == "ok") / asked if asked else 0.0


def _write(name: str, write: Any) -> None:
    try:
        write(Path(name))
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror}") from None
