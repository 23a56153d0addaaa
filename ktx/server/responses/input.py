"""What a request to /v1/responses goes on from, and its items as chat messages."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

from ktx.server.auth import MAX_BODY_BYTES
from ktx.server.errors import APIError
from ktx.server.protocol.responses import MAX_ITEMS, ResponseTokensRequest
from ktx.server.responses.store import Item, ResponseStore, StoredTurn

KINDS = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


def resolve_input(
    kept: ResponseStore, owner: bytes, fields: ResponseTokensRequest
) -> tuple[list[Item], list[Item], StoredTurn | None]:
    """The items of the turns before, those that came with the request, and the turn that it goes on from. Problem 400 for what is not kept."""
    link = None
    if fields.previous_response_id is not None:
        answer = kept.find(owner, fields.previous_response_id)
        if answer is None:
            raise APIError(
                400,
                f"Previous response with id {fields.previous_response_id!r} not found: {_why(kept)}",
                "previous_response_id",
                "previous_response_not_found",
            )
        link = answer.link
    came = fields.input if fields.input is not None else []
    if isinstance(came, str):
        came = [{"type": "message", "role": "user", "content": came}]
    came = _resolve_references(kept, owner, came)
    before: list[Item] = []
    if link is not None:
        size = sum(one.nbytes for one in link.chain())
        if size > MAX_BODY_BYTES:
            raise APIError(
                400,
                f"the conversation has {size >> 20} MB, at most {MAX_BODY_BYTES >> 20} MB are read",
                "previous_response_id",
            )
        before = link.items()
    if len(before) + len(came) > MAX_ITEMS:
        raise APIError(400, f"the conversation has {len(before) + len(came)} items, at most {MAX_ITEMS} are read", "input")
    return before, came, link


def _why(kept: ResponseStore) -> str:
    if not kept.max_responses:
        return "this server keeps no answers (--keep_responses 0), send the whole conversation"
    return f"the newest {kept.max_responses} answers are kept, until the server ends, for the key that asked"


def _resolve_references(kept: ResponseStore, owner: bytes, came: Sequence[Item]) -> list[Item]:
    """The items with those in the place of references that they refer to."""
    names = [str(item.get("id")) for item in came if item.get("type") == "item_reference"]
    if not names:
        return list(came)
    found = kept.items(owner, names)
    sizes = {name: len(json.dumps(item)) for name, item in found.items()}
    told: list[Item] = []
    size = 0
    for at, item in enumerate(came):
        if item.get("type") == "item_reference":
            name = str(item.get("id"))
            if name not in found:
                raise APIError(400, f"input[{at}]: Item with id {name!r} not found: {_why(kept)}", "input")
            item, size = found[name], size + sizes[name]
            if size > MAX_BODY_BYTES:
                raise APIError(400, f"the items that input refers to have more than {MAX_BODY_BYTES >> 20} MB", "input")
        told.append(item)
    return told


def normalize_item(item: Item) -> Item:
    """An item as it is kept and shown: with an id, and with texts as lists of parts."""
    kind, name = item.get("type", "message"), item.get("id")
    if not (isinstance(name, str) and 0 < len(name) <= 256):
        name = f"{KINDS[kind]}_{uuid.uuid4().hex}"
    told = {"status": "completed"} | item | {"id": name, "type": kind}
    if kind == "message" and isinstance(item.get("content"), str):
        said = item["role"] == "assistant"
        part: Item = {"type": "output_text" if said else "input_text", "text": item["content"]}
        told["content"] = [part | ({"annotations": []} if said else {})]
    return told


def qualified_name(space: str | None, name: str) -> str:
    return f"{space}__{name}" if space else name


def to_messages(instructions: str | None, before: list[Item], came: list[Item]) -> list[dict[str, Any]]:
    """Items of the turns before and of the request as chat messages; calls of one turn stand in one message, with the reasoning before them."""
    told: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    thought = ""
    for at, item in enumerate([*before, *came], -len(before)):
        kind = item.get("type", "message")
        if kind == "reasoning":
            lists = [item.get(place) or () for place in ("content", "summary")]
            if not all(isinstance(parts, list | tuple) for parts in lists):
                raise APIError(400, f"input[{at}]: content and summary of reasoning are lists", "input")
            thought = "".join(str(part.get("text", "")) for parts in lists for part in parts if isinstance(part, dict))
            continue
        if kind == "function_call_output":
            told.append(
                {
                    "role": "tool",
                    "tool_call_id": str(item.get("call_id", "")),
                    "content": _content(item.get("output"), at),
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
            if not told or told[-1]["role"] != "assistant":
                told.append({"role": "assistant", "content": ""})
            told[-1].setdefault("tool_calls", []).append(call)
            if thought:
                told[-1]["reasoning_content"], thought = thought, ""
        elif kind == "message" and item.get("role") in ("user", "assistant", "system", "developer"):
            told.append({"role": item["role"], "content": _content(item.get("content"), at)})
            if thought and item["role"] == "assistant":
                told[-1]["reasoning_content"], thought = thought, ""
        else:
            raise APIError(
                400, f"input[{at}] is a {kind!r} of role {item.get('role')!r}, which is not understood", "input"
            )
    if not any(message["role"] != "system" for message in told):
        raise APIError(400, "input holds no message", "input")
    return told


def _content(content: Any, at: int) -> str:
    if isinstance(content, str):
        return content
    parts = []
    for part in content if isinstance(content, list) else [content]:
        text = part.get("text", part.get("refusal")) if isinstance(part, dict) else None
        if not isinstance(text, str):
            raise APIError(
                400,
                f"input[{at}] holds a {part.get('type') if isinstance(part, dict) else type(part).__name__!r}; only text is understood",
                "input",
            )
        parts.append(text)
    return "".join(parts)
