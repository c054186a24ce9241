"""Everything that can go wrong by somebody else's doing.

DynamoServeError
 ├── ConfigError                  at start: a key, what is wrong with it, what is allowed
 ├── EngineStartError             at start: the engine cannot run this model here
 └── RequestError                 has an HTTP status and an OpenAI-shaped code
      ├── InvalidRequest          400  a value is wrong
      │    ├── ContextTooLong     400  prompt + max_tokens exceed what the engine can hold
      │    ├── UnsupportedField   400  known to OpenAI clients, would change the answer, not built
      │    ├── UnknownField       400  known to nobody
      │    └── PreviousNotFound   400  the response to go on from is not kept here
      ├── Unauthorized            401
      ├── Forbidden               403  this key may not do that
      ├── ModelNotFound           404
      ├── RequestNotFound         404
      ├── PrefixNotFound          404
      ├── ResponseNotFound        404
      ├── RequestTimeout          408  headers or body were too slow
      ├── PayloadTooLarge         413
      ├── AddressTooLong          414
      ├── HeadersTooLarge         431
      ├── EngineFailure           500  the engine failed this request alone
      ├── EngineTimeout           504  whom the engine forwards to took too long
      ├── DeadlinePassed          504  the client's own deadline, before there was an answer
      └── TryLater                     with Retry-After
           ├── Unavailable        503  starting, draining, full, engine lost
           │    ├── ServerShutdown 503  the drain is over: send it again
           │    └── ServerHandover 503  the stream goes on in the next server
           └── Shed                    refused by the scheduler on arrival, with the numbers
                ├── QuotaExceeded 429  the tenant's own limit or share is reached
                └── Overloaded    503  the server is full, or would be too late
"""

from __future__ import annotations

import math
from typing import Any


class DynamoServeError(Exception):
    """Root of the tree."""


class ConfigError(DynamoServeError):
    """A setting is unknown or has a bad value; the message names its key path."""


class EngineStartError(DynamoServeError):
    """The engine cannot start with this model on this machine; the message names the remedy."""


class RequestError(DynamoServeError):
    """Ends one request. API and SSE render the same object.

    `param` names the field at fault, `code` is machine-readable, `status` is the HTTP status.
    """

    status = 500
    code = "internal_error"
    type = "server_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def body(self) -> dict[str, dict[str, Any]]:
        """The OpenAI error object."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


class InvalidRequest(RequestError):
    status, code, type = 400, "invalid_value", "invalid_request_error"


class ContextTooLong(InvalidRequest):
    code = "context_length_exceeded"


class UnsupportedField(InvalidRequest):
    code = "unsupported_parameter"


class UnknownField(InvalidRequest):
    code = "unknown_parameter"


class PreviousNotFound(InvalidRequest):
    code = "previous_response_not_found"


class Unauthorized(RequestError):
    status, code, type = 401, "invalid_api_key", "authentication_error"


class Forbidden(RequestError):
    status, code, type = 403, "permission_denied", "permission_error"


class ModelNotFound(RequestError):
    status, code, type = 404, "model_not_found", "invalid_request_error"


class RequestNotFound(RequestError):
    status, code, type = 404, "request_not_found", "invalid_request_error"


class PrefixNotFound(RequestError):
    status, code, type = 404, "prefix_not_found", "invalid_request_error"


class ResponseNotFound(RequestError):
    status, code, type = 404, "response_not_found", "invalid_request_error"


class PayloadTooLarge(RequestError):
    status, code, type = 413, "payload_too_large", "invalid_request_error"


class RequestTimeout(RequestError):
    status, code, type = 408, "request_timeout", "invalid_request_error"


class AddressTooLong(RequestError):
    status, code, type = 414, "address_too_long", "invalid_request_error"


class HeadersTooLarge(RequestError):
    status, code, type = 431, "headers_too_large", "invalid_request_error"


class EngineFailure(RequestError):
    status, code, type = 500, "engine_error", "server_error"


class EngineTimeout(RequestError):
    status, code, type = 504, "engine_timeout", "server_error"


class DeadlinePassed(RequestError):
    status, code, type = 504, "deadline_passed", "server_error"


class TryLater(RequestError):
    """The same request may succeed after `retry_after` seconds."""

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    @property
    def retry_after_header(self) -> str:
        """Whole seconds, at least one: what the header can say."""
        return str(max(1, math.ceil(self.retry_after)))


class Shed(TryLater):
    """The scheduler refused a request on arrival, and says what it decided on.

    `reason` is a code (`core.journal.Reason`); times are in seconds from now.
    """

    def __init__(
        self,
        message: str,
        *,
        retry_after: float,
        reason: str,
        limit: float | None = None,
        predicted_wait: float | None = None,
        queue_position: int | None = None,
    ) -> None:
        super().__init__(message, retry_after=retry_after)
        self.facts = {
            "reason": reason,
            "limit": limit,
            "predicted_wait_s": predicted_wait,
            "queue_position": queue_position,
            "retry_after_s": retry_after,
        }

    def body(self) -> dict[str, dict[str, Any]]:
        return {"error": {**super().body()["error"], **self.facts}}


class QuotaExceeded(Shed):
    status, code, type = 429, "rate_limit_exceeded", "rate_limit_error"


class Overloaded(Shed):
    status, code, type = 503, "overloaded", "server_error"


class Unavailable(TryLater):
    """The server cannot take or finish this now."""

    status, code, type = 503, "unavailable", "server_error"


class ServerShutdown(Unavailable):
    """The server ends before this request does."""

    code = "server_shutdown"

    def body(self) -> dict[str, dict[str, Any]]:
        return {"error": {**super().body()["error"], "retry_after_s": self.retry_after}}


class ServerHandover(ServerShutdown):
    """The stream goes on in the server that has taken over; `resume` says where, if it is known
    how far the client is."""

    code = "server_handover"
    resume: dict[str, str] | None = None

    def body(self) -> dict[str, dict[str, Any]]:
        told = super().body()["error"]
        return {"error": {**told, "resume": self.resume} if self.resume else told}
