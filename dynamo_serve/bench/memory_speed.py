"""How fast this machine reads from its memory: what a decode step on its CPU is held against."""

from __future__ import annotations

import ctypes
import ipaddress
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from dynamo_serve.bench.scenario import Scenario
from dynamo_serve.cgroups import usable_cores
from dynamo_serve.errors import ConfigError

SIZE = 1 << 29  # bytes that are read; the caches of processors are smaller
REPEATS = 5
FILL, SOUGHT = 1, 2  # every byte is the one, so the search for the other reads all of them


def of_server(url: str, scenario: Scenario, facts: Mapping[str, Any]) -> float | None:
    """Bytes per second as given, or measured; None if neither was asked for. Raises `ConfigError`
    where measuring here would say nothing of the server."""
    if scenario.bandwidth is not None:
        return scenario.bandwidth * 1e9
    if not scenario.measure_bandwidth:
        return None
    if not is_here(url):
        raise ConfigError(
            f"--measure-bandwidth measures this machine, and {url} is another one; "
            "give --bandwidth of that one's memory"
        )
    engine = facts.get("engine")
    device = str(engine.get("device", "cpu")) if isinstance(engine, dict) else "cpu"
    if device != "cpu":
        raise ConfigError(
            f"--measure-bandwidth measures the memory of this machine's CPU, and the server runs "
            f"on {device}; give --bandwidth of its memory"
        )
    return measured()


def is_here(url: str) -> bool:
    """Whether an address is one of the loopback, so surely of this machine."""
    host = urlsplit(url if "//" in url else f"http://{url}").hostname or ""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return False  # who asks for it next is told
    return all(ipaddress.ip_address(address).is_loopback for address in found)


def measured(size: int = SIZE, repeats: int = REPEATS) -> float:
    """Bytes per second that all cores read together, by the C library's search for a byte that is
    not there; the best of some repeats, for what disturbs only makes it slower."""
    cores = usable_cores()
    parts = [(ctypes.c_char * (size // cores))() for _ in range(cores)]
    for part in parts:
        ctypes.memset(part, FILL, len(part))  # or all pages would be the same one, of zeros
    search = ctypes.CDLL(None).memchr  # lets other threads run meanwhile
    search.argtypes, search.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t), None
    return sum(map(len, parts)) / min(_once(search, parts) for _ in range(repeats))


def _once(search: Any, parts: list[Any]) -> float:
    """Seconds from when the first thread began to when the last was done."""
    line = threading.Barrier(len(parts))
    spans: list[tuple[float, float]] = []

    def read(part: Any) -> None:
        line.wait()
        begin = time.perf_counter()
        search(part, SOUGHT, len(part))
        spans.append((begin, time.perf_counter()))

    threads = [threading.Thread(target=read, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(end for _, end in spans) - min(begin for begin, _ in spans)
