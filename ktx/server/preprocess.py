"""A checked request -> what the engine is asked: ids, settings, a grammar."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ktx.chat_formats import ChatFormat, Parser, forced_call_grammar
from ktx.engine.client import RequestGroup
from ktx.engine.grammar import check_schema, rules_of_choice, rules_of_regex, rules_of_schema
from ktx.engine.prompt import RenderedPrompt
from ktx.engine.sampler import SamplingParams
from ktx.errors import ContextExceeded
from ktx.server.errors import APIError, to_api_error
from ktx.server.lora import resolve_adapters
from ktx.server.protocol.openai import Format, LoraUse, SamplingFields, Structured, StructuredOutputFields
from ktx.server.protocol.parameters import ignore
from ktx.server.state import ServerState
from ktx.server.worker_threads import (
    COMPILE_THREADS,
    COMPILE_TIMEOUT_S,
    RENDER_THREADS,
    RENDER_TIMEOUT_S,
    run_with_timeout,
)

log = logging.getLogger("ktx.server")


@dataclass
class ChatInput:
    """A chat-like request in the words that all protocols share."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = field(default_factory=list)  # OpenAI's form
    tool_choice: str | list[str] = "auto"  # auto, none, required, or which functions: a name, or several to choose from
    parallel_tool_calls: bool = True
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # for the template
    response_format: Format | None = None
    thinking: bool | None = None  # None: as the model does by itself
    answers_in_text: bool = True  # the prompt ends where the assistant speaks
    continue_final_message: bool = False  # the answer goes on with the last message
    template: str | None = None  # its name, where the model has several
    truncate: int | None = None  # tokens of the prompt that are read, its last ones


@dataclass
class EngineInput:
    """What goes to the engine, `count` times, and how the answers are read."""

    rendered: RenderedPrompt
    sampling: SamplingParams
    grammar: tuple[str, str] | None = None  # Lark rules, and the text behind which they begin
    tools: list[dict[str, Any]] = field(default_factory=list)
    parse_calls: bool = False
    salt: bytes = b""
    count: int = 1

    def parser(self, state: ServerState) -> Parser:
        assert state.prompts is not None
        rendered = self.rendered
        return Parser(
            state.prompts.dialect, self.tools, rendered.thinking, self.parse_calls, said=rendered.prefill_text
        )


def reasoning_kwargs(effort: str | None) -> dict[str, Any]:
    """What templates of several families understand of OpenAI's reasoning_effort."""
    if effort is None:
        return {}
    thinks = effort != "none"
    told = {"none": "low", "minimal": "low", "xhigh": "high", "max": "high"}.get(effort, effort)
    return {"enable_thinking": thinks, "thinking": thinks, "reasoning_effort": told}


def restrict_tools(
    tools: list[dict[str, Any]], names: list[str], mode: str
) -> tuple[list[dict[str, Any]], str | list[str]]:
    """What the model is told of and must choose from, where only some tools may be called. Problem 400 for names that none has."""
    known = [tool["function"]["name"] for tool in tools]
    if not names or not set(names) <= set(known):
        raise APIError(400, f"tool_choice allows {names}, tools are {known}", "tool_choice")
    if mode == "required":
        return tools, names
    return [
        tool for tool in tools if tool["function"]["name"] in names
    ], "auto"  # no grammar binds what may also be text


def build_sampling_params(
    state: ServerState, fields: SamplingFields | Mapping[str, Any], limit: int | None, **more: Any
) -> SamplingParams:
    """The request's settings over the server's and the model's. `limit`: of new tokens; None: the server's, else what the context leaves."""
    given = fields if isinstance(fields, Mapping) else fields.model_dump(exclude_none=True)
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
    chosen = state.defaults | {name: given[name] for name in names if name in given}
    chosen["top_k"] = max(0, chosen.get("top_k", 0))
    stop = given.get("stop") or ()
    bias = {int(token): float(value) for token, value in (given.get("logit_bias") or {}).items()}
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    most = limit if limit is not None else state.settings.max_new_tokens or 1 << 30
    if chosen.get("min_tokens", 0) > most:
        raise APIError(400, f"min_tokens is {chosen['min_tokens']}, the answer has {most} at most", "min_tokens")
    return SamplingParams(
        **chosen,
        stop=stop,
        hidden=frozenset() if given.get("skip_special_tokens") is False else _hidden(state, stop),
        include_stop=bool(given.get("include_stop_str_in_output")),
        stop_ids=tuple(given.get("stop_token_ids") or ()),
        logit_bias=bias,
        max_new_tokens=most,
        **more,
    )


