"""Error responses in the format of each protocol."""

from __future__ import annotations

from typing import Any

from ktx.errors import KtxError
from ktx.server import request_id

ERROR_TYPES = {  # HTTP status -> OpenAI's error type, Anthropic's error type
    400: ("invalid_request_error", "invalid_request_error"),
    401: ("authentication_error", "authentication_error"),
    403: ("permission_error", "permission_error"),
    404: ("invalid_request_error", "not_found_error"),
    405: ("invalid_request_error", "invalid_request_error"),
    408: ("invalid_request_error", "invalid_request_error"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "rate_limit_error"),
    501: ("invalid_request_error", "invalid_request_error"),
    503: ("unavailable_error", "overloaded_error"),
}


class APIError(Exception):
    """An error that is returned to the client.

    Args:
        status: HTTP status.
        message: text for the user.
        param: field of the request that is wrong.
        code: machine-readable error code.
        retry: seconds after which the client may retry (Retry-After).
        details: additional fields of an error in Anthropic's format.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str = "",
        retry: int | None = None,  # seconds
        details: dict[str, Any] | None = None,
    ):
        """Stores what the error's response needs, in any protocol."""
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry = status, message, param, code, retry
        self.details = details


def to_api_error(error: Exception) -> APIError:
    """Converts an exception of the engine or of a check. Its class determines the status, not its message."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, KtxError) and error.status != 500:
        return APIError(error.status, str(error), code=error.code, retry=error.retry)
    if isinstance(error, (ValueError, KeyError)):
        return APIError(400, str(error))
    return APIError(500, f"internal server error: {type(error).__name__}")


def error_body(
    path: str,
    status: int,
    message: str,
    code: str = "",
    param: str | None = None,
    details: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the JSON body of an error in the format of a path's protocol.

    Args:
        path: the path: of /api (Ollama's format), of /v1/messages (Anthropic's) or any other (OpenAI's).
        status: HTTP status.
        message: text for the user.
        code: machine-readable error code.
        param: field of the request that is wrong.
        details: additional fields of an error in Anthropic's format.
    """
    openai_type, anthropic_type = ERROR_TYPES.get(status, ("server_error", "api_error"))
    if path.startswith("/api/"):
        return {"error": message}
    if path.startswith("/v1/messages"):
        extra = {"details": details} if details else {}
        error = {"type": anthropic_type, "message": message, **extra}
        return {"type": "error", "error": error, "request_id": request_id.CURRENT.get()}
    return {"error": {"message": message, "type": openai_type, "param": param, "code": code or None}}
