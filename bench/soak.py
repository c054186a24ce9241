"""Does a server stay as it is? Mixed traffic for an hour, with engines that are killed.

    python -m bench.soak MODEL --minutes 60 [--out DIR] [--rate 8] [--set KEY=VALUE ...]

Clients of all kinds (`soak_clients`) come at a pace. Every couple of minutes, but for one long
stretch, a process below the API process gets SIGKILL or SIGSTOP. Every `--every` seconds DIR
gets a line of `soak.jsonl` (`soak_samples`). In the end the server is left alone until nothing is
live; then `soak_report` says line by line whether all is as it was. Exits with 1 if not.
`python -m bench.soak_report DIR` says it again, also of a run that was broken off.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import httpx

from bench import soak_report
from bench.promises import tenants_file
from bench.server import Server, free_port, our_command, running
from bench.soak_clients import PATIENCE_S, TENANTS, Clients, totals
from bench.soak_samples import family, files, look, sample
from bench.survival import Run, engine_of

SETTINGS = (
    "model.dtype=float32",  # in half precision an answer may differ with its neighbours
    "scheduler.speculation=auto",
    "engine.stall_timeout_s=5",
    "cache.num_pages=512",  # so few that they are all touched soon, and evicted and preempted
    "server.stream_buffer_bytes=8192",
    f"server.reader_patience_s={PATIENCE_S}",
)
BETWEEN_S, QUIET_S = 120.0, 600.0  # from one signal to the next, on average; the long stretch
DRAIN_S = 180.0


class Hit(NamedTuple):
    """A signal that is to be sent, `at` seconds after the beginning."""

    at: float
    target: str  # engine or other
    number: signal.Signals


def quiet(seconds: float) -> tuple[float, float]:
    """The stretch without signals, in the second half of a run."""
    length = min(QUIET_S, seconds / 3)
    return 0.6 * seconds, 0.6 * seconds + length


def hits(seconds: float, rng: random.Random) -> list[Hit]:
    """What is sent when. A run of a few minutes has it all in quick motion."""
    between, at = min(BETWEEN_S, max(20.0, seconds / 8)), 10.0
    found: list[Hit] = []
    begin, end = quiet(seconds)
    while (at := at + between * rng.uniform(0.5, 1.5)) < seconds - between / 2:
        if begin - 1 <= at < end:
            at = end
            continue
        target = rng.choice(("engine", "engine", "engine", "other"))
        found.append(Hit(at, target, rng.choice((signal.SIGKILL, signal.SIGSTOP))))
    return found


class Soak:
    """One run: what it saw goes to a file at once."""

    def __init__(self, server: Server, args: argparse.Namespace, sink: TextIO) -> None:
        self.server, self.args, self._sink = server, args, sink
        self.run = Run(server.url, random.Random(args.seed))
        self.clients = Clients(self.run, args.outputs, args.rate, self.failed)
        self.began = time.monotonic()

    def write(self, what: str, **facts: Any) -> None:
        line = {"what": what, "at": round(time.monotonic() - self.began, 2), **facts}
        self._sink.write(json.dumps(line) + "\n")
        self._sink.flush()

    def failed(self, why: str) -> None:
        self.run.failures.append(why)
        self.write("bad", why=why)

    async def play(self) -> None:
        seconds = 60.0 * self.args.minutes
        await self.clients.calm()
        self.began = time.monotonic()
        begin, end = quiet(seconds)
        self.write("begin", seconds=seconds, quiet=[begin, end], rate=self.args.rate)
        await self._settled("first")
        helpers = [asyncio.create_task(self._watch()), asyncio.create_task(self._hurt(seconds))]
        try:
            await self.clients.come(self.began + seconds)
        finally:
            for helper in helpers:
                helper.cancel()
            stopped = await asyncio.gather(*helpers, return_exceptions=True)
        if broken := [e for e in stopped if isinstance(e, Exception)]:
            raise broken[0]
        await self._settled("last")

    async def _sample(self, what: str) -> dict[str, Any]:
        async with httpx.AsyncClient(timeout=30) as http:
            page = (await http.get(self.server.url + "/metrics")).text
        found = sample(self.server.pid, page)
        run = self.run
        self.write(what, **found, requests=run.num_requests, resumed=run.num_resumed,
                   bad=len(run.failures), open=len(self.clients.tasks))  # fmt: skip
        return found

    async def _watch(self) -> None:
        while True:
            found = await self._sample("sample")
            minutes = (time.monotonic() - self.began) / 60
            parts = [f"{minutes:.1f} of {self.args.minutes:g} min", *totals(self.clients.seen),
                     f"{len(self.run.failures)} bad", f"API {found['api']['rss_mib']:.1f} MiB",
                     f"engine {(found['engine'] or {}).get('rss_mib', 0):.0f} MiB"]  # fmt: skip
            print("\r" + ", ".join(parts), end=" ", file=sys.stderr, flush=True)
            await asyncio.sleep(self.args.every)

    async def _hurt(self, seconds: float) -> None:
        for hit in hits(seconds, random.Random(self.args.seed)):
            await asyncio.sleep(max(0.0, self.began + hit.at - time.monotonic()))
            await self._ready()
            pid = engine_of(self.server.pid)
            others = [at for at in family(self.server.pid) if at != pid and look(at)]
            target = hit.target if others else "engine"
            if target == "other":
                pid = others[0]
            assert pid is not None, "the server is ready without an engine"
            os.kill(pid, hit.number)
            self.write("hit", target=target, signal=hit.number.name, pid=pid)

    async def _ready(self) -> None:
        """Wait until there is an engine to hurt. One that hangs in its start is another matter: it
        is given a minute, and that is all the patience requests have."""
        async with httpx.AsyncClient(timeout=30) as http:
            while (await http.get(self.server.url + "/ready")).status_code != 200:
                await asyncio.sleep(0.2)

    async def _settled(self, what: str) -> None:
        """Wait until nothing is live or parked, and look."""
        names = [f"dserve_sequences_{state}" for state in ("live", "waiting", "parked")]
        deadline = time.monotonic() + DRAIN_S
        while time.monotonic() < deadline:
            found = await self._sample("sample")
            if found["engine"] and not any(found["numbers"][name] for name in names):
                break
            await asyncio.sleep(2)
        await asyncio.sleep(8)  # connections that were kept alive are closed after five
        self.write("files", when=what, files=files(self.server.pid))
        await self._sample(what)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--out", type=Path, help="a folder; a new one in the temporary folder")
    parser.add_argument("--rate", type=float, default=8.0, help="requests a second")
    parser.add_argument("--every", type=float, default=10, help="seconds between two samples")
    parser.add_argument("--outputs", type=int, default=48)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], help="a dynamo_serve setting")
    args = parser.parse_args()
    out: Path = args.out or Path(tempfile.mkdtemp(prefix="soak"))
    out.mkdir(parents=True, exist_ok=True)
    port = free_port()
    try:
        with (
            tenants_file({}, TENANTS) as tenants,
            (out / "soak.jsonl").open("w") as sink,
            running(
                our_command(args.model, port,
                            [*SETTINGS, f"server.tenants_file={tenants}", *args.set]),
                port, out / "server.log",
            ) as server,
        ):  # fmt: skip
            asyncio.run(Soak(server, args, sink).play())
    finally:
        print(f"\n{out}", file=sys.stderr)
        passed = soak_report.tell(out)
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
