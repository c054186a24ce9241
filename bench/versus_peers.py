"""dynamo_serve against other servers, alternating in one run.

    python -m bench.random_model --out MODEL_DIR
    python -m bench.versus_peers MODEL_DIR --vllm ENV/bin/vllm --transformers ENV/bin/transformers

Peers are commands of environments of their own (`docs/benchmarks.md` says how to make them); those
that are not named are left out. Each server is started alone, warmed up, measured and stopped;
then the next; `--repeat` times. A table for people, one JSON line last.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from bench.load import Report, Workload, count_tokens, drive, prompts
from bench.peers import SERVERS
from bench.server import free_port, running, settle

WORKLOADS = (
    Workload("W1", requests=32, concurrency=8, shared=0, own=256, output=64),
    Workload("W2", requests=64, concurrency=32, shared=0, own=128, output=64),
    Workload("W3", requests=32, concurrency=8, shared=1024, own=64, output=32),
    Workload("W4", requests=4, concurrency=1, shared=0, own=64, output=128),
    Workload("W5", requests=256, concurrency=64, shared=0, own=32, output=128),
)


async def measure(server: str, url: str, args: argparse.Namespace, seed: int) -> dict[str, Report]:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = str(args.model)
    extra: dict[str, Any] = {"ignore_eos": True} if server == "vllm" else {}
    warm = Workload("warm-up", requests=4, concurrency=4, shared=0, own=64, output=8)
    await drive(url, model, warm, prompts(warm, tokenizer, seed + 1000), extra)
    reports = {}
    for workload in WORKLOADS:
        if workload.name not in args.only:
            continue
        texts = prompts(workload, tokenizer, seed)
        counted = await count_tokens(url, model, "hello", workload.output, extra)
        assert counted == workload.output, f"asked for {workload.output} tokens, got {counted}"
        reports[workload.name] = await drive(url, model, workload, texts, extra)
    return reports


def run_once(server: str, args: argparse.Namespace, seed: int) -> dict[str, Report]:
    port = free_port()
    log = Path(tempfile.gettempdir()) / f"versus-{server}.log"
    peer = SERVERS[server](args, port)
    begin = time.monotonic()
    with running(peer.command, port, log, peer.ready, peer.environment) as server_run:
        up = time.monotonic() - begin
        settle()
        reports = asyncio.run(measure(server, server_run.url, args, seed))
        print(f"{server}: up after {up:.1f} s, {server_run.resident_gib():.1f} GiB resident")
        return reports


def show(rows: list[dict[str, Any]]) -> None:
    columns = list(rows[0])
    print(" | ".join(columns))
    for row in rows:
        print(" | ".join(str(row[c]) for c in columns))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--vllm", type=Path, help="the vllm command")
    parser.add_argument("--tcmalloc", type=Path, help="libtcmalloc_minimal.so for vllm")
    parser.add_argument("--transformers", type=Path, help="the transformers command")
    parser.add_argument("--int8", action="store_true", help="ours with int8 weights, too")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=["W1", "W2", "W3", "W4"])
    parser.add_argument("--set", action="append", default=[], help="a dynamo_serve setting")
    return parser.parse_args()


def main() -> None:
    args = parse()
    servers = ["dynamo_serve", *(s for s in ("int8", "vllm", "transformers") if getattr(args, s))]
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
        for server in servers for w in WORKLOADS if w.name in args.only
    }  # fmt: skip
    print(json.dumps({"tokens_per_second": rates}))


if __name__ == "__main__":
    main()
