"""OpenAI's chat messages as the chat templates of a family want them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ktx.chat_formats.json_repair import strict
from ktx.chat_formats.registry import ChatFormat

_NAMED_ID = re.compile(r"functions\..+:\d+")
_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")

Message = dict[str, Any]


def for_template(messages: Iterable[Mapping[str, Any]], dialect: ChatFormat) -> list[Message]:
    """New messages; ValueError where one holds what is not text."""
    history = _History(dialect)
    told = [history.message(message) for message in messages]
    return _one_call_each(told) if dialect.one_call else told


class _History:
    """What later messages need of earlier ones: the ids of calls as the template has them, and whose results are whose."""

    def __init__(self, dialect: ChatFormat):
        self.dialect = dialect
        self.ids: dict[str, str] = {}
        self.names: dict[str, str] = {}
        self.count = 0

    def message(self, message: Mapping[str, Any]) -> Message:
        role = message.get("role")
        told: Message = {"role": role, "content": text_of(message.get("content"))}
        if role == "developer" and not self.dialect.developer:
            told["role"] = "system"
        if message.get("name"):
            told["name"] = message["name"]
        if role == "assistant":
            self._assistant(message, told)
        elif role == "tool":
            self._result(message, told)
        return told

    def _assistant(self, message: Mapping[str, Any], told: Message) -> None:
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        if reasoning:
            told["reasoning_content"] = text_of(reasoning)
            if self.dialect.thinking_key:
                told[self.dialect.thinking_key] = told["reasoning_content"]
        if message.get("tool_calls"):
            told["tool_calls"] = [self._call(call) for call in message["tool_calls"]]
            told["content"] = told["content"] or (None if self.dialect.argument_text else "")

    def _call(self, call: Mapping[str, Any]) -> Message:
        function = call.get("function") or {}
        name, id = str(function.get("name", "")), str(call.get("id") or "")
        self.ids[id], self.names[id] = self._id(id, name), name
        arguments = function.get("arguments")
        told = _text(arguments) if self.dialect.argument_text else _object(arguments)
        return {"id": self.ids[id], "type": "function", "function": {"name": name, "arguments": told}}

    def _id(self, id: str, name: str) -> str:
        """The id in the family's form; one that came from elsewhere gets a new one, always the same."""
        self.count += 1
        if self.dialect.ids == "named" and not _NAMED_ID.fullmatch(id):
            return f"functions.{name}:{self.count - 1}"
        if self.dialect.ids == "short" and not _SHORT_ID.fullmatch(id):
            return hashlib.sha256(id.encode()).hexdigest()[:9]
        return id

    def _result(self, message: Mapping[str, Any], told: Message) -> None:
        id = str(message.get("tool_call_id") or "")
        told["tool_call_id"] = self.ids.get(id, id)
        name = told.get("name") or self.names.get(id)
        if name:
            told["name"] = name


def text_of(content: Any) -> str:
    """A message's text: a string, or parts that are all text."""
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
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(f"content part of type {kind!r}: only text is understood")
    return "".join(parts)


def _text(arguments: Any) -> str:
    """Arguments as JSON text, as the client sent them if it did."""
    if isinstance(arguments, str):
        return arguments.strip() or "{}"
    return json.dumps(arguments or {}, ensure_ascii=False)


def _object(arguments: Any) -> dict[str, Any]:
    """Arguments as an object. What is none is kept as the only argument: templates ask for items()."""
    if isinstance(arguments, str) and arguments.strip():
        text = strict(arguments)
        arguments = json.loads(text) if text is not None else arguments
    if isinstance(arguments, Mapping):
        return dict(arguments)
    return {"arguments": arguments} if arguments else {}


def _one_call_each(messages: list[Message]) -> list[Message]:
    """For templates that refuse several calls in one message: each call with its results behind it."""
    told: list[Message] = []
    at = 0
    while at < len(messages):
        message = messages[at]
        at += 1
        calls = message.get("tool_calls") or ()
        if len(calls) < 2:
            told.append(message)
            continue
        results = []
        while at < len(messages) and messages[at]["role"] == "tool":
            results.append(messages[at])
            at += 1
        for n, call in enumerate(calls):
            told.append(
                {**message, "tool_calls": [call]}
                if n == 0
                else {"role": "assistant", "content": "", "tool_calls": [call]}
            )
            told += [result for result in results if result["tool_call_id"] == call["id"]]
        ids = [call["id"] for call in calls]
        told += [result for result in results if result["tool_call_id"] not in ids]
    return told
