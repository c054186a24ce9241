"""Everything that can go wrong by somebody else's doing.

DynamoServeError
 ├── ConfigError                  at start: a key, what is wrong with it, what is allowed
 ├── EngineStartError             at start: the engine cannot run this model here
 └── RequestError                 has an HTTP status and an OpenAI-shaped code
      ├── InvalidRequest          400  a value is wrong
      │    ├── ContextTooLong     400  prompt + max_tokens exceed what the engine can hold
      │    ├── UnsupportedField   400  known to OpenAI clients, would change the answer, not built
      │    └── UnknownField       400  known to nobody
      ├── Unauthorized            401
      ├── ModelNotFound           404
      ├── PayloadTooLarge         413
      ├── EngineFailure           500  the engine failed this request alone
      └── Unavailable             503  with Retry-After: starting, draining, full, engine lost
"""

from __future__ import annotations


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

    def body(self) -> dict[str, dict[str, str | None]]:
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


class Unauthorized(RequestError):
    status, code, type = 401, "invalid_api_key", "authentication_error"


class ModelNotFound(RequestError):
    status, code, type = 404, "model_not_found", "invalid_request_error"


class PayloadTooLarge(RequestError):
    status, code, type = 413, "payload_too_large", "invalid_request_error"


class EngineFailure(RequestError):
    status, code, type = 500, "engine_error", "server_error"


class Unavailable(RequestError):
    """The server cannot take or finish this now; `retry_after` is in seconds."""

    status, code, type = 503, "unavailable", "server_error"

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after
