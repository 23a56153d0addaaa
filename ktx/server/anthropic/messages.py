"""/v1/messages and /v1/messages/count_tokens: Anthropic's Messages API."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import JSONResponse, Response

from ktx.engine.client import RequestGroup
from ktx.engine.sampler import SamplingParams
from ktx.server import streaming
from ktx.server.errors import APIError
from ktx.server.output import Finish, OutputParser, TextDelta, ToolCallDelta
from ktx.server.preprocess import (
    ChatInput,
    EngineInput,
    build_engine_input,
    build_sampling_params,
    check_context_length,
    reasoning_kwargs,
    submit,
)
from ktx.server.protocol.anthropic import AnthropicMessage, ContentBlock, CountTokensRequest, MessagesRequest
from ktx.server.protocol.openai import Format
from ktx.server.state import LoadedModel

PATH = "/v1/messages"
STOP_REASONS = {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens"}


async def answer(model: LoadedModel, fields: MessagesRequest) -> Response:
    """Answers a messages request, as one body or as a stream.

    Raises:
        APIError: the request is invalid, or the engine refused it.
    """
    params = fields.model_dump(exclude_none=True, include={"temperature", "top_p", "top_k"}) | {
        "stop": fields.stop_sequences
    }
    engine_input = await _build_input(model, fields, build_sampling_params(model, params, fields.max_tokens))
    # max_tokens is not checked, because clients send the largest value that they know; the context limits the answer.
    check_context_length(model, engine_input.rendered.ids, 1)
    group = await submit(model, [engine_input], fields.model)
    base = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": fields.model}
    parser = OutputParser(engine_input.parser(model.prompts.chat_format))
    stops = frozenset(fields.stop_sequences or ())
    if not fields.stream:
        return await streaming.json_response(group, _complete(group, parser, base, stops))
    return streaming.sse_response(_stream(group, parser, base, stops), group, PATH, model.settings.keepalive_s)


async def count(model: LoadedModel, fields: CountTokensRequest) -> Response:
    """Returns the number of prompt tokens of a messages request."""
    engine_input = await _build_input(model, fields, SamplingParams())
    return JSONResponse({"input_tokens": len(engine_input.rendered.ids)})


async def _build_input(model: LoadedModel, fields: CountTokensRequest, sampling: SamplingParams) -> EngineInput:
    """Converts a request to the engine's input. Raises APIError (400) if it is invalid."""
    if fields.thread is not None:
        raise APIError(
            400,
            "thread: this server does not store conversations; send the full conversation with each request",
            details={"error_code": "thread_unsupported_request", "unsupported": ["thread"]},
        )
    messages: list[dict[str, Any]] = []
    if fields.system:
        messages.append(
            {
                "role": "system",
                "content": fields.system
                if isinstance(fields.system, str)
                else "\n".join(_text_of_block(block) for block in fields.system),
            }
        )
    for message in fields.messages:
        messages += _convert_message(message)
    tools: list[dict[str, Any]] = [
        {
            "type": "function",
            "function": {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema},
        }
        for tool in fields.tools or ()
    ]
    choice = fields.tool_choice
    tool_choice = "auto"
    if choice is not None:
        if choice.type == "tool" and choice.name not in [tool["function"]["name"] for tool in tools]:
            raise APIError(400, f"tool_choice names {choice.name!r}, which is not one of the tools")
        if choice.type == "any" and not tools:
            raise APIError(400, "tool_choice any needs tools")
        tool_choice = {"any": "required", "tool": str(choice.name)}.get(choice.type, choice.type)
    thinking = None if fields.thinking is None else fields.thinking.type != "disabled"
    parallel = not (choice and choice.disable_parallel_tool_use)
    effort = reasoning_kwargs(fields.output_config.effort if fields.output_config else None)
    # Only the effort: the field `thinking` determines whether the model thinks.
    template_kwargs = {"reasoning_effort": effort["reasoning_effort"]} if effort else {}
    chat = ChatInput(
        messages=messages,
        tools=tools,
        tool_choice=tool_choice,
        parallel_tool_calls=parallel,
        template_kwargs=template_kwargs,
        response_format=_response_format(fields),
        thinking=thinking,
        continue_final_message=_continues(fields.messages[-1]),
    )
    return await build_engine_input(model, chat, sampling)


