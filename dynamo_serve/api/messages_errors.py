"""Failures as Anthropic's error object."""

from __future__ import annotations

from typing import Any

from dynamo_serve.errors import RequestError

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_body(
    error: RequestError, status: int | None = None, request_id: str | None = None
) -> dict[str, Any]:
    """`details` has what else we tell: `error_code`, the field at fault (`param`), numbers. Without
    a status, the error's own."""
    told = error.body()["error"]
    details = {key: value for key, value in told.items() if key not in ("message", "type", "code")}
    return {
        "type": "error",
        "error": {
            "type": TYPES.get(status or error.status, "invalid_request_error"),
            "message": error.message,
            "details": {"error_code": error.code, **details},
        },
        **({"request_id": request_id} if request_id else {}),
    }
