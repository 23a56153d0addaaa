"""Ollama's /api: chat, generate, tags, show, ps, version. Durations are nanoseconds, streams are lines of JSON, and streaming is the default."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ktx.engine.client import RequestGroup
from ktx.engine.prompt import RenderedPrompt
from ktx.engine.sampler import SampledToken
from ktx.server import streaming
from ktx.server.errors import APIError
from ktx.server.model_names import LATEST_TAG
from ktx.server.output import Finish, LogprobFormatter, OutputParser, TextDelta, ToolCallDelta
from ktx.server.preprocess import (
    ChatInput,
    EngineInput,
    build_engine_input,
    build_grammar,
    build_sampling_params,
    check_context_length,
    submit,
)
from ktx.server.protocol.ollama import OllamaChat, OllamaGenerate, OllamaShared, OllamaShow
from ktx.server.protocol.openai import Format
from ktx.server.state import ServerState
from ktx.server.worker_threads import RENDER_THREADS, RENDER_TIMEOUT_S, run_with_timeout

VERSION = "0.13.0"  # of Ollama's API that these routes follow


def _settings(fields: OllamaShared) -> tuple[dict[str, Any], int | None]:
    given = fields.options.model_dump(exclude_none=True) if fields.options else {}
    limit = given.pop("num_predict", fields.max_tokens)
    if "repeat_penalty" in given:
        given["repetition_penalty"] = given.pop("repeat_penalty")
    return given, limit if limit is not None and limit > 0 else None


def _format(fields: OllamaShared) -> Format | None:
    if not fields.format:
        return None
    if fields.format == "json":
        return Format(type="json_object")
    return Format.model_validate({"type": "json_schema", "json_schema": {"schema": fields.format}})


def _logprobs(fields: OllamaShared) -> int | None:
    return (fields.top_logprobs or 0) if fields.logprobs else None


def _loaded(fields: OllamaShared, piece: dict[str, Any]) -> Response:
    """The answer to an empty request, which is how its clients load a model, and unload one with keep_alive 0. Problem 400 for that."""
    if re.fullmatch(r"0+(\.0+)?[a-z]*", str(fields.keep_alive)):
        raise APIError(400, "keep_alive: this server keeps its model as long as it runs")
    return JSONResponse({"model": fields.model, "created_at": _now(), **piece, "done": True, "done_reason": "load"})


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat().replace("+00:00", "Z")


async def chat(state: ServerState, fields: OllamaChat, request: Request) -> Response:
    name = state.resolve_model(fields.model)
    state.require_ready()
    if not fields.messages:
        return _loaded(fields, {"message": {"role": "assistant", "content": ""}})
    messages = []
    for message in fields.messages:
        told = message.model_dump(exclude_none=True)
        if "thinking" in told:
            told["reasoning_content"] = told.pop("thinking")
        if "tool_name" in told:
            told["name"] = told.pop("tool_name")
        for call in told.get("tool_calls", ()):
            call["type"] = "function"
            call["function"]["arguments"] = json.dumps(call["function"].get("arguments") or {}, ensure_ascii=False)
        messages.append(told)
    given, limit = _settings(fields)
    tools = [tool.model_dump(exclude_none=True) for tool in fields.tools or ()]
    words = {"reasoning_effort": fields.think} if isinstance(fields.think, str) else {}
    talk = ChatInput(
        messages,
        tools,
        template_kwargs=words,
        response_format=_format(fields),
        thinking=None if fields.think is None else bool(fields.think),
        continue_final_message=fields.messages[-1].role == "assistant",
    )
    ask = await build_engine_input(state, talk, build_sampling_params(state, given, limit, logprobs=_logprobs(fields)))

    def piece(kind: str, text: str, calls: list[ToolCallDelta]) -> dict[str, Any]:
        told: dict[str, Any] = {"role": "assistant", "content": text if kind == "answer" else ""}
        if kind == "think":
            told["thinking"] = text
        if calls:
            told["tool_calls"] = [
                {
                    "id": call.id,
                    "function": {"index": call.index, "name": call.name, "arguments": call.parsed_arguments()},
                }
                for call in calls
            ]
        return {"message": told}

    return await _answer(state, ask, fields, name, piece, request, fields.think is not False)


async def generate(state: ServerState, fields: OllamaGenerate, request: Request) -> Response:
    name = state.resolve_model(fields.model)
    engine, _, _ = state.require_ready()
    if not fields.prompt:
        return _loaded(fields, {"response": ""})
    given, limit = _settings(fields)
    sampling = build_sampling_params(state, given, limit, logprobs=_logprobs(fields))
    if fields.raw:
        ids = await run_with_timeout(
            RENDER_TIMEOUT_S, RENDER_THREADS, "the prompt", lambda: list(engine.tokenizer(fields.prompt)["input_ids"])
        )
        ask = EngineInput(RenderedPrompt(fields.prompt, ids, False), sampling, await build_grammar(_format(fields)))
    else:
        messages = [{"role": "system", "content": fields.system}] if fields.system else []
        think = None if fields.think is None else bool(fields.think)
        ask = await build_engine_input(
            state,
            ChatInput(
                [*messages, {"role": "user", "content": fields.prompt}], response_format=_format(fields), thinking=think
            ),
            sampling,
        )

    def piece(kind: str, text: str, calls: list[ToolCallDelta]) -> dict[str, Any]:
        return {"response": text if kind == "answer" else "", **({"thinking": text} if kind == "think" else {})}

    return await _answer(state, ask, fields, name, piece, request, fields.think is not False)


Piece = Callable[[str, str, list[ToolCallDelta]], dict[str, Any]]


async def _answer(
    state: ServerState, ask: EngineInput, fields: OllamaShared, name: str, piece: Piece, request: Request, thinks: bool
) -> Response:
    check_context_length(state, ask.rendered.ids, 1)
    chorus = await submit(state, [ask], name)
    turn = OutputParser(ask.parser(state))
    tokens = LogprobFormatter(chorus.engine.tokenizer) if fields.logprobs else None
    if fields.stream is False:
        return await streaming.json_response(chorus, _whole(chorus, turn, name, piece, thinks, tokens))
    return streaming.ndjson_response(_stream(chorus, turn, name, piece, thinks, tokens), chorus)


def _told(tokens: LogprobFormatter | None, choices: list[SampledToken]) -> dict[str, Any]:
    return {"logprobs": tokens.content(choices)["content"]} if tokens and choices else {}


def _done(told: Finish, prompt: int) -> dict[str, Any]:
    usage = told.finished.usage
    return {
        "done": True,
        "done_reason": "length" if told.reason == "length" else "stop",
        "total_duration": int(usage.seconds * 1e9),
        "load_duration": 0,
        "prompt_eval_count": prompt,
        "prompt_eval_duration": int((usage.first_token_seconds - usage.queued_seconds) * 1e9),
        "eval_count": usage.answer,
        "eval_duration": int((usage.seconds - usage.first_token_seconds) * 1e9),
    }


async def _whole(
    chorus: RequestGroup, turn: OutputParser, name: str, piece: Piece, thinks: bool, tokens: LogprobFormatter | None
) -> dict[str, Any]:
    async for _, event in chorus:
        for told in turn.feed(event):
            if isinstance(told, Finish):
                streaming.raise_for_finish(told.finished)
    assert turn.end is not None
    body = piece("answer", turn.texts["answer"], turn.calls)
    if turn.texts["think"] and thinks:
        body.get("message", body)["thinking"] = turn.texts["think"]
    done = _done(turn.end, len(chorus.requests[0].prompt))
    return {"model": name, "created_at": _now(), **body, **_told(tokens, turn.token_log), **done}


async def _stream(
    chorus: RequestGroup, turn: OutputParser, name: str, piece: Piece, thinks: bool, tokens: LogprobFormatter | None
) -> AsyncIterator[dict[str, Any]]:
    async for _, event in chorus:
        for told in turn.feed(event):
            head, more = {"model": name, "created_at": _now()}, _told(tokens, told.choices)
            if isinstance(told, TextDelta):
                if told.kind == "answer" or thinks:
                    yield {**head, **piece(told.kind, told.text, []), **more, "done": False}
            elif isinstance(told, ToolCallDelta):
                yield {**head, **piece("answer", "", [told]), **more, "done": False}
            else:
                streaming.raise_for_finish(told.finished)
                yield {**head, **piece("answer", "", []), **more, **_done(told, len(chorus.requests[0].prompt))}


def details(state: ServerState, name: str) -> dict[str, Any]:
    engine, _, _ = state.require_ready()
    adapter = state.adapter_of(name)
    config = engine.model.config
    held = getattr(getattr(engine.model, "ktx", None), "nbytes", 0)
    return {
        "size": held,
        "digest": hashlib.sha256("\0".join((state.models[0], *adapter)).encode()).hexdigest(),
        "details": {
            "parent_model": state.models[0] if adapter else "",
            "format": "gguf",
            "family": config.model_type,
            "families": [config.model_type],
            "parameter_size": "",
            "quantization_level": "",
        },
    }


def tags(state: ServerState) -> dict[str, Any]:
    state.require_ready()
    return {
        "models": [
            {
                "name": f"{name}{LATEST_TAG}",
                "model": f"{name}{LATEST_TAG}",
                "modified_at": state.created_iso,
                **details(state, name),
            }
            for name in state.names
        ]
    }


def ps(state: ServerState) -> dict[str, Any]:
    engine, _, _ = state.require_ready()
    more = {"expires_at": "2318-01-01T00:00:00Z", "size_vram": 0, "context_length": engine.context}
    return {
        "models": [
            {"name": f"{name}{LATEST_TAG}", "model": f"{name}{LATEST_TAG}", **details(state, name), **more} for name in state.names
        ]
    }


def show(state: ServerState, fields: OllamaShow) -> dict[str, Any]:
    name = state.resolve_model(fields.model or fields.name or "")
    engine, prompts, _ = state.require_ready()
    kind = engine.model.config.model_type
    can = (
        ["completion"]
        + (["tools"] if prompts.dialect.format else [])
        + (["thinking"] if prompts.dialect.think[0] else [])
    )
    return {
        "modelfile": "",
        "parameters": "",
        "template": prompts.template or "",
        "details": details(state, name)["details"],
        "model_info": {
            "general.architecture": kind,
            "general.basename": name.removesuffix(LATEST_TAG),
            f"{kind}.context_length": engine.context,
        },
        "capabilities": can,
        "modified_at": state.created_iso,
    }
