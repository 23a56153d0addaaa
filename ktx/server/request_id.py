"""The request id, which connects a response, its errors and its log lines.

Sources: OpenAI's API reference ("Debugging requests": `x-request-id`) and Anthropic's ("Request id": `request-id`,
and `request_id` in errors).
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from contextvars import ContextVar

CLIENT_HEADER = "x-request-id"  # a client may choose the id with it; the proxy forwards it to the replica
RESPONSE_HEADERS = (CLIENT_HEADER, "request-id")
VALID_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
CURRENT: ContextVar[str | None] = ContextVar("request_id", default=None)


def set_current(headers: Mapping[str, str]) -> str:
    """Sets the id of the current task and of the tasks that it starts, and returns it.

    It is the client's id, or a new one if the client sent no valid one.
    """
    client_id = headers.get(CLIENT_HEADER, "")
    request_id = client_id if VALID_ID.fullmatch(client_id) else f"req_{uuid.uuid4().hex}"
    CURRENT.set(request_id)
    return request_id
