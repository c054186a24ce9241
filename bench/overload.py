"""A server that gets several times what it can do, with and without its healing ladder.

    python -m bench.overload MODEL --seconds 300 --factor 3 --out DIR [--scene one-tenant]

Short questions that were promised a TTFT and an ITL, and batch work that was promised nothing. In
the scene two-tenants they come from different ones, so that fair share keeps them apart; in
one-tenant a team's nightly jobs have the key of its chat, as happens. Calm, overload, calm: first
until the backlog has gone (`--backlog cancel`: it is cancelled) and every rung is undone, at most
`--wait` seconds, and then as long as before. Every second the ladder is read; every answer is timed
at the client. Writes DIR/overload.json and DIR/overload.svg.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx

from bench.overload_report import Run, Sent, phases, picture
from bench.promises import FIRST_ID, LAST_ID, Answer, Client, tenants_file
from bench.server import free_port, our_command, running

QUESTION, BATCH = (48, 16), (200, 64)  # tokens of prompt and output
PROBE_S = 10.0  # of batch work alone, to see what the server can do
CALM_LOAD = 0.3  # of that, for each of the two
WAITING = re.compile(rb"^dserve_sequences_waiting (\S+)$", re.MULTILINE)


# For each scene: the tenants, and of both kinds of work the key and the class that is asked for.
SCENES: dict[str, tuple[dict[str, Any], dict[str, tuple[str, str | None]]]] = {
    "two-tenants": (
        {"questions": {"class": "promised"}, "batch": {"class": "batch"}},
        {"questions": ("questions", None), "batch": ("batch", None)},
    ),
    "one-tenant": (
        {"team": {"class": "promised"}},
        {"questions": ("team", None), "batch": ("team", "batch")},
    ),
}


class Visitor(Client):
    """A client whose prompts keep within the model's vocabulary."""

    last_id = LAST_ID

    def __init__(self, http: httpx.AsyncClient, model: str, scene: str) -> None:
        super().__init__(http, model)
        self.who = SCENES[scene][1]

    async def learn(self) -> None:
        headers = {"Authorization": f"Bearer {self.who['batch'][0]}"}
        facts = (await self.http.get("/v1/server", headers=headers)).json()
        self.last_id = min(LAST_ID, int(facts["limits"]["vocab_size"]) - 1)

    async def send(self, kind: str, size: tuple[int, int]) -> Answer:
        key, class_name = self.who[kind]
        return await self.ask(key, self.prompt(size[0]), size[1], class_name=class_name)

    def prompt(self, length: int) -> list[int]:
        first = min(FIRST_ID, self.last_id // 2)
        return [self.rng.randint(first, self.last_id) for _ in range(length)]


async def probe(client: Visitor, workers: int) -> float:
    """Batch requests that the server answers in a second, if it has nothing else to do. A first
    wave is not counted: it finds cold memory, and a server that knows no step times yet."""
    await asyncio.gather(*(client.send("batch", BATCH) for _ in range(workers)))
    began, done = time.monotonic(), 0
    stop = began + PROBE_S

    async def worker() -> None:
        nonlocal done
        while time.monotonic() < stop:
            answer = await client.send("batch", BATCH)
            if answer.status != 200:
                raise RuntimeError(f"the server answers with {answer.status}")
            done += 1

    await asyncio.gather(*(worker() for _ in range(workers)))
    return done / (time.monotonic() - began)  # the last answers come after the end of a short probe


class Load:
    """Sends requests at random times with given rates, and remembers what became of each."""

    def __init__(self, client: Visitor, run: Run, most_open: int) -> None:
        self.client, self.run, self.most_open = client, run, most_open
        self.began = time.monotonic()
        self.tasks: set[asyncio.Task[None]] = set()
        self.open = 0
        self.is_over = False

    @property
    def now(self) -> float:
        return time.monotonic() - self.began

    async def send(self, kind: str, size: tuple[int, int], rates: Sequence[float]) -> None:
        """`rates` before, in and after the overload, in requests a second."""
        rng = random.Random(kind)
        at = 0.0
        while max(at, self.now) < self.run.last:
            rate = rates[sum(at >= end for end in self.run.overload)]
            at += rng.expovariate(rate)
            await asyncio.sleep(max(0.0, at - self.now))
            self.run.behind = max(self.run.behind, self.now - at)
            task = asyncio.create_task(self._one(kind, size), name=kind)
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def _one(self, kind: str, size: tuple[int, int]) -> None:
        sent = Sent(kind, self.now)
        self.run.sent.append(sent)
        if kind == "batch" and self.open >= self.most_open:
            sent.status = -1
            return
        self.open += kind == "batch"
        try:
            answer = await self.client.send(kind, size)
        except httpx.HTTPError:
            return
        except asyncio.CancelledError:
            sent.status = 0 if self.is_over else -2
            raise
        finally:
            self.open -= kind == "batch"
        sent.status, sent.retry_after = answer.status, answer.retry_after
        sent.tokens = [at - self.began for at in answer.tokens]
        sent.ttft = answer.ttft if answer.tokens else None

    async def watch(self) -> None:
        """Read the ladder and the queue every second."""
        while True:
            await asyncio.sleep(1.0 - self.now % 1.0)
            told = await self.client.admin("controller")
            page = (await self.client.http.get("/metrics")).content
            found = WAITING.search(page)
            self.run.samples.append(
                {
                    "at": self.now,
                    "waiting": float(found[1]) if found else 0.0,
                    "rungs": {rung["rung"]: rung["level"] for rung in told["rungs"]},
                    "troubles": told["troubles"],
                    "evidence": told["evidence"],
                }
            )
            self.run.history = [{**c, "at": self.now - c["s_ago"]} for c in told["history"]]
            self.run.look(self.now)

    async def cancel_backlog(self) -> None:
        """Hang up on the jobs that are open when the overload ends."""
        await asyncio.sleep(max(0.0, self.run.overload[1] - self.now))
        for task in [task for task in self.tasks if task.get_name() == "batch"]:
            task.cancel()


async def act(url: str, ladder: str, args: argparse.Namespace) -> Run:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
    async with httpx.AsyncClient(base_url=url, timeout=900, limits=limits) as http:
        client = Visitor(http, str(args.model), args.scene)
        await client.learn()
        capacity = args.capacity or await probe(client, args.workers)
        calm, over = args.calm, args.seconds
        run = Run(ladder, capacity, (calm, calm + over), calm, args.wait)
        load = Load(client, run, args.most_open)
        # A question costs about a quarter of a batch request.
        asked = 4 * CALM_LOAD * capacity
        batch = CALM_LOAD * capacity
        flood = (args.factor - 2 * CALM_LOAD) * capacity
        watching = asyncio.create_task(load.watch())
        helpers = [watching]
        if args.backlog == "cancel":
            helpers.append(asyncio.create_task(load.cancel_backlog()))
        await asyncio.gather(
            load.send("questions", QUESTION, (asked, 2 * asked, asked)),
            load.send("batch", BATCH, (batch, flood, batch)),
        )
        if watching.done():
            watching.result()  # raises: nobody has looked
        left, load.is_over = [*helpers, *load.tasks], True
        for task in left:  # what is still open had its time
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        return run


def play(ladder: str, args: argparse.Namespace) -> Run:
    """One run on a fresh server."""
    promised = {"rank": 0, "ttft_ms": args.ttft_ms, "itl_ms": args.itl_ms}
    port, log = free_port(), Path(tempfile.gettempdir()) / f"overload-{ladder}.log"
    with tenants_file({"promised": promised}, SCENES[args.scene][0]) as path:
        settings = [f"server.tenants_file={path}", f"scheduler.ladder={ladder}", *args.set]
        with running(our_command(args.model, port, settings), port, log) as server:
            return asyncio.run(act(server.url, ladder, args))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--scene", choices=SCENES, default="two-tenants")
    parser.add_argument("--seconds", type=float, default=300.0, help="of overload")
    parser.add_argument("--calm", type=float, default=120.0, help="seconds before, and after")
    parser.add_argument("--wait", type=float, default=900.0, help="for what the overload leaves")
    parser.add_argument("--backlog", choices=("wait", "cancel"), default="wait")
    parser.add_argument("--factor", type=float, default=3.0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ladder", nargs="+", choices=("auto", "off"), default=["off", "auto"])
    parser.add_argument("--ttft-ms", type=float, default=1000.0)
    parser.add_argument("--itl-ms", type=float, default=250.0)
    parser.add_argument("--workers", type=int, default=24, help="of the probe")
    parser.add_argument("--capacity", type=float, default=0.0, help="batch requests/s; 0: probe")
    parser.add_argument("--most-open", type=int, default=1000, help="batch requests at a time")
    parser.add_argument("--set", action="append", default=[], help="a setting of the server")
    args = parser.parse_args()
    runs: list[Run] = []
    for ladder in args.ladder:
        runs.append(play(ladder, args))
        args.capacity = runs[0].capacity  # the same load for every run
        print(json.dumps(phases(runs[-1], args)), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    whole = {"summary": [phases(run, args) for run in runs], "runs": [asdict(run) for run in runs]}
    (args.out / "overload.json").write_text(json.dumps(whole))
    (args.out / "overload.svg").write_text(picture(runs, args))


if __name__ == "__main__":
    main()
