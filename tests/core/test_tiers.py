"""Pages that go down to lower tiers and come back: nothing wrong, nothing lost, nobody stalled."""

from __future__ import annotations

import random

import pytest

from dynamo_serve.core.scheduler import Limits
from tests.core.tiers import RoughEngine
from tests.core.traffic import VOCAB_SIZE, Harness, judge, play, random_requests


def check_seed(seed: int) -> RoughEngine:
    """A random mix over a tiny pool with tiny tiers below it, driven to its end."""
    rng = random.Random(seed)
    page_size = rng.choice([1, 2, 4])
    longest = 36
    tiers = rng.choice([(12, 0), (0, 20), (6, 30), (3, 4), (40, 80)])
    engine = RoughEngine(
        rng,
        failing=rng.choice([0.0, 0.0, 0.1, 0.5]),
        slowest=rng.choice([0, 2, 10, 600]),
        vocab_size=VOCAB_SIZE,
        max_model_len=longest,
        page_size=page_size,
        num_pages=-(-longest // page_size) + rng.randint(0, 12),
        host_pages=tiers[0],
        disk_pages=tiers[1],
    )
    limits = Limits(
        max_prefill_tokens=rng.choice([1, 5, 16, 64]),
        max_decode_sequences=rng.choice([1, 3, 8]),
        mix_phases=rng.random() < 0.5,
    )
    engine.harness = harness = Harness(engine, limits)
    requests = random_requests(rng, 20, longest)
    cancelled = {r.id for r in requests if rng.random() < 0.2}
    play(harness, rng, requests, cancelled)
    for _ in range(20_000):
        if not harness.scheduler.spill.flights.is_busy:
            break
        harness.turn()
    judge(harness, requests, cancelled)
    assert not engine.under_way
    return engine


@pytest.mark.parametrize("first", range(0, 400, 20))
def test_random_traffic_over_tiers_ends_exactly(first: int) -> None:
    ends = [check_seed(seed) for seed in range(first, first + 20)]
    assert sum(e.harness.scheduler.spill.num_restored for e in ends) > 0, "nothing came back"
    assert sum(e.num_failed for e in ends) > 0, "nothing failed"
