"""The engine process as the operating system sees it: start, memory it shares, end."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Generator
from pathlib import Path

CLOSE_SECONDS = 5.0  # what a step in flight gets before the process is killed
# -P: what lies in the working directory is not for us to import.
WORKER = ("-P", "-m", "dynamo_serve.worker")


def spawn(fds: tuple[int, ...], threads: int) -> subprocess.Popen[bytes]:
    """Start an engine process that inherits these descriptors: its socket and its flight record."""
    return subprocess.Popen(
        [sys.executable, *WORKER, *map(str, fds)],
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


async def exit_code(process: subprocess.Popen[bytes]) -> int:
    """Wait for the end of a process that should end by itself; kill it if it does not."""
    try:
        return await asyncio.to_thread(process.wait, CLOSE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return await asyncio.to_thread(process.wait)


def describe_exit(code: int) -> str:
    if code < 0:
        names = {number.value: number.name for number in signal.Signals}
        return f"the engine process died of {names.get(-code, f'signal {-code}')}"
    return f"the engine process exited with code {code}"
