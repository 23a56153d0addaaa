"""Converts a validated request of any protocol to the engine's input: token ids, sampling parameters, a grammar."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from ktx.chat_formats import ChatFormat, Parser, forced_call_grammar
from ktx.engine.client import RequestGroup
from ktx.engine.grammar import GrammarMatcher, check_schema, choice_grammar, regex_grammar, schema_grammar
from ktx.engine.prompt import RenderedPrompt
from ktx.engine.sampler import SamplingParams
from ktx.errors import ContextExceeded
from ktx.server.errors import APIError, to_api_error
from ktx.server.lora import resolve_adapters
from ktx.server.protocol.openai import Format, LoraUse, SamplingFields, Structured, StructuredOutputFields
from ktx.server.protocol.parameters import note_ignored
from ktx.server.state import LoadedModel
from ktx.server.worker_threads import (
    COMPILE_THREADS,
    COMPILE_TIMEOUT_S,
    RENDER_THREADS,
    RENDER_TIMEOUT_S,
    run_with_timeout,
)

log = logging.getLogger("ktx.server")


@dataclass(frozen=True, kw_only=True)
class ChatInput:
    """A chat request of any protocol, without its sampling parameters.

    Attributes:
        messages: the conversation, in OpenAI's format.
        tools: the tools, in OpenAI's format.
        tool_choice: auto, none, required, a function's name, or a list of allowed names.
        parallel_tool_calls: whether a forced call may be several calls.
        template_kwargs: arguments of the chat template.
        response_format: the format of the answer.
        thinking: whether the model reasons; None: the model's default.
        add_generation_prompt: the prompt ends with the start of an assistant message.
        continue_final_message: the answer continues the last message.
        template: name of the chat template, for a model with several.
        truncate: keep this many of the prompt's last tokens, see `last_tokens`.
        count: number of answers.
        salt: the hashed cache salt.
    """

    messages: Sequence[dict[str, Any]]
    tools: Sequence[dict[str, Any]] = ()
    tool_choice: str | list[str] = "auto"
    parallel_tool_calls: bool = True
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    response_format: Format | None = None
    thinking: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template: str | None = None
    truncate: int | None = None
    count: int = 1
    salt: bytes = b""


@dataclass(frozen=True)
class EngineInput:
    """The input of `count` equal requests to the engine, and what the parser of their output needs.

    Every protocol converts its requests to it; `submit` makes the engine's requests of it.
    """

    rendered: RenderedPrompt
    sampling: SamplingParams
    grammar: tuple[str, str] | None = None  # Lark rules, and the text after which they apply
    tools: Sequence[dict[str, Any]] = ()  # in OpenAI's format
    salt: bytes = b""  # hash of the cache salt
    count: int = 1

    def parser(self, chat_format: ChatFormat) -> Parser:
        """Returns a new parser for the output of one request."""
        rendered = self.rendered
        return Parser(
            chat_format,
            self.tools,
            thinking=rendered.thinking,
            prefill_text=rendered.prefill_text,
        )


def reasoning_kwargs(effort: str | None) -> dict[str, Any]:
    """Converts OpenAI's reasoning_effort to the chat template kwargs of several model families."""
    if effort is None:
        return {}
    thinks = effort != "none"
    template_effort = {"none": "low", "minimal": "low", "xhigh": "high", "max": "high"}.get(effort, effort)
    return {"enable_thinking": thinks, "thinking": thinks, "reasoning_effort": template_effort}


def restrict_tools(
    tools: list[dict[str, Any]], names: list[str], mode: str
) -> tuple[list[dict[str, Any]], str | list[str]]:
    """Applies a tool_choice that allows only some tools.

    Args:
        tools: tools of the request, in OpenAI's format.
        names: names of the allowed tools.
        mode: "required" if the model must call one of them, else "auto".

    Returns:
        The tools that the prompt contains, and the tool choice. With "auto" the other tools are removed from the
        prompt, because no grammar constrains output that may also be text.

    Raises:
        APIError: 400, a name is not one of the tools, or there are no names.
    """
    known = [tool["function"]["name"] for tool in tools]
    if not names or not set(names) <= set(known):
        raise APIError(400, f"tool_choice allows {names}, but the tools are {known}", "tool_choice")
    if mode == "required":
        return tools, names
    return [tool for tool in tools if tool["function"]["name"] in names], "auto"


