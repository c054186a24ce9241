"""Endpoints for who holds an admin key: the whole picture, across tenants."""

from __future__ import annotations

import logging
import re

from fastapi import APIRouter, Request, Response

from dynamo_serve.api.edge import Edge
from dynamo_serve.api.openapi import takes
from dynamo_serve.api.render import answer
from dynamo_serve.api.schema_admin import SteerRequest
from dynamo_serve.directory import summed_up
from dynamo_serve.errors import ConfigError, InvalidRequest

logger = logging.getLogger(__name__)

MAX_ENTRIES = 10_000
DIGITS = re.compile(r"\d{1,6}", re.ASCII)


def admin_routes(edge: Edge) -> APIRouter:
    routes = APIRouter(prefix="/admin", tags=["administration"])

    @routes.get("/state")
    async def state() -> Response:
        """Tenants with their shares, running and waiting requests, the latest decisions."""
        return answer(await edge.service.inspect("state"))

    @routes.get("/costs")
    async def costs() -> Response:
        """Device-seconds, page-seconds and tokens saved by the cache: the whole, by tenant."""
        return answer(await edge.service.inspect("costs"))

    @routes.get("/incidents")
    async def incidents() -> Response:
        """The latest ends of engines: when, why, what was in the step, how long until the next
        one, and which requests were failed for it."""
        return answer({"incidents": list(edge.service.engine.incidents)})

    @routes.get("/journal")
    async def journal(http: Request) -> Response:
        """The latest decisions of the scheduler, oldest first; `?limit=` says how many (100)."""
        limit = _limit(http.query_params.get("limit", "100"))
        return answer({"journal": await edge.service.inspect("journal", str(limit))})

    @routes.get("/controller")
    async def controller() -> Response:
        """The healing ladder: what it sees, each rung with its state, trigger, evidence and effect,
        and the latest changes."""
        return answer(await edge.service.inspect("controller"))

    _add_orders(routes, edge)
    return routes


def _add_orders(routes: APIRouter, edge: Edge) -> None:
    """What changes something."""

    @routes.post("/controller", openapi_extra=takes(SteerRequest))
    async def steer(http: Request) -> Response:
        """Pin a rung (it is taken and stays), forbid it (it is undone and never taken), or hand it
        back to the ladder (`auto`). Holds for engines that are started later, too."""
        body = await edge.body(http, SteerRequest)
        edge.service.steer(body.rung, body.mode)
        logger.warning("rung %s: mode %s, as an operator wants it", body.rung, body.mode)
        return answer({"rung": body.rung, "mode": body.mode})

    @routes.post("/reload")
    async def reload() -> Response:
        """Read the tenants file again, as on SIGHUP; 400 with the fault, and nothing changes."""
        try:
            done = edge.access.reload()
        except ConfigError as error:
            raise InvalidRequest(str(error)) from error
        logger.info("tenants reloaded: %s", summed_up(done))
        return answer(done)


def _limit(text: str) -> int:
    if not DIGITS.fullmatch(text) or not 1 <= int(text) <= MAX_ENTRIES:
        raise InvalidRequest(
            f"'limit' must be a whole number from 1 to {MAX_ENTRIES}.", param="limit"
        )
    return int(text)
