"""What ran where: versions, commit, machine, and whether the client was in its own way."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httptools

from dynamo_serve import __version__
from dynamo_serve.bench.spread import percentile
from dynamo_serve.cgroups import usable_cores

KEY = re.compile(r"(\b|_)keys?\s*[=:]")  # of an assignment; what is behind it is hidden
LATE_S, LAG_S, BUSY = 0.010, 0.005, 0.9  # above these a client measures itself
FEW, LATE_SHARE = 2, 0.01  # calls may be late by chance


def versions() -> dict[str, str]:
    return {
        "dynamo-serve": __version__,
        "python": platform.python_version(),
        "httptools": httptools.__version__,
    }


def commit() -> str:
    """Of the checkout this runs from, or empty; with a plus if something was changed."""
    folder = Path(__file__).parent
    try:
        found = _git(folder, "rev-parse", "--short=12", "HEAD")
        tracked = _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return ""
    return found + ("+" if changed else "") if tracked else ""


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=5
    )
    return done.stdout.strip()


def machine() -> dict[str, Any]:
    """The client's; of the server only what it says itself is known."""
    found: dict[str, Any] = {"system": platform.platform(), "cores": usable_cores(), "cpu": _cpu()}
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        found["memory_gib"] = round(pages * size / 2**30, 1)
    except (OSError, ValueError):
        pass
    return found


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def command(words: Sequence[str]) -> str:
    """A command line without the keys in it."""
    shown = []
    for before, word in zip(("", *words), words, strict=False):
        if before == "--api-key" and not word.startswith("$"):
            shown.append("…")
        elif word.startswith("--api-key="):
            shown.append("--api-key=…")
        else:
            found = KEY.search(word)
            shown.append(word[: found.end()] + "…" if found else word)
    return " ".join([Path(shown[0]).name, *shown[1:]])


def num_late(late: Sequence[float]) -> int:
    """How many calls were begun too late, or 0 if they are so few that it may be chance."""
    found = sum(value > LATE_S for value in late)
    return found if found > max(FEW, len(late) * LATE_SHARE) else 0


def keeping_up(late: Sequence[float], lags: Sequence[float], busy: float) -> dict[str, Any]:
    """How late calls were begun and timers came; `warning` is not empty if the client was too
    slow for what it measured. `busy` is the processor time of the busiest process per second."""
    late_p99, lag_p99 = percentile(late, 0.99), percentile(lags, 0.99)
    many = num_late(late)
    why = [
        *([f"{many} of {len(late)} calls were begun over 10 ms late"] * (many > 0)),
        *([f"1 % of its timers came over {lag_p99 * 1e3:.1f} ms late"] * (lag_p99 > LAG_S)),
        *([f"it kept a core busy {busy:.0%} of the time"] * (busy > BUSY)),
    ]
    warning = "; ".join(why)
    if warning:
        warning = (
            f"the client could not keep up, so these latencies are partly its own: {warning}. "
            "Use --processes, or a machine that the server does not need"
        )
    return {
        "late_p50_ms": round(percentile(late, 0.5) * 1e3, 3),
        "late_p99_ms": round(late_p99 * 1e3, 3),
        "late_max_ms": round(max(late, default=0.0) * 1e3, 3),
        "lag_p99_ms": round(lag_p99 * 1e3, 3),
        "lag_max_ms": round(max(lags, default=0.0) * 1e3, 3),
        "busy": round(busy, 3),
        "warning": warning,
    }
