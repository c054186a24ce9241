"""Who gets the next request, and who gets none for a while."""

from __future__ import annotations

import random

from dynamo_serve.engines.triton_server.endpoints import (
    LONGEST_PAUSE,
    MOST_RETRIES,
    Budget,
    Endpoint,
    pick,
)

RNG = random.Random(7)


def opened(*in_flight: int) -> list[Endpoint]:
    return [Endpoint(f"host:{i}", True, count) for i, count in enumerate(in_flight)]


def test_of_two_servers_the_one_with_fewer_in_flight_is_asked() -> None:
    endpoints = opened(3, 2)
    assert all(pick(endpoints, [], RNG) is endpoints[1] for _ in range(20))


def test_of_many_servers_the_fullest_is_never_asked_and_no_other_is_left_out() -> None:
    endpoints = opened(5, 1, 1, 1)
    asked = {endpoints.index(e) for _ in range(200) if (e := pick(endpoints, [], RNG))}
    assert asked == {1, 2, 3}


def test_another_try_goes_elsewhere_if_there_is_elsewhere() -> None:
    endpoints = opened(0, 9)
    assert pick(endpoints, [endpoints[0]], RNG) is endpoints[1]
    assert pick(endpoints[:1], [endpoints[0]], RNG) is endpoints[0]


def test_an_ejected_server_is_not_asked() -> None:
    endpoints = opened(0, 9)
    endpoints[0].eject()
    assert all(pick(endpoints, [], RNG) is endpoints[1] for _ in range(20))
    endpoints[1].eject()
    assert pick(endpoints, [], RNG) is None


def test_pauses_double_up_to_a_bound_and_begin_anew_after_an_answer() -> None:
    endpoint = Endpoint("host:1", True)
    assert [endpoint.eject() for _ in range(4)] == [0.5, 1.0, 2.0, 4.0]
    assert max(endpoint.eject() for _ in range(100)) == LONGEST_PAUSE
    endpoint.answered()
    assert endpoint.eject() == LONGEST_PAUSE, "what it still answered is from before"
    endpoint.is_open = True
    endpoint.answered()
    assert endpoint.eject() == 0.5


def test_retries_run_out_where_nothing_ends_well() -> None:
    budget = Budget()
    assert sum(budget.spend() for _ in range(500)) == MOST_RETRIES
    for _ in range(6):
        budget.earn()
    assert budget.spend() and not budget.spend()


def test_a_long_queue_is_not_taken_for_a_dead_server_at_once() -> None:
    endpoint = Endpoint("host:1", True)
    assert [endpoint.is_silent() for _ in range(2)] == [False, False]
    endpoint.answered()
    assert [endpoint.is_silent() for _ in range(3)] == [False, False, True]
