"""A server of our own for as long as something is measured: started, waited for, stopped."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dynamo_serve.errors import DynamoServeError

HOST = "127.0.0.1"
LOOK_EVERY_S = 0.1
ANSWER_S = 5.0  # for /ready to say yes or no
STOP_S = 60.0  # it drains; nothing should be live then
LAST_CHARACTERS = 300  # of its log, in a message

Say = Callable[[float], None]  # seconds waited so far


class ServerError(DynamoServeError):
    """A server that we started is not there; the message says why, and where its log is."""


def free_port() -> int:
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])


@contextmanager
def running(words: Sequence[str], log: Path, patience: float, say: Say) -> Iterator[str]:
    """Its address; `words` stand behind `dynamo-serve serve`. It is stopped at the end, however
    that comes. Raises `ServerError` if it is not ready in time, or is gone at the end."""
    port = free_port()
    # -P: what lies in the folder from which this is called is none of its modules.
    command = [sys.executable, "-P", "-m", "dynamo_serve.cli", "serve"]
    command += ["--host", HOST, "--port", str(port), *words]
    process: subprocess.Popen[bytes] | None = None
    try:
        with log.open("wb") as sink, held():
            # A Ctrl-C is for whoever measures, who stops it then; so it has a session of its own.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env=environment(),
                start_new_session=True,
            )
        wait_until_ready(process, port, log, patience, say)
        yield f"http://{HOST}:{port}"
        if process.poll() is not None:
            raise ServerError(f"the server ended while it was measured{last_words(process, log)}")
    finally:
        if process is not None:
            stop(process)


def environment() -> dict[str, str]:
    """Ours, with which the server finds the package that is running here."""
    root, known = str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")
    if root == sysconfig.get_path("purelib"):
        return dict(os.environ)  # installed: it is found anyway
    return {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{known}" if known else root}


@contextmanager
def held() -> Iterator[None]:
    """Signals come after this instead of within, where a process might have been started that
    nobody knows of yet."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])


def wait_until_ready(
    process: subprocess.Popen[bytes], port: int, log: Path, patience: float, say: Say
) -> None:
    began = time.monotonic()
    while not is_ready(port):
        if process.poll() is not None:
            raise ServerError(f"the server did not start{last_words(process, log)}")
        if (waited := time.monotonic() - began) > patience:
            raise ServerError(
                f"the server was not ready after {patience:g} s; wait longer with "
                f"--start-timeout, or see {log}"
            )
        say(waited)
        time.sleep(LOOK_EVERY_S)


def is_ready(port: int) -> bool:
    asking = http.client.HTTPConnection(HOST, port, timeout=ANSWER_S)
    try:
        asking.request("GET", "/ready")
        return asking.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        asking.close()


def last_words(process: subprocess.Popen[bytes], log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    said = lines[-1][:LAST_CHARACTERS] if lines else "nothing"
    return f" (exit code {process.returncode}; its log {log} ends with: {said})"


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()  # the processes below it end with it
        process.wait()
