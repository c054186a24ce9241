"""One turn at a time: how long the inbox may wait, what is published, when the books are read."""

from __future__ import annotations

import pytest

from dynamo_serve.core.limits import Limits
from dynamo_serve.core.loop import IDLE_SECONDS, Cancel, Command, Loop, Stop, Submit
from dynamo_serve.core.page_pool import PagePool
from dynamo_serve.core.request import Request, TokenEvent
from dynamo_serve.core.scheduler import Scheduler
from dynamo_serve.core.stats import Stats
from dynamo_serve.engines.fake import FakeEngine


class Stage:
    """A loop whose inbox is a script and whose clock stands still."""

    def __init__(self, *script: list[Command], delay: float = 0.0) -> None:
        engine = FakeEngine()
        spec = engine.start()
        self.script = list(script)
        self.patience: list[float | None] = []
        self.published: list[tuple[list[TokenEvent], Stats]] = []
        self.scheduler = Scheduler(
            PagePool(spec.num_pages, spec.page_size), Limits(max_queue_delay=delay)
        )
        self.loop = Loop(
            self.scheduler,
            engine,
            inbox=self.inbox,
            publish=lambda events, stats: self.published.append((events, stats)),
            clock=lambda: 100.0,
        )

    def inbox(self, patience: float | None) -> list[Command]:
        self.patience.append(patience)
        return self.script.pop(0) if self.script else []


def ask(name: str, max_tokens: int = 2) -> Submit:
    return Submit(Request(name, (1, 2, 3), max_tokens, arrival=100.0))


def test_the_inbox_waits_for_ever_when_idle_and_not_at_all_when_busy() -> None:
    stage = Stage([], [ask("a")])
    for _ in range(5):
        stage.loop.turn()
    assert stage.patience == [None, None, 0.0, IDLE_SECONDS, None]


def test_the_inbox_waits_as_long_as_the_merge_window_is_open() -> None:
    stage = Stage([ask("a")], delay=0.5)
    stage.loop.turn()
    stage.loop.turn()
    assert stage.patience == [None, 0.5]
    assert not stage.published


def test_a_step_is_published_once_however_many_got_a_token() -> None:
    stage = Stage([ask("a"), ask("b"), ask("c")])
    stage.loop.turn()
    [(events, stats)] = stage.published
    assert [e.request_id for e in events] == ["a", "b", "c"]
    assert stats.step is not None
    assert (stats.step.phase, stats.step.num_tokens, stats.step.num_sequences) == ("prefill", 9, 3)


def test_a_cancel_is_published_without_a_step() -> None:
    stage = Stage([ask("a")], [Cancel("a")])
    stage.loop.turn()
    stage.loop.turn()
    assert stage.published[-1][1].step is None
    assert stage.published[-1][1].pages_used == 0


def test_stop_ends_the_loop_without_another_step() -> None:
    stage = Stage([ask("a", 50)], [Stop()])
    stage.loop.run()
    assert len(stage.published) == 1


def test_the_books_are_read_when_the_loop_goes_idle() -> None:
    stage = Stage([ask("a", 1)])
    stage.loop.turn()
    stage.scheduler.pool._blank.pop()
    with pytest.raises(AssertionError, match="lost"):
        stage.loop.turn()


def test_the_books_are_not_read_while_somebody_may_be_waiting() -> None:
    stage = Stage([ask("a", 1)], [ask("b", 1)])
    stage.loop.turn()
    stage.scheduler.pool._blank.pop()
    stage.loop.turn()
    assert [e.request_id for events, _ in stage.published for e in events] == ["a", "b"]
