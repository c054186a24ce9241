"""dynamo_serve against `transformers serve --continuous-batching`, alternating in one run.

    python -m bench.random_model --out MODEL_DIR
    python -m bench.versus_transformers MODEL_DIR --transformers PATH/TO/bin/transformers

`--transformers` is the command of an environment of its own with
`torch==2.13.0 'transformers[serving]==5.23.0' accelerate`. Each server is started alone, warmed
up, measured and stopped; then the other; `--repeat` times. A table for people, one JSON line last.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from bench.load import Report, Workload, count_tokens, drive, prompts
from bench.server import free_port, our_command, running

WORKLOADS = (
    Workload("W2", requests=64, concurrency=32, shared=0, own=128, output=64),
    Workload("W3", requests=32, concurrency=8, shared=1024, own=64, output=32),
)


def command_of(server: str, args: argparse.Namespace, port: int) -> list[str]:
    if server == "dynamo_serve":
        settings = ["model.dtype=bfloat16", "cache.num_pages=2400", *args.set]
        return our_command(args.model, port, settings)
    return [str(args.transformers), "serve", str(args.model), "--continuous-batching",
            "--device", "cpu", "--dtype", "bfloat16", "--attn-implementation", "sdpa",
            "--cb-num-blocks", "1152", "--cb-block-size", "32", "--cb-max-batch-tokens", "512",
            "--port", str(port)]  # fmt: skip


async def measure(url: str, args: argparse.Namespace, seed: int) -> dict[str, Report]:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = str(args.model)
    extra: dict[str, Any] = {}
    warm = Workload("warm-up", requests=4, concurrency=4, shared=0, own=64, output=8)
    await drive(url, model, warm, prompts(warm, tokenizer, seed + 1000), extra)
    reports = {}
    for workload in WORKLOADS:
        texts = prompts(workload, tokenizer, seed)
        counted = await count_tokens(url, model, "hello", workload.output, extra)
        assert counted == workload.output, f"asked for {workload.output} tokens, got {counted}"
        reports[workload.name] = await drive(url, model, workload, texts, extra)
    return reports


def run_once(server: str, args: argparse.Namespace, seed: int) -> dict[str, Report]:
    port = free_port()
    log = Path(tempfile.gettempdir()) / f"versus-{server}.log"
    ready = "/ready" if server == "dynamo_serve" else "/health"
    with running(command_of(server, args, port), port, log, ready) as url:
        return asyncio.run(measure(url, args, seed))


def show(rows: list[dict[str, Any]]) -> None:
    columns = list(rows[0])
    print(" | ".join(columns))
    for row in rows:
        print(" | ".join(str(row[c]) for c in columns))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--transformers", type=Path)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], help="a dynamo_serve setting")
    return parser.parse_args()


def main() -> None:
    args = parse()
    servers = ["dynamo_serve", *(["transformers"] if args.transformers else [])]
    rows: list[dict[str, Any]] = []
    for repetition in range(args.repeat):
        for server in servers:
            for name, report in run_once(server, args, repetition).items():
                rows.append({"server": server, "workload": name, "run": repetition,
                             **report.summary()})  # fmt: skip
                print(rows[-1], flush=True)
    show(rows)
    rates = {
        f"{server} {w.name}": statistics.median(
            row["tokens_per_second"] for row in rows
            if row["server"] == server and row["workload"] == w.name
        )
        for server in servers for w in WORKLOADS
    }  # fmt: skip
    print(json.dumps({"tokens_per_second": rates}))


if __name__ == "__main__":
    main()
