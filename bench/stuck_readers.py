"""Readers that stop reading, beside good ones: do the good ones feel it, and what does it cost?

    python -m bench.stuck_readers MODEL [--stuck 500] [--good 8] [--set ...]

Good streams alone, one after the other on each of `--good` connections; then the same beside
`--stuck` clients that send a request for a long answer and never read a byte of it; their requests
are to be parked, and given up after `server.reader_patience_s`. Tokens/s of the good ones are
counted before, in the wave in which the stuck ones fill what their connections buffer, and after
it. Memory is that of the server's processes. A table for people, one JSON line last.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from bench.server import Server, free_port, our_command, running, settle

RECEIVE_BYTES = 4096  # of the buffer of a stuck client
GONE = "dserve_stream_changes_total"


def body(tokens: int) -> dict[str, Any]:
    return {"prompt": "Once upon a time", "max_tokens": tokens, "stream": True,
            "ignore_eos": True, "temperature": 0}  # fmt: skip


class Good:
    """Counts the tokens (events) of clients that read."""

    def __init__(self, url: str, tokens: int) -> None:
        self._url, self._body = url, body(tokens)
        self.count = 0
        self.stalls: list[float] = []

    async def read(self) -> None:
        async with httpx.AsyncClient(timeout=120) as http:
            while True:
                before = time.monotonic()
                async with http.stream("POST", self._url, json=self._body) as response:
                    response.raise_for_status()
                    async for line in response.aiter_lines():
                        if line.startswith("data: {"):
                            now = time.monotonic()
                            self.stalls.append(now - before)
                            before = now
                            self.count += 1


def stuck(server: Server, tokens: int) -> socket.socket:
    """Send a request, and read nothing."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
    host, port = server.url.removeprefix("http://").split(":")
    connection.connect((host, int(port)))
    raw = json.dumps(body(tokens)).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
    return connection


async def numbers(server: Server) -> dict[str, float]:
    async with httpx.AsyncClient(timeout=30) as http:
        lines = (await http.get(server.url + "/metrics")).text.splitlines()
    wanted = ("dserve_sequences", GONE, "dserve_stream_lag")
    return {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith(wanted)}


async def rate(good: Good, seconds: float) -> float:
    before, began = good.count, time.monotonic()
    await asyncio.sleep(seconds)
    return (good.count - before) / (time.monotonic() - began)


async def until(condition: Callable[[dict[str, float]], bool], server: Server) -> float:
    began = time.monotonic()
    while not condition(found := await numbers(server)):
        told = ", ".join(f"{name} {value:g}" for name, value in found.items() if value)
        print(f"\r{told}"[:150], end="", file=sys.stderr)
        if time.monotonic() - began > 600:
            raise RuntimeError(f"it never came true: {found}")
        await asyncio.sleep(0.5)
    return time.monotonic() - began


async def measure(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    good = Good(server.url + "/v1/completions", args.tokens)
    readers = [asyncio.create_task(good.read()) for _ in range(args.good)]
    await asyncio.sleep(2)
    alone, memory = await rate(good, args.seconds), server.resident_gib()
    connections = [await asyncio.to_thread(stuck, server, args.long) for _ in range(args.stuck)]
    slow = f'{GONE}{{what="reader_slow"}}'
    began, count = time.monotonic(), good.count
    await until(lambda found: found[slow] >= args.stuck, server)
    wave = time.monotonic() - began
    in_wave = (good.count - count) / wave
    good.stalls.clear()
    beside, full = await rate(good, args.seconds), server.resident_gib()
    found = await numbers(server)
    up = f'{GONE}{{what="given_up"}}'
    await until(lambda found: found[up] >= args.stuck, server)
    after, left = await rate(good, args.seconds), server.resident_gib()
    for reader in readers:
        reader.cancel()
    await asyncio.wait(readers)
    for connection in connections:
        connection.close()
    return {
        "good_alone_tok_s": round(alone, 1),
        "while_they_fill_tok_s": round(in_wave, 1),
        "filled_after_s": round(wave, 1),
        "beside_parked_tok_s": round(beside, 1),
        "lost": round(1 - beside / alone, 3),
        "longest_gap_beside_s": round(max(good.stalls), 3),
        "after_tok_s": round(after, 1),
        "memory_gib": [round(gib, 3) for gib in (memory, full, left)],
        "beside": found,
        "in_the_end": await numbers(server),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--stuck", type=int, default=500)
    parser.add_argument("--good", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="of a good answer")
    parser.add_argument("--long", type=int, default=1800, help="of an answer nobody reads")
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--set", action="append", default=[], help="a dynamo_serve setting")
    args = parser.parse_args()
    port = free_port()
    command = our_command(args.model, port, args.set)
    with (
        tempfile.NamedTemporaryFile(prefix="stuck", suffix=".log", delete=False) as log,
        running(command, port, Path(log.name)) as server,
    ):
        settle()
        row = asyncio.run(measure(server, args))
    for key, value in row.items():
        print(f"{key}: {value}")
    print(json.dumps(row))
    return int(row["lost"] > 0.05)


if __name__ == "__main__":
    sys.exit(main())
