"""/v1/responses, without memory: each request brings its whole conversation. Source of shapes: OpenAI's reference and the Open Responses schema."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from ktx.engine.asking import Chorus
from ktx.server import sending
from ktx.server.asked import Talk, allowed, asked_of, begin, check_room, effort_words, sampling_of
from ktx.server.errors import Problem
from ktx.server.fields.openai import Format, Respond, ResponseAllowed, ResponseChoice, ResponseNamespace, ResponseTool
from ktx.server.items import Writer
from ktx.server.served import Served
from ktx.server.turn import Tokens, Turn

INCLUDED = (
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
)  # the second is never there, and may be asked for


async def answer(served: Served, fields: Respond, request: Request) -> Response:
    model = served.named(fields.model)
    served.ready()
    for word in fields.include or ():
        if word not in INCLUDED:
            raise Problem(400, f"include knows {', '.join(INCLUDED)}, not {word!r}", "include")
    wanted = INCLUDED[0] in (fields.include or ()) or bool(fields.top_logprobs)
    sampling = sampling_of(
        served,
        fields.model_dump(exclude_none=True, include={"temperature", "top_p"}),
        fields.max_output_tokens,
        logprobs=(fields.top_logprobs or 0) if wanted else None,
    )
    tools, spaces = _tools(fields)
    tools, choice = _chosen(fields, tools)
    effort = fields.reasoning.effort if fields.reasoning else None
    talk = Talk(
        messages_of(fields),
        tools,
        choice,
        fields.parallel_tool_calls is not False,
        effort_words(effort),
        _format(fields),
    )
    ask = await asked_of(served, talk, sampling)
    check_room(served, ask.rendered.ids, fields.max_output_tokens)
    chorus = await begin(served, [ask])
    writer = Writer(
        _base(fields, model, sampling),
        Turn(ask.parser(served)),
        Tokens(chorus.engine.tokenizer) if wanted else None,
        len(ask.rendered.ids),
        bool(fields.reasoning and (fields.reasoning.summary or fields.reasoning.generate_summary)),
        spaces,
    )
    if not fields.stream:
        return await sending.whole(request, chorus, _whole(chorus, writer))
    return sending.events(_stream(chorus, writer), chorus, request.url.path, served.settings.ping)


def _tools(fields: Respond) -> tuple[list[dict[str, Any]], dict[str, tuple[str, str]]]:
    """What the model is told of, and the namespace and own name of each function that has one."""
    tools: list[dict[str, Any]] = []
    spaces: dict[str, tuple[str, str]] = {}
    for tool in fields.tools or ():
        space = tool.name if isinstance(tool, ResponseNamespace) else None
        for one in tool.tools if isinstance(tool, ResponseNamespace) else [tool]:
            if isinstance(one, ResponseTool):
                name = _spaced(space, one.name)
                if space:
                    spaces[name] = (space, one.name)
                told = one.model_dump(exclude_none=True, exclude={"type"}) | {"name": name}
                tools.append({"type": "function", "function": told})
    return tools, spaces


def _chosen(fields: Respond, tools: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str | list[str]]:
    """What the model is told of, and what it may or must call of it. Problem 400 for names that no tool has."""
    said = fields.tool_choice
    if isinstance(said, ResponseAllowed):
        return allowed(tools, [tool.name for tool in said.tools], said.mode)
    choice = said.name if isinstance(said, ResponseChoice) else said or "auto"
    names = [tool["function"]["name"] for tool in tools]
    if choice == "required" and not names or choice not in ("auto", "none", "required", *names):
        raise Problem(400, f"tool_choice is {choice!r}, tools are {names}", "tool_choice")
    return tools, choice


def _spaced(space: str | None, name: str) -> str:
    return f"{space}__{name}" if space else name


def messages_of(fields: Respond) -> list[dict[str, Any]]:
    """Items of the input as chat messages; calls of one turn stand in one message, with the reasoning before them."""
    told: list[dict[str, Any]] = [{"role": "system", "content": fields.instructions}] if fields.instructions else []
    if isinstance(fields.input, str):
        return [*told, {"role": "user", "content": fields.input}]
    thought = ""
    for at, item in enumerate(fields.input):
        kind = item.get("type", "message")
        if kind == "reasoning":
            parts = [*(item.get("content") or ()), *(item.get("summary") or ())]
            thought = "".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))
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
                    "name": _spaced(item.get("namespace"), str(item.get("name", ""))),
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
        elif kind == "item_reference":
            raise Problem(
                400,
                f"input[{at}] is the id of an item, {item.get('id')!r}, and this server keeps none: send items whole, "
                "as clients do that are told store: false",
                "input",
            )
        else:
            raise Problem(
                400, f"input[{at}] is a {kind!r} of role {item.get('role')!r}, which is not understood", "input"
            )
    if not any(message["role"] != "system" for message in told):
        raise Problem(400, "input holds no message", "input")
    return told


def _content(content: Any, at: int) -> str:
    if isinstance(content, str):
        return content
    parts = []
    for part in content if isinstance(content, list) else [content]:
        text = part.get("text", part.get("refusal")) if isinstance(part, dict) else None
        if not isinstance(text, str):
            raise Problem(
                400,
                f"input[{at}] holds a {part.get('type') if isinstance(part, dict) else type(part).__name__!r}; only text is understood",
                "input",
            )
        parts.append(text)
    return "".join(parts)


def _format(fields: Respond) -> Format | None:
    said = dict((fields.text.format if fields.text else None) or {})
    if not said or said.get("type") == "text":
        return None
    if said.get("type") == "json_schema":
        said = {"type": "json_schema", "json_schema": {key: value for key, value in said.items() if key != "type"}}
    try:
        return Format.model_validate(said)
    except ValidationError as error:
        raise Problem(400, f"text.format: {error.errors()[0]['msg']}", "text.format") from error


def _base(fields: Respond, model: str, sampling: Any) -> dict[str, Any]:
    told = fields.model_dump(exclude_none=True)
    tools = [tool for tool in told.get("tools", ()) if tool["type"] != "web_search"]
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": fields.instructions,
        "max_output_tokens": fields.max_output_tokens,
        "max_tool_calls": None,
        "model": model,
        "output": [],
        "parallel_tool_calls": fields.parallel_tool_calls is not False,
        "previous_response_id": None,
        "prompt_cache_key": fields.prompt_cache_key,
        "safety_identifier": fields.safety_identifier,
        "reasoning": {"effort": None, "summary": None} | told.get("reasoning", {}),
        "service_tier": "default",
        "store": False,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "top_logprobs": fields.top_logprobs or 0,
        "text": {"format": {"type": "text"}} | told.get("text", {}),
        "tool_choice": told.get("tool_choice", "auto"),
        "tools": [{"description": None, "parameters": None, "strict": None} | tool for tool in tools],
        "truncation": "disabled",
        "usage": None,
        "user": fields.user,
        "metadata": fields.metadata or {},
    }


async def _whole(chorus: Chorus, writer: Writer) -> dict[str, Any]:
    async for _, event in chorus:
        writer.hear(event)
    return {**writer.base, "output": writer.items}


async def _stream(chorus: Chorus, writer: Writer) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    yield writer.state("response.created")
    yield writer.state("response.in_progress")
    try:
        async for _, event in chorus:
            for told in writer.hear(event):
                yield told
    except Problem as problem:
        writer.base |= {"status": "failed", "error": {"code": "server_error", "message": problem.message}}
        yield writer.state("response.failed")