def build_sampling_params(
    model: LoadedModel, fields: SamplingFields | Mapping[str, Any], limit: int | None, **more: Any
) -> SamplingParams:
    """Builds the sampling parameters of a request; defaults are the server's, then the model's.

    Args:
        model: the loaded model.
        fields: the request, or a dict of its parameters under OpenAI's names.
        limit: max new tokens; None: the server's limit, else the rest of the context.
        more: further fields of `SamplingParams`.

    Raises:
        APIError: 400, min_tokens is larger than the limit.
    """
    params = fields if isinstance(fields, Mapping) else fields.model_dump(exclude_none=True)
    names = (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "typical_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "seed",
        "ignore_eos",
        "min_tokens",
        "repeat_last_n",
    )
    values = model.defaults | {name: params[name] for name in names if name in params}
    values["top_k"] = max(0, values.get("top_k", 0))
    stop = params.get("stop") or ()
    bias = {int(token): float(value) for token, value in (params.get("logit_bias") or {}).items()}
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    max_new_tokens = limit if limit is not None else model.settings.max_new_tokens or 1 << 30
    if values.get("min_tokens", 0) > max_new_tokens:
        raise APIError(
            400,
            f"min_tokens is {values['min_tokens']}, but the answer may have at most {max_new_tokens} tokens",
            "min_tokens",
        )
    return SamplingParams(
        **values,
        stop=stop,
        hidden=frozenset() if params.get("skip_special_tokens") is False else _hidden_tokens(model, stop),
        include_stop=bool(params.get("include_stop_str_in_output")),
        stop_ids=tuple(params.get("stop_token_ids") or ()),
        logit_bias=bias,
        max_new_tokens=max_new_tokens,
        **more,
    )


def _hidden_tokens(model: LoadedModel, stop: Sequence[str]) -> frozenset[int]:
    """Returns the special tokens that are removed from the text.

    A special token that overlaps a stop string stays, because the stop string could not match without it.
    """
    prompts = model.prompts
    in_stop_strings = {
        token
        for text, token in prompts.special.items()
        if any(text in stop_string or stop_string in text for stop_string in stop)
    }
    return prompts.textless_ids - in_stop_strings


def cache_salt(fields: SamplingFields) -> bytes:
    """Returns the hash of the request's cache salt. Requests with different salts share no pages of the KV cache."""
    return hashlib.sha256(fields.cache_salt.encode()).digest()[:16] if fields.cache_salt else b""


async def build_engine_input(model: LoadedModel, chat: ChatInput, sampling: SamplingParams) -> EngineInput:
    """Renders a chat request to tokens and builds the grammar of its tool choice or response format.

    Args:
        model: the loaded model.
        chat: the request.
        sampling: the sampling parameters.

    Raises:
        APIError: the request is invalid, or rendering or compiling timed out.
    """
    tools = () if chat.tool_choice == "none" else chat.tools
    is_forced_call = bool(tools) and chat.tool_choice != "auto"
    has_format = chat.response_format is not None and chat.response_format.type != "text"
    if chat.continue_final_message and (has_format or is_forced_call):
        kind, param = ("a response format", "response_format") if has_format else ("tool calls", "tool_choice")
        raise APIError(400, f"an answer that continues the last message cannot be constrained to {kind}", param)
    kwargs = {} if chat.thinking is None else {"enable_thinking": chat.thinking, "thinking": chat.thinking}
    kwargs |= chat.template_kwargs
    may_think = chat.thinking is not False and kwargs.get("enable_thinking") is not False
    render = partial(
        model.prompts.render,
        chat.messages,
        tools,
        template_kwargs=kwargs,
        force_think=model.settings.force_think and may_think,
        add_generation_prompt=chat.add_generation_prompt,
        continue_final_message=chat.continue_final_message,
        template_name=chat.template,
    )
    rendered = await run_with_timeout(RENDER_TIMEOUT_S, RENDER_THREADS, "the prompt", render)
    if tools:
        _check_tools(model, rendered.tools_not_rendered)
    if chat.truncate is not None:
        rendered = replace(rendered, ids=last_tokens(model, rendered.ids, chat.truncate, sampling))
    grammar = None
    if is_forced_call:
        grammar = await _build_call_grammar(model, chat, rendered.thinking)
    elif has_format:
        grammar = await build_grammar(chat.response_format, _answer_start(model.prompts.chat_format, rendered.thinking))
    return EngineInput(rendered, sampling, grammar, tools, chat.salt, chat.count)


