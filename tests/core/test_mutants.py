"""The tests of the core must notice when the core is broken on purpose."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUITE = ("test_random_traffic.py", "test_scheduler.py", "test_page_pool.py", "traffic.py")

MUTANTS = {
    "reuse every token, leaving none to run": (
        "scheduler.py",
        "end = seq.num_tokens - 1",
        "end = seq.num_tokens",
    ),
    "publish pages that are not written yet": (
        "scheduler.py",
        "full = seq.num_computed // self.pool.page_size",
        "full = seq.num_tokens // self.pool.page_size",
    ),
    "forget to give pages back": ("scheduler.py", "self.pool.release(seq.page_table)", "pass"),
    "keep the phase of a preempted sequence": (
        "scheduler.py",
        "        seq.phase = Phase.PREFILL\n",
        "",
    ),
    "lose the preempted sequence": (
        "scheduler.py",
        "        self.waiting[seq.id] = seq\n        self.waiting.move_to_end",
        "        self.waiting.pop",
    ),
    "never withdraw a claim": ("scheduler.py", "self.pool.index.unclaim(", "tuple(("),
    "finish one token late": (
        "scheduler.py",
        "seq.num_outputs >= request.max_tokens",
        "seq.num_outputs > request.max_tokens",
    ),
    "count the prefix again after a preemption": (
        "scheduler.py",
        "if seq.admitted_at is None:",
        "if True:",
    ),
    "let somebody overtake the head of the queue": (
        "scheduler.py",
        "break  # no room yet",
        "continue  # no room yet",
    ),
    "hash a page without what is before it": (
        "prefix_index.py",
        "blake2b(parent + array",
        "blake2b(array",
    ),
    "hash without the salt": ("prefix_index.py", "blake2b(salt.encode()", 'blake2b(b""'),
    "share a page without counting": (
        "page_pool.py",
        "            self._cached.pop(page_id, None)\n            self._ref_counts[page_id] += 1",
        "            self._cached.pop(page_id, None)",
    ),
    "share a page that may still be evicted": (
        "page_pool.py",
        "            self._cached.pop(page_id, None)\n",
        "",
    ),
    "evict and stay listed": ("page_pool.py", "        del self.index.pages[key]\n", ""),
    "evict the head of a chain first": ("page_pool.py", "in reversed(page_table)", "in page_table"),
    "cover one page too few": ("page_pool.py", "-(-num_tokens //", "(num_tokens //"),
}


def run_suite(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/core"]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The core, the fake engine and the suite, on their own."""
    package = tmp_path / "dynamo_serve"
    shutil.copytree(ROOT / "dynamo_serve" / "core", package / "core")
    (package / "engines").mkdir()
    shutil.copy(ROOT / "dynamo_serve" / "engines" / "fake.py", package / "engines")
    suite = tmp_path / "tests" / "core"
    suite.mkdir(parents=True)
    for file in (package, package / "engines", suite.parent, suite):
        (file / "__init__.py").touch()
    for name in SUITE:
        shutil.copy(ROOT / "tests" / "core" / name, suite)
    return tmp_path


def test_the_unchanged_core_passes(copy: Path) -> None:
    result = run_suite(copy)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name: str, copy: Path) -> None:
    file, old, new = MUTANTS[name]
    path = copy / "dynamo_serve" / "core" / file
    source = path.read_text()
    assert old in source, "the mutation no longer applies: bring it up to date"
    path.write_text(source.replace(old, new))
    result = run_suite(copy)
    assert result.returncode == 1, f"nobody noticed: {name}\n{result.stdout}"
