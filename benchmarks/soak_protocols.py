"""The protocols that soak.py speaks: how each is asked, and where its answers have their text."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MODEL = "ktx-demo"


@dataclass(frozen=True)
class Protocol:
    """`body(text, limit, seed, stream)` asks; `whole` and `piece` find the text in an answer and in an event of a stream."""

    path: str
    body: Callable[[str, int, int, bool], dict[str, Any]]
    whole: Callable[[Any], str]
    piece: Callable[[Any], str]

    def events(self, line: str) -> list[Any]:
        """What a line of a stream holds: an event, or nothing."""
        line = line.removeprefix("data: ") if not self.path.startswith("/api") else line
        return [json.loads(line)] if line.startswith("{") else []


def _chat(text: str, limit: int, seed: int, stream: bool) -> dict[str, Any]:
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": limit,
        "temperature": 0.8,
        "seed": seed,
        "stream": stream,
    }


def _completion(text: str, limit: int, seed: int, stream: bool) -> dict[str, Any]:
    return {"model": MODEL, "prompt": text, "max_tokens": limit, "temperature": 0.8, "seed": seed, "stream": stream}


def _response(text: str, limit: int, seed: int, stream: bool) -> dict[str, Any]:
    """It has no seed: the likeliest tokens."""
    return {"model": MODEL, "input": text, "max_output_tokens": limit, "temperature": 0.0, "stream": stream}


def _message(text: str, limit: int, seed: int, stream: bool) -> dict[str, Any]:
    """It has no seed: the likeliest tokens."""
    said = [{"role": "user", "content": text}]
    return {"model": MODEL, "messages": said, "max_tokens": limit, "temperature": 0.0, "stream": stream}


def _ollama(text: str, limit: int, seed: int, stream: bool) -> dict[str, Any]:
    options = {"num_predict": limit, "temperature": 0.8, "seed": seed}
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], "stream": stream, "options": options}


def _said(message: dict[str, Any]) -> str:
    """Reasoning and answer of a message or of a delta; Ollama calls the first `thinking`."""
    return "".join(message.get(key) or "" for key in ("reasoning_content", "thinking", "content"))


def _choices(value: Any, key: str) -> str:
    return "".join(_said(choice[key]) for choice in value.get("choices", ()))


def _texts(value: Any) -> str:
    return "".join(choice["text"] for choice in value.get("choices", ()))


def _output(value: Any) -> str:
    parts = [part for item in value["output"] for part in item.get("content") or ()]
    return "".join(part.get("text", "") for part in parts)


def _blocks(value: Any) -> str:
    return "".join(block.get("text") or block.get("thinking") or "" for block in value["content"])


def _delta(value: Any) -> str:
    """Of Responses: a string; of Anthropic's: an object."""
    delta = value.get("delta", "")
    return delta if isinstance(delta, str) else delta.get("text") or delta.get("thinking") or ""


PROTOCOLS = (
    Protocol("/v1/chat/completions", _chat, lambda v: _choices(v, "message"), lambda v: _choices(v, "delta")),
    Protocol("/v1/completions", _completion, _texts, _texts),
    Protocol("/v1/responses", _response, _output, _delta),
    Protocol("/v1/messages", _message, _blocks, _delta),
    Protocol("/api/chat", _ollama, lambda v: _said(v["message"]), lambda v: _said(v.get("message", {}))),
)
CHAT = PROTOCOLS[0]
