"""A limit on connections means nothing if the system allows fewer files."""

from __future__ import annotations

import resource

import pytest

from dynamo_serve import open_files

UNLIMITED = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "room", "raised"),
    [
        (256, 10_000, 4096, (4096 + open_files.OWN_FILES, 10_000)),
        (256, UNLIMITED, 4096, (4096 + open_files.OWN_FILES, UNLIMITED)),
        (256, 2048, 2048 - open_files.OWN_FILES, (2048, 2048)),
        (256, 100, 1, (100, 100)),
        (10_000, 10_000, 4096, None),
        (UNLIMITED, UNLIMITED, 4096, None),
    ],
)
def test_as_many_files_as_connections_need_or_as_there_are(
    soft: int,
    hard: int,
    room: int,
    raised: tuple[int, int] | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: told.append(limits))
    assert open_files.make_room(4096) == room
    assert told == ([raised] if raised else [])
    assert ("server.max_connections = 4096 needs" in caplog.text) == (room < 4096)