def _continues(message: AnthropicMessage) -> bool:
    """Returns whether the answer continues the last message.

    Raises:
        APIError: 400, the message ends in a way that Anthropic's API refuses.
    """
    if message.role != "assistant":
        return False
    text = message.content if isinstance(message.content, str) else ""
    if message.content and not isinstance(message.content, str):
        last = message.content[-1]
        if last.type != "text":
            raise APIError(400, f"messages: final assistant content cannot end with a block of type {last.type!r}")
        text = _text_of_block(last)
    if text != text.rstrip():
        raise APIError(400, "messages: final assistant content cannot end with trailing whitespace")
    return True


def _response_format(fields: CountTokensRequest) -> Format | None:
    """Returns the JSON schema that the request constrains its answer to, in OpenAI's form; None without one."""
    output_format = (fields.output_config.format if fields.output_config else None) or fields.output_format
    return (
        Format.model_validate({"type": "json_schema", "json_schema": {"schema": output_format.schema_}})
        if output_format
        else None
    )


def _text_of_block(block: ContentBlock) -> str:
    """Returns the text of a text block."""
    return _block_text(block.type, (block.model_extra or {}).get("text"))


def _block_text(block_type: object, text: object) -> str:
    """Returns the text of a content block. Raises APIError (400) for a block that is not text."""
    if block_type != "text" or not isinstance(text, str):
        raise APIError(
            400,
            f"a content block of type {block_type!r} is not supported; use text, thinking, tool_use or tool_result",
        )
    return text


def _convert_message(message: AnthropicMessage) -> list[dict[str, Any]]:
    """Converts a message to OpenAI's format. Each tool result becomes a separate message, before the message itself."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    texts, results = [], []
    converted: dict[str, Any] = {"role": message.role}
    for block in message.content:
        extra = block.model_extra or {}
        if block.type == "tool_result":
            results.append(
                {
                    "role": "tool",
                    "tool_call_id": str(extra.get("tool_use_id", "")),
                    "content": _tool_result_text(extra.get("content")),
                }
            )
        elif block.type == "tool_use":
            call = {
                "name": str(extra.get("name", "")),
                "arguments": json.dumps(extra.get("input") or {}, ensure_ascii=False),
            }
            converted.setdefault("tool_calls", []).append(
                {"id": str(extra.get("id", "")), "type": "function", "function": call}
            )
        elif block.type == "thinking":
            converted["reasoning_content"] = converted.get("reasoning_content", "") + str(extra.get("thinking", ""))
        elif block.type != "redacted_thinking":
            texts.append(_text_of_block(block))
    converted["content"] = "".join(texts)
    # leaves out a message that had only tool results; more than role and content means calls or reasoning
    return results + ([converted] if texts or len(converted) > 2 or not results else [])


def _tool_result_text(content: object) -> str:
    """Returns the text of a tool result. Raises APIError (400) if it has other content."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise APIError(400, "the content of a tool_result must be text or a list of blocks")
    return "".join(_block_text(part.get("type"), part.get("text")) for part in content)


def _usage(finish: Finish | None, num_prompt_tokens: int) -> dict[str, Any]:
    """Returns the `usage` of a message; without `finish` that of its start. In Anthropic's API input_tokens does not
    include the cached ones.
    """
    num_cached = finish.event.usage.cached if finish else 0
    num_output_tokens = finish.event.usage.answer if finish else 0
    return {
        "input_tokens": num_prompt_tokens - num_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": num_cached,
        "output_tokens": num_output_tokens,
    }


def _stop_fields(finish: Finish, stops: frozenset[str]) -> dict[str, Any]:
    """Returns the fields stop_reason and stop_sequence: the latter for a stop string of the request (`stops`), not for
    an end token of the model.
    """
    stop_string = finish.event.stop
    if finish.reason == "stop" and stop_string in stops:
        return {"stop_reason": "stop_sequence", "stop_sequence": stop_string}
    return {"stop_reason": STOP_REASONS[finish.reason], "stop_sequence": None}


