"""What do pages of the console cost that somebody has open? The same load with and without them.

    python -m bench.console MODEL [--pages 1] [--streams 32] [--seconds 20] [--repeat 3]

One server; the two alternate. Every page asks what the script of `/console` asks, once a second.
Output tokens/s of streams that follow each other, by the counter of the server. One JSON line last.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from bench.server import free_port, our_command, running
from dynamo_serve.bench.words import percent

ADMIN = "key-of-the-bench-with-enough-characters"
HEAD = {"Authorization": f"Bearer {ADMIN}"}
ASKED = ("/ready", "/admin/state", "/admin/costs", "/admin/controller", "/admin/incidents")
WARM_UP = 5.0  # seconds
PROMPT = [5, 6, 7, 8] * 16
LENGTHS = range(8, 40)  # output tokens: not all alike, or all would end and begin together


async def page(client: httpx.AsyncClient, took: list[float]) -> None:
    while True:
        began = time.perf_counter()
        await asyncio.gather(*(client.get(path, headers=HEAD) for path in ASKED))
        took.append(time.perf_counter() - began)
        await asyncio.sleep(max(0.0, 1.0 - took[-1]))


async def stream(client: httpx.AsyncClient) -> None:
    while True:
        body = {"prompt": PROMPT, "max_tokens": random.choice(LENGTHS), "ignore_eos": True}
        (await client.post("/v1/completions", json=body)).raise_for_status()


async def output(client: httpx.AsyncClient) -> int:
    costs = (await client.get("/admin/costs", headers=HEAD)).raise_for_status().json()
    return sum(tenant["output_tokens"] for tenant in costs["tenants"].values())


async def measured(url: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        load = [asyncio.create_task(stream(client)) for _ in range(args.streams)]
        await asyncio.sleep(WARM_UP)
        for round in range(2 * args.repeat):
            took: list[float] = []
            count = args.pages * (round % 2)
            pages = [asyncio.create_task(page(client, took)) for _ in range(count)]
            began, before = time.perf_counter(), await output(client)
            await asyncio.sleep(args.seconds)
            speed = (await output(client) - before) / (time.perf_counter() - began)
            rows.append({"pages": count, "tokens_s": speed, "look_s": median(took or [0.0])})
            print(rows[-1], flush=True)
            for task in pages:
                task.cancel()
        for task in load:
            task.cancel()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--pages", type=int, default=1)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    port, log = free_port(), Path(tempfile.gettempdir()) / "console.log"
    settings = [f'server.admin_keys=["{ADMIN}"]', "scheduler.speculation=off"]
    with running(our_command(args.model, port, settings), port, log):
        rows = asyncio.run(measured(f"http://127.0.0.1:{port}", args))
    without, with_pages = (
        median(row["tokens_s"] for row in rows if bool(row["pages"]) is is_open)
        for is_open in (False, True)
    )
    print(f"{args.pages} pages cost {percent(1 - with_pages / without)}")
    print(json.dumps({"without": without, "with": with_pages, "rows": rows}))


if __name__ == "__main__":
    main()