def _hidden(state: ServerState, stop: Sequence[str]) -> frozenset[int]:
    """Special tokens that are not shown. One that a stop string is made of is read as text: else it would end nothing."""
    _, prompts, _ = state.require_ready()
    named = {token for word, token in prompts.special.items() if any(word in one or one in word for one in stop)}
    return prompts.silent - named


def cache_salt(fields: SamplingFields) -> bytes:
    """Requests with different salts share no pages."""
    return hashlib.sha256(fields.cache_salt.encode()).digest()[:16] if fields.cache_salt else b""


async def build_engine_input(
    state: ServerState, talk: ChatInput, sampling: SamplingParams, count: int = 1, salt: bytes = b""
) -> EngineInput:
    """A conversation as the engine is asked it."""
    _, prompts, _ = state.require_ready()
    tools = talk.tools if talk.tool_choice != "none" else []
    formed = talk.response_format is not None and talk.response_format.type != "text"
    if talk.continue_final_message and (formed or (tools and talk.tool_choice != "auto")):
        kind, param = ("a format", "response_format") if formed else ("calls", "tool_choice")
        raise APIError(400, f"an answer that goes on with the last message cannot be held to {kind}", param)
    words = dict(talk.template_kwargs)
    if talk.thinking is not None:
        words = {"enable_thinking": talk.thinking, "thinking": talk.thinking} | words
    force = state.settings.force_think and talk.thinking is not False and words.get("enable_thinking") is not False
    how = (talk.messages, tools, words, force, talk.answers_in_text, talk.continue_final_message, talk.template)
    rendered = await run_with_timeout(RENDER_TIMEOUT_S, RENDER_THREADS, "the prompt", prompts.render, *how)
    if tools:
        _check_tools(state, rendered.tools_not_rendered)
    if talk.truncate is not None:
        rendered = replace(rendered, ids=last_tokens(state, rendered.ids, talk.truncate, sampling))
    asked = EngineInput(rendered, sampling, None, tools, bool(tools), salt, count)
    if tools and talk.tool_choice != "auto":
        names = (
            None
            if talk.tool_choice == "required"
            else [talk.tool_choice]
            if isinstance(talk.tool_choice, str)
            else talk.tool_choice
        )
        if prompts.dialect.format is None:
            raise APIError(400, f"this model ({prompts.dialect.name}) cannot be made to call a function", "tool_choice")
        forced = (prompts.dialect, tools, names, talk.parallel_tool_calls, prompts.special, rendered.thinking)
        asked.grammar = (await run_with_timeout(COMPILE_TIMEOUT_S, COMPILE_THREADS, "the grammar", _forced, *forced), "")
    elif talk.response_format is not None and formed:
        after = ""
        if prompts.dialect.format is not None and prompts.dialect.format.style == "harmony":
            after = "<|channel|>final<|message|>"
        elif rendered.thinking:
            after = prompts.dialect.think[1]
        asked.grammar = await build_grammar(talk.response_format, after)
    return asked


def _check_tools(state: ServerState, untold: bool) -> None:
    """Says where tools have no effect: in the answer's header each time, in the log once for a model."""
    _, prompts, _ = state.require_ready()
    if untold:
        ignore("tools")
        state.warn_once("the model's chat template writes nothing of tools: the model does not hear of them")
    elif prompts.dialect.format is None:
        state.warn_once("how this model writes calls is not known: its calls are text of the answer")


def last_tokens(state: ServerState, ids: list[int], count: int, sampling: SamplingParams) -> list[int]:
    """The last `count` tokens of a prompt; -1: as many as the context holds beside the answer."""
    engine, _, _ = state.require_ready()
    if count < 0:
        count = max(1, engine.context - min(sampling.max_new_tokens, engine.context - 1))
    return ids[max(0, len(ids) - count) :]


