"""Ollama's /api routes: chat, generate, tags, show, ps, version.

Durations are in nanoseconds, streams are lines of JSON, and streaming is the default.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

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
from ktx.server.state import LoadedModel
from ktx.server.worker_threads import RENDER_THREADS, RENDER_TIMEOUT_S, run_with_timeout

VERSION = "0.13.0"  # version of Ollama whose API these routes implement


def _sampling_params(fields: OllamaShared) -> tuple[dict[str, Any], int | None]:
    """Returns the sampling parameters under OpenAI's names, and the max number of new tokens (None: no limit)."""
    params = fields.options.model_dump(exclude_none=True) if fields.options else {}
    limit = params.pop("num_predict", fields.max_tokens)
    if "repeat_penalty" in params:
        params["repetition_penalty"] = params.pop("repeat_penalty")
    return params, limit if limit is not None and limit > 0 else None


def _response_format(fields: OllamaShared) -> Format | None:
    """Returns the format that the request constrains its answer to, in OpenAI's form: any JSON object, or a JSON
    schema; None without one.
    """
    if not fields.format:
        return None
    if fields.format == "json":
        return Format(type="json_object")
    return Format.model_validate({"type": "json_schema", "json_schema": {"schema": fields.format}})


def _num_logprobs(fields: OllamaShared) -> int | None:
    """Returns how many alternatives per token the request wants; None: no log probabilities."""
    return (fields.top_logprobs or 0) if fields.logprobs else None


def _load_response(fields: OllamaShared, delta_fields: dict[str, Any]) -> Response:
    """Answers a request without a prompt, with which clients load a model, or unload it with keep_alive 0.

    Raises:
        APIError: 400, keep_alive is 0.
    """
    if re.fullmatch(r"0+(\.0+)?[a-z]*", str(fields.keep_alive)):  # 0, also with a unit
        raise APIError(400, "keep_alive: this server cannot unload its model; it stays loaded until the server stops")
    return JSONResponse(
        {"model": fields.model, "created_at": _now(), **delta_fields, "done": True, "done_reason": "load"}
    )


def _now() -> str:
    """Returns the current time in ISO 8601, as in Ollama's responses."""
    return datetime.datetime.now(datetime.UTC).isoformat().replace("+00:00", "Z")


async def chat(model: LoadedModel, fields: OllamaChat) -> Response:
    """Answers /api/chat.

    Raises:
        APIError: the request is invalid, or the engine refused it.
    """
    if not fields.messages:
        return _load_response(fields, {"message": {"role": "assistant", "content": ""}})
    messages = []
    for message in fields.messages:
        converted = message.model_dump(exclude_none=True)
        if "thinking" in converted:
            converted["reasoning_content"] = converted.pop("thinking")
        if "tool_name" in converted:
            converted["name"] = converted.pop("tool_name")
        for call in converted.get("tool_calls", ()):
            call["type"] = "function"
            call["function"]["arguments"] = json.dumps(call["function"].get("arguments") or {}, ensure_ascii=False)
        messages.append(converted)
    params, limit = _sampling_params(fields)
    tools = [tool.model_dump(exclude_none=True) for tool in fields.tools or ()]
    template_kwargs = {"reasoning_effort": fields.think} if isinstance(fields.think, str) else {}
    sampling = build_sampling_params(model, params, limit, logprobs=_num_logprobs(fields))
    chat_input = ChatInput(
        messages=messages,
        tools=tools,
        template_kwargs=template_kwargs,
        response_format=_response_format(fields),
        thinking=None if fields.think is None else bool(fields.think),
        continue_final_message=fields.messages[-1].role == "assistant",
    )
    engine_input = await build_engine_input(model, chat_input, sampling)

    def format_delta(kind: str, text: str, calls: list[ToolCallDelta]) -> dict[str, Any]:
        """Returns the fields of a response of /api/chat: a message with answer text or thinking, and tool calls."""
        message: dict[str, Any] = {"role": "assistant", "content": text if kind == "answer" else ""}
        if kind == "think":
            message["thinking"] = text
        if calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "function": {"index": call.index, "name": call.name, "arguments": call.parsed_arguments()},
                }
                for call in calls
            ]
        return {"message": message}

    return await _run(model, engine_input, fields, format_delta, fields.think is not False)


