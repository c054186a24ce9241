"""What the control groups of this process leave it: a container's limits, in either layout."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def folders(
    controller: str, root: Path = ROOT, membership: Path = MEMBERSHIP
) -> Iterator[tuple[Path, int]]:
    """Our group and those around it, as far as they can be seen, with the version of their files.

    Not every container sees its own group as the `root`; `membership` says where we are. In the
    older layout (1) each `controller` ("cpu", "memory") has groups of its own.
    """
    paths = {"": "/", controller: "/"}
    with contextlib.suppress(OSError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            paths |= dict.fromkeys(controllers.split(","), path)
    for top, path, version in ((root, paths[""], 2), (root / controller, paths[controller], 1)):
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                yield folder, version


@cache
def usable_cores(root: Path = ROOT, membership: Path = MEMBERSHIP) -> int:
    """Cores that this process may run on, or as many whole ones as its groups' quota of CPU time
    is worth, if that is less: more threads would only be stopped together. At least 1."""
    can_ask = hasattr(os, "sched_getaffinity")  # Linux can; the cores we may use, not all
    cores = len(os.sched_getaffinity(0)) if can_ask else os.cpu_count() or 1
    quotas = (_quota(*found) for found in folders("cpu", root, membership))
    return max(1, min([cores, *(int(quota) for quota in quotas if quota is not None)]))


def _quota(folder: Path, version: int) -> float | None:
    """Cores' worth of time, or None where there is no limit."""
    try:
        if version == 2:
            quota, period = (folder / "cpu.max").read_text().split()  # "max" is no limit
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()  # -1 is none
            period = (folder / "cpu.cfs_period_us").read_text()
        worth = int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
    return worth if worth > 0 else None
