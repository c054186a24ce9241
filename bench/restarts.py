"""How long until there is an engine again? With the template process and without, in turn.

    python -m bench.restarts MODEL [--times 10] [--starts 5] [--set ...]

First starts: from the command to /ready 200; and from a command that only imports what engines
import to the end of that. Restarts: two servers side by side, the engine of one and then of the
other is killed while a stream runs; from SIGKILL to /ready 200 and to the stream's next token.
Memory: shared pages counted in equal parts (PSS). A table for people, one JSON line last.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from bench.server import START_SECONDS, Server, free_port, our_command, settle
from bench.survival import engine_of
from dynamo_serve import cli, process, supervisor

KINDS = ("with", "without")
LOOK_SECONDS = 0.005
IMPORTS = """
import time
from dynamo_serve import template
template.load()
print(time.monotonic())
"""
BODY = {"prompt": "Tell me about pages.", "max_tokens": 3000, "ignore_eos": True, "stream": True,
        "temperature": 0}  # fmt: skip


def import_seconds() -> float:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-P", "-c", IMPORTS],
        env=process.engine_environment(0),
        stdout=subprocess.PIPE,
        check=True,
    )
    return float(done.stdout) - began


@contextmanager
def started(kind: str, args: argparse.Namespace, log: Path) -> Iterator[tuple[Server, float]]:
    """A server that is ready, and how long that took."""
    port = free_port()
    command = our_command(args.model, port, ["server.resume_grace_s=0", *args.set])
    if kind == "without":
        command[command.index("dynamo_serve.cli")] = "bench.restarts"
    began = time.perf_counter()
    with log.open("ab") as sink:
        running = subprocess.Popen(command, stdout=sink, stderr=sink)
    try:
        server = Server(f"http://127.0.0.1:{port}", running.pid)
        while not is_ready(server.url):
            if running.poll() is not None or time.perf_counter() - began > START_SECONDS:
                raise RuntimeError(f"the server does not start; see {log}")
            time.sleep(LOOK_SECONDS)
        yield server, time.perf_counter() - began
    finally:
        running.terminate()
        running.wait(60)


def is_ready(url: str) -> bool:
    try:
        return httpx.get(url + "/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


async def restart(server: Server) -> dict[str, float]:
    """Kill the engine in mid-stream: seconds until it is ready again, and to the next token."""
    async with httpx.AsyncClient(timeout=START_SECONDS) as http:
        reads: list[float] = []

        async def read() -> None:
            async with http.stream("POST", server.url + "/v1/completions", json=BODY) as answer:
                async for chunk in answer.aiter_raw():
                    if b"data: " in chunk:
                        reads.append(time.perf_counter())  # noqa: PERF401 - they are watched

        async def until(ready: bool) -> float:
            while (await http.get(server.url + "/ready")).is_success is not ready:
                await asyncio.sleep(LOOK_SECONDS)
            return time.perf_counter()

        reading = asyncio.create_task(read())
        while len(reads) < 8:
            assert not reading.done(), "the stream has ended"
            await asyncio.sleep(LOOK_SECONDS)
        pid = engine_of(server.pid)
        assert pid is not None, "there is no engine"
        os.kill(pid, signal.SIGKILL)
        began = time.perf_counter()
        red = await until(ready=False)
        green = await until(ready=True)
        while reads[-1] < red:
            assert not reading.done(), "the stream has ended"
            await asyncio.sleep(LOOK_SECONDS)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    return {"ready_s": green - began, "token_s": next(at for at in reads if at > red) - began}


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    logs = {kind: folder / f"{kind}.log" for kind in KINDS}
    rows: list[dict[str, Any]] = []
    for _ in range(args.starts):
        rows.append({"kind": "imports alone", "start_s": import_seconds()})
        for kind in KINDS:
            with started(kind, args, logs[kind]) as (_, seconds):
                rows.append({"kind": kind, "start_s": seconds})
    with ExitStack() as stack:
        servers = {k: stack.enter_context(started(k, args, logs[k]))[0] for k in KINDS}
        settle()
        rows += [{"kind": k, "first_gib": servers[k].resident_gib()} for k in KINDS]
        for _ in range(args.times):
            for kind in KINDS:
                rows.append({"kind": kind, **asyncio.run(restart(servers[kind]))})
        settle()
        rows += [{"kind": k, "later_gib": servers[k].resident_gib()} for k in KINDS]
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], help="a dynamo_serve setting")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="restarts-"))
    rows = measure(args, folder)
    for kind in ("imports alone", *KINDS):
        for what in ("start_s", "ready_s", "token_s", "first_gib", "later_gib"):
            if found := [row[what] for row in rows if row["kind"] == kind and what in row]:
                low, high = min(found), max(found)
                print(f"{kind:>13} {what:>9} median {statistics.median(found):.3f}, "
                      f"{low:.3f} to {high:.3f}, of {len(found)}")  # fmt: skip
    print("logs:", folder)
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        supervisor.Template = lambda threads: None  # type: ignore
        sys.exit(cli.main(sys.argv[1:]))
    sys.exit(main())
