"""Anthropic's /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ktx.engine.client import RequestGroup
from ktx.server import streaming
from ktx.server.errors import APIError
from ktx.server.output import Finish, OutputParser, TextDelta, ToolCallDelta
from ktx.server.preprocess import (
    ChatInput,
    build_engine_input,
    build_sampling_params,
    check_context_length,
    reasoning_kwargs,
    submit,
)
from ktx.server.protocol.anthropic import AnthropicMessage, ContentBlock, CountTokensRequest, MessagesRequest
from ktx.server.protocol.openai import Format
from ktx.server.state import ServerState

ENDS = {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens"}


async def answer(state: ServerState, fields: MessagesRequest, request: Request) -> Response:
    model = state.resolve_model(fields.model)
    engine, _, _ = state.require_ready()
    given = fields.model_dump(exclude_none=True, include={"temperature", "top_p", "top_k"}) | {
        "stop": fields.stop_sequences
    }
    ask = await build_engine_input(state, to_chat_input(fields), build_sampling_params(state, given, fields.max_tokens))
    check_context_length(
        state, ask.rendered.ids, 1
    )  # clients name the largest number they know: what the context leaves is enough
    chorus = await submit(state, [ask], model)
    head = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": model}
    turn = OutputParser(ask.parser(state))
    stops = frozenset(fields.stop_sequences or ())
    if not fields.stream:
        return await streaming.json_response(chorus, _whole(chorus, turn, head, stops))
    return streaming.sse_response(
        _stream(chorus, turn, head, stops), chorus, request.url.path, state.settings.keepalive_s
    )


async def count(state: ServerState, fields: CountTokensRequest) -> Response:
    state.resolve_model(fields.model)
    ask = await build_engine_input(state, to_chat_input(fields), build_sampling_params(state, {}, 1))
    return JSONResponse({"input_tokens": len(ask.rendered.ids)})


def to_chat_input(fields: CountTokensRequest) -> ChatInput:
    if fields.thread is not None:
        raise APIError(
            400,
            "thread: this server keeps no conversations, send the whole one each time",
            details={"error_code": "thread_unsupported_request", "unsupported": ["thread"]},
        )
    told: list[dict[str, Any]] = []
    if fields.system:
        told.append(
            {
                "role": "system",
                "content": fields.system
                if isinstance(fields.system, str)
                else "\n".join(_text(block) for block in fields.system),
            }
        )
    for message in fields.messages:
        told += _message(message)
    tools: list[dict[str, Any]] = [
        {
            "type": "function",
            "function": {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema},
        }
        for tool in fields.tools or ()
    ]
    said = fields.tool_choice
    choice = "auto"
    if said is not None:
        if said.type == "tool" and said.name not in [tool["function"]["name"] for tool in tools]:
            raise APIError(400, f"tool_choice names {said.name!r}, which no tool is called")
        if said.type == "any" and not tools:
            raise APIError(400, "tool_choice any needs tools")
        choice = {"any": "required", "tool": str(said.name)}.get(said.type, said.type)
    think = None if fields.thinking is None else fields.thinking.type != "disabled"
    parallel = not (said and said.disable_parallel_tool_use)
    effort = reasoning_kwargs(fields.output_config.effort if fields.output_config else None)
    words = {"reasoning_effort": effort["reasoning_effort"]} if effort else {}  # whether it thinks is said by thinking
    return ChatInput(
        told,
        tools,
        choice,
        parallel,
        words,
        _format(fields),
        think,
        continue_final_message=_proceeds(fields.messages[-1]),
    )


def _proceeds(message: AnthropicMessage) -> bool:
    """Whether the answer goes on with the last message. Problem 400 for an end that Anthropic's API refuses."""
    if message.role != "assistant":
        return False
    text = message.content if isinstance(message.content, str) else ""
    if message.content and not isinstance(message.content, str):
        last = message.content[-1]
        if last.type != "text":
            raise APIError(400, f"messages: final assistant content cannot end with a block of type {last.type!r}")
        text = _text(last)
    if text != text.rstrip():
        raise APIError(400, "messages: final assistant content cannot end with trailing whitespace")
    return True


def _format(fields: CountTokensRequest) -> Format | None:
    said = (fields.output_config.format if fields.output_config else None) or fields.output_format
    return Format.model_validate({"type": "json_schema", "json_schema": {"schema": said.schema_}}) if said else None


def _text(block: ContentBlock) -> str:
    return _plain(block.type, (block.model_extra or {}).get("text"))


def _plain(kind: Any, text: Any) -> str:
    """The text of a block of that type."""
    if kind != "text" or not isinstance(text, str):
        raise APIError(
            400, f"a content block of type {kind!r}: only text, thinking, tool_use and tool_result are understood"
        )
    return text


