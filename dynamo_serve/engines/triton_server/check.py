"""What an operator wants to know of servers before anything is forwarded to them."""

from __future__ import annotations

import asyncio
import time
from typing import NamedTuple

from dynamo_serve.config import TritonSection
from dynamo_serve.engines.triton_server.dialects import triton_dialect
from dynamo_serve.engines.triton_server.faults import Fault
from dynamo_serve.engines.triton_server.server import Server, Spoken
from dynamo_serve.errors import EngineStartError


class Report(NamedTuple):
    """Of one server. `error` is empty if it answered; `seconds` is what a token took."""

    address: str
    spoken: Spoken | None = None
    seconds: float = 0.0
    error: str = ""


async def check(settings: TritonSection) -> list[Report]:
    return await asyncio.gather(*(_check(each, settings) for each in settings.endpoints))


async def _check(address: str, settings: TritonSection) -> Report:
    server, spoken = Server(address, settings), None
    try:
        declared = await server.declared()
        spoken = Spoken(triton_dialect(declared, settings.dialect, settings.model), declared)
        began = time.monotonic()
        await server.canary(spoken)
        return Report(address, spoken, time.monotonic() - began)
    except (Fault, EngineStartError) as error:
        return Report(address, spoken, error=str(error))
    finally:
        await server.close()
