"""Cores that a container may use, read from files that look like the kernel's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dynamo_serve import process
from dynamo_serve.cgroups import usable_cores

CORES = 8


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(CORES)))


def usable(root: Path, membership: str = "0::/\n") -> int:
    usable_cores.cache_clear()
    (root / "membership").write_text(membership)
    return usable_cores(root, root / "membership")


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("max 100000", CORES),
        ("400000 100000", 4),
        ("250000 100000", 2),  # what is left over is for the API process
        ("50000 100000", 1),
        ("900000 100000", CORES),  # more than there are
        ("0 100000", CORES),
        ("half a core", CORES),
        ("100000 0", CORES),
        ("", CORES),
    ],
)
def test_a_quota_is_worth_whole_cores(tmp_path: Path, quota: str, cores: int) -> None:
    (tmp_path / "cpu.max").write_text(quota + "\n")
    assert usable(tmp_path) == cores


def test_the_tightest_group_around_us_counts(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "cpu.max").write_text("300000 100000\n")
    (tmp_path / "a" / "b" / "cpu.max").write_text("max 100000\n")
    assert usable(tmp_path, "0::/a/b\n") == 3
    (tmp_path / "a" / "b" / "cpu.max").write_text("200000 100000\n")
    assert usable(tmp_path, "0::/a/b\n") == 2
    assert usable(tmp_path, "0::/\n") == CORES


def test_the_older_layout_is_read_too(tmp_path: Path) -> None:
    group = tmp_path / "cpu" / "jobs"
    group.mkdir(parents=True)
    (group / "cpu.cfs_quota_us").write_text("-1\n")
    (group / "cpu.cfs_period_us").write_text("100000\n")
    membership = "3:cpuset:/\n4:cpu,cpuacct:/jobs\n"
    assert usable(tmp_path, membership) == CORES
    (group / "cpu.cfs_quota_us").write_text("550000\n")
    assert usable(tmp_path, membership) == 5


def test_no_groups_are_no_limit(tmp_path: Path) -> None:
    assert usable(tmp_path) == CORES
    usable_cores.cache_clear()
    assert usable_cores(tmp_path / "nowhere", tmp_path / "nothing") == CORES


def test_an_engine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(process, "usable_cores", lambda: 3)
    assert process.engine_environment(0)["OMP_NUM_THREADS"] == "3"
    assert process.engine_environment(5)["OMP_NUM_THREADS"] == "5"
