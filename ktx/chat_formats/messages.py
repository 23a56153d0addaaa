"""Converts OpenAI's chat messages into the form that a family's chat template expects."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ktx.chat_formats.json_repair import repair_json
from ktx.chat_formats.registry import ChatFormat

_NAMED_ID = re.compile(r"functions\..+:\d+")
_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")

Message = dict[str, Any]


def to_template_messages(messages: Iterable[Mapping[str, Any]], chat_format: ChatFormat) -> list[Message]:
    """Returns converted messages; ValueError when one contains anything but text."""
    history = _History(chat_format)
    converted = [history.convert(message) for message in messages]
    return _split_calls(converted) if chat_format.single_call else converted


class _History:
    """What later messages need of earlier ones: call ids in the template's form, and the function names of calls."""

    def __init__(self, chat_format: ChatFormat):
        self.chat_format = chat_format
        self.ids: dict[str, str] = {}  # a call's id in the request -> in the template's form
        self.names: dict[str, str] = {}  # a call's id in the request -> its function
        self.count = 0  # calls so far, which number the ids of the form functions.name:0

    def convert(self, message: Mapping[str, Any]) -> Message:
        """Converts one message: its text, its role as the template knows it, and what its role has in addition."""
        role = message.get("role")
        converted: Message = {"role": role, "content": message_text(message.get("content"))}
        if role == "developer" and not self.chat_format.developer:
            converted["role"] = "system"
        if message.get("name"):
            converted["name"] = message["name"]
        if role == "assistant":
            self._convert_assistant(message, converted)
        elif role == "tool":
            self._convert_result(message, converted)
        return converted

    def _convert_assistant(self, message: Mapping[str, Any], converted: Message) -> None:
        """Adds the reasoning and the calls of an assistant message, as the chat template expects them."""
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        if reasoning:
            converted["reasoning_content"] = message_text(reasoning)
            if self.chat_format.reasoning_key:
                converted[self.chat_format.reasoning_key] = converted["reasoning_content"]
        if message.get("tool_calls"):
            converted["tool_calls"] = [self._convert_call(call) for call in message["tool_calls"]]
            # some templates expect None as empty content with calls, see ChatFormat.arguments_as_text
            converted["content"] = converted["content"] or (None if self.chat_format.arguments_as_text else "")

    def _convert_call(self, call: Mapping[str, Any]) -> Message:
        """Converts one call: its id and arguments in the template's form; records both ids for the call's result."""
        function = call.get("function") or {}
        name, call_id = str(function.get("name", "")), str(call.get("id") or "")
        self.ids[call_id], self.names[call_id] = self._convert_id(call_id, name), name
        arguments = function.get("arguments")
        converted_arguments = (
            _arguments_text(arguments) if self.chat_format.arguments_as_text else _arguments_object(arguments)
        )
        return {
            "id": self.ids[call_id],
            "type": "function",
            "function": {"name": name, "arguments": converted_arguments},
        }

    def _convert_id(self, call_id: str, name: str) -> str:
        """Returns a call's id in the form that the family's template expects. An id of another form gets a new one, the
        same in each request of a conversation, whose prompts would otherwise not begin alike.
        """
        self.count += 1
        if self.chat_format.id_style == "named" and not _NAMED_ID.fullmatch(call_id):
            return f"functions.{name}:{self.count - 1}"
        if self.chat_format.id_style == "short" and not _SHORT_ID.fullmatch(call_id):
            return hashlib.sha256(call_id.encode()).hexdigest()[:9]
        return call_id

    def _convert_result(self, message: Mapping[str, Any], converted: Message) -> None:
        """Adds the call id and the function name of a tool result."""
        call_id = str(message.get("tool_call_id") or "")
        converted["tool_call_id"] = self.ids.get(call_id, call_id)
        name = converted.get("name") or self.names.get(call_id)
        if name:
            converted["name"] = name


def message_text(content: Any) -> str:
    """Returns a message's text: a string, or parts that are all text. ValueError for another part."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = []
    for part in content:
        if isinstance(part, Mapping) and isinstance(part.get("text"), str):
            parts.append(part["text"])
        elif isinstance(part, str):
            parts.append(part)
        else:
            type_ = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(f"content part of type {type_!r}: only text is supported")
    return "".join(parts)


def _arguments_text(arguments: Any) -> str:
    """Returns arguments as JSON text, unchanged if they are text."""
    if isinstance(arguments, str):
        return arguments.strip() or "{}"
    return json.dumps(arguments or {}, ensure_ascii=False)


def _arguments_object(arguments: Any) -> dict[str, Any]:
    """Returns arguments as an object. Anything else becomes the only argument, because templates call items()."""
    if isinstance(arguments, str) and arguments.strip():
        text = repair_json(arguments)
        arguments = json.loads(text) if text is not None else arguments
    if isinstance(arguments, Mapping):
        return dict(arguments)
    return {"arguments": arguments} if arguments else {}


def _split_calls(messages: list[Message]) -> list[Message]:
    """For templates that refuse several calls in one message: each call in a message of its own, followed by its
    results.
    """
    converted: list[Message] = []
    index = 0
    while index < len(messages):
        message = messages[index]
        index += 1
        calls = message.get("tool_calls") or ()
        if len(calls) < 2:
            converted.append(message)
            continue
        results = []
        while index < len(messages) and messages[index]["role"] == "tool":
            results.append(messages[index])
            index += 1
        for position, call in enumerate(calls):
            converted.append(
                {**message, "tool_calls": [call]}
                if position == 0
                else {"role": "assistant", "content": "", "tool_calls": [call]}
            )
            converted += [result for result in results if result["tool_call_id"] == call["id"]]
        ids = [call["id"] for call in calls]
        converted += [result for result in results if result["tool_call_id"] not in ids]
    return converted
