"""Resolves the input of /v1/responses (previous turns, item references) and converts it to chat messages."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

from ktx.server.auth import MAX_BODY_BYTES
from ktx.server.errors import APIError
from ktx.server.protocol.responses import MAX_ITEMS, ResponseTokensRequest
from ktx.server.responses.store import Item, ResponseStore, StoredTurn

ID_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


def resolve_input(
    store: ResponseStore, owner: bytes, fields: ResponseTokensRequest
) -> tuple[list[Item], list[Item], StoredTurn | None]:
    """Collects the input items of a request.

    Args:
        store: the stored responses.
        owner: digest of the API key.
        fields: the request.

    Returns:
        The items of the previous turns, the items of the request, and the turn that the request continues (or None).

    Raises:
        APIError: 400, the previous response or a referenced item is not stored, or the conversation is too long.
    """
    previous = None
    if fields.previous_response_id is not None:
        response = store.find(owner, fields.previous_response_id)
        if response is None:
            raise APIError(
                400,
                f"Previous response with id {fields.previous_response_id!r} not found: {_missing_reason(store)}",
                "previous_response_id",
                "previous_response_not_found",
            )
        previous = response.turn
    new_items = fields.input if fields.input is not None else []
    if isinstance(new_items, str):
        new_items = [{"type": "message", "role": "user", "content": new_items}]
    new_items = _resolve_references(store, owner, new_items)
    previous_items: list[Item] = []
    if previous is not None:
        num_bytes = sum(turn.nbytes for turn in previous.chain())
        if num_bytes > MAX_BODY_BYTES:
            raise APIError(
                400,
                f"the conversation has {num_bytes >> 20} MB; the limit is {MAX_BODY_BYTES >> 20} MB",
                "previous_response_id",
            )
        previous_items = previous.items()
    if len(previous_items) + len(new_items) > MAX_ITEMS:
        raise APIError(
            400,
            f"the conversation has {len(previous_items) + len(new_items)} items; the limit is {MAX_ITEMS}",
            "input",
        )
    return previous_items, new_items, previous


def _missing_reason(store: ResponseStore) -> str:
    """Returns why a response or item may be missing, for an error message."""
    if not store.max_responses:
        return "this server does not store responses (--max_stored_responses 0); send the full conversation"
    return f"the server stores only the newest {store.max_responses} responses, until it stops, per API key"


def _resolve_references(store: ResponseStore, owner: bytes, new_items: Sequence[Item]) -> list[Item]:
    """Returns the items with each reference replaced by the stored item. Raises APIError (400) if it is not stored."""
    ids = [str(item.get("id")) for item in new_items if item.get("type") == "item_reference"]
    if not ids:
        return list(new_items)
    found = store.items(owner, ids)
    sizes = {item_id: len(json.dumps(item)) for item_id, item in found.items()}
    resolved: list[Item] = []
    num_bytes = 0
    for i, item in enumerate(new_items):
        if item.get("type") == "item_reference":
            item_id = str(item.get("id"))
            if item_id not in found:
                raise APIError(
                    400, f"input[{i}]: Item with id {item_id!r} not found: {_missing_reason(store)}", "input"
                )
            item, num_bytes = found[item_id], num_bytes + sizes[item_id]
            if num_bytes > MAX_BODY_BYTES:
                raise APIError(400, f"the items that input refers to have more than {MAX_BODY_BYTES >> 20} MB", "input")
        resolved.append(item)
    return resolved


def normalize_item(item: Item) -> Item:
    """Returns an input item in the form in which it is stored and returned: with an id, and text as a list of parts."""
    kind, item_id = item.get("type", "message"), item.get("id")
    if not (isinstance(item_id, str) and 0 < len(item_id) <= 256):
        item_id = f"{ID_PREFIXES[kind]}_{uuid.uuid4().hex}"
    normalized = {"status": "completed"} | item | {"id": item_id, "type": kind}
    if kind == "message" and isinstance(item.get("content"), str):
        is_output = item["role"] == "assistant"
        part: Item = {"type": "output_text" if is_output else "input_text", "text": item["content"]}
        normalized["content"] = [part | ({"annotations": []} if is_output else {})]
    return normalized


def qualified_name(namespace: str | None, name: str) -> str:
    """Returns the name under which the model sees a function of a namespace."""
    return f"{namespace}__{name}" if namespace else name


def to_messages(instructions: str | None, previous_items: list[Item], new_items: list[Item]) -> list[dict[str, Any]]:
    """Converts items to chat messages. The calls of one turn become one message, together with the preceding reasoning.

    Args:
        instructions: the system message.
        previous_items: items of the previous turns.
        new_items: items of the request.

    Raises:
        APIError: 400, an item is not supported or there is no message.
    """
    messages: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    reasoning = ""
    for i, item in enumerate([*previous_items, *new_items], -len(previous_items)):
        kind = item.get("type", "message")
        if kind == "reasoning":
            lists = [item.get(field) or () for field in ("content", "summary")]
            if not all(isinstance(parts, list | tuple) for parts in lists):
                raise APIError(400, f"input[{i}]: content and summary of a reasoning item must be lists", "input")
            reasoning = "".join(
                str(part.get("text", "")) for parts in lists for part in parts if isinstance(part, dict)
            )
            continue
        if kind == "function_call_output":
            messages.append(
                {
                    "role": "tool",
                    "tool_call_id": str(item.get("call_id", "")),
                    "content": _item_text(item.get("output"), i),
                }
            )
        elif kind == "function_call":
            call = {
                "id": str(item.get("call_id", "")),
                "type": "function",
                "function": {
                    "name": qualified_name(item.get("namespace"), str(item.get("name", ""))),
                    "arguments": str(item.get("arguments") or "{}"),
                },
            }
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            messages[-1].setdefault("tool_calls", []).append(call)
            if reasoning:
                messages[-1]["reasoning_content"], reasoning = reasoning, ""
        elif kind == "message" and item.get("role") in ("user", "assistant", "system", "developer"):
            messages.append({"role": item["role"], "content": _item_text(item.get("content"), i)})
            if reasoning and item["role"] == "assistant":
                messages[-1]["reasoning_content"], reasoning = reasoning, ""
        else:
            raise APIError(
                400, f"input[{i}] is a {kind!r} of role {item.get('role')!r}, which is not supported", "input"
            )
    if not any(message["role"] != "system" for message in messages):
        raise APIError(400, "input has no message", "input")
    return messages


def _item_text(content: object, index: int) -> str:
    """Returns the text of an item's content. Raises APIError (400) for a part that is not text."""
    if isinstance(content, str):
        return content
    parts = []
    for part in content if isinstance(content, list) else [content]:
        text = part.get("text", part.get("refusal")) if isinstance(part, dict) else None
        if not isinstance(text, str):
            raise APIError(
                400,
                f"input[{index}] has a {part.get('type') if isinstance(part, dict) else type(part).__name__!r};"
                " only text is supported",
                "input",
            )
        parts.append(text)
    return "".join(parts)
