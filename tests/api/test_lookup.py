"""The map from X-Request-Id: bounded, and never without a live request."""

from __future__ import annotations

from typing import Any

import pytest

from dynamo_serve.api import lookup
from dynamo_serve.api.lookup import Lookup
from dynamo_serve.core.request import Request


class Living:
    """Stands for the service."""

    def __init__(self) -> None:
        self.live: set[str] = set()

    def is_live(self, request_id: str) -> bool:
        return request_id in self.live


class Answer:
    """Stands for a job of two choices."""

    def __init__(self, id: str) -> None:
        self.id = id
        self.requests = [Request(f"{id}-{i}", (1,), 1) for i in range(2)]


@pytest.fixture
def living() -> Living:
    return Living()


@pytest.fixture
def found(living: Living, monkeypatch: pytest.MonkeyPatch) -> Lookup:
    monkeypatch.setattr(lookup, "KEPT", 3)
    service: Any = living
    return Lookup(service)


def add(found: Lookup, name: str, *, tenant: str = "acme") -> None:
    job: Any = Answer(f"job-{name}")
    found.add(tenant, name, job)


def test_an_id_means_something_within_its_tenant(found: Lookup) -> None:
    add(found, "x")
    assert found.find("acme", "x") == "job-x"
    assert found.find("beta", "x") == "x"
    assert found.find("acme", "job-x") == "job-x"


def test_a_second_request_takes_the_place_of_the_first(found: Lookup) -> None:
    add(found, "x")
    second: Any = Answer("job-later")
    found.add("acme", "x", second)
    assert found.find("acme", "x") == "job-later"


def test_of_those_that_ended_the_last_are_kept(found: Lookup) -> None:
    for i in range(5):
        add(found, str(i))
    assert [found.find("acme", str(i)) for i in range(5)] == ["0", "1", "job-2", "job-3", "job-4"]


def test_the_live_are_kept_besides_and_the_map_shrinks_after_them(
    found: Lookup, living: Living
) -> None:
    living.live = {f"job-{i}-1" for i in range(10)}
    for i in range(30):
        add(found, str(i))
        assert all(found.find("acme", str(live)) == f"job-{live}" for live in range(min(i + 1, 10)))
    living.live = set()
    for i in range(30, 60):
        add(found, str(i))
    assert len(found._ids) == 3