async def generate(model: LoadedModel, fields: OllamaGenerate) -> Response:
    """Answers /api/generate; with `raw` the prompt is not rendered by the chat template.

    Raises:
        APIError: the request is invalid, or the engine refused it.
    """
    if not fields.prompt:
        return _load_response(fields, {"response": ""})
    params, limit = _sampling_params(fields)
    sampling = build_sampling_params(model, params, limit, logprobs=_num_logprobs(fields))
    if fields.raw:
        ids = await run_with_timeout(
            RENDER_TIMEOUT_S,
            RENDER_THREADS,
            "the prompt",
            lambda: list(model.engine.tokenizer(fields.prompt)["input_ids"]),
        )
        engine_input = EngineInput(
            RenderedPrompt(fields.prompt, ids, thinking=False), sampling, await build_grammar(_response_format(fields))
        )
    else:
        messages = [{"role": "system", "content": fields.system}] if fields.system else []
        chat_input = ChatInput(
            messages=[*messages, {"role": "user", "content": fields.prompt}],
            response_format=_response_format(fields),
            thinking=None if fields.think is None else bool(fields.think),
        )
        engine_input = await build_engine_input(model, chat_input, sampling)

    def format_delta(kind: str, text: str, calls: list[ToolCallDelta]) -> dict[str, Any]:
        """Returns the fields of a response of /api/generate: answer text or thinking; it has no tool calls."""
        return {"response": text if kind == "answer" else "", **({"thinking": text} if kind == "think" else {})}

    return await _run(model, engine_input, fields, format_delta, fields.think is not False)


# (kind of the text: "answer" or "think", text, tool calls) -> fields of the response
DeltaFormatter = Callable[[str, str, list[ToolCallDelta]], dict[str, Any]]


async def _run(
    model: LoadedModel,
    engine_input: EngineInput,
    fields: OllamaShared,
    format_delta: DeltaFormatter,
    include_thinking: bool,
) -> Response:
    """Runs the request and returns its response, as a stream or as one body. The prompt must leave one token of the
    context; num_predict may ask for more than is left.
    """
    check_context_length(model, engine_input.rendered.ids, 1)
    group = await submit(model, [engine_input], fields.model)
    parser = OutputParser(engine_input.parser(model.prompts.chat_format))
    formatter = LogprobFormatter(group.engine.tokenizer) if fields.logprobs else None
    if fields.stream is False:
        return await streaming.json_response(
            group, _complete(group, parser, fields.model, format_delta, include_thinking, formatter)
        )
    return streaming.ndjson_response(
        _stream(group, parser, fields.model, format_delta, include_thinking, formatter), group
    )


def _logprob_fields(formatter: LogprobFormatter | None, tokens: list[SampledToken]) -> dict[str, Any]:
    """Returns the field `logprobs`, if the request has log probabilities and there are tokens."""
    return {"logprobs": formatter.content(tokens)["content"]} if formatter and tokens else {}


def _finish_fields(finish: Finish, num_prompt_tokens: int) -> dict[str, Any]:
    """Returns the fields of the last object: reason, token counts and durations in nanoseconds."""
    usage = finish.event.usage
    return {
        "done": True,
        "done_reason": "length" if finish.reason == "length" else "stop",
        "total_duration": int(usage.seconds * 1e9),
        "load_duration": 0,
        "prompt_eval_count": num_prompt_tokens,
        "prompt_eval_duration": int((usage.first_token_seconds - usage.queued_seconds) * 1e9),
        "eval_count": usage.answer,
        "eval_duration": int((usage.seconds - usage.first_token_seconds) * 1e9),
    }


