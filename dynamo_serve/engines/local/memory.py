"""How much memory is free: of a CUDA device, or of this machine or container."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

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


def cgroup_free_bytes(root: Path) -> int | None:
    """What the container's memory limit leaves (cgroup v2, then v1); None without a limit."""
    for limit_name, used_name, cache_key in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit = (root / limit_name).read_text().strip()
            used = int((root / used_name).read_text())
            stat = (root / used_name).with_name("memory.stat").read_text().split()
        except (OSError, ValueError):
            continue
        if limit == "max":
            return None
        reclaimable = dict(zip(stat[::2], stat[1::2], strict=False)).get(cache_key, "0")
        return max(0, int(limit) - used + int(reclaimable))
    return None
