"""/v1/responses. Source of shapes: OpenAI's reference and the Open Responses schema."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from ktx.engine.client import RequestGroup
from ktx.engine.sampler import SamplingParams
from ktx.server import streaming
from ktx.server.auth import owner_of
from ktx.server.errors import APIError
from ktx.server.output import LogprobFormatter, OutputParser
from ktx.server.preprocess import (
    ChatInput,
    build_engine_input,
    build_sampling_params,
    check_context_length,
    reasoning_kwargs,
    restrict_tools,
    submit,
)
from ktx.server.protocol.openai import Format
from ktx.server.protocol.responses import (
    ResponseAllowed,
    ResponseChoice,
    ResponseNamespace,
    ResponsesRequest,
    ResponseTokensRequest,
    ResponseTool,
)
from ktx.server.responses.events import ResponseEvents
from ktx.server.responses.input import normalize_item, qualified_name, resolve_input, to_messages
from ktx.server.responses.store import Item
from ktx.server.state import ServerState

INCLUDED = (
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
)  # the second is never there, and may be asked for


async def answer(state: ServerState, fields: ResponsesRequest, request: Request) -> Response:
    model = state.resolve_model(fields.model)
    state.require_ready()
    for word in fields.include or ():
        if word not in INCLUDED:
            raise APIError(400, f"include knows {', '.join(INCLUDED)}, not {word!r}", "include")
    wanted = INCLUDED[0] in (fields.include or ()) or bool(fields.top_logprobs)
    sampling = build_sampling_params(
        state,
        fields.model_dump(exclude_none=True, include={"temperature", "top_p"}),
        fields.max_output_tokens,
        logprobs=(fields.top_logprobs or 0) if wanted else None,
    )
    owner = owner_of(request)
    before, came, previous = resolve_input(state.response_store, owner, fields)
    talk, spaces = _talk(fields, before, came)
    ask = await build_engine_input(state, talk, sampling)
    check_context_length(state, ask.rendered.ids, fields.max_output_tokens)
    chorus = await submit(state, [ask], model)
    writer = ResponseEvents(
        _base(fields, model, sampling, bool(state.response_store.max_responses) and fields.store is not False),
        OutputParser(ask.parser(state)),
        LogprobFormatter(chorus.engine.tokenizer) if wanted else None,
        len(ask.rendered.ids),
        bool(fields.reasoning and (fields.reasoning.summary or fields.reasoning.generate_summary)),
        spaces,
    )

    def keep() -> None:
        """Once the answer has ended, and before its client may ask for it."""
        if writer.ended and writer.base["store"]:
            state.response_store.put(owner, writer.to_response(), [normalize_item(item) for item in came], previous)

    if not fields.stream:
        return await streaming.json_response(chorus, _whole(chorus, writer, keep))
    return streaming.sse_response(_stream(chorus, writer, keep), chorus, request.url.path, state.settings.keepalive_s)


async def count(state: ServerState, fields: ResponseTokensRequest, request: Request) -> dict[str, Any]:
    """How many tokens the prompt of such a request has."""
    if fields.model is not None:
        state.resolve_model(fields.model)
    before, came, _ = resolve_input(state.response_store, owner_of(request), fields)
    talk, _ = _talk(fields, before, came)
    ask = await build_engine_input(state, talk, SamplingParams())
    return {"object": "response.input_tokens", "input_tokens": len(ask.rendered.ids)}


def _talk(
    fields: ResponseTokensRequest, before: list[Item], came: list[Item]
) -> tuple[ChatInput, dict[str, tuple[str, str]]]:
    """What the engine is asked, and the namespace and own name of each function that has one."""
    tools, spaces = _tools(fields)
    tools, choice = _chosen(fields, tools)
    words = reasoning_kwargs(fields.reasoning.effort if fields.reasoning else None)
    messages = to_messages(fields.instructions, before, came)
    return ChatInput(messages, tools, choice, fields.parallel_tool_calls is not False, words, _format(fields)), spaces


def _tools(fields: ResponseTokensRequest) -> tuple[list[dict[str, Any]], dict[str, tuple[str, str]]]:
    """What the model is told of, and the namespace and own name of each function that has one."""
    tools: list[dict[str, Any]] = []
    spaces: dict[str, tuple[str, str]] = {}
    for tool in fields.tools or ():
        space = tool.name if isinstance(tool, ResponseNamespace) else None
        for one in tool.tools if isinstance(tool, ResponseNamespace) else [tool]:
            if isinstance(one, ResponseTool):
                name = qualified_name(space, one.name)
                if space:
                    spaces[name] = (space, one.name)
                told = one.model_dump(exclude_none=True, exclude={"type"}) | {"name": name}
                tools.append({"type": "function", "function": told})
    return tools, spaces


def _chosen(fields: ResponseTokensRequest, tools: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str | list[str]]:
    """What the model is told of, and what it may or must call of it. Problem 400 for names that no tool has."""
    said = fields.tool_choice
    if isinstance(said, ResponseAllowed):
        return restrict_tools(tools, [tool.name for tool in said.tools], said.mode)
    choice = said.name if isinstance(said, ResponseChoice) else said or "auto"
    names = [tool["function"]["name"] for tool in tools]
    if choice == "required" and not names or choice not in ("auto", "none", "required", *names):
        raise APIError(400, f"tool_choice is {choice!r}, tools are {names}", "tool_choice")
    return tools, choice


def _format(fields: ResponseTokensRequest) -> Format | None:
    said = dict((fields.text.format if fields.text else None) or {})
    if not said or said.get("type") == "text":
        return None
    if said.get("type") == "json_schema":
        said = {"type": "json_schema", "json_schema": {key: value for key, value in said.items() if key != "type"}}
    try:
        return Format.model_validate(said)
    except ValidationError as error:
        raise APIError(400, f"text.format: {error.errors()[0]['msg']}", "text.format") from error


def _base(fields: ResponsesRequest, model: str, sampling: Any, store: bool) -> dict[str, Any]:
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


async def _whole(chorus: RequestGroup, writer: ResponseEvents, keep: Callable[[], None]) -> dict[str, Any]:
    async for _, event in chorus:
        writer.feed(event)
    keep()
    return writer.to_response()


async def _stream(
    chorus: RequestGroup, writer: ResponseEvents, keep: Callable[[], None]
) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    yield writer.state("response.created")
    yield writer.state("response.in_progress")
    try:
        async for _, event in chorus:
            said = writer.feed(event)
            keep()
            for told in said:
                yield told
    except APIError as problem:
        writer.base |= {"status": "failed", "error": {"code": "server_error", "message": problem.message}}
        yield writer.state("response.failed")
