"""What a request is waiting for, told to its own tenant."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from dynamo_serve.api.edge import Edge
from dynamo_serve.api.render import answer
from dynamo_serve.errors import RequestNotFound

MAX_ID = 200


def request_routes(edge: Edge) -> APIRouter:
    routes = APIRouter(tags=["requests"])

    @routes.get("/v1/requests/{id:path}")
    async def request(http: Request, id: str) -> Response:
        """Where a request of the caller's tenant stands, by the id of its answer or by the
        X-Request-Id it was sent with: state, queue position, and what it has waited for."""
        found = await _own(edge, http.state.caller.tenant, id)
        return answer({"id": id, "choices": found})

    return routes


async def _own(edge: Edge, tenant: str, id: str) -> list[dict[str, object]]:
    """Raises the same `RequestNotFound` for another tenant's id as for one that never was."""
    known = edge.lookup.find(tenant, id)
    choices = await edge.service.inspect("request", known) if len(known) <= MAX_ID else ()
    own = [choice for choice in choices if choice["tenant"] == tenant]
    if not own:
        raise RequestNotFound(f"There is no request {id[:MAX_ID]!r}, or it is forgotten by now.")
    return own
