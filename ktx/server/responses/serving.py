"""/v1/responses. Sources of the formats: OpenAI's reference and the Open Responses schema."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from pydantic import ValidationError
from starlette.responses import Response

from ktx.engine.client import RequestGroup
from ktx.engine.sampler import SamplingParams
from ktx.server import streaming
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
from ktx.server.responses.store import ResponseStore
from ktx.server.state import LoadedModel

PATH = "/v1/responses"
# reasoning.encrypted_content is accepted, but always null.
SUPPORTED_INCLUDES = ("message.output_text.logprobs", "reasoning.encrypted_content")


async def answer(model: LoadedModel, store: ResponseStore, owner: bytes, fields: ResponsesRequest) -> Response:
    """Answers a responses request, as one body or as a stream, and stores the response.

    Args:
        model: the loaded model.
        store: the stored responses.
        owner: digest of the API key.
        fields: the request.

    Raises:
        APIError: the request is invalid, or the engine refused it.
    """
    for name in fields.include or ():
        if name not in SUPPORTED_INCLUDES:
            raise APIError(400, f"include supports {', '.join(SUPPORTED_INCLUDES)}, not {name!r}", "include")
    wants_logprobs = SUPPORTED_INCLUDES[0] in (fields.include or ()) or bool(fields.top_logprobs)
    sampling = build_sampling_params(
        model,
        fields.model_dump(exclude_none=True, include={"temperature", "top_p"}),
        fields.max_output_tokens,
        logprobs=(fields.top_logprobs or 0) if wants_logprobs else None,
    )
    previous_items, new_items, previous = resolve_input(store, owner, fields)
    messages = to_messages(fields.instructions, previous_items, new_items)
    tools, namespaces = _convert_tools(fields)
    engine_input = await build_engine_input(model, _chat_input(fields, messages, tools), sampling)
    check_context_length(model, engine_input.rendered.ids, fields.max_output_tokens)
    group = await submit(model, [engine_input], fields.model)
    events = ResponseEvents(
        _initial_response(fields, sampling, bool(store.max_responses) and fields.store is not False),
        OutputParser(engine_input.parser(model.prompts.chat_format)),
        LogprobFormatter(group.engine.tokenizer) if wants_logprobs else None,
        len(engine_input.rendered.ids),
        bool(fields.reasoning and (fields.reasoning.summary or fields.reasoning.generate_summary)),
        namespaces,
    )

    def store_response() -> None:
        """Stores the response once it is complete, before the client learns that it is and may refer to it."""
        if events.ended and events.base["store"]:
            store.put(owner, events.to_response(), [normalize_item(item) for item in new_items], previous)

    if not fields.stream:
        return await streaming.json_response(group, _complete(group, events, store_response))
    return streaming.sse_response(_stream(group, events, store_response), group, PATH, model.settings.keepalive_s)


async def count(
    model: LoadedModel, store: ResponseStore, owner: bytes, fields: ResponseTokensRequest
) -> dict[str, Any]:
    """Returns the number of prompt tokens of a responses request; for the arguments see `answer`.

    Raises:
        APIError: the request is invalid.
    """
    previous_items, new_items, _ = resolve_input(store, owner, fields)
    messages = to_messages(fields.instructions, previous_items, new_items)
    chat = _chat_input(fields, messages, _convert_tools(fields)[0])
    engine_input = await build_engine_input(model, chat, SamplingParams())
    return {"object": "response.input_tokens", "input_tokens": len(engine_input.rendered.ids)}


def _chat_input(
    fields: ResponseTokensRequest, messages: list[dict[str, Any]], tools: list[dict[str, Any]]
) -> ChatInput:
    """Converts a request to a chat request; its messages and tools are in OpenAI's chat format already."""
    tools, tool_choice = _resolve_tool_choice(fields, tools)
    return ChatInput(
        messages=messages,
        tools=tools,
        tool_choice=tool_choice,
        parallel_tool_calls=fields.parallel_tool_calls is not False,
        template_kwargs=reasoning_kwargs(fields.reasoning.effort if fields.reasoning else None),
        response_format=_response_format(fields),
    )


