"""Start a server for a benchmark, wait until it is up, stop it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

START_SECONDS = 300
SETTLE_SECONDS = 10


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def our_command(model: Path, port: int, settings: Sequence[str]) -> list[str]:
    """dynamo_serve with a model folder, known by its path.

    Without speculation, unless asked for: random weights soon say the same over and over, which is
    easily guessed and flatters whoever guesses.
    """
    wanted = ("scheduler.speculation=off", *settings)
    sets = [word for setting in wanted for word in ("--set", setting)]
    return [sys.executable, "-m", "dynamo_serve.cli", "serve", "--model", str(model),
            "--served-model-name", str(model), "--port", str(port), *sets]  # fmt: skip


@dataclass(frozen=True)
class Server:
    """A server that runs: its base URL and the process that was started."""

    url: str
    pid: int

    def resident_gib(self) -> float:
        """Memory of the process and all its children, shared pages in equal parts."""
        return sum(_resident_bytes(pid) for pid in _family(self.pid)) / 2**30


def _family(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(found for child in children for found in _family(int(child)))]


def _resident_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


@contextmanager
def running(
    command: Sequence[str],
    port: int,
    log: Path,
    ready: str = "/ready",
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """The server that `command` starts on `port`; it is stopped at the end."""
    url = f"http://127.0.0.1:{port}"
    whole = {**os.environ, "HF_HUB_OFFLINE": "1", **(environment or {})}
    with log.open("wb") as sink:
        process = subprocess.Popen(command, env=whole, stdout=sink, stderr=sink)
        try:
            wait_until_up(url + ready, process, log)
            yield Server(url, process.pid)
        finally:
            process.terminate()
            process.wait(60)


def settle() -> None:
    """Wait for what goes on behind a server that is up: it takes memory, fills caches."""
    time.sleep(SETTLE_SECONDS)


def wait_until_up(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server exited with {process.returncode}; see {log}")
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"the server was not up after {START_SECONDS} s; see {log}")
