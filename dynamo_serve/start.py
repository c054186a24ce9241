"""How an engine process comes to be: forked from the template process, or started from nothing."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import socket
import subprocess
from collections.abc import Generator
from typing import NamedTuple

from dynamo_serve import process
from dynamo_serve.process import (
    CLOSE_SECONDS,
    EngineProcess,
    Forked,
    describe_exit,
    is_stopped,
    launch,
    wiring,
)

log = logging.getLogger(__name__)

IMPORT_SECONDS = 60.0  # what a new template gets before the engine is started without it
FORK_SECONDS = 5.0  # what one that has forked before gets
LOOK_SECONDS = 0.25
UNFIT = "unfit: "  # what the template says if no copy of it could be an engine
PR_SET_PDEATHSIG = 1  # from Linux' prctl.h
PR_SET_CHILD_SUBREAPER = 36


class TemplateError(Exception):
    """No engine can be forked; the message says why."""


class Template:
    """The template process: started before the first engine, and again if it has ended since."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._process: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket
        self._ended: list[subprocess.Popen[bytes]] = []
        self._has_answered = False
        self._refusal: str | None = None  # also of the next one

    async def fork(self, fds: tuple[int, ...]) -> Forked:
        """An engine process that has these descriptors. Raises `TemplateError`."""
        if self._refusal:
            raise TemplateError(self._refusal)
        try:
            if self._process is None or self._process.poll() is not None:
                self._start()
            with adopting():
                socket.send_fds(self._sock, [b"fork"], fds)
                answer = await self._answer()
                if answer.isdecimal():
                    return Forked(int(answer))
            if answer.startswith(UNFIT):
                self._refusal = answer
                self._end()
            raise TemplateError(answer)
        except OSError as error:
            self._end()
            raise TemplateError(str(error)) from error
        except BaseException:  # an answer that is still to come would be taken for the next one's
            self._end()
            raise

    async def close(self) -> None:
        self._end()
        for ended in self._ended:
            with contextlib.suppress(subprocess.TimeoutExpired):  # the system does not let it go
                await asyncio.to_thread(ended.wait, CLOSE_SECONDS)

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
                self._process = launch(process.TEMPLATE, (theirs.fileno(),), self._threads)
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
        self._ended = [ended for ended in self._ended if ended.poll() is None]
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
                forked = await template.fork(fds)
        except TemplateError as error:
            log.warning("the template process: %s; the engine is started without it", error)
        else:
            log.info("the engine is process %d, forked from the template", forked.pid)
            return Started(forked, ours, memory)
    with wiring(record_bytes) as (ours, memory, fds):  # the others may be in a copy's hands
        started = launch(process.WORKER, fds, threads)
        log.info("the engine is process %d", started.pid)
        return Started(started, ours, memory)
