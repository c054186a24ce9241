"""Start a server for a benchmark, wait until it is up, stop it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

START_SECONDS = 300


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


@contextmanager
def running(command: Sequence[str], port: int, log: Path, ready: str = "/ready") -> Iterator[str]:
    """The base URL of the server that `command` starts on `port`; it is stopped at the end."""
    url = f"http://127.0.0.1:{port}"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as sink:
        process = subprocess.Popen(command, env=environment, stdout=sink, stderr=sink)
        try:
            wait_until_up(url + ready, process, log)
            yield url
        finally:
            process.terminate()
            process.wait(60)


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
        time.sleep(0.5)
    raise RuntimeError(f"the server was not up after {START_SECONDS} s; see {log}")
