"""A page for operators: what the scheduler does and why, as it happens."""

from __future__ import annotations

from base64 import b64encode
from hashlib import sha256
from html import escape
from importlib.resources import files

from fastapi import APIRouter, Response

from dynamo_serve.api.edge import Edge


def console_routes(edge: Edge) -> APIRouter:
    """The page is for anybody, and empty: what it shows it asks `/admin` for, with the key that
    who looks at it types in."""
    routes = APIRouter(tags=["operations"])
    page, policy = _page(", ".join(edge.model_names))

    @routes.get("/console", response_class=Response)
    async def console() -> Response:
        """A page that shows the scheduler at work: tenants, requests and what they wait for, the
        ladder, the latest decisions. It asks for an admin key, and needs nothing from elsewhere."""
        headers = {
            "Content-Security-Policy": policy,
            "Cache-Control": "no-cache",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        return Response(page, media_type="text/html", headers=headers)

    return routes


def _page(models: str) -> tuple[str, str]:
    """The page and the policy by which a browser runs its script and no other."""
    folder = files("dynamo_serve.api")
    names = ("console.html", "console.css", "console_numbers.js", "console.js")
    page, style, numbers, script = ((folder / name).read_text("utf-8") for name in names)
    script = numbers + script
    page = page.replace("/*style*/", style).replace("/*script*/", script)
    head, _, rest = page.partition("{models}")  # last: whatever a model is called stays a name
    page = head + escape(models) + rest
    policy = (
        f"default-src 'none'; style-src {_only(style)}; script-src {_only(script)}; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


def _only(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
