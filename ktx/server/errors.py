"""Errors as each protocol's clients read them."""

from __future__ import annotations

from typing import Any

from ktx.errors import KtxError
from ktx.server import request_id

KINDS = {  # status: OpenAI's type, Anthropic's type
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
    """An answer that is an error. `param`: the field at fault; `code`: a word for programs; `details`: more for Anthropic's."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str = "",
        retry: int | None = None,
        details: dict[str, Any] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry = status, message, param, code, retry
        self.details = details


def to_api_error(error: Exception) -> APIError:
    """What a client is told of an error of the engine's or a check's: its class says the status, not its words."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, KtxError) and error.status != 500:
        return APIError(error.status, str(error), code=error.code, retry=error.retry)
    if isinstance(error, (ValueError, KeyError)):
        return APIError(400, str(error))
    return APIError(500, f"the server failed: {type(error).__name__}")


def error_body(
    path: str,
    status: int,
    message: str,
    code: str = "",
    param: str | None = None,
    details: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """An error's body in the form of the protocol that a path belongs to."""
    openai, anthropic = KINDS.get(status, ("server_error", "api_error"))
    if path.startswith("/api/"):
        return {"error": message}
    if path.startswith("/v1/messages"):
        more = {"details": details} if details else {}
        error = {"type": anthropic, "message": message, **more}
        return {"type": "error", "error": error, "request_id": request_id.CURRENT.get()}
    return {"error": {"message": message, "type": openai, "param": param, "code": code or None}}
