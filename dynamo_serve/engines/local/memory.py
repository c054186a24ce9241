"""How much memory is free: of a CUDA device, or of this machine or container."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

import torch

from dynamo_serve.cgroups import MEMBERSHIP, ROOT, folders


def free_bytes(device: torch.device) -> int:
    """Bytes that could still be allocated on `device`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free) + int(cached)
    available = machine_free_bytes()
    limit = cgroup_free_bytes()
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


VERSIONS = {
    1: _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: _Names("memory.max", "memory.current", "inactive_file"),
}


def cgroup_free_bytes(root: Path = ROOT, membership: Path = MEMBERSHIP) -> int | None:
    """The least that the memory limits of our group and those around it leave; None without one."""
    found = (_left(folder, VERSIONS[v]) for folder, v in folders("memory", root, membership))
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