def _message(message: AnthropicMessage) -> list[dict[str, Any]]:
    """Results of tools are messages of their own."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    texts, results = [], []
    own: dict[str, Any] = {"role": message.role}
    for block in message.content:
        more = block.model_extra or {}
        if block.type == "tool_result":
            results.append(
                {
                    "role": "tool",
                    "tool_call_id": str(more.get("tool_use_id", "")),
                    "content": _result(more.get("content")),
                }
            )
        elif block.type == "tool_use":
            call = {
                "name": str(more.get("name", "")),
                "arguments": json.dumps(more.get("input") or {}, ensure_ascii=False),
            }
            own.setdefault("tool_calls", []).append(
                {"id": str(more.get("id", "")), "type": "function", "function": call}
            )
        elif block.type == "thinking":
            own["reasoning_content"] = own.get("reasoning_content", "") + str(more.get("thinking", ""))
        elif block.type != "redacted_thinking":
            texts.append(_text(block))
    own["content"] = "".join(texts)
    return results + ([own] if texts or len(own) > 2 or not results else [])


def _result(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise APIError(400, "the content of a tool_result must be text or a list of blocks")
    return "".join(_plain(part.get("type"), part.get("text")) for part in content)


def _usage(told: Finish | None, prompt: int) -> dict[str, Any]:
    cached = told.finished.usage.cached if told else 0
    said = told.finished.usage.answer if told else 0
    return {
        "input_tokens": prompt - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": said,
    }


def _end(told: Finish, stops: frozenset[str]) -> dict[str, Any]:
    stop = told.finished.stop
    if told.reason == "stop" and stop in stops:
        return {"stop_reason": "stop_sequence", "stop_sequence": stop}
    return {"stop_reason": ENDS[told.reason], "stop_sequence": None}


async def _whole(
    chorus: RequestGroup, turn: OutputParser, head: dict[str, Any], stops: frozenset[str]
) -> dict[str, Any]:
    blocks: list[dict[str, Any]] = []
    async for _, event in chorus:
        for told in turn.feed(event):
            if isinstance(told, TextDelta):
                key = {"answer": "text", "think": "thinking"}[told.kind]
                if not blocks or blocks[-1]["type"] != key:
                    blocks.append({"type": key, key: "", **({"signature": ""} if key == "thinking" else {})})
                blocks[-1][key] += told.text
            elif isinstance(told, ToolCallDelta):
                blocks.append({"type": "tool_use", "id": told.id, "name": told.name, "input": told.parsed_arguments()})
            else:
                streaming.raise_for_finish(told.finished)
    assert turn.end is not None
    return {
        **head,
        "content": blocks,
        **_end(turn.end, stops),
        "usage": _usage(turn.end, len(chorus.requests[0].prompt)),
    }


async def _stream(
    chorus: RequestGroup, turn: OutputParser, head: dict[str, Any], stops: frozenset[str]
) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    prompt = len(chorus.requests[0].prompt)
    start = {**head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": _usage(None, prompt)}
    yield "message_start", {"type": "message_start", "message": start}
    number, open = -1, ""

    def closed() -> list[tuple[str, dict[str, Any]]]:
        out: list[tuple[str, dict[str, Any]]] = []
        if open == "thinking":
            out.append(
                (
                    "content_block_delta",
                    {
                        "type": "content_block_delta",
                        "index": number,
                        "delta": {"type": "signature_delta", "signature": ""},
                    },
                )
            )
        return [*out, ("content_block_stop", {"type": "content_block_stop", "index": number})] if open else []

    async for _, event in chorus:
        for told in turn.feed(event):
            if isinstance(told, TextDelta):
                key = {"answer": "text", "think": "thinking"}[told.kind]
                if open != key:
                    for piece in closed():
                        yield piece
                    number, open = number + 1, key
                    block: dict[str, Any] = {"type": key, key: "", **({"signature": ""} if key == "thinking" else {})}
                    yield (
                        "content_block_start",
                        {"type": "content_block_start", "index": number, "content_block": block},
                    )
                yield (
                    "content_block_delta",
                    {"type": "content_block_delta", "index": number, "delta": {"type": f"{key}_delta", key: told.text}},
                )
            elif isinstance(told, ToolCallDelta):
                for piece in closed():
                    yield piece
                number, open = number + 1, ""
                use: dict[str, Any] = {"type": "tool_use", "id": told.id, "name": told.name, "input": {}}
                yield "content_block_start", {"type": "content_block_start", "index": number, "content_block": use}
                yield (
                    "content_block_delta",
                    {
                        "type": "content_block_delta",
                        "index": number,
                        "delta": {"type": "input_json_delta", "partial_json": told.arguments},
                    },
                )
                yield "content_block_stop", {"type": "content_block_stop", "index": number}
            else:
                streaming.raise_for_finish(told.finished)
                for piece in closed():
                    yield piece
                open = ""
                yield (
                    "message_delta",
                    {"type": "message_delta", "delta": _end(told, stops), "usage": _usage(told, prompt)},
                )
    yield "message_stop", {"type": "message_stop"}
