"""Budgets of size: raised on purpose, in a commit that says why, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.architecture import source

MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 40
# 750 were enough for one tenant; fair share, admission, the step-time model, forecasts and the
# journal are 1,700 more, 300 look for drafts and decide whether one pays, and 250 are for prompts
# that go ahead of others or for which a running step is held. 250 keep requests alive: what is in
# flight, steps that raise, suspects, and sequences that go on after an engine or a reader was gone.
# 600 are the healing ladder: evidence, rungs, and when to take one; 120 more for rungs that cut
# answers and change engines: a ladder that the next engine goes on with, and steps gone slow.
# 600 are the tiers of KV pages: their books, what goes down, what comes back, and what becomes of
# copies that fail. 150 tell routers what becomes of pages. 250 are pinned prefixes: what is
# held for whom until when, and how much of the pool that may be. 300
# say why a prompt was not found: the tree of what is stored, and what became of the rest.
# 300 decide whose cached page goes when room is needed; 50 are heads that tenants share.
# 50 keep steps cheap: what is not asked, summed up or made again for every sequence and token.
# 20 tell a tenant what it has stored under another salt of its own.
# 35 hold prompts to a time where nobody was promised one, also after a slow start.
# 40 are text and faults of engines that forward to others. 50 are answers that are no tokens:
# vectors, and log probabilities of prompts. 50 tell whose promises were kept.
CORE_CODE_LINES = 6410
LONGER_ON_PURPOSE: frozenset[str] = frozenset()  # dotted names of functions


def test_no_file_is_longer_than_a_sitting() -> None:
    lengths = {source.dotted(path): len(path.read_text().splitlines()) for path in source.modules()}
    assert {name: n for name, n in lengths.items() if n > MAX_FILE_LINES} == {}


def test_no_function_is_longer_than_a_screen() -> None:
    long = {
        function.name: function.num_lines
        for path in source.modules()
        for function in source.functions(path)
        if function.num_lines > MAX_FUNCTION_LINES
    }
    assert {name: n for name, n in long.items() if name not in LONGER_ON_PURPOSE} == {}
    assert not LONGER_ON_PURPOSE - long.keys(), "an exception that is not needed any more"


def test_core_keeps_within_its_budget() -> None:
    core = (source.PACKAGE / "core").rglob("*.py")
    assert sum(source.num_code_lines(path) for path in core) <= CORE_CODE_LINES


PROBE = '''"""A module."""

import os  # one


class Thing:
    """Not counted."""

    @property
    def long(self) -> int:
        """Neither
        is this."""

        # nor this
        def inner() -> int:
            return 1

        return inner()
'''


def test_lines_are_counted_as_promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "ROOT", tmp_path)
    path = tmp_path / "probe.py"
    path.write_text(PROBE)
    found = {function.name: function.num_lines for function in source.functions(path)}
    # Decorator, signature, blank, comment, blank, return; and the two lines inside on their own.
    assert found == {"probe.long": 6, "probe.inner": 2}
    assert source.num_code_lines(path) == 7
