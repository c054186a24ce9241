"""Does the API process grow with the number of requests? Many short ones of all kinds, fast.

    python -m bench.growth [--requests 50000] [--every 5000] [--only stream wrong ...]

On the fake engine, each request over a connection of its own, as in `bench.soak`. What is resident
is told by kind of memory: files, the heap of the main thread, the arenas of other threads, and the
rest (Python's own). Kept streams make a plateau in the first minute. One JSON line last.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import socket
import struct
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bench.server import free_port, our_command, running
from dynamo_serve import bundled

ARENA = 64 << 20  # glibc begins each at a multiple of that
REGION = re.compile(r"^([0-9a-f]+)-[0-9a-f]+ ")
RESET = struct.pack("ii", 1, 0)
RECEIVE = 1 << 16
JSON = "Content-Type: application/json\r\n"
CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
# How often each kind comes, of a hundred.
KINDS = {"stream": 25, "whole": 10, "chat": 15, "choices": 8, "logprobs": 8, "stops": 9,
         "leaves": 8, "resets": 8, "wrong": 8, "long": 1}  # fmt: skip


def body(kind: str, rng: random.Random) -> tuple[str, dict[str, Any]]:
    words = " ".join(rng.choice(("sun", "rain", "road", "ship", "gold")) for _ in range(20))
    text = f"{rng.random()} {words}"
    plain = {"prompt": text, "max_tokens": 12, "ignore_eos": True, "stream": True}
    chat = {"messages": [{"role": "user", "content": text}], "max_tokens": 12, "stream": True}
    more: dict[str, dict[str, Any]] = {
        "whole": {"stream": False},
        "choices": {"n": 3},
        "logprobs": {"logprobs": 2},
        "stops": {"stop": ["e a", "qu"]},
        "leaves": {"max_tokens": 400},
        "resets": {"max_tokens": 400},
        "wrong": {"max_tokens": -1},
        "long": {"prompt": "hello " * 20_000},
    }
    return (CHAT, chat) if kind == "chat" else (PLAIN, {**plain, **more.get(kind, {})})


async def ask(port: int, kind: str, rng: random.Random) -> None:
    path, asked = body(kind, rng)
    raw = json.dumps(asked).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n{JSON}"
    writer.write(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
    status = int((await reader.read(RECEIVE)).split(b" ", 2)[1])
    if status != (400 if kind in ("wrong", "long") else 200):
        raise RuntimeError(f"{kind}: {status}")
    if kind == "resets":
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    while kind not in ("leaves", "resets") and await reader.read(RECEIVE):
        pass
    writer.transport.abort()


async def load(port: int, kinds: list[str], count: int, width: int, rng: random.Random) -> None:
    todo = iter(rng.choices(kinds, [KINDS[kind] for kind in kinds], k=count))

    async def client() -> None:
        for kind in todo:
            await ask(port, kind, rng)

    await asyncio.gather(*(client() for _ in range(width)))


def resident(pid: int) -> dict[str, float]:
    """MiB by kind of memory."""
    found, kind = Counter[str](), ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if begin := REGION.match(line):
            name = line.split(None, 5)[5:]
            is_arena = int(begin[1], 16) % ARENA == 0
            kind = "arenas" if is_arena else "others"
            if name:
                kind = {"[heap]": "heap", "[stack]": "others"}.get(name[0], "files")
        elif line.startswith("Rss:"):
            found[kind] += int(line.split()[1])
    whole = sum(found.values())
    return {name: round(kib / 1024, 1) for name, kib in sorted({**found, "all": whole}.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--every", type=int, default=5_000)
    parser.add_argument("--width", type=int, default=24)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rest", type=float, default=15, help="seconds before the last look")
    parser.add_argument("--set", action="append", default=[], help="a dynamo_serve setting")
    args = parser.parse_args()
    port, rng = free_port(), random.Random(1)
    log = Path(tempfile.gettempdir()) / "growth.log"
    settings = ["engine.kind=fake", "server.resume_grace_s=2", *args.set]
    rows: list[dict[str, Any]] = []
    with running(our_command(bundled.path(), port, settings), port, log) as server:

        def look(requests: int) -> None:
            rows.append({"requests": requests, **resident(server.pid)})
            print(rows[-1], flush=True)

        look(0)
        for done in range(0, args.requests, args.every):
            asyncio.run(load(port, args.only, args.every, args.width, rng))
            look(done + args.every)
        time.sleep(args.rest)
        look(args.requests)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
