"""/v1/responses. Source of shapes: OpenAI's reference and the Open Responses schema."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from ktx.engine.asking import Chorus
from ktx.engine.sampling import Sampling
from ktx.server import sending
from ktx.server.asked import Talk, allowed, asked_of, begin, check_room, effort_words, sampling_of
from ktx.server.conversation import input_of, listed, messages_of, spaced
from ktx.server.errors import Problem
from ktx.server.fields.openai import Format
from ktx.server.fields.responses import (
    Respond,
    RespondCount,
    ResponseAllowed,
    ResponseChoice,
    ResponseNamespace,
    ResponseTool,
)
from ktx.server.guard import owner_of
from ktx.server.items import Writer
from ktx.server.kept import Item
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
    owner = owner_of(request)
    before, came, previous = input_of(served.kept, owner, fields)
    talk, spaces = _talk(fields, before, came)
    ask = await asked_of(served, talk, sampling)
    check_room(served, ask.rendered.ids, fields.max_output_tokens)
    chorus = await begin(served, [ask], model)
    writer = Writer(
        _base(fields, model, sampling, bool(served.kept.most) and fields.store is not False),
        Turn(ask.parser(served)),
        Tokens(chorus.engine.tokenizer) if wanted else None,
        len(ask.rendered.ids),
        bool(fields.reasoning and (fields.reasoning.summary or fields.reasoning.generate_summary)),
        spaces,
    )

    def keep() -> None:
        """Once the answer has ended, and before its client may ask for it."""
        if writer.ended and writer.base["store"]:
            served.kept.keep(owner, writer.told(), [listed(item) for item in came], previous)

    if not fields.stream:
        return await sending.whole(chorus, _whole(chorus, writer, keep))
    return sending.events(_stream(chorus, writer, keep), chorus, request.url.path, served.settings.ping)


async def count(served: Served, fields: RespondCount, request: Request) -> dict[str, Any]:
    """How many tokens the prompt of such a request has."""
    if fields.model is not None:
        served.named(fields.model)
    before, came, _ = input_of(served.kept, owner_of(request), fields)
    talk, _ = _talk(fields, before, came)
    ask = await asked_of(served, talk, Sampling())
    return {"object": "response.input_tokens", "input_tokens": len(ask.rendered.ids)}


def _talk(fields: RespondCount, before: list[Item], came: list[Item]) -> tuple[Talk, dict[str, tuple[str, str]]]:
    """What the engine is asked, and the namespace and own name of each function that has one."""
    tools, spaces = _tools(fields)
    tools, choice = _chosen(fields, tools)
    words = effort_words(fields.reasoning.effort if fields.reasoning else None)
    messages = messages_of(fields.instructions, before, came)
    return Talk(messages, tools, choice, fields.parallel_tool_calls is not False, words, _format(fields)), spaces


def _tools(fields: RespondCount) -> tuple[list[dict[str, Any]], dict[str, tuple[str, str]]]:
    """What the model is told of, and the namespace and own name of each function that has one."""
    tools: list[dict[str, Any]] = []
    spaces: dict[str, tuple[str, str]] = {}
    for tool in fields.tools or ():
        space = tool.name if isinstance(tool, ResponseNamespace) else None
        for one in tool.tools if isinstance(tool, ResponseNamespace) else [tool]:
            if isinstance(one, ResponseTool):
                name = spaced(space, one.name)
                if space:
                    spaces[name] = (space, one.name)
                told = one.model_dump(exclude_none=True, exclude={"type"}) | {"name": name}
                tools.append({"type": "function", "function": told})
    return tools, spaces


def _chosen(fields: RespondCount, tools: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str | list[str]]:
    """What the model is told of, and what it may or must call of it. Problem 400 for names that no tool has."""
    said = fields.tool_choice
    if isinstance(said, ResponseAllowed):
        return allowed(tools, [tool.name for tool in said.tools], said.mode)
    choice = said.name if isinstance(said, ResponseChoice) else said or "auto"
    names = [tool["function"]["name"] for tool in tools]
    if choice == "required" and not names or choice not in ("auto", "none", "required", *names):
        raise Problem(400, f"tool_choice is {choice!r}, tools are {names}", "tool_choice")
    return tools, choice


def _format(fields: RespondCount) -> Format | None:
    said = dict((fields.text.format if fields.text else None) or {})
    if not said or said.get("type") == "text":
        return None
    if said.get("type") == "json_schema":
        said = {"type": "json_schema", "json_schema": {key: value for key, value in said.items() if key != "type"}}
    try:
        return Format.model_validate(said)
    except ValidationError as error:
        raise Problem(400, f"text.format: {error.errors()[0]['msg']}", "text.format") from error


def _base(fields: Respond, model: str, sampling: Any, store: bool) -> dict[str, Any]:
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
        "previous_response_id": fields.previous_response_id,
        "prompt_cache_key": fields.prompt_cache_key,
        "safety_identifier": fields.safety_identifier,
        "reasoning": {"effort": None, "summary": None} | told.get("reasoning", {}),
        "service_tier": "default",
        "store": store,
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


async def _whole(chorus: Chorus, writer: Writer, keep: Callable[[], None]) -> dict[str, Any]:
    async for _, event in chorus:
        writer.hear(event)
    keep()
    return writer.told()


async def _stream(
    chorus: Chorus, writer: Writer, keep: Callable[[], None]
) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    yield writer.state("response.created")
    yield writer.state("response.in_progress")
    try:
        async for _, event in chorus:
            said = writer.hear(event)
            keep()
            for told in said:
                yield told
    except Problem as problem:
        writer.base |= {"status": "failed", "error": {"code": "server_error", "message": problem.message}}
        yield writer.state("response.failed")
