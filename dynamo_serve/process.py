"""The engine process as the operating system sees it: start, memory it shares, end."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Generator
from pathlib import Path

from dynamo_serve.cgroups import usable_cores

CLOSE_SECONDS = 5.0  # what a step in flight gets before the process is killed
# -P: what lies in the working directory is not for us to import.
WORKER = ("-P", "-m", "dynamo_serve.worker")
TEMPLATE = ("-P", "-m", "dynamo_serve.template")


class Forked:
    """A child of ours that somebody else has forked: what we need of `subprocess.Popen`.

    Raises `ChildProcessError`.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._lock = threading.Lock()  # once it is reaped, its number may be another's
        try:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError as error:
            raise ChildProcessError(f"process {pid} is not a child of ours") from error

    def kill(self) -> None:
        with self._lock:
            if self.returncode is None:
                os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, or minus its signal. Raises `subprocess.TimeoutExpired`."""
        with self._lock:
            if self.returncode is not None:
                return self.returncode
            fd = os.pidfd_open(self.pid)
        try:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            if not poll.poll(None if timeout is None else 1000 * timeout):
                raise subprocess.TimeoutExpired("the engine process", timeout or 0.0)
        finally:
            os.close(fd)
        with self._lock:
            if self.returncode is None:
                try:
                    status = os.waitpid(self.pid, 0)[1]
                except ChildProcessError:  # SIGCHLD is ignored: nobody knows; as Popen has it
                    status = 0
                self.returncode = os.waitstatus_to_exitcode(status)
            return self.returncode


EngineProcess = subprocess.Popen[bytes] | Forked


@contextlib.contextmanager
def wiring(
    record_bytes: int,
) -> Generator[tuple[socket.socket, memoryview, tuple[int, int]]]:
    """What an engine process is reached by, and the descriptors that are for it."""
    ours, theirs = socket.socketpair()
    try:
        with theirs, shared_memory(record_bytes) as (fd, memory):
            yield ours, memory, (theirs.fileno(), fd)
    except BaseException:
        ours.close()
        raise


def launch(code: tuple[str, ...], fds: tuple[int, ...], threads: int) -> subprocess.Popen[bytes]:
    """Start a process that inherits these descriptors and is told their numbers."""
    return subprocess.Popen(
        [sys.executable, *code, *map(str, fds)],
        pass_fds=fds,
        stdin=subprocess.DEVNULL,
        env=engine_environment(threads),
        start_new_session=True,  # Ctrl-C is for the API process, which drains
    )


def engine_environment(threads: int) -> dict[str, str]:
    """The engine process's environment; what the operator set stands."""
    package_root = str(Path(__file__).parents[1])
    if package_root == sysconfig.get_path("purelib"):
        package_root = ""  # installed: it is found without our help
    ours = {
        "OMP_NUM_THREADS": str(threads or usable_cores()),
        # Threads that spin at a barrier take the core the API process needs: bench/LOG.md.
        "GOMP_SPINCOUNT": "10000",
        "TOKENIZERS_PARALLELISM": "false",
    }
    path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    return {**ours, **os.environ, **({"PYTHONPATH": path} if path else {})}


@contextlib.contextmanager
def shared_memory(size: int) -> Generator[tuple[int, memoryview]]:
    """Memory without a name, and a descriptor of it for a child, closed here at the end."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("flight")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    try:
        os.ftruncate(fd, size)
        yield fd, memoryview(mmap.mmap(fd, size))
    finally:
        os.close(fd)


def is_stopped(pid: int) -> bool:
    """Whether a process stands still for a signal (SIGSTOP, a debugger), where that is known."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] in "Tt"


async def exit_code(process: EngineProcess) -> int:
    """Wait for the end of a process that should end by itself; kill it if it does not."""
    try:
        return await asyncio.to_thread(process.wait, CLOSE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return await asyncio.to_thread(process.wait)


def describe_exit(code: int, what: str = "the engine process") -> str:
    if code < 0:
        names = {number.value: number.name for number in signal.Signals}
        return f"{what} died of {names.get(-code, f'signal {-code}')}"
    return f"{what} exited with code {code}"
