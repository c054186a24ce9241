"""How much memory is free, read from files that look like the kernel's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dynamo_serve.engines.local import memory
from dynamo_serve.engines.local.memory import cgroup_free_bytes, free_bytes, machine_free_bytes
from tests.patience import PATIENCE_S


def test_machine_memory_is_what_the_kernel_calls_available(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 900 kB\nMemFree: 10 kB\nMemAvailable:    500 kB\n")
    assert machine_free_bytes(meminfo) == 500 * 1024
    assert machine_free_bytes(tmp_path / "missing") > 0  # another kernel: half of all memory


def write_cgroup(root: Path, limit: str, used: int, cache: int) -> None:
    (root / "memory.max").write_text(limit + "\n")
    (root / "memory.current").write_text(f"{used}\n")
    (root / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\n")


def test_container_limit_counts_file_cache_as_free(tmp_path: Path) -> None:
    assert cgroup_free_bytes(tmp_path) is None
    write_cgroup(tmp_path, "1000", 700, 200)
    assert cgroup_free_bytes(tmp_path) == 500
    write_cgroup(tmp_path, "max", 700, 200)
    assert cgroup_free_bytes(tmp_path) is None


def test_the_older_layout_of_cgroups_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("1000")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("900")
    (tmp_path / "memory" / "memory.stat").write_text("total_inactive_file 50\n")
    assert cgroup_free_bytes(tmp_path) == 150


def test_the_tightest_limit_around_our_own_group_counts(tmp_path: Path) -> None:
    membership = tmp_path / "membership"
    membership.write_text("9:name=systemd:/\n4:cpu,memory:/jobs/one\n0::/a/b\n")
    root = tmp_path / "cgroup"
    (root / "a" / "b").mkdir(parents=True)
    write_cgroup(root / "a", "1000", 300, 0)
    write_cgroup(root / "a" / "b", "max", 100, 0)
    assert cgroup_free_bytes(root, membership) == 700
    write_cgroup(root / "a" / "b", "500", 100, 0)
    assert cgroup_free_bytes(root, membership) == 400
    older = root / "memory" / "jobs" / "one"
    older.mkdir(parents=True)
    (older / "memory.limit_in_bytes").write_text("900")
    (older / "memory.usage_in_bytes").write_text("650")
    (older / "memory.stat").write_text("total_inactive_file 50\n")
    assert cgroup_free_bytes(root, membership) == 300
    membership.write_text("0::/not/mounted/here\n")
    assert cgroup_free_bytes(root, membership) is None


def test_the_smaller_of_machine_and_container_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cgroup(tmp_path, "1000", 300, 0)
    monkeypatch.setattr(memory, "cgroup_free_bytes", lambda: cgroup_free_bytes(tmp_path))
    assert free_bytes(torch.device("cpu")) == 700
    write_cgroup(tmp_path, str(1 << 60), 300, 0)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < free_bytes(torch.device("cpu")) <= total


FAULTS = """
import resource
import torch
from dynamo_serve.engines.local.malloc import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(16 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), keep_freed_memory(), faults())
"""


def test_large_blocks_are_reused_without_faulting_in_again() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    before, is_kept, after = done.stdout.split()
    if is_kept == "False":
        pytest.skip("the C library has no mallopt")
    assert int(after) < int(before) / 2
