"""Who, and what for: pure functions, no clock but an argument."""

from __future__ import annotations

import pytest

from dynamo_serve.core import policy
from dynamo_serve.core.batch import Phase
from dynamo_serve.core.request import Request
from dynamo_serve.core.sequence import Sequence
from dynamo_serve.core.tenant import Class

NOW = float("-inf")


def waiting(*requests: tuple[int, float]) -> list[Sequence]:
    return [
        Sequence.of(Request(f"r{i}", (1,) * length, 5, arrival=arrival), Class("any"))
        for i, (length, arrival) in enumerate(requests)
    ]


def test_phases_alternate() -> None:
    assert policy.phase_order(Phase.DECODE)[0] is Phase.PREFILL
    assert policy.phase_order(Phase.PREFILL)[0] is Phase.DECODE


def test_the_newest_admission_is_the_victim() -> None:
    running = waiting((1, 0.0), (1, 1.0), (1, 2.0))
    assert policy.victim(running) is running[-1]


def test_the_merge_window_opens_with_the_oldest_arrival() -> None:
    queue = waiting((4, 2.0), (4, 1.0))
    assert policy.merge_until(queue, delay=0.5, tokens=100, sequences=8) == 1.5


def test_the_merge_window_closes_when_a_step_is_full() -> None:
    queue = waiting((4, 1.0), (4, 1.0))
    assert policy.merge_until(queue, delay=0.5, tokens=8, sequences=8) == NOW
    assert policy.merge_until(queue, delay=0.5, tokens=9, sequences=2) == NOW


def test_a_preempted_sequence_does_not_wait_for_company() -> None:
    queue = waiting((4, 1.0))
    queue[0].num_preemptions = 1
    assert policy.merge_until(queue, delay=0.5, tokens=100, sequences=8) == NOW


@pytest.mark.parametrize(("ttft", "wanted"), [(1.0, 0.5), (30.0, 15.0), (120.0, 15.0)])
def test_half_of_a_target_is_for_what_nobody_foresees(ttft: float, wanted: float) -> None:
    """A target beyond the ageing time counts as that."""
    seq = Sequence.of(Request("r", (1,), 1, arrival=0.0), Class("c", ttft=ttft))
    assert policy.aim(seq) == pytest.approx(wanted)
    assert policy.is_pressed(seq, wanted + 0.01) and not policy.is_pressed(seq, wanted)
