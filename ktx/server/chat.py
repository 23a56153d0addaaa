"""/v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ktx.engine.asking import Chorus
from ktx.engine.request import Piece
from ktx.server import sending
from ktx.server.asked import Talk, allowed, asked_of, begin, check_room, effort_words, guided, salt_of, sampling_of
from ktx.server.errors import Problem
from ktx.server.fields.openai import AllowedChoice, Chat, Message, NamedTool, StreamOptions
from ktx.server.served import Served
from ktx.server.turn import Called, Ended, Said, Tokens, Turn


async def answer(served: Served, fields: Chat, request: Request) -> Response:
    model = served.named(fields.model)
    served.ready()
    limit = fields.max_completion_tokens or fields.max_tokens
    logprobs = (fields.top_logprobs or 0) if fields.logprobs else None
    sampling = sampling_of(served, fields, limit, logprobs=logprobs)
    talk = Talk(
        [message_of(message) for message in fields.messages],
        *_tools(fields),
        fields.parallel_tool_calls is not False,
        _words(fields),
        guided(fields),
        answer=fields.add_generation_prompt is not False,
        proceed=fields.proceeds,
        template=fields.chat_template,
        truncate=fields.truncate_prompt_tokens,
    )
    ask = await asked_of(served, talk, sampling, fields.n or 1, salt_of(fields))
    check_room(served, ask.rendered.ids, limit)
    chorus = await begin(served, [ask], model, fields.lora)
    base = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": served.fingerprint,
    }
    turns = [Turn(ask.parser(served)) for _ in range(ask.count)]
    tokens = Tokens(chorus.engine.tokenizer, bool(fields.return_tokens_as_token_ids))
    wants = bool(fields.logprobs)
    hide = fields.include_reasoning is False or bool(fields.reasoning and fields.reasoning.exclude)
    if not fields.stream:
        return await sending.whole(chorus, _whole(chorus, turns, base, tokens, wants, hide))
    pieces = _stream(chorus, turns, base, tokens, wants, hide, fields.stream_options or StreamOptions())
    return sending.events(pieces, chorus, request.url.path, served.settings.ping, "[DONE]")


def _words(fields: Chat) -> dict[str, Any]:
    """What the template is told of thinking and whatever else."""
    said = fields.reasoning
    told = effort_words(fields.reasoning_effort or (said.effort if said else None))
    if said and said.enabled is not None:
        told |= {"enable_thinking": said.enabled, "thinking": said.enabled}
    return told | fields.words


def _tools(fields: Chat) -> tuple[list[dict[str, Any]], str | list[str]]:
    """What the model is told of, and what it may or must call of it."""
    tools, choice = [tool.model_dump(exclude_none=True) for tool in fields.tools or ()], fields.tool_choice
    if isinstance(choice, AllowedChoice):
        names = [tool.function.name for tool in choice.allowed_tools.tools]
        return allowed(tools, names, choice.allowed_tools.mode)
    return tools, choice.function.name if isinstance(choice, NamedTool) else choice or "auto"


def message_of(message: Message) -> dict[str, Any]:
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
        raise Problem(400, "messages: a part of type 'refusal' without its text", "messages")
    return {"type": "text", "text": part["refusal"]}


def usage_of(ask_tokens: int, turns: list[Turn]) -> dict[str, Any]:
    ends = [turn.end for turn in turns if turn.end is not None]
    said = sum(end.finished.usage.answer for end in ends)
    return {
        "prompt_tokens": ask_tokens,
        "completion_tokens": said,
        "total_tokens": ask_tokens + said,
        "prompt_tokens_details": {"cached_tokens": max((end.finished.usage.cached for end in ends), default=0)},
        "completion_tokens_details": {"reasoning_tokens": sum(end.thought for end in ends)},
    }


def _prompt_tokens(chorus: Chorus) -> int:
    return len(chorus.requests[0].prompt)


async def _whole(
    chorus: Chorus, turns: list[Turn], base: dict[str, Any], tokens: Tokens, logprobs: bool, hide: bool
) -> dict[str, Any]:
    async for number, event in chorus:
        for told in turns[number].hear(event):
            if isinstance(told, Ended):
                sending.check_end(told.finished)
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
                "logprobs": tokens.content(turn.told) if logprobs else None,
                "finish_reason": turn.end.reason,
            }
        )
    return {
        **base,
        "object": "chat.completion",
        "choices": choices,
        "usage": usage_of(_prompt_tokens(chorus), turns),
        "service_tier": "default",
    }


async def _stream(
    chorus: Chorus,
    turns: list[Turn],
    base: dict[str, Any],
    tokens: Tokens,
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
        so_far = sending.usage_so_far(chorus, number, said[number]) if options.continuous_usage_stats else None
        more = {"usage": so_far} if usage else {}
        return None, {**base, "object": "chat.completion.chunk", "choices": [one], **more}

    for number in range(len(turns)):
        yield chunk(number, {"role": "assistant", "content": ""})
    async for number, event in chorus:
        said[number] += isinstance(event, Piece)
        for told in turns[number].hear(event):
            if isinstance(told, Said):
                if told.kind == "answer":
                    yield chunk(number, {"content": told.text}, told.choices)
                elif not hide:
                    yield chunk(number, {"reasoning_content": told.text, "reasoning": told.text}, told.choices)
            elif isinstance(told, Called):
                head = {
                    "index": told.number,
                    "id": told.id,
                    "type": "function",
                    "function": {"name": told.name, "arguments": ""},
                }
                yield chunk(number, {"tool_calls": [head]}, told.choices)
                yield chunk(number, {"tool_calls": [{"index": told.number, "function": {"arguments": told.arguments}}]})
            else:
                sending.check_end(told.finished)
                yield chunk(number, {}, told.choices, told.reason)
    if usage:
        yield (
            None,
            {
                **base,
                "object": "chat.completion.chunk",
                "choices": [],
                "usage": usage_of(_prompt_tokens(chorus), turns),
            },
        )
