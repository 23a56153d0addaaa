"""Retrieves, lists, deletes and cancels stored responses. Source of the formats: OpenAI's reference."""

from __future__ import annotations

from typing import Any

from ktx.server.errors import APIError
from ktx.server.responses.store import ResponseStore, StoredResponse


def _find(store: ResponseStore, owner: bytes, response_id: str) -> StoredResponse:
    """Returns a stored response. Raises APIError (404) if it is not stored."""
    response = store.find(owner, response_id)
    if response is None:
        raise _not_found_error(response_id)
    return response


def _not_found_error(response_id: str) -> APIError:
    """Returns the error for a response that is not stored."""
    return APIError(404, f"Response with id {response_id[:256]!r} not found.", "response_id")


def retrieve(store: ResponseStore, owner: bytes, response_id: str, stream: bool) -> dict[str, Any]:
    """Returns a stored response. Raises APIError (404) if it is not stored, (400) for `stream`."""
    if stream:
        raise APIError(
            400,
            "stream: only background responses can be streamed again, and this server does not support background mode",
            "stream",
        )
    return _find(store, owner, response_id).to_dict()


def delete(store: ResponseStore, owner: bytes, response_id: str) -> dict[str, Any]:
    """Deletes a stored response. Raises APIError (404) if it is not stored."""
    if not store.delete(owner, response_id):
        raise _not_found_error(response_id)
    return {"id": response_id, "object": "response", "deleted": True}


def cancel(store: ResponseStore, owner: bytes, response_id: str) -> dict[str, Any]:
    """Raises APIError: 404 if the response is not stored, else 400, as only background responses can be cancelled."""
    _find(store, owner, response_id)
    raise APIError(
        400, "only background responses can be cancelled; this server does not support background mode", "response_id"
    )


def input_items(
    store: ResponseStore, owner: bytes, response_id: str, limit: int, newest_first: bool, after: str | None
) -> dict[str, Any]:
    """Returns a page of the input items of a response, those of the previous turns included.

    Args:
        store: the store.
        owner: digest of the API key.
        response_id: id of the response.
        limit: max number of items.
        newest_first: order of the items.
        after: id of the item after which the page starts.

    Raises:
        APIError: 404, the response is not stored; 400, it has no item `after`.
    """
    items = _find(store, owner, response_id).input_history()
    if newest_first:
        items.reverse()
    if after is not None:
        position = next((at for at, item in enumerate(items) if item["id"] == after), None)
        if position is None:
            raise APIError(400, f"after: this response has no item {after!r}", "after")
        items = items[position + 1 :]
    page = items[:limit]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
    return {"object": "list", "data": page, "has_more": len(items) > limit, **ends}
