"""Work that is done for a client, until it goes."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

T = TypeVar("T")


async def until_hang_up(work: Coroutine[Any, Any, T], client: Coroutine[Any, Any, None]) -> T:
    """The result of `work`, which is cancelled if `client` ends first: then `ClientDisconnect`, or
    what `client` raises."""
    task, watch = asyncio.create_task(work), asyncio.create_task(client)
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            watch.result()
            raise ClientDisconnect
        return task.result()
    finally:
        watch.cancel()
        task.cancel()
        await asyncio.wait({task, watch})  # what they held is the caller's again


async def hang_up(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