async def _build_call_grammar(model: LoadedModel, chat: ChatInput, thinking: bool) -> tuple[str, str]:
    """Returns Lark rules that allow only tool calls, and an empty text: they apply from the start of the output.

    Args:
        model: the loaded model.
        chat: the request, whose tool choice is required, a function's name, or a list of allowed names.
        thinking: whether the prompt ends inside the reasoning block.

    Raises:
        APIError: 400, the format of the model's tool calls is unknown or a schema is too large.
    """
    chat_format = model.prompts.chat_format
    if chat_format.call_format is None:
        raise APIError(
            400,
            f"tool_choice: the format of this model's tool calls is unknown ({chat_format.name}), so it cannot be"
            " forced to call a function",
            "tool_choice",
        )
    choice = chat.tool_choice
    names = choice if isinstance(choice, list) else None if choice == "required" else [choice]
    rules = await run_with_timeout(
        COMPILE_TIMEOUT_S,
        COMPILE_THREADS,
        "the grammar",
        _forced_call_rules,
        chat_format,
        chat.tools,
        names,
        chat.parallel_tool_calls,
        model.prompts.special,
        thinking,
    )
    return rules, ""


def _answer_start(chat_format: ChatFormat, thinking: bool) -> str:
    """Returns the text after which the answer starts: the end of the reasoning, which a response format does not
    constrain. Empty if the output starts with the answer.
    """
    if chat_format.call_format is not None and chat_format.call_format.style == "harmony":
        return "<|channel|>final<|message|>"
    return chat_format.reasoning_marks[1] if thinking else ""


def _check_tools(model: LoadedModel, not_rendered: bool) -> None:
    """Reports tools that have no effect: in a header of each response and once in the log."""
    if not_rendered:
        note_ignored("tools")
        model.warn_once("the model's chat template does not render tools: the model does not see them")
    elif model.prompts.chat_format.call_format is None:
        model.warn_once("the format of this model's tool calls is unknown: its calls are returned as text")


def last_tokens(model: LoadedModel, ids: list[int], count: int, sampling: SamplingParams) -> list[int]:
    """Returns the last tokens of a prompt.

    Args:
        model: the loaded model.
        ids: the prompt.
        count: number of tokens; -1: as many as fit into the context together with the answer.
        sampling: the sampling parameters, whose limit is the length of the answer.
    """
    if count < 0:
        context_length = model.engine.context
        count = max(1, context_length - min(sampling.max_new_tokens, context_length - 1))
    return ids[max(0, len(ids) - count) :]


def _forced_call_rules(
    chat_format: ChatFormat, tools: Sequence[dict[str, Any]], names: list[str] | None, *more: Any
) -> str:
    """Returns Lark rules that allow only tool calls. Checks the size of the functions' schemas first.

    Args:
        chat_format: the model's chat format.
        tools: the request's tools.
        names: the functions that may be called; None: any.
        more: further arguments of `forced_call_grammar`.
    """
    for tool in tools:
        if names is None or tool["function"]["name"] in names:
            check_schema(tool["function"].get("parameters") or {})
    return forced_call_grammar(chat_format, tools, names, *more)


async def build_grammar(format: Format | None, trigger: str = "") -> tuple[str, str] | None:
    """Returns the Lark rules of a response format and the text after which they apply; None for plain text."""
    if format is None or format.type == "text":
        return None
    return await run_with_timeout(COMPILE_TIMEOUT_S, COMPILE_THREADS, "the grammar", format_rules, format), trigger


def format_rules(format: Format) -> str:
    """Returns the Lark rules of a response format."""
    if format.type == "json_object":
        return schema_grammar(True)
    if format.type == "json_schema":
        assert format.json_schema is not None
        return schema_grammar(format.json_schema.schema_)
    return regex_grammar(format.pattern or "") if format.type == "regex" else format.grammar or ""


