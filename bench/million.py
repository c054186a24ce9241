"""How long a simulation of many replicas takes, and how much memory.

    python -m bench.million [--requests 1000000] [--replicas 1000] [--processes 2]
                            [--per-replica 24] [--routing prefix_affinity] [--set KEY=VALUE]

Writes a made-up trace and runs `dynamo-serve simulate` on it: prompts of 64 to 512 tokens, half of
them behind one of `--heads` shared heads of 128 tokens, answers of 20 to 60 tokens, four tenants
with and without targets, arrivals at random, so many a second for each replica. Steps cost what
those of a small model on a GPU do (`COST`). What it took is told beside what was simulated; one
JSON line last.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dynamo_serve import cli, trace
from dynamo_serve.core.tenant import CLASSES, Tenancy, Tenant
from dynamo_serve.trace import Arrival, Header

PAGE = 16
COST = "fixed=8ms,token=40us,sequence=100us,read=20ns,between=0.3ms"
TENANTS = (
    ("chat", "interactive"),
    ("shop", "standard"),
    ("search", "standard"),
    ("night", "batch"),
)
HEAD_PAGES, SHARED = 8, 0.5
OWN, ANSWERS = (4, 32), (20, 60)  # pages of a prompt, tokens of an answer: least and most


def arrivals(count: int, per_second: float, heads: int, rng: random.Random) -> Iterator[Arrival]:
    """In the order of their times; nothing of them is kept."""
    at, number = 0.0, heads * HEAD_PAGES
    for _ in range(count):
        at += rng.expovariate(per_second)
        own, tokens = rng.randint(*OWN), rng.randint(*ANSWERS)
        pages: tuple[tuple[int, int], ...] = ((number, own),)
        if rng.random() < SHARED:
            pages = ((rng.randrange(heads) * HEAD_PAGES, HEAD_PAGES), *pages)
        number += own
        yield Arrival(
            at=round(at, 6),
            prompt_tokens=PAGE * sum(count for _, count in pages) + rng.randint(1, PAGE - 1),
            output_tokens=tokens,
            max_tokens=tokens,
            pages=pages,
            tenant=rng.choice(TENANTS)[0],
        )


def write(path: Path, asked: argparse.Namespace) -> None:
    tenants = {name: Tenant(name, class_name=of) for name, of in TENANTS}
    header = Header(
        model="made-up",
        page_size=PAGE,
        spec={"num_pages": 4096, "max_model_len": 4096},
        tenancy=asdict(Tenancy(tenants, CLASSES)),
    )
    per_second = asked.per_replica * asked.replicas
    with trace.open_trace(path, "w") as file:
        file.write(trace.dump(header) + "\n")
        for arrival in arrivals(asked.requests, per_second, asked.heads, random.Random(asked.seed)):
            file.write(trace.dump(arrival) + "\n")


def simulated(path: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """What `dynamo-serve simulate` prints last, and what it took."""
    words = ["simulate", str(path), "--cost", COST, "--replicas", str(asked.replicas)]
    words += ["--processes", str(asked.processes), "--routing", asked.routing]
    words += [word for said in asked.set for word in ("--set", said)]
    told, began = io.StringIO(), time.perf_counter()
    with contextlib.redirect_stdout(told):
        code = cli.main(words)
    if code:
        raise SystemExit(f"simulate ended with {code}")
    seconds = time.perf_counter() - began
    own, others = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    seen = json.loads(told.getvalue().splitlines()[-1])["simulated"]
    return {
        "requests": asked.requests,
        "replicas": asked.replicas,
        "seconds": seconds,
        "cpu_seconds": sum(one.ru_utime + one.ru_stime for one in (own, others)),
        "gib": own.ru_maxrss / (1 << 20),
        "gib_of_a_worker": others.ru_maxrss / (1 << 20),  # what it shares with the first counts
        "simulated": seen,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--per-replica", type=float, default=24.0, help="requests a second")
    parser.add_argument("--heads", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--routing", default="prefix_affinity")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.jsonl"
        write(path, asked)
        print(
            f"trace: {asked.requests:,} requests, {path.stat().st_size / 1e6:,.0f} MB", flush=True
        )
        result = simulated(path, asked)
    print(
        f"{result['seconds']:.1f} s ({result['cpu_seconds']:.1f} s of CPU with writing the trace), "
        f"{result['gib']:.2f} GiB and {result['gib_of_a_worker']:.2f} in a worker"
    )
    for name, figure in result["simulated"].items():
        print(f"{name:28} {figure:,.4g}")
    print(json.dumps({"simulated_cluster": result}))


if __name__ == "__main__":
    main()