def _convert_tools(fields: ResponseTokensRequest) -> tuple[list[dict[str, Any]], dict[str, tuple[str, str]]]:
    """Returns the tools in OpenAI's chat format, and the namespace and own name of each function in a namespace."""
    tools: list[dict[str, Any]] = []
    namespaces: dict[str, tuple[str, str]] = {}
    for tool in fields.tools or ():
        namespace = tool.name if isinstance(tool, ResponseNamespace) else None
        for function_tool in tool.tools if isinstance(tool, ResponseNamespace) else [tool]:
            if isinstance(function_tool, ResponseTool):
                name = qualified_name(namespace, function_tool.name)
                if namespace:
                    namespaces[name] = (namespace, function_tool.name)
                function = function_tool.model_dump(exclude_none=True, exclude={"type"}) | {"name": name}
                tools.append({"type": "function", "function": function})
    return tools, namespaces


def _resolve_tool_choice(
    fields: ResponseTokensRequest, tools: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], str | list[str]]:
    """Returns the tools for the prompt and the tool choice. Raises APIError (400) if it names an unknown tool."""
    requested = fields.tool_choice
    if isinstance(requested, ResponseAllowed):
        return restrict_tools(tools, [tool.name for tool in requested.tools], requested.mode)
    choice = requested.name if isinstance(requested, ResponseChoice) else requested or "auto"
    names = [tool["function"]["name"] for tool in tools]
    if (choice == "required" and not names) or choice not in ("auto", "none", "required", *names):
        raise APIError(400, f"tool_choice is {choice!r}, but the tools are {names}", "tool_choice")
    return tools, choice


def _response_format(fields: ResponseTokensRequest) -> Format | None:
    """Returns the response format that the request constrains its answer to, in the form of the chat API."""
    params = dict((fields.text.format if fields.text else None) or {})
    if not params or params.get("type") == "text":
        return None
    if params.get("type") == "json_schema":  # the chat API nests its fields
        params = {"type": "json_schema", "json_schema": {key: value for key, value in params.items() if key != "type"}}
    try:
        return Format.model_validate(params)
    except ValidationError as error:
        raise APIError(400, f"text.format: {error.errors()[0]['msg']}", "text.format") from error


def _initial_response(fields: ResponsesRequest, sampling: SamplingParams, store: bool) -> dict[str, Any]:
    """Returns the response object of a request that has just started: the parameters of the request, with defaults, and
    fields that `ResponseEvents` sets when the response ends. `store`: whether the response will be stored.
    """
    params = fields.model_dump(exclude_none=True)
    # web search is accepted and not supported
    tools = [tool for tool in params.get("tools", ()) if tool["type"] != "web_search"]
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
        "model": fields.model,
        "output": [],
        "parallel_tool_calls": fields.parallel_tool_calls is not False,
        "previous_response_id": fields.previous_response_id,
        "prompt_cache_key": fields.prompt_cache_key,
        "safety_identifier": fields.safety_identifier,
        "reasoning": {"effort": None, "summary": None} | params.get("reasoning", {}),
        "service_tier": "default",
        "store": store,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "top_logprobs": fields.top_logprobs or 0,
        "text": {"format": {"type": "text"}} | params.get("text", {}),
        "tool_choice": params.get("tool_choice", "auto"),
        "tools": [{"description": None, "parameters": None, "strict": None} | tool for tool in tools],
        "truncation": "disabled",
        "usage": None,
        "user": fields.user,
        "metadata": fields.metadata or {},
    }


async def _complete(group: RequestGroup, events: ResponseEvents, store_response: Callable[[], None]) -> dict[str, Any]:
    """Collects the output and returns the whole response."""
    async for _, event in group:
        events.feed(event)
    store_response()
    return events.to_response()


async def _stream(
    group: RequestGroup, events: ResponseEvents, store_response: Callable[[], None]
) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """Yields the events of a streamed response; an error of the engine is an event of its own."""
    yield events.make_state_event("response.created")
    yield events.make_state_event("response.in_progress")
    try:
        async for _, event in group:
            emitted = events.feed(event)
            store_response()
            for emitted_event in emitted:
                yield emitted_event
    except APIError as error:
        events.base |= {"status": "failed", "error": {"code": "server_error", "message": error.message}}
        yield events.make_state_event("response.failed")
