"""The examples in docs/concepts are what the code does, to the letter."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest

from tests.architecture.source import ROOT
from tests.architecture.worked import page_pool_blocks, scheduling_blocks


@pytest.mark.parametrize(
    ("page", "replay"),
    [("page-pool.md", page_pool_blocks), ("scheduling.md", scheduling_blocks)],
)
def test_a_worked_example_is_replayed(page: str, replay: Callable[[], Iterator[str]]) -> None:
    text = (ROOT / "docs" / "concepts" / page).read_text()
    assert re.findall(r"^```text\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) == list(replay())