async def _complete(
    group: RequestGroup, parser: OutputParser, base: dict[str, Any], stops: frozenset[str]
) -> dict[str, Any]:
    """Collects the output and returns the message of a request without streaming: text, thinking and calls as content
    blocks, in the order in which the model wrote them.
    """
    blocks: list[dict[str, Any]] = []
    async for _, event in group:
        for delta in parser.feed(event):
            if isinstance(delta, TextDelta):
                key = {"answer": "text", "think": "thinking"}[delta.kind]
                if not blocks or blocks[-1]["type"] != key:
                    blocks.append({"type": key, key: "", **({"signature": ""} if key == "thinking" else {})})
                blocks[-1][key] += delta.text
            elif isinstance(delta, ToolCallDelta):
                blocks.append(
                    {"type": "tool_use", "id": delta.id, "name": delta.name, "input": delta.parsed_arguments()}
                )
            else:
                streaming.raise_for_finish(delta.event)
    assert parser.end is not None
    return {
        **base,
        "content": blocks,
        **_stop_fields(parser.end, stops),
        "usage": _usage(parser.end, len(group.requests[0].prompt)),
    }


async def _stream(
    group: RequestGroup, parser: OutputParser, base: dict[str, Any], stops: frozenset[str]
) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """Yields the events of a streamed message: each content block is started, extended and stopped."""
    num_prompt_tokens = len(group.requests[0].prompt)
    start = {
        **base,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": _usage(None, num_prompt_tokens),
    }
    yield "message_start", {"type": "message_start", "message": start}
    index, open_type = -1, ""

    def close_block() -> list[tuple[str, dict[str, Any]]]:
        """Returns the events that end the open content block; clients expect a signature at the end of thinking."""
        events: list[tuple[str, dict[str, Any]]] = []
        if open_type == "thinking":
            events.append(
                (
                    "content_block_delta",
                    {
                        "type": "content_block_delta",
                        "index": index,
                        "delta": {"type": "signature_delta", "signature": ""},
                    },
                )
            )
        return [*events, ("content_block_stop", {"type": "content_block_stop", "index": index})] if open_type else []

    async for _, event in group:
        for delta in parser.feed(event):
            if isinstance(delta, TextDelta):
                key = {"answer": "text", "think": "thinking"}[delta.kind]
                if open_type != key:
                    for sse_event in close_block():
                        yield sse_event
                    index, open_type = index + 1, key
                    block: dict[str, Any] = {"type": key, key: "", **({"signature": ""} if key == "thinking" else {})}
                    yield (
                        "content_block_start",
                        {"type": "content_block_start", "index": index, "content_block": block},
                    )
                yield (
                    "content_block_delta",
                    {"type": "content_block_delta", "index": index, "delta": {"type": f"{key}_delta", key: delta.text}},
                )
            elif isinstance(delta, ToolCallDelta):
                for sse_event in close_block():
                    yield sse_event
                index, open_type = index + 1, ""
                tool_use: dict[str, Any] = {"type": "tool_use", "id": delta.id, "name": delta.name, "input": {}}
                yield "content_block_start", {"type": "content_block_start", "index": index, "content_block": tool_use}
                yield (
                    "content_block_delta",
                    {
                        "type": "content_block_delta",
                        "index": index,
                        "delta": {"type": "input_json_delta", "partial_json": delta.arguments},
                    },
                )
                yield "content_block_stop", {"type": "content_block_stop", "index": index}
            else:
                streaming.raise_for_finish(delta.event)
                for sse_event in close_block():
                    yield sse_event
                open_type = ""
                yield (
                    "message_delta",
                    {
                        "type": "message_delta",
                        "delta": _stop_fields(delta, stops),
                        "usage": _usage(delta, num_prompt_tokens),
                    },
                )
    yield "message_stop", {"type": "message_stop"}
