"""Kept answers of /v1/responses: shown, listed and forgotten. Source of shapes: OpenAI's reference."""

from __future__ import annotations

from typing import Any

from ktx.server.errors import APIError
from ktx.server.responses.store import ResponseStore, StoredResponse


def _found(kept: ResponseStore, owner: bytes, name: str) -> StoredResponse:
    answer = kept.find(owner, name)
    if answer is None:
        raise _missing(name)
    return answer


def _missing(name: str) -> APIError:
    return APIError(404, f"Response with id {name[:256]!r} not found.", "response_id")


def retrieve(kept: ResponseStore, owner: bytes, name: str, stream: bool) -> dict[str, Any]:
    if stream:
        raise APIError(
            400, "stream: only answers in the background can be followed, and this server makes none", "stream"
        )
    return _found(kept, owner, name).to_dict()


def delete(kept: ResponseStore, owner: bytes, name: str) -> dict[str, Any]:
    if not kept.delete(owner, name):
        raise _missing(name)
    return {"id": name, "object": "response", "deleted": True}


def cancel(kept: ResponseStore, owner: bytes, name: str) -> dict[str, Any]:
    _found(kept, owner, name)
    raise APIError(400, "only answers in the background can be cancelled, and this server makes none", "response_id")


def input_items(
    kept: ResponseStore, owner: bytes, name: str, limit: int, newest_first: bool, after: str | None
) -> dict[str, Any]:
    """A page of what was answered, the turns before it included."""
    items = _found(kept, owner, name).before()
    if newest_first:
        items.reverse()
    if after is not None:
        place = next((at for at, item in enumerate(items) if item["id"] == after), None)
        if place is None:
            raise APIError(400, f"after: this response has no item {after!r}", "after")
        items = items[place + 1 :]
    page = items[:limit]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
    return {"object": "list", "data": page, "has_more": len(items) > limit, **ends}
