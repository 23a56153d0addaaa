"""/v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ktx.engine.client import RequestGroup
from ktx.engine.request import TokenEvent
from ktx.server import streaming
from ktx.server.errors import APIError
from ktx.server.output import Finish, LogprobFormatter, OutputParser, TextDelta, ToolCallDelta
from ktx.server.preprocess import (
    ChatInput,
    build_engine_input,
    build_sampling_params,
    cache_salt,
    check_context_length,
    reasoning_kwargs,
    restrict_tools,
    structured_output,
    submit,
)
from ktx.server.protocol.openai import AllowedChoice, ChatCompletionRequest, Message, NamedTool, StreamOptions
from ktx.server.state import ServerState


async def answer(state: ServerState, fields: ChatCompletionRequest, request: Request) -> Response:
    model = state.resolve_model(fields.model)
    state.require_ready()
    limit = fields.max_completion_tokens or fields.max_tokens
    logprobs = (fields.top_logprobs or 0) if fields.logprobs else None
    sampling = build_sampling_params(state, fields, limit, logprobs=logprobs)
    talk = ChatInput(
        [to_template_message(message) for message in fields.messages],
        *_tools(fields),
        fields.parallel_tool_calls is not False,
        _words(fields),
        structured_output(fields),
        answers_in_text=fields.add_generation_prompt is not False,
        continue_final_message=fields.continues,
        template=fields.chat_template,
        truncate=fields.truncate_prompt_tokens,
    )
    ask = await build_engine_input(state, talk, sampling, fields.n or 1, cache_salt(fields))
    check_context_length(state, ask.rendered.ids, limit)
    chorus = await submit(state, [ask], model, fields.lora)
    base = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": state.fingerprint,
    }
    turns = [OutputParser(ask.parser(state)) for _ in range(ask.count)]
    tokens = LogprobFormatter(chorus.engine.tokenizer, bool(fields.return_tokens_as_token_ids))
    wants = bool(fields.logprobs)
    hide = fields.include_reasoning is False or bool(fields.reasoning and fields.reasoning.exclude)
    if not fields.stream:
        return await streaming.json_response(chorus, _whole(chorus, turns, base, tokens, wants, hide))
    pieces = _stream(chorus, turns, base, tokens, wants, hide, fields.stream_options or StreamOptions())
    return streaming.sse_response(pieces, chorus, request.url.path, state.settings.keepalive_s, "[DONE]")


def _words(fields: ChatCompletionRequest) -> dict[str, Any]:
    """What the template is told of thinking and whatever else."""
    said = fields.reasoning
    told = reasoning_kwargs(fields.reasoning_effort or (said.effort if said else None))
    if said and said.enabled is not None:
        told |= {"enable_thinking": said.enabled, "thinking": said.enabled}
    return told | fields.template_kwargs


def _tools(fields: ChatCompletionRequest) -> tuple[list[dict[str, Any]], str | list[str]]:
    """What the model is told of, and what it may or must call of it."""
    tools, choice = [tool.model_dump(exclude_none=True) for tool in fields.tools or ()], fields.tool_choice
    if isinstance(choice, AllowedChoice):
        names = [tool.function.name for tool in choice.allowed_tools.tools]
        return restrict_tools(tools, names, choice.allowed_tools.mode)
    return tools, choice.function.name if isinstance(choice, NamedTool) else choice or "auto"


def to_template_message(message: Message) -> dict[str, Any]:
    """As for_template takes it; parts that are no text are refused there."""
    told = message.model_dump(exclude_none=True)
    content = told.get("content")
    if isinstance(content, list):
        told["content"] = [_part(part) for part in content]
    if told["role"] == "function":
        told["role"] = "tool"
    return told


def _part(part: dict[str, Any]) -> dict[str, Any]:
    if part.get("type") != "refusal":
        return part
    if not isinstance(part.get("refusal"), str):
        raise APIError(400, "messages: a part of type 'refusal' without its text", "messages")
    return {"type": "text", "text": part["refusal"]}


def usage_dict(ask_tokens: int, turns: list[OutputParser]) -> dict[str, Any]:
    ends = [turn.end for turn in turns if turn.end is not None]
    said = sum(end.finished.usage.answer for end in ends)
    return {
        "prompt_tokens": ask_tokens,
        "completion_tokens": said,
        "total_tokens": ask_tokens + said,
        "prompt_tokens_details": {"cached_tokens": max((end.finished.usage.cached for end in ends), default=0)},
        "completion_tokens_details": {"reasoning_tokens": sum(end.reasoning_tokens for end in ends)},
    }


def _prompt_tokens(chorus: RequestGroup) -> int:
    return len(chorus.requests[0].prompt)


async def _whole(
    chorus: RequestGroup,
    turns: list[OutputParser],
    base: dict[str, Any],
    tokens: LogprobFormatter,
    logprobs: bool,
    hide: bool,
) -> dict[str, Any]:
    async for number, event in chorus:
        for told in turns[number].feed(event):
            if isinstance(told, Finish):
                streaming.raise_for_finish(told.finished)
    choices = []
    for i, turn in enumerate(turns):
        assert turn.end is not None
        message: dict[str, Any] = {
            "role": "assistant",
            "content": turn.texts["answer"] or ("" if not turn.calls else None),
            "refusal": None,
        }
        if turn.texts["think"] and not hide:
            message |= {"reasoning_content": turn.texts["think"], "reasoning": turn.texts["think"]}
        if turn.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in turn.calls
            ]
        choices.append(
            {
                "index": i,
                "message": message,
                "logprobs": tokens.content(turn.token_log) if logprobs else None,
                "finish_reason": turn.end.reason,
            }
        )
    return {
        **base,
        "object": "chat.completion",
        "choices": choices,
        "usage": usage_dict(_prompt_tokens(chorus), turns),
        "service_tier": "default",
    }


async def _stream(
    chorus: RequestGroup,
    turns: list[OutputParser],
    base: dict[str, Any],
    tokens: LogprobFormatter,
    logprobs: bool,
    hide: bool,
    options: StreamOptions,
) -> AsyncIterator[tuple[None, Any]]:
    """One id for all chunks, the role in the first of each choice, one finish a choice, usage last if it was asked for."""
    usage, said = bool(options.include_usage), [0 for _ in turns]

    def chunk(
        number: int, delta: dict[str, Any], choices: list[Any] | None = None, finish: str | None = None
    ) -> tuple[None, Any]:
        told = tokens.content(choices) if logprobs and choices else None
        one = {"index": number, "delta": delta, "logprobs": told, "finish_reason": finish}
        so_far = streaming.usage_so_far(chorus, number, said[number]) if options.continuous_usage_stats else None
        more = {"usage": so_far} if usage else {}
        return None, {**base, "object": "chat.completion.chunk", "choices": [one], **more}

    for number in range(len(turns)):
        yield chunk(number, {"role": "assistant", "content": ""})
    async for number, event in chorus:
        said[number] += isinstance(event, TokenEvent)
        for told in turns[number].feed(event):
            if isinstance(told, TextDelta):
                if told.kind == "answer":
                    yield chunk(number, {"content": told.text}, told.choices)
                elif not hide:
                    yield chunk(number, {"reasoning_content": told.text, "reasoning": told.text}, told.choices)
            elif isinstance(told, ToolCallDelta):
                head = {
                    "index": told.index,
                    "id": told.id,
                    "type": "function",
                    "function": {"name": told.name, "arguments": ""},
                }
                yield chunk(number, {"tool_calls": [head]}, told.choices)
                yield chunk(number, {"tool_calls": [{"index": told.index, "function": {"arguments": told.arguments}}]})
            else:
                streaming.raise_for_finish(told.finished)
                yield chunk(number, {}, told.choices, told.reason)
    if usage:
        yield (
            None,
            {
                **base,
                "object": "chat.completion.chunk",
                "choices": [],
                "usage": usage_dict(_prompt_tokens(chorus), turns),
            },
        )
