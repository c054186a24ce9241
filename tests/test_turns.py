"""Turns by tenant: who has had the least goes first, and nobody saves up."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from weakref import ref

from dynamo_serve.turns import Turns
from tests.patience import PATIENCE_S

ENDLESS = """
import asyncio, threading
from dynamo_serve.turns import Turns

begun = threading.Event()

def work(thing):
    begun.set()
    threading.Event().wait()

async def main():
    asking = asyncio.create_task(Turns(work).run("a", 1))
    await asyncio.sleep(0)
    await asyncio.to_thread(begun.wait)

asyncio.run(main())
print("over")
"""


class Clock:
    """Seconds that pass only while something is done."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def order_of(asked: list[tuple[str, float]]) -> list[str]:
    """Who was served when, if all ask at once for something that takes so many seconds."""
    clock, served = Clock(), []

    def work(thing: tuple[str, float]) -> None:
        served.append(thing[0])
        clock.now += thing[1]

    async def ask() -> None:
        turns = Turns(work, clock=clock)
        await asyncio.gather(*(turns.run(tenant, (tenant, s)) for tenant, s in asked))

    asyncio.run(ask())
    return served


def test_tenants_take_turns_by_what_they_have_had() -> None:
    slow, quick = [("slow", 6.0)] * 3, [("quick", 2.0)] * 6
    served = order_of([*slow, *quick])
    assert served == ["slow", *["quick"] * 3, "slow", *["quick"] * 3, "slow"]


def test_who_comes_later_has_no_arrears() -> None:
    clock, served, go_on = Clock(), list[str](), threading.Event()

    def work(tenant: str) -> None:
        if tenant == "late":
            assert go_on.wait(PATIENCE_S)
        served.append(tenant)
        clock.now += 5.0

    async def ask() -> None:
        turns = Turns(work, clock=clock)
        long = [asyncio.create_task(turns.run("long", "long")) for _ in range(8)]
        await long[3]
        late = [asyncio.create_task(turns.run("late", "late")) for _ in range(4)]
        await asyncio.sleep(0)
        go_on.set()
        await asyncio.gather(*long, *late)

    asyncio.run(ask())
    first = served.index("late")
    assert first in (4, 5)  # the fifth may have begun
    assert served[first : first + 6] == ["late", "long"] * 3


def test_a_turn_that_nobody_waits_for_is_left_out() -> None:
    done, go_on = list[int](), threading.Event()

    def work(number: int) -> None:
        assert go_on.wait(PATIENCE_S)
        done.append(number)

    async def ask() -> None:
        turns = Turns[int, None](work)
        asked = [asyncio.create_task(turns.run("a", i)) for i in range(4)]
        await asyncio.sleep(0)
        asked[2].cancel()
        await asyncio.wait(asked[2:3])
        go_on.set()
        await asyncio.gather(*asked, return_exceptions=True)
        assert not turns._queue._waiting and not turns._queue._had  # nothing is kept of tenants

    asyncio.run(ask())
    assert done == [0, 1, 3]


def test_what_nobody_waits_for_is_not_held_until_its_turn() -> None:
    class Text:
        """Takes memory."""

    begun, go_on = threading.Event(), threading.Event()

    def work(text: Text) -> None:
        begun.set()
        assert go_on.wait(PATIENCE_S)

    async def ask() -> None:
        turns = Turns[Text, None](work)
        first = asyncio.create_task(turns.run("a", Text()))
        for tenant in ("a", "b", "b"):
            text = Text()
            left, alive = asyncio.create_task(turns.run(tenant, text)), ref(text)
            await asyncio.sleep(0)
            assert await asyncio.to_thread(begun.wait, PATIENCE_S)
            left.cancel()
            await asyncio.wait((left,))
            del left, text
            assert alive() is None
        assert not first.done()
        go_on.set()
        await first
        await turns.run("b", Text())

    asyncio.run(ask())


def test_what_work_raises_is_raised_to_who_asked() -> None:
    async def ask() -> None:
        turns = Turns[int, int](lambda number: 1 // number)
        first, second = await asyncio.gather(
            turns.run("a", 0), turns.run("a", 1), return_exceptions=True
        )
        assert isinstance(first, ZeroDivisionError) and second == 1

    asyncio.run(ask())


def test_another_event_loop_can_use_it_after_one_has_ended() -> None:
    go_on = threading.Event()
    turns = Turns[int, int](lambda number: number if go_on.wait(PATIENCE_S) else 0)

    async def leave() -> None:
        task = asyncio.create_task(turns.run("a", 1))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()

    asyncio.run(leave())
    go_on.set()
    assert asyncio.run(turns.run("a", 2)) == 2


def test_a_process_that_ends_does_not_wait_for_work() -> None:
    command = [sys.executable, "-c", ENDLESS]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "over\n", "")


def test_what_an_ended_event_loop_left_behind_is_not_worked_beside() -> None:
    go_on, begun, at_once, most = threading.Event(), threading.Event(), 0, 0

    def work(number: int) -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        begun.set()
        assert go_on.wait(PATIENCE_S)
        at_once -= 1

    turns = Turns[int, None](work)

    async def leave() -> None:
        task = asyncio.create_task(turns.run("a", 1))
        await asyncio.sleep(0)
        assert await asyncio.to_thread(begun.wait, 30)
        task.cancel()

    async def come() -> None:
        asked = asyncio.create_task(turns.run("a", 2))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        go_on.set()
        await asked

    asyncio.run(leave())
    asyncio.run(come())
    assert most == 1
