"""/v1/chat/completions: OpenAI's chat completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response

from ktx.engine.client import RequestGroup
from ktx.engine.request import TokenEvent
from ktx.engine.sampler import SampledToken
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
from ktx.server.state import LoadedModel

PATH = "/v1/chat/completions"


async def answer(model: LoadedModel, fields: ChatCompletionRequest) -> Response:
    """Answers a chat completion request, as one body or as a stream.

    Raises:
        APIError: the request is invalid, or the engine refused it.
    """
    limit = fields.max_completion_tokens or fields.max_tokens
    num_logprobs = (fields.top_logprobs or 0) if fields.logprobs else None
    sampling = build_sampling_params(model, fields, limit, logprobs=num_logprobs)
    tools, tool_choice = _select_tools(fields)
    chat = ChatInput(
        messages=[to_template_message(message) for message in fields.messages],
        tools=tools,
        tool_choice=tool_choice,
        parallel_tool_calls=fields.parallel_tool_calls is not False,
        template_kwargs=_template_kwargs(fields),
        response_format=structured_output(fields),
        add_generation_prompt=fields.add_generation_prompt is not False,
        continue_final_message=fields.continues,
        template=fields.chat_template,
        truncate=fields.truncate_prompt_tokens,
        count=fields.n or 1,
        salt=cache_salt(fields),
    )
    engine_input = await build_engine_input(model, chat, sampling)
    check_context_length(model, engine_input.rendered.ids, limit)
    group = await submit(model, [engine_input], fields.model, fields.lora)
    base = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": fields.model,
        "system_fingerprint": model.fingerprint,
    }
    parsers = [OutputParser(engine_input.parser(model.prompts.chat_format)) for _ in range(engine_input.count)]
    formatter = LogprobFormatter(group.engine.tokenizer, bool(fields.return_tokens_as_token_ids))
    wants_logprobs = bool(fields.logprobs)
    hide_reasoning = fields.include_reasoning is False or bool(fields.reasoning and fields.reasoning.exclude)
    if not fields.stream:
        return await streaming.json_response(
            group, _complete(group, parsers, base, formatter, wants_logprobs, hide_reasoning)
        )
    events = _stream(
        group, parsers, base, formatter, wants_logprobs, hide_reasoning, fields.stream_options or StreamOptions()
    )
    return streaming.sse_response(events, group, PATH, model.settings.keepalive_s, "[DONE]")


def _template_kwargs(fields: ChatCompletionRequest) -> dict[str, Any]:
    """Returns the chat template kwargs of a request: those of its reasoning options and its own."""
    reasoning = fields.reasoning
    template_kwargs = reasoning_kwargs(fields.reasoning_effort or (reasoning.effort if reasoning else None))
    if reasoning and reasoning.enabled is not None:
        template_kwargs |= {"enable_thinking": reasoning.enabled, "thinking": reasoning.enabled}
    return template_kwargs | fields.template_kwargs


def _select_tools(fields: ChatCompletionRequest) -> tuple[list[dict[str, Any]], str | list[str]]:
    """Returns the tools for the prompt and the tool choice."""
    tools, choice = [tool.model_dump(exclude_none=True) for tool in fields.tools or ()], fields.tool_choice
    if isinstance(choice, AllowedChoice):
        names = [tool.function.name for tool in choice.allowed_tools.tools]
        return restrict_tools(tools, names, choice.allowed_tools.mode)
    return tools, choice.function.name if isinstance(choice, NamedTool) else choice or "auto"


def to_template_message(message: Message) -> dict[str, Any]:
    """Converts a message to the form that `PromptRenderer` takes; the renderer refuses parts that are not text."""
    converted = message.model_dump(exclude_none=True)
    content = converted.get("content")
    if isinstance(content, list):
        converted["content"] = [_convert_part(part) for part in content]
    if converted["role"] == "function":
        converted["role"] = "tool"
    return converted


def _convert_part(part: dict[str, Any]) -> dict[str, Any]:
    """Converts a refusal to a text part; returns other parts unchanged."""
    if part.get("type") != "refusal":
        return part
    if not isinstance(part.get("refusal"), str):
        raise APIError(400, "messages: a part of type 'refusal' needs the field refusal with its text", "messages")
    return {"type": "text", "text": part["refusal"]}


def usage_dict(num_prompt_tokens: int, parsers: list[OutputParser]) -> dict[str, Any]:
    """Returns the `usage` of all choices of a request, which share one prompt: its cached tokens count once."""
    ends = [parser.end for parser in parsers if parser.end is not None]
    num_output_tokens = sum(end.event.usage.answer for end in ends)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": max((end.event.usage.cached for end in ends), default=0)},
        "completion_tokens_details": {"reasoning_tokens": sum(end.reasoning_tokens for end in ends)},
    }


def _num_prompt_tokens(group: RequestGroup) -> int:
    """Returns the number of prompt tokens; all choices have the same prompt."""
    return len(group.requests[0].prompt)


async def _complete(
    group: RequestGroup,
    parsers: list[OutputParser],
    base: dict[str, Any],
    formatter: LogprobFormatter,
    logprobs: bool,
    hide_reasoning: bool,
) -> dict[str, Any]:
    """Collects the output of all choices and returns the response of a request without streaming."""
    async for index, event in group:
        for delta in parsers[index].feed(event):
            if isinstance(delta, Finish):
                streaming.raise_for_finish(delta.event)
    choices = []
    for i, parser in enumerate(parsers):
        assert parser.end is not None
        message: dict[str, Any] = {
            "role": "assistant",
            "content": parser.texts["answer"] or ("" if not parser.calls else None),
            "refusal": None,
        }
        if parser.texts["think"] and not hide_reasoning:
            message |= {"reasoning_content": parser.texts["think"], "reasoning": parser.texts["think"]}
        if parser.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in parser.calls
            ]
        choices.append(
            {
                "index": i,
                "message": message,
                "logprobs": formatter.content(parser.token_log) if logprobs else None,
                "finish_reason": parser.end.reason,
            }
        )
    return {
        **base,
        "object": "chat.completion",
        "choices": choices,
        "usage": usage_dict(_num_prompt_tokens(group), parsers),
        "service_tier": "default",
    }


async def _stream(
    group: RequestGroup,
    parsers: list[OutputParser],
    base: dict[str, Any],
    formatter: LogprobFormatter,
    logprobs: bool,
    hide_reasoning: bool,
    options: StreamOptions,
) -> AsyncIterator[tuple[None, dict[str, Any]]]:
    """Yields the chunks of a streamed response.

    All have the same id. The first chunk of each choice has the role, the last its finish reason; a chunk with the
    usage comes last if the request has `include_usage`.
    """
    include_usage, num_tokens = bool(options.include_usage), [0 for _ in parsers]

    def chunk(
        index: int, delta: dict[str, Any], tokens: list[SampledToken] | None = None, finish: str | None = None
    ) -> tuple[None, dict[str, Any]]:
        """Returns an event without a name: a chunk with one choice's delta."""
        token_logprobs = formatter.content(tokens) if logprobs and tokens else None
        choice = {"index": index, "delta": delta, "logprobs": token_logprobs, "finish_reason": finish}
        usage = streaming.usage_so_far(group, index, num_tokens[index]) if options.continuous_usage_stats else None
        usage_field = {"usage": usage} if include_usage else {}
        return None, {**base, "object": "chat.completion.chunk", "choices": [choice], **usage_field}

    for index in range(len(parsers)):
        yield chunk(index, {"role": "assistant", "content": ""})
    async for index, event in group:
        num_tokens[index] += isinstance(event, TokenEvent)
        for output in parsers[index].feed(event):
            if isinstance(output, TextDelta):
                if output.kind == "answer":
                    yield chunk(index, {"content": output.text}, output.tokens)
                elif not hide_reasoning:
                    yield chunk(index, {"reasoning_content": output.text, "reasoning": output.text}, output.tokens)
            elif isinstance(output, ToolCallDelta):
                call_start = {
                    "index": output.index,
                    "id": output.id,
                    "type": "function",
                    "function": {"name": output.name, "arguments": ""},
                }
                yield chunk(index, {"tool_calls": [call_start]}, output.tokens)
                yield chunk(
                    index, {"tool_calls": [{"index": output.index, "function": {"arguments": output.arguments}}]}
                )
            else:
                streaming.raise_for_finish(output.event)
                yield chunk(index, {}, output.tokens, output.reason)
    if include_usage:
        yield (
            None,
            {
                **base,
                "object": "chat.completion.chunk",
                "choices": [],
                "usage": usage_dict(_num_prompt_tokens(group), parsers),
            },
        )