async def _complete(
    group: RequestGroup,
    parser: OutputParser,
    name: str,
    format_delta: DeltaFormatter,
    include_thinking: bool,
    formatter: LogprobFormatter | None,
) -> dict[str, Any]:
    """Collects the output and returns the response of a request without streaming: answer, thinking, statistics."""
    async for _, event in group:
        for delta in parser.feed(event):
            if isinstance(delta, Finish):
                streaming.raise_for_finish(delta.event)
    assert parser.end is not None
    body = format_delta("answer", parser.texts["answer"], parser.calls)
    if parser.texts["think"] and include_thinking:
        # /api/chat has the text in a message, /api/generate in the body
        body.get("message", body)["thinking"] = parser.texts["think"]
    done = _finish_fields(parser.end, len(group.requests[0].prompt))
    return {"model": name, "created_at": _now(), **body, **_logprob_fields(formatter, parser.token_log), **done}


async def _stream(
    group: RequestGroup,
    parser: OutputParser,
    name: str,
    format_delta: DeltaFormatter,
    include_thinking: bool,
    formatter: LogprobFormatter | None,
) -> AsyncIterator[dict[str, Any]]:
    """Yields the objects of a streamed response, one per delta; the last one has the statistics."""
    async for _, event in group:
        for delta in parser.feed(event):
            base, logprobs = {"model": name, "created_at": _now()}, _logprob_fields(formatter, delta.tokens)
            if isinstance(delta, TextDelta):
                if delta.kind == "answer" or include_thinking:
                    yield {**base, **format_delta(delta.kind, delta.text, []), **logprobs, "done": False}
            elif isinstance(delta, ToolCallDelta):
                yield {**base, **format_delta("answer", "", [delta]), **logprobs, "done": False}
            else:
                streaming.raise_for_finish(delta.event)
                yield {
                    **base,
                    **format_delta("answer", "", []),
                    **logprobs,
                    **_finish_fields(delta, len(group.requests[0].prompt)),
                }


def describe_model(model: LoadedModel, name: str) -> dict[str, Any]:
    """Returns size, digest and details of a model or adapter. The digest is that of the names, not of the weights."""
    base, adapter = model.names.first, model.names.adapter(name)
    config = model.engine.model.config
    return {
        "size": model.engine.model.ktx.nbytes,
        "digest": hashlib.sha256("\0".join((base, adapter) if adapter else (base,)).encode()).hexdigest(),
        "details": {
            "parent_model": base if adapter else "",
            "format": "gguf",
            "family": config.model_type,
            "families": [config.model_type],
            "parameter_size": "",
            "quantization_level": "",
        },
    }


def list_models(model: LoadedModel, created: str) -> dict[str, Any]:
    """Lists the model and its adapters under names with Ollama's tag, for /api/tags. `created` is an ISO 8601 time."""
    return {
        "models": [
            {
                "name": f"{name}{LATEST_TAG}",
                "model": f"{name}{LATEST_TAG}",
                "modified_at": created,
                **describe_model(model, name),
            }
            for name in model.names.all
        ]
    }


def list_loaded_models(model: LoadedModel) -> dict[str, Any]:
    """Lists the loaded models, for /api/ps: all of them, as the model is never unloaded."""
    extra = {"expires_at": "2318-01-01T00:00:00Z", "size_vram": 0, "context_length": model.engine.context}
    return {
        "models": [
            {"name": f"{name}{LATEST_TAG}", "model": f"{name}{LATEST_TAG}", **describe_model(model, name), **extra}
            for name in model.names.all
        ]
    }


def show_model(model: LoadedModel, created: str, fields: OllamaShow) -> dict[str, Any]:
    """Describes a model, for /api/show: its template, its context length, and whether it supports tools and thinking
    (`capabilities`). `created` is an ISO 8601 time.
    """
    name, prompts = fields.model or fields.name or "", model.prompts
    model_type = model.engine.model.config.model_type
    capabilities = (
        ["completion"]
        + (["tools"] if prompts.chat_format.call_format else [])
        + (["thinking"] if prompts.chat_format.reasoning_marks[0] else [])
    )
    return {
        "modelfile": "",
        "parameters": "",
        "template": prompts.template or "",
        "details": describe_model(model, name)["details"],
        "model_info": {
            "general.architecture": model_type,
            "general.basename": name.removesuffix(LATEST_TAG),
            f"{model_type}.context_length": model.engine.context,
        },
        "capabilities": capabilities,
        "modified_at": created,
    }
