"""Whether a tenant that sends slow grammars holds up the new ones of others.

    python -m bench.structured_turns

A real server with the bundled model. One tenant keeps `--flood` requests under way, each with a
schema of its own that takes seconds to compile; another asks for one token with a new small schema
at a time. How long it waits, alone and beside the flood. A table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from bench.promises import tenants_file
from bench.server import free_port, our_command, running
from dynamo_serve import bundled
from dynamo_serve.bench.spread import percentile

SLOW_PROPERTIES = 2_000
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
TENANTS: dict[str, Any] = {"flood": {}, "small": {}}


def body_with(schema: dict[str, Any]) -> dict[str, Any]:
    return {**CHAT, "structured_outputs": {"json": schema}}


def slow(number: int) -> dict[str, Any]:
    names = (f"p{number}-{i}" for i in range(SLOW_PROPERTIES))
    return {"properties": {name: {"type": "string"} for name in names}}


def small(number: int) -> dict[str, Any]:
    return {"properties": {f"q{number}": {"type": "integer"}}, "required": [f"q{number}"]}


class Flood:
    """Clients that send slow schemas until they are told to stop."""

    def __init__(self, url: str, number: int) -> None:
        self.statuses: Counter[str] = Counter()
        self._url = url
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._send, args=(i,)) for i in range(number)]

    def _send(self, client: int) -> None:
        with httpx.Client(timeout=60, headers={"Authorization": "Bearer flood"}) as http:
            number = client * 10_000
            while not self._stop.is_set():
                number += 1
                answer = http.post(self._url, json=body_with(slow(number)))
                self.statuses[str(answer.status_code)] += 1
                if answer.status_code in (429, 503):
                    self._stop.wait(1.0)

    def __enter__(self) -> Flood:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def waits(url: str, first: int, seconds: float) -> list[float]:
    found: list[float] = []
    until = time.monotonic() + seconds
    with httpx.Client(timeout=300, headers={"Authorization": "Bearer small"}) as http:
        while time.monotonic() < until:
            began = time.monotonic()
            answer = http.post(url, json=body_with(small(first + len(found))))
            found.append(time.monotonic() - began)
            assert answer.status_code == 200, answer.text
    return found


def row(name: str, found: list[float]) -> dict[str, Any]:
    p50, p99 = (percentile(found, share) for share in (0.5, 0.99))
    return {"scene": name, "answers": len(found), "p50": p50, "p99": p99, "max": max(found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flood", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=30.0)
    args = parser.parse_args()
    port, log = free_port(), Path(tempfile.gettempdir()) / "bench-structured-turns.log"
    with tenants_file({}, TENANTS) as path:
        command = our_command(Path(bundled.path()), port, [f"server.tenants_file={path}"])
        with running(command, port, log) as server:
            url = f"{server.url}/v1/chat/completions"
            waits(url, 0, 2.0)
            rows = [row("alone", waits(url, 10_000, args.seconds))]
            with Flood(url, args.flood) as flood:
                time.sleep(2.0)
                rows.append(row("beside the flood", waits(url, 20_000, args.seconds)))
    print(f"{'scene':18} {'answers':>8} {'p50 s':>8} {'p99 s':>8} {'longest':>8}")
    for r in rows:
        print("{scene:18} {answers:8} {p50:8.3f} {p99:8.3f} {max:8.3f}".format(**r))
    print(json.dumps({"structured_turns": rows, "flood_statuses": flood.statuses}))


if __name__ == "__main__":
    main()
