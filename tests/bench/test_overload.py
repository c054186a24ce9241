"""When an overload is over, on made-up samples: the backlog gone and every rung undone."""

from __future__ import annotations

import pytest

from bench.overload_report import Run, Sent

BEGIN, END, CALM, WAIT = 10.0, 40.0, 5.0, 60.0


def played(levels: dict[float, int], answered_at: float, wait: float = WAIT) -> Run:
    """A run with one job that is answered at a time; `levels` of one rung from a time on."""
    run = Run("auto", 1.0, (BEGIN, END), CALM, wait)
    job = Sent("batch", 20.0)
    run.sent += [Sent("batch", 5.0, status=200), job, Sent("batch", 45.0)]
    at = 1.0
    while at < run.last:
        job.status = 200 if at >= answered_at else 0
        level = [level for since, level in levels.items() if at >= since][-1:]
        run.samples.append({"at": at, "rungs": {"cap_batch": level[0] if level else 0}})
        run.look(at)
        at += 1.0
    return run


def test_all_is_as_it_was_once_the_backlog_has_gone_and_the_rungs_are_undone() -> None:
    run = played({20.0: 1, 60.0: 0}, answered_at=50.0)
    assert (run.backlog_gone_at, run.undone_at, run.over_at) == (50.0, 60.0, 60.0)
    assert run.last == 60.0 + CALM


def test_a_rung_that_is_taken_again_was_not_undone() -> None:
    run = played({20.0: 1, 45.0: 0, 48.0: 1, 55.0: 0}, answered_at=50.0)
    assert (run.undone_at, run.over_at) == (55.0, 55.0)


@pytest.mark.parametrize("answered_at", [50.0, 1000.0])
def test_the_wait_has_a_bound(answered_at: float) -> None:
    run = played({20.0: 1}, answered_at=answered_at)
    assert run.undone_at is None and run.over_at == END + WAIT
    assert (run.backlog_gone_at is None) is (answered_at == 1000.0)
    assert run.last == END + WAIT + CALM
