"""Nothing lost, exactly one finish each, no page leaked, every token right."""

from __future__ import annotations

import pytest

from tests.core.traffic import Drafting, check_seed


@pytest.mark.parametrize("first", range(0, 200, 20))
def test_random_traffic_ends_exactly(first: int) -> None:
    ends = [check_seed(seed, Drafting()) for seed in range(first, first + 20)]
    assert sum(end.prefix_copied_tokens_total for end in ends) > 0, "no part of a page was copied"
    assert sum(end.preemptions_total for end in ends) > 0, "no memory pressure any more"


@pytest.mark.parametrize("first", range(0, 200, 20))
def test_random_traffic_with_drafts_ends_exactly_the_same(first: int) -> None:
    ends = [
        check_seed(seed, Drafting((0.7, 0.95)[seed % 2], (1, 4, 8)[seed % 3]))
        for seed in range(first, first + 20)
    ]
    accepted = sum(end.draft_accepted_tokens_total for end in ends)
    assert 0 < accepted < sum(end.draft_tokens_total for end in ends), "drafts all fail, or none"
    assert sum(end.preemptions_total for end in ends) > 0, "no memory pressure any more"
