"""How much memory is free: of a CUDA device, or of this machine or container."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

import torch

CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Bytes that could still be allocated on `device`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free) + int(cached)
    available = machine_free_bytes()
    limit = cgroup_free_bytes(CGROUP)
    return available if limit is None else min(available, limit)


def machine_free_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """What the kernel says is available without swapping; else half of all memory."""
    with contextlib.suppress(OSError):
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


class _Names(NamedTuple):
    """What a version of cgroups calls its files, and the cache among what is used."""

    limit: str
    used: str
    cache: str


V2 = _Names("memory.max", "memory.current", "inactive_file")
V1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def cgroup_free_bytes(root: Path, membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """The least that the memory limits of our group and those around it leave; None without one.

    Not every container sees its own group as the `root`; `membership` says where we are.
    """
    paths = {"": "/", "memory": "/"}
    with contextlib.suppress(OSError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            paths |= dict.fromkeys(controllers.split(","), path)
    found: list[int | None] = []
    for top, path, names in ((root, paths[""], V2), (root / "memory", paths["memory"], V1)):
        group = top / path.lstrip("/")
        folders = (group, *group.parents)
        found += [_left(folder, names) for folder in folders if folder.is_relative_to(top)]
    return min((left for left in found if left is not None), default=None)


def _left(folder: Path, names: _Names) -> int | None:
    try:
        limit = int((folder / names.limit).read_text())  # "max" is no limit, and no number
        used = int((folder / names.used).read_text())
        stat = (folder / "memory.stat").read_text().split()
    except (OSError, ValueError):
        return None
    reclaimable = dict(zip(stat[::2], stat[1::2], strict=False)).get(names.cache, "0")
    return max(0, limit - used + int(reclaimable))
