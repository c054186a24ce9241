"""What a soak looks at every few seconds: processes by /proc, pool and queue by /metrics."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

from bench.control_plane import TICKS, children, cpu_seconds
from bench.survival import engine_of

MEMORY = {"Rss": "rss_mib", "Pss": "pss_mib", "Anonymous": "anonymous_mib"}
NUMBERS = (
    *("dserve_pages", "dserve_sequences_live", "dserve_sequences_waiting"),
    *("dserve_sequences_parked", "dserve_engine_restarts_total", "dserve_preemptions_total"),
    *("dserve_stream_changes_total", "dserve_finishes_total", "dserve_refusals_total"),
)


def numbers(page: str) -> dict[str, float]:
    """The samples of a /metrics page that a soak keeps, by name and labels."""
    lines = (line.rsplit(" ", 1) for line in page.splitlines() if line.startswith(NUMBERS))
    return {name: float(value) for name, value in lines}


def family(pid: int) -> list[int]:
    """All descendants of a process."""
    found = []
    for child in children(pid):
        found.append(child)
        try:
            found += family(child)
        except OSError:
            continue
    return found


def look(pid: int) -> dict[str, float] | None:
    """Memory, descriptors, threads, age and CPU time of a process; None if it is gone."""
    try:
        proc = Path(f"/proc/{pid}")
        found: dict[str, float] = {"pid": pid}
        for line in (proc / "smaps_rollup").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in MEMORY:
                found[MEMORY[name]] = int(value.split()[0]) / 1024
        started = int((proc / "stat").read_text().rpartition(") ")[2].split()[19]) / TICKS
        found["age_s"] = float(Path("/proc/uptime").read_text().split()[0]) - started
        found["descriptors"] = len(os.listdir(proc / "fd"))
        found["threads"] = len(os.listdir(proc / "task"))
        found["cpu_s"] = cpu_seconds(pid)
    except OSError:
        return None
    return found if "rss_mib" in found else None  # a zombie has no memory


def files(pid: int) -> dict[str, int]:
    """What the descriptors of a process are, and how many of each."""
    folder = Path(f"/proc/{pid}/fd")
    found = [str(link.readlink()) for link in folder.iterdir()]
    return Counter(name.split("[")[0] for name in found)


def sample(server: int, page: str) -> dict[str, Any]:
    """One look at a server: the API process, its engine, and whatever else it has started."""
    engine = engine_of(server)
    others = [pid for pid in family(server) if pid != engine]
    return {
        "api": look(server),
        "engine": look(engine) if engine else None,
        "others": [found for pid in others if (found := look(pid))],
        "client_cpu_s": cpu_seconds(os.getpid()),
        "numbers": numbers(page),
    }
