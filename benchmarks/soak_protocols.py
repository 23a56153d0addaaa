"""The protocols of soak.py: the request bodies, and the text in answers and stream events."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MODEL = "ktx-demo"


@dataclass(frozen=True)
class Protocol:
    """One API: its path, its request body and how to extract text.

    `body(text, limit, seed, stream)` builds a request; `answer_text` and `event_text` return the text of a complete
    answer and of a stream event.
    """

    path: str
    body: Callable[[str, int, int, bool], dict[str, Any]]
    answer_text: Callable[[Any], str]
    event_text: Callable[[Any], str]

    def events(self, line: str) -> list[Any]:
        """Returns the events in a line of a stream: one, or none."""
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
    """The API has no seed, so sampling is greedy."""
    return {"model": MODEL, "input": text, "max_output_tokens": limit, "temperature": 0.0, "stream": stream}


def _message(text: str, limit: int, seed: int, stream: bool) -> dict[str, Any]:
    """The API has no seed, so sampling is greedy."""
    messages = [{"role": "user", "content": text}]
    return {"model": MODEL, "messages": messages, "max_tokens": limit, "temperature": 0.0, "stream": stream}


def _ollama(text: str, limit: int, seed: int, stream: bool) -> dict[str, Any]:
    options = {"num_predict": limit, "temperature": 0.8, "seed": seed}
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], "stream": stream, "options": options}


def _message_text(message: dict[str, Any]) -> str:
    """Returns reasoning and content of a message or a delta; Ollama names the first `thinking`."""
    return "".join(message.get(key) or "" for key in ("reasoning_content", "thinking", "content"))


def _choices(value: Any, key: str) -> str:
    return "".join(_message_text(choice[key]) for choice in value.get("choices", ()))


def _texts(value: Any) -> str:
    return "".join(choice["text"] for choice in value.get("choices", ()))


def _output(value: Any) -> str:
    parts = [part for item in value["output"] for part in item.get("content") or ()]
    return "".join(part.get("text", "") for part in parts)


def _blocks(value: Any) -> str:
    return "".join(block.get("text") or block.get("thinking") or "" for block in value["content"])


def _delta(value: Any) -> str:
    """Returns the text of a delta, which is a string in the Responses API and an object in Anthropic's."""
    delta = value.get("delta", "")
    return delta if isinstance(delta, str) else delta.get("text") or delta.get("thinking") or ""


PROTOCOLS = (
    Protocol("/v1/chat/completions", _chat, lambda v: _choices(v, "message"), lambda v: _choices(v, "delta")),
    Protocol("/v1/completions", _completion, _texts, _texts),
    Protocol("/v1/responses", _response, _output, _delta),
    Protocol("/v1/messages", _message, _blocks, _delta),
    Protocol(
        "/api/chat", _ollama, lambda v: _message_text(v["message"]), lambda v: _message_text(v.get("message", {}))
    ),
)
CHAT = PROTOCOLS[0]