def _forced(dialect: ChatFormat, tools: list[dict[str, Any]], names: list[str] | None, *more: Any) -> str:
    """Lark rules of nothing but calls, once the schemas of what may be called are known to be of bearable size."""
    for tool in tools:
        if names is None or tool["function"]["name"] in names:
            check_schema(tool["function"].get("parameters") or {})
    return forced_call_grammar(dialect, tools, names, *more)


async def build_grammar(format: Format | None, after: str = "") -> tuple[str, str] | None:
    """What a response format asks for: rules, and the mark behind which they begin. None for plain text."""
    if format is None or format.type == "text":
        return None
    return await run_with_timeout(COMPILE_TIMEOUT_S, COMPILE_THREADS, "the grammar", format_rules, format), after


def format_rules(format: Format) -> str:
    """Lark rules of a response format."""
    if format.type == "json_object":
        return rules_of_schema(True)
    if format.type == "json_schema":
        assert format.json_schema is not None
        return rules_of_schema(format.json_schema.schema_)
    return rules_of_regex(format.pattern or "") if format.type == "regex" else format.grammar or ""


def structured_output(fields: StructuredOutputFields) -> Format | None:
    """The one format that a request asks for, by OpenAI's name or by one of vLLM's."""

    def first(*given: Any) -> Any:
        return next((one for one in given if one is not None), None)

    more = fields.structured_outputs or Structured(json=None)
    schema, regex = first(fields.guided_json, more.json_), first(fields.guided_regex, more.regex)
    choice, grammar = first(fields.guided_choice, more.choice), first(fields.guided_grammar, more.grammar)
    if schema is not None:
        name = "guided_json" if fields.guided_json is not None else "structured_outputs"
        try:
            schema = json.loads(schema) if isinstance(schema, str) else schema
        except ValueError as error:
            raise APIError(400, f"{name} is no JSON: {error}", name) from error
        return Format.model_validate({"type": "json_schema", "json_schema": {"schema": schema}})
    if regex is not None:
        return Format(type="regex", pattern=regex)
    if choice is not None:
        return Format(type="grammar", grammar=rules_of_choice(choice))
    if grammar is not None:
        return Format(type="grammar", grammar=grammar)
    return Format(type="json_object") if more.json_object else fields.response_format


def check_context_length(state: ServerState, prompt: Sequence[int], limit: int | None) -> None:
    """Problem 400 for a request that can never be answered: the numbers tell why."""
    engine, _, _ = state.require_ready()
    most = engine.context
    if len(prompt) + (limit or 0) > most:
        wanted = f"{len(prompt)} in the prompt" + (f" and {limit} in the answer" if limit else "")
        raise APIError(
            400,
            f"this model's context holds {most} tokens, the request asks for {len(prompt) + (limit or 0)}: {wanted}",
            "messages",
            ContextExceeded.code,
        )


async def submit(
    state: ServerState, asks: Sequence[EngineInput], model: str, lora: Sequence[LoraUse] | None = None
) -> RequestGroup:
    """Queues all of them for the served name `model`, or with adapters by number, each as often as it says; the numbers run through. None of them runs when one cannot."""
    engine, _, grammars = state.require_ready()
    uses = resolve_adapters(state, model, lora)
    constraints = []
    for ask in asks:
        for _ in range(ask.count):
            made = None
            if ask.grammar is not None:
                made = await run_with_timeout(
                    COMPILE_TIMEOUT_S, COMPILE_THREADS, "the grammar", grammars.constraint, *ask.grammar
                )
            constraints.append(made)
    chorus = RequestGroup(engine)
    if not state.settings.hide_input:
        for ask in asks:
            log.info("asked", extra={"prompt": ask.rendered.text or engine.tokenizer.decode(ask.rendered.ids)})
    try:
        number = 0
        for ask in asks:
            for i in range(ask.count):
                sampling = ask.sampling
                if i and sampling.seed is not None:
                    sampling = replace(sampling, seed=sampling.seed + i)
                chorus.submit(ask.rendered.ids, sampling, constraints[number], ask.salt, uses)
                number += 1
    except BaseException as error:
        chorus.close()
        if isinstance(error, Exception):
            raise to_api_error(error) from error
        raise
    return chorus
