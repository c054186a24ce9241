"""Nothing lost, exactly one finish each, no page leaked, every token right."""

from __future__ import annotations

import pytest

from tests.core.traffic import check_seed


@pytest.mark.parametrize("first", range(0, 200, 20))
def test_random_traffic_ends_exactly(first: int) -> None:
    preemptions = [check_seed(seed) for seed in range(first, first + 20)]
    assert sum(preemptions) > 0, "these seeds no longer meet memory pressure"
