"""The id of a request, by which an answer, an error and a log line are found together.

Sources: OpenAI's API reference ("Debugging requests": `x-request-id`), Anthropic's ("Request id": `request-id`, and `request_id` in errors).
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from contextvars import ContextVar

CLIENT_HEADER = b"x-request-id"  # what a client may say itself, and what a replica is told
RESPONSE_HEADERS = (CLIENT_HEADER, b"request-id")
VALID_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
CURRENT: ContextVar[str | None] = ContextVar("request_id", default=None)


def begin(headers: Mapping[bytes, bytes]) -> str:
    """The client's own id, or a new one if that is none. It is the current one of this task and of all that it starts."""
    given = headers.get(CLIENT_HEADER, b"")
    name = given.decode() if VALID_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
    CURRENT.set(name)
    return name