def structured_output(fields: StructuredOutputFields) -> Format | None:
    """Returns the format that a request constrains its answer to: OpenAI's response_format or one of vLLM's guides.

    Raises:
        APIError: 400, the JSON schema is a text that is not JSON.
    """

    def first(*candidates: Any) -> Any:
        """Returns the first candidate that is set."""
        return next((candidate for candidate in candidates if candidate is not None), None)

    structured = fields.structured_outputs or Structured(json=None)
    schema, regex = first(fields.guided_json, structured.json_), first(fields.guided_regex, structured.regex)
    choice, grammar = first(fields.guided_choice, structured.choice), first(fields.guided_grammar, structured.grammar)
    if schema is not None:
        name = "guided_json" if fields.guided_json is not None else "structured_outputs"
        try:
            schema = json.loads(schema) if isinstance(schema, str) else schema
        except ValueError as error:
            raise APIError(400, f"{name} is not valid JSON: {error}", name) from error
        return Format.model_validate({"type": "json_schema", "json_schema": {"schema": schema}})
    if regex is not None:
        return Format(type="regex", pattern=regex)
    if choice is not None:
        return Format(type="grammar", grammar=choice_grammar(choice))
    if grammar is not None:
        return Format(type="grammar", grammar=grammar)
    return Format(type="json_object") if structured.json_object else fields.response_format


def check_context_length(model: LoadedModel, prompt: Sequence[int], limit: int | None) -> None:
    """Raises APIError (400) if the token ids of a prompt and the `limit` of new tokens do not fit into the context."""
    context_length = model.engine.context
    if len(prompt) + (limit or 0) > context_length:
        breakdown = f"{len(prompt)} in the prompt" + (f" and {limit} in the answer" if limit else "")
        raise APIError(
            400,
            f"this model's context holds {context_length} tokens, the request needs {len(prompt) + (limit or 0)}:"
            f" {breakdown}",
            "messages",
            ContextExceeded.code,
        )


async def submit(
    model: LoadedModel, engine_inputs: Sequence[EngineInput], name: str, lora: Sequence[LoraUse] | None = None
) -> RequestGroup:
    """Queues the requests of all inputs, each `count` times; the group's indices run through all of them.

    Either all requests are queued or none.

    Args:
        model: the loaded model.
        engine_inputs: the inputs.
        name: the model name of the request, which selects the LoRA adapter.
        lora: LoRA adapters by id, only with the base model.

    Raises:
        APIError: an adapter is unknown, a grammar is invalid or the engine refused a request.
    """
    engine, uses = model.engine, resolve_adapters(model.names, name, lora)
    requests = [(engine_input, i) for engine_input in engine_inputs for i in range(engine_input.count)]
    # one constraint per request, compiled before any request is queued, because a grammar may be invalid
    constraints = [await _compile_grammar(model, engine_input.grammar) for engine_input, _ in requests]
    group = RequestGroup(engine)
    if model.settings.log_prompts:
        for engine_input in engine_inputs:
            rendered = engine_input.rendered
            log.info("asked", extra={"prompt": rendered.text or engine.tokenizer.decode(rendered.ids)})
    try:
        for (engine_input, i), constraint in zip(requests, constraints, strict=True):
            sampling = engine_input.sampling
            # with a seed, further answers of an input must not equal the first one
            if i and sampling.seed is not None:
                sampling = replace(sampling, seed=sampling.seed + i)
            group.submit(engine_input.rendered.ids, sampling, constraint, engine_input.salt, uses)
    except BaseException as error:
        group.close()
        if isinstance(error, Exception):
            raise to_api_error(error) from error
        raise
    return group


async def _compile_grammar(model: LoadedModel, grammar: tuple[str, str] | None) -> GrammarMatcher | None:
    """Returns the matcher of a grammar; None without one. Raises APIError (400) if the grammar is invalid."""
    if grammar is None:
        return None
    return await run_with_timeout(COMPILE_TIMEOUT_S, COMPILE_THREADS, "the grammar", model.grammars.compile, *grammar)
