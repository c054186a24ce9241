"""Readers that stop are told from readers that are slow, without waiting for either."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from dynamo_serve.api.watch import Watch


class Buffer:
    """Stands for a transport: each look finds the next of some sizes."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = list(sizes)

    def get_write_buffer_size(self) -> int:
        return self.sizes.pop(0) if len(self.sizes) > 1 else self.sizes[0]


@pytest.mark.parametrize(
    ("sizes", "is_cut"),
    [
        ((0,), False),
        ((9, 9), True),
        ((9, 10), True),
        ((9, 8, 8, 8), True),
        ((9, 8, 8, 7, 7, 0, 0), False),
    ],
)
def test_only_who_takes_nothing_is_cut(sizes: tuple[int, ...], is_cut: bool) -> None:
    async def looks() -> list[str]:
        cuts: list[str] = []
        watch = Watch(cast(Any, Buffer(*sizes)), 0, lambda: cuts.append("cut"))
        watch.start()
        for _ in range(20):
            await asyncio.sleep(0)
        return cuts

    assert asyncio.run(looks()) == ["cut"] * is_cut


def test_who_takes_again_is_not_watched() -> None:
    async def looks() -> list[str]:
        cuts: list[str] = []
        watch = Watch(cast(Any, Buffer(9)), 0, lambda: cuts.append("cut"))
        watch.start()
        watch.stop()
        for _ in range(20):
            await asyncio.sleep(0)
        return cuts

    assert asyncio.run(looks()) == []
