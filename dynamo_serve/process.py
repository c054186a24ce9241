"""The engine process as the operating system sees it: start, memory it shares, end.

It is forked from a template process that has done the imports, or, where that cannot be, started
from nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
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
from typing import NamedTuple

log = logging.getLogger(__name__)

CLOSE_SECONDS = 5.0  # what a step in flight gets before the process is killed
IMPORT_SECONDS = 60.0  # what a new template gets before the engine is started without it
FORK_SECONDS = 5.0  # what one that has forked before gets
LOOK_SECONDS = 0.25
# -P: what lies in the working directory is not for us to import.
WORKER = ("-P", "-m", "dynamo_serve.worker")
TEMPLATE = ("-P", "-m", "dynamo_serve.template")
PR_SET_PDEATHSIG = 1  # from Linux' prctl.h
PR_SET_CHILD_SUBREAPER = 36


class TemplateError(Exception):
    """No engine can be forked; the message says why."""


class Forked:
    """A child of ours that somebody else has forked: what we need of `subprocess.Popen`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._lock = threading.Lock()  # once it is reaped, its number may be another's
        try:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError as error:
            raise TemplateError("the system does not make its copies our children") from error

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
                self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            return self.returncode


EngineProcess = subprocess.Popen[bytes] | Forked


class Template:
    """The template process: started before the first engine, and again if it has ended since."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._process: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket
        self._ended: list[subprocess.Popen[bytes]] = []
        self._has_answered = False
        self._refusal: str | None = None  # it can fork no engines, and the next one could not

    def prepare(self) -> None:
        """Start it unless it runs. Raises `OSError` or `TemplateError`."""
        if self._process is None or self._process.poll() is not None:
            self._start()

    async def fork(self, fds: tuple[int, ...]) -> Forked:
        """An engine process that has these descriptors. Raises `TemplateError`."""
        if self._refusal:
            raise TemplateError(self._refusal)
        try:
            self.prepare()
            with adopting():
                socket.send_fds(self._sock, [b"fork"], fds)
                answer = await self._answer()
                if answer.isdecimal():
                    return Forked(int(answer))
            self._refusal = answer
            raise TemplateError(answer)
        except OSError as error:
            self._end()
            raise TemplateError(str(error)) from error
        except BaseException:  # an answer that is still to come would be taken for the next one's
            self._end()
            raise

    async def close(self) -> None:
        self._end()
        for process in self._ended:
            with contextlib.suppress(subprocess.TimeoutExpired):  # the system does not let it go
                await asyncio.to_thread(process.wait, CLOSE_SECONDS)

    def _start(self) -> None:
        if self._process is not None:
            code = self._process.returncode
            log.warning("%s; another one is started", describe_exit(code, "the template process"))
        self._end()
        if not hasattr(os, "pidfd_open"):
            self._refusal = "this system has no pidfd_open"
            raise TemplateError(self._refusal)
        self._has_answered = False
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.setblocking(False)
        try:
            with theirs:
                self._process = launch(TEMPLATE, (theirs.fileno(),), self._threads)
        except BaseException:
            self._sock.close()
            raise

    async def _answer(self) -> str:
        assert self._process
        patience = FORK_SECONDS if self._has_answered else IMPORT_SECONDS
        loop = asyncio.get_running_loop()
        reading = asyncio.ensure_future(loop.sock_recv(self._sock, 1024))
        try:
            for _ in range(round(patience / LOOK_SECONDS)):
                await asyncio.wait([reading], timeout=LOOK_SECONDS)
                if reading.done():
                    break
                if is_stopped(self._process.pid):
                    raise TemplateError("it stands still for a signal")
            else:
                raise TemplateError(f"it has not answered within {patience:g} s")
            with contextlib.suppress(ConnectionError):
                if answer := reading.result():
                    self._has_answered = True
                    return answer.decode()
            raise TemplateError("it has ended")
        finally:
            reading.cancel()
            await asyncio.wait([reading])  # before its socket is closed

    def _end(self) -> None:
        self._ended = [process for process in self._ended if process.poll() is None]
        if self._process is not None:
            self._process.kill()
            self._sock.close()
            self._ended.append(self._process)
            self._process = None


@contextlib.contextmanager
def adopting() -> Generator[None]:
    """Meanwhile processes below us whose parents end become our children, not those of init."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0)


def prctl(option: int, value: int) -> None:
    """Raises `OSError`, also where there is no such call."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "prctl"):
        raise OSError("this system has no prctl")
    if libc.prctl(option, *(ctypes.c_ulong(n) for n in (value, 0, 0, 0))):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class Started(NamedTuple):
    """An engine process, our end of the socket to it, and the memory of its flight record."""

    process: EngineProcess
    sock: socket.socket
    memory: memoryview


async def start_engine(template: Template | None, threads: int, record_bytes: int) -> Started:
    """Fork an engine process from the template, or else start one; the log says which."""
    if template is not None:
        try:
            with wiring(record_bytes) as (ours, memory, fds):
                process = await template.fork(fds)
        except TemplateError as error:
            log.warning("the template process: %s; the engine is started without it", error)
        else:
            log.info("the engine is process %d, forked from the template", process.pid)
            return Started(process, ours, memory)
    with wiring(record_bytes) as (ours, memory, fds):  # the others may be in a copy's hands
        return Started(launch(WORKER, fds, threads), ours, memory)


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
        "OMP_NUM_THREADS": str(threads or len(os.sched_getaffinity(0))),
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
