"""A server that gets several times what it can do, with and without its healing ladder.

    python -m bench.overload MODEL --seconds 300 --factor 3 --out DIR

Two tenants: one asks short questions and was promised a TTFT and an ITL, the other has batch work
and was promised nothing. Calm, overload, calm. Every second the ladder is read; every answer is
timed at the client. Writes DIR/overload.json and DIR/overload.svg.
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from bench.plot import Bars, Lines, svg
from bench.promises import FIRST_ID, LAST_ID, Answer, Client, tenants_file
from bench.server import free_port, our_command, running

QUESTION, BATCH = (48, 16), (200, 64)  # tokens of prompt and output
PROBE_S = 10.0  # of batch work alone, to see what the server can do
CALM_LOAD = 0.3  # of that, for each of the two
WAITING = re.compile(rb"^dserve_sequences_waiting (\S+)$", re.MULTILINE)


@dataclass
class Sent:
    """One request; seconds from the beginning of the run."""

    kind: str
    at: float
    status: int = 0  # 0: no answer in time, -1: not sent, too many were open
    ttft: float | None = None
    tokens: list[float] = field(default_factory=list)
    retry_after: float = 0.0


@dataclass
class Run:
    """What happened with one setting of `scheduler.ladder`."""

    ladder: str
    capacity: float
    phases: tuple[float, float, float]  # when the overload begins and ends, and the end of all
    sent: list[Sent] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    behind: float = 0.0  # seconds by which the client was late: it should be next to none


class Visitor(Client):
    """A client whose prompts keep within the model's vocabulary."""

    last_id = LAST_ID

    async def learn(self) -> None:
        headers = {"Authorization": "Bearer batch"}
        facts = (await self.http.get("/v1/server", headers=headers)).json()
        self.last_id = min(LAST_ID, int(facts["limits"]["vocab_size"]) - 1)

    def prompt(self, length: int) -> list[int]:
        first = min(FIRST_ID, self.last_id // 2)
        return [self.rng.randint(first, self.last_id) for _ in range(length)]


async def probe(client: Client, workers: int) -> float:
    """Batch requests that the server answers in a second, if it has nothing else to do."""
    began, done = time.monotonic(), 0
    stop = began + PROBE_S

    async def worker() -> None:
        nonlocal done
        while time.monotonic() < stop:
            answer = await client.ask("batch", client.prompt(BATCH[0]), BATCH[1])
            if answer.status != 200:
                raise RuntimeError(f"the server answers with {answer.status}")
            done += 1

    await asyncio.gather(*(worker() for _ in range(workers)))
    return done / (time.monotonic() - began)  # the last answers come after the end of a short probe


class Load:
    """Sends requests at random times with given rates, and remembers what became of each."""

    def __init__(self, client: Client, run: Run, most_open: int) -> None:
        self.client, self.run, self.most_open = client, run, most_open
        self.began = time.monotonic()
        self.tasks: set[asyncio.Task[None]] = set()
        self.open = 0

    @property
    def now(self) -> float:
        return time.monotonic() - self.began

    async def send(self, kind: str, size: tuple[int, int], rates: Sequence[float]) -> None:
        """`rates` of the three phases, in requests a second."""
        rng = random.Random(kind)
        at = 0.0
        while max(at, self.now) < self.run.phases[2]:
            rate = rates[sum(at >= end for end in self.run.phases[:2])]
            at += rng.expovariate(rate)
            await asyncio.sleep(max(0.0, at - self.now))
            self.run.behind = max(self.run.behind, self.now - at)
            task = asyncio.create_task(self._one(kind, size))
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
            answer: Answer = await self.client.ask(kind, self.client.prompt(size[0]), size[1])
        except httpx.HTTPError:
            return
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


async def act(url: str, ladder: str, args: argparse.Namespace) -> Run:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
    async with httpx.AsyncClient(base_url=url, timeout=900, limits=limits) as http:
        client = Visitor(http, str(args.model))
        await client.learn()
        capacity = args.capacity or await probe(client, args.workers)
        calm, over = args.calm, args.seconds
        run = Run(ladder, capacity, (calm, calm + over, 2 * calm + over))
        load = Load(client, run, args.most_open)
        # A question costs about a quarter of a batch request.
        asked = 4 * CALM_LOAD * capacity
        batch = CALM_LOAD * capacity
        flood = (args.factor - 2 * CALM_LOAD) * capacity
        watching = asyncio.create_task(load.watch())
        await asyncio.gather(
            load.send("questions", QUESTION, (asked, 2 * asked, asked)),
            load.send("batch", BATCH, (batch, flood, batch)),
        )
        watching.cancel()
        left = list(load.tasks)
        for task in left:  # what is still open had its time
            task.cancel()
        await asyncio.gather(watching, *left, return_exceptions=True)
        return run


def play(ladder: str, args: argparse.Namespace) -> Run:
    """One run on a fresh server."""
    promised = {"rank": 0, "ttft_ms": args.ttft_ms, "itl_ms": args.itl_ms}
    tenants = {"questions": {"class": "promised"}, "batch": {"class": "batch"}}
    port, log = free_port(), Path(tempfile.gettempdir()) / f"overload-{ladder}.log"
    with tenants_file({"promised": promised}, tenants) as path:
        settings = [f"server.tenants_file={path}", f"scheduler.ladder={ladder}", *args.set]
        with running(our_command(args.model, port, settings), port, log) as server:
            return asyncio.run(act(server.url, ladder, args))


# ── what came of it ──────────────────────────────────────────────────────────


def kept(run: Run, begin: float, end: float, args: argparse.Namespace) -> dict[str, float | None]:
    """The shares of targets kept, for questions that were sent between two times."""
    mine = [s for s in run.sent if s.kind == "questions" and begin <= s.at < end]
    # The last may have had no time to be answered.
    mine = [s for s in mine if s.status or s.at < run.phases[2] - args.ttft_ms / 1e3]
    in_time = [s.ttft is not None and s.ttft <= args.ttft_ms / 1e3 for s in mine]
    gaps = [b - a for s in mine for a, b in zip(s.tokens, s.tokens[1:], strict=False)]
    short = [gap <= args.itl_ms / 1e3 for gap in gaps]
    return {
        "ttft": sum(in_time) / len(in_time) if in_time else None,
        "itl": sum(short) / len(short) if short else None,
    }


def phases(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    begin, end, last = run.phases
    batch = [s for s in run.sent if s.kind == "batch"]
    return {
        "ladder": run.ladder,
        "capacity_per_s": run.capacity,
        "client_behind_s": round(run.behind, 2),
        "before": kept(run, 0.0, begin, args),
        "overload": kept(run, begin, end, args),
        "after": kept(run, end, last, args),
        "batch": {
            "answered": sum(s.status == 200 for s in batch),
            "shed": sum(s.status == 503 for s in batch),
            "not_sent": sum(s.status == -1 for s in batch),
            "open_at_the_end": sum(s.status == 0 for s in batch),
        },
        "changes": [[round(c["at"], 1), c["rung"], c["direction"], c["level"], c["trigger"]]
                    for c in run.history],
    }  # fmt: skip


def bars(run: Run) -> dict[str, list[tuple[float, float, int]]]:
    """Stretches of equal level, by rung."""
    rows: dict[str, list[tuple[float, float, int]]] = {}
    for sample in run.samples:
        for rung, level in sample["rungs"].items():
            row = rows.setdefault(rung, [])
            if level and row and row[-1][2] == level and sample["at"] - row[-1][1] < 1.6:
                row[-1] = (row[-1][0], sample["at"], level)
            elif level:
                row.append((sample["at"] - 1.0, sample["at"], level))
    return rows


def picture(runs: list[Run], args: argparse.Namespace) -> str:
    end = runs[0].phases[2]
    step = max(2.0, end / 100)

    def attained(run: Run, what: str) -> list[tuple[float, float]]:
        found = []
        for i in range(int(end / step)):
            share = kept(run, i * step, (i + 1) * step, args)[what]
            if share is not None:
                found.append(((i + 0.5) * step, share))
        return found

    names = {f"ladder {run.ladder}": run for run in runs}
    panels: list[Lines | Bars] = [
        Lines(f"questions: first token within {args.ttft_ms:g} ms (share)",
              {n: attained(run, "ttft") for n, run in names.items()}, 1.0),
        Lines(f"questions: gaps within {args.itl_ms:g} ms (share)",
              {n: attained(run, "itl") for n, run in names.items()}, 1.0),
        Lines("requests waiting",
              {n: [(s["at"], s["waiting"]) for s in run.samples] for n, run in names.items()}),
        *(Bars(f"rungs taken, ladder {run.ladder}", bars(run)) for run in runs if run.history),
    ]  # fmt: skip
    title = f"{args.factor:g} times what the server can do, from {runs[0].phases[0]:g} s on"
    return svg(title, panels, end, runs[0].phases[:2])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--seconds", type=float, default=300.0, help="of overload")
    parser.add_argument("--calm", type=float, default=120.0, help="seconds before, and after")
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
