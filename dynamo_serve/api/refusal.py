"""An error that comes from the HTTP layer, as the bytes of an answer."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from dynamo_serve.api.render import to_json
from dynamo_serve.errors import RequestError, TryLater


def refusal(error: RequestError, default_headers: list[tuple[bytes, bytes]]) -> bytes:
    """The whole of an answer after which the connection ends."""
    body = to_json(error.body()).encode()
    headers = [
        *default_headers,
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    if isinstance(error, TryLater):
        headers.append((b"retry-after", error.retry_after_header.encode()))
    lines = [b"%s: %s\r\n" % header for header in headers]
    return b"".join([STATUS_LINE[error.status], *lines, b"\r\n", body])
