"""Who is let in when everybody comes."""

from __future__ import annotations

import pytest

from dynamo_serve.api import gate
from dynamo_serve.api.gate import Gate
from dynamo_serve.errors import RequestError, Unavailable


class Guest:
    """A connection that does what it is told. As with the real one, its end is told later."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.is_answering = False
        self.error: RequestError | None = None
        self.is_cut = False
        self.is_closing = False

    def refuse(self, error: RequestError) -> None:
        if self.is_closing:
            return
        self.error = error
        self.gate.leave(self)

    def cut(self) -> None:
        self.is_cut = True


def crowd(gate: Gate, size: int) -> list[Guest]:
    guests = [Guest(gate) for _ in range(size)]
    for guest in guests:
        gate.enter(guest)
    return guests


def test_so_many_are_guests_and_no_more() -> None:
    gate = Gate(3)
    assert [gate.is_guest(guest) for guest in crowd(gate, 5)] == [True] * 3 + [False] * 2


def test_the_oldest_who_is_silent_makes_room_in_the_reserve() -> None:
    door = Gate(1)
    _, asking, *rest = crowd(door, 1 + gate.RESERVE)
    asking.is_answering = True
    newcomer = crowd(door, 1)[0]
    assert isinstance(rest[0].error, Unavailable)
    assert newcomer.error is None and asking.error is None
    assert all(guest.error is None for guest in rest[1:])


def test_who_is_closing_makes_room_once() -> None:
    """A probe has its answer, and its client does not read it."""
    door = Gate(1)
    _, closing, *rest = crowd(door, 1 + gate.RESERVE)
    closing.is_closing = True
    crowd(door, 2)
    assert closing.error is None and not closing.is_cut
    assert [guest.error is None for guest in rest[:2]] == [False, True]
    crowd(door, gate.LEAVING - 2)
    assert not closing.is_cut
    crowd(door, 1)
    assert closing.is_cut


def test_a_reserve_that_is_busy_takes_nobody() -> None:
    door = Gate(1)
    reserve = crowd(door, 1 + gate.RESERVE)[1:]
    for guest in reserve:
        guest.is_answering = True
    assert crowd(door, 1)[0].error is not None
    assert all(guest.error is None for guest in reserve)


@pytest.mark.parametrize("probe", sorted(gate.PROBES))
def test_the_reserve_is_for_probes(probe: str) -> None:
    door = Gate(1)
    guest, other = crowd(door, 2)
    assert door.admits(other, probe)
    assert not door.admits(other, "/v1/models")
    assert door.admits(guest, "/v1/models")


def test_who_waits_in_the_reserve_takes_the_place_of_who_left() -> None:
    door = Gate(1)
    guest, first, second = crowd(door, 3)
    door.forget(guest)
    assert door.admits(first, "/v1/models") and door.is_guest(first)
    assert not door.admits(second, "/v1/models")


def test_of_those_who_leave_the_oldest_is_cut_when_they_are_many() -> None:
    door = Gate(1)
    leaving = crowd(door, 1 + gate.RESERVE + gate.LEAVING)[1:]
    assert not any(guest.is_cut for guest in leaving)
    crowd(door, 4)
    assert [guest.is_cut for guest in leaving[:5]] == [True] * 4 + [False]


def test_the_log_is_told_once_in_a_while(caplog: pytest.LogCaptureFixture) -> None:
    crowd(Gate(1), 100)
    assert len(caplog.records) == 1
    assert "server.max_connections = 1 reached" in caplog.text
