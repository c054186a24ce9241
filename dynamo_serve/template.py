"""The template process: it has imported what an engine needs, and forks engine processes.

Most of an engine's start is imports. Here they are done once; an engine is a copy of this process,
its memory shared with it until it is written to. A copy has the thread that forked and no other,
and cannot use a device that was in use before, so whether it may be made is looked at each time.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import socket
import sys
from pathlib import Path

from dynamo_serve import worker
from dynamo_serve.start import PR_SET_PDEATHSIG, UNFIT, prctl

NUM_DESCRIPTORS = 2  # of an engine: its socket, its flight record
DEVICES = ("/dev/nvidia", "/dev/kfd", "/dev/dri")


def load() -> None:
    """Import what engines import."""
    # numpy's OpenBLAS starts threads at once, which every copy would lack; nobody here computes
    # with numpy. Only while it is imported: an OpenBLAS of torch's would read this, too.
    is_free = "OPENBLAS_NUM_THREADS" not in os.environ
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    import numpy  # noqa: F401, PLC0415

    if is_free:
        del os.environ["OPENBLAS_NUM_THREADS"]
    import transformers.generation.utils  # noqa: F401, PLC0415 - for every model

    import dynamo_serve.engines.local  # noqa: F401, PLC0415


def obstacle() -> str | None:
    """Why no copy of this process can be an engine; None if one can."""
    if (num_threads := len(os.listdir("/proc/self/task"))) != 1:
        return f"it has {num_threads} threads, and a copy would have one of them"
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one with which it was listed
            if (path := os.readlink(f"/proc/self/fd/{fd}")).startswith(DEVICES):
                return f"it has opened {path}, which a copy could not use"
    return None


def fork_away() -> int:
    """Fork a process that is not our child: 0 in the copy, its id here. Raises `OSError`.

    The one in between ends at once, and the system hands the copy to the API process.
    """
    reading, writing = os.pipe()
    between = os.fork()
    if between == 0:
        try:
            if copy := os.fork():
                os.write(writing, str(copy).encode())
                os._exit(0)
        except OSError as error:
            os._exit(error.errno or 1)
        os.close(reading)
        os.close(writing)
        return 0
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(between, 0)[1])
    if not answer:
        raise OSError(code, os.strerror(code))
    return int(answer)


def serve(sock: socket.socket) -> list[int] | None:
    """Fork an engine for each message; its descriptors in the copy, None at the end."""
    while True:
        flags = socket.MSG_CMSG_CLOEXEC
        message, fds, _, _ = socket.recv_fds(sock, 64, NUM_DESCRIPTORS, flags)
        if not message:
            return None
        if reason := obstacle():
            answer = UNFIT + reason
        else:
            try:
                copy = fork_away()
            except OSError as error:
                answer = f"it cannot fork: {error.strerror}"
            else:
                if copy == 0:
                    return fds
                answer = str(copy)
        for fd in fds:
            os.close(fd)
        sock.send(answer.encode())


def rename() -> None:
    """In the list of processes, a copy is the engine process that it is."""
    stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(stat[45]), int(stat[46])  # of the arguments, in our memory
    before, found, after = ctypes.string_at(start, end - start).rpartition(b"template")
    if found:
        ctypes.memmove(start, (before + b"worker" + after).ljust(end - start, b"\0"), end - start)


def main(fd: int) -> int:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # as in the engine: the API process handles them
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would hide how a fork went
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # so it ends with the API process even if stopped
    try:
        with socket.socket(fileno=fd) as sock:  # closed in the copy, too
            load()
            gc.collect()
            gc.freeze()  # the collector would write to every page, and a page written to is a copy
            fds = serve(sock)
    except (BrokenPipeError, ConnectionResetError):
        return 0
    if fds is None:
        return 0
    os.setsid()
    rename()
    sys.argv = [worker.__file__, *map(str, fds)]
    return worker.main(*fds)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
