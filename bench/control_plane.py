"""What everything around the model costs: a server on the fake engine, many streams, two cores.

    python -m bench.control_plane [--endpoint chat completions] [--streams 64] [--output 512]

The fake engine takes no time to speak of, so the rate is the control plane's. Server, engine
process and client share the machine. Every stream is checked: all its tokens by `usage`, its
finish, its events parsed (after the clock has stopped). A table for people, one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from bench.server import free_port, our_command, running
from bench.sse_client import Stream, drive, post
from dynamo_serve import bundled
from dynamo_serve.bench.spread import percentile

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
TICKS = os.sysconf("SC_CLK_TCK")
WORDS = "the quick brown fox jumps over the lazy dog and goes home"


class Cpu(NamedTuple):
    """CPU seconds so far, user and system."""

    api: float
    engine: float
    client: float

    @classmethod
    def now(cls) -> Cpu:
        (api,) = children(os.getpid())
        (engine,) = children(api)
        return cls(cpu_seconds(api), cpu_seconds(engine), time.process_time())


def children(pid: int) -> list[int]:
    return [
        int(child)
        for path in Path(f"/proc/{pid}/task").glob("*/children")
        for child in path.read_text().split()
    ]


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def body(endpoint: str, number: int, output: int) -> dict[str, Any]:
    text = f"{number}: {WORDS} {WORDS}"
    asked = {"prompt": text}
    if endpoint == "chat":
        asked = {"messages": [{"role": "user", "content": text}]}  # type: ignore[dict-item]
    return {**asked, "max_tokens": output, "temperature": 0, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True}}  # fmt: skip


def check(stream: Stream, output: int) -> int:
    """How many events carried a choice. Raises `RuntimeError` unless every token arrived."""
    events = stream.events()
    choices = [event["choices"][0] for event in events if event["choices"]]
    usage, finish = events[-1].get("usage") or {}, choices[-1]["finish_reason"]
    if usage.get("completion_tokens") != output or finish != "length":
        raise RuntimeError(f"asked for {output} tokens, got {usage} and {finish!r}")
    return len(choices)


def measure(port: int, endpoint: str, args: argparse.Namespace, first: int) -> dict[str, Any]:
    numbers = range(first, first + args.requests)
    requests = [post(PATHS[endpoint], body(endpoint, i, args.output)) for i in numbers]
    before, began = Cpu.now(), time.perf_counter()
    streams = drive(port, requests, args.streams)
    seconds, after = time.perf_counter() - began, Cpu.now()
    tokens = args.output * len(streams)
    events = sum(check(stream, args.output) for stream in streams)
    gaps = [gap for stream in streams for gap in stream.gaps]
    ttfts = [stream.ttft - stream.sent for stream in streams]
    spent = {f"{name}_us_per_token": 1e6 * (end - start) / tokens
             for name, start, end in zip(Cpu._fields, before, after, strict=True)}  # fmt: skip
    return {
        "endpoint": endpoint,
        "tokens_per_second": tokens / seconds,
        "events_per_token": events / tokens,
        "ttft_p50_ms": 1e3 * percentile(ttfts, 0.5),
        "ttft_p99_ms": 1e3 * percentile(ttfts, 0.99),
        "gap_p50_ms": 1e3 * percentile(gaps, 0.5),
        "gap_p99_ms": 1e3 * percentile(gaps, 0.99),
        **spent,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=bundled.path(), help="whose tokenizer")
    parser.add_argument("--endpoint", nargs="+", choices=PATHS, default=list(PATHS))
    parser.add_argument("--streams", type=int, default=64, help="at a time")
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--output", type=int, default=512, help="tokens of each answer")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], help="a dynamo_serve setting")
    return parser.parse_args()


def main() -> None:
    args = parse()
    port, rows = free_port(), []
    log = Path(tempfile.gettempdir()) / "control-plane.log"
    settings = ["engine.kind=fake", f"scheduler.max_decode_sequences={args.streams}", *args.set]
    with running(our_command(args.model, port, settings), port, log):
        for run in range(args.repeat):
            for endpoint in args.endpoint:
                row = measure(port, endpoint, args, first=run * args.requests)
                rows.append(row)
                shown = {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}
                print(*(f"{key} {value}" for key, value in shown.items()), sep=" | ", flush=True)
    medians = {
        endpoint: statistics.median(
            row["tokens_per_second"] for row in rows if row["endpoint"] == endpoint
        )
        for endpoint in args.endpoint
    }
    print(json.dumps({"tokens_per_second": {k: round(v, 1) for k, v in medians.items()}}))


if __name__ == "__main__":
    main()
