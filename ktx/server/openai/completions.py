"""/v1/completions: text that goes on, for one prompt or many, and what the model thinks of a text (echo)."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ktx.engine.client import RequestGroup
from ktx.engine.prompt import RenderedPrompt
from ktx.engine.request import Finished, PromptLogprobs, TokenEvent
from ktx.engine.sampler import SampledToken
from ktx.server import streaming
from ktx.server.output import LogprobFormatter, clamp_logprob
from ktx.server.preprocess import (
    EngineInput,
    build_grammar,
    build_sampling_params,
    cache_salt,
    check_context_length,
    last_tokens,
    structured_output,
    submit,
)
from ktx.server.protocol.openai import CompletionRequest
from ktx.server.state import ServerState
from ktx.server.worker_threads import RENDER_THREADS, RENDER_TIMEOUT_S, run_with_timeout

DEFAULT_MAX_TOKENS = 16  # OpenAI's number of new tokens where none is named


async def answer(state: ServerState, fields: CompletionRequest, request: Request) -> Response:
    model = state.resolve_model(fields.model)
    engine, _, _ = state.require_ready()
    limit = fields.max_tokens if fields.max_tokens is not None else DEFAULT_MAX_TOKENS
    sampling = build_sampling_params(
        state, fields, limit, logprobs=fields.logprobs, echo=bool(fields.echo and fields.logprobs is not None)
    )
    prompts = await run_with_timeout(RENDER_TIMEOUT_S, RENDER_THREADS, "the prompt", _ids, engine.tokenizer, fields)
    if fields.truncate_prompt_tokens is not None:
        prompts = [last_tokens(state, ids, fields.truncate_prompt_tokens, sampling) for ids in prompts]
    grammar = await build_grammar(structured_output(fields))
    for ids in prompts:
        check_context_length(state, ids, limit)
    asks = [
        EngineInput(RenderedPrompt("", ids, False), sampling, grammar, salt=cache_salt(fields), count=fields.n or 1)
        for ids in prompts
    ]
    chorus = await submit(state, asks, model, fields.lora)
    base = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": state.fingerprint,
    }
    tokens = LogprobFormatter(engine.tokenizer, bool(fields.return_tokens_as_token_ids))
    if not fields.stream:
        return await streaming.json_response(chorus, _whole(chorus, base, tokens, fields, prompts))
    return streaming.sse_response(
        _stream(chorus, base, tokens, fields, prompts), chorus, request.url.path, state.settings.keepalive_s, "[DONE]"
    )


def _ids(tokenizer: Any, fields: CompletionRequest) -> list[list[int]]:
    """The prompts as ids: a text, several, ids, or several lists of them."""
    prompt: Any = fields.prompt
    many = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) or not prompt else prompt
    special = fields.add_special_tokens is not False
    return [
        list(tokenizer(one, add_special_tokens=special)["input_ids"]) if isinstance(one, str) else list(one)
        for one in many
    ]


class LegacyLogprobs:
    """`logprobs` of a completion: four lists side by side. `at` is where the next token's text begins."""

    def __init__(self, tokens: LogprobFormatter, wanted: bool):
        self.tokens, self.wanted, self.at = tokens, wanted, 0

    def of(self, choices: list[SampledToken]) -> dict[str, Any] | None:
        if not self.wanted:
            return None
        lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for choice in choices:
            text = self.tokens.text(choice.token)
            first = choice.logprob is None  # of a prompt: nothing stands before it
            top: dict[str, float] = {}
            for token, logprob in choice.top:
                top.setdefault(self.tokens.name(token), clamp_logprob(logprob))
            for name, value in zip(
                lists,
                (
                    self.tokens.name(choice.token),
                    None if first else clamp_logprob(choice.logprob),
                    None if first else top,
                    self.at,
                ),
                strict=True,
            ):
                lists[name].append(value)
            self.at += len(text)
        return lists


def ending(event: Finished) -> list[SampledToken]:
    """The token that ended an answer is told with the others' log-probabilities: who asked for one token, as lm-eval does, counts on one."""
    return [event.choice] if event.choice is not None else []


def _usage(chorus: RequestGroup, prompts: list[list[int]], ends: dict[int, Finished]) -> dict[str, Any]:
    asked, said = sum(map(len, prompts)), sum(end.usage.answer for end in ends.values())
    cached = sum(end.usage.cached for end in ends.values())
    return {
        "prompt_tokens": asked,
        "completion_tokens": said,
        "total_tokens": asked + said,
        "prompt_tokens_details": {"cached_tokens": min(cached, asked)},
    }


async def _whole(
    chorus: RequestGroup,
    base: dict[str, Any],
    tokens: LogprobFormatter,
    fields: CompletionRequest,
    prompts: list[list[int]],
) -> dict[str, Any]:
    count = len(chorus.requests)
    texts, choices, ends = [""] * count, [list[SampledToken]() for _ in range(count)], dict[int, Finished]()
    async for number, event in chorus:
        if isinstance(event, PromptLogprobs):
            choices[number] = list(event.choices)
        elif isinstance(event, TokenEvent):
            texts[number] += event.text
            choices[number].append(event.choice)
        else:
            streaming.raise_for_finish(event)
            texts[number] += event.text
            choices[number] += ending(event)
            ends[number] = event
    each = fields.n or 1
    if fields.echo:
        decode = tokens.tokenizer.decode
        begun = [decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) for ids in prompts]
        texts = [begun[i // each] + text for i, text in enumerate(texts)]
    wanted = fields.logprobs is not None
    told = [
        {
            "index": i,
            "text": texts[i],
            "logprobs": LegacyLogprobs(tokens, wanted).of(choices[i]),
            "finish_reason": ends[i].reason,
        }
        for i in range(count)
    ]
    return {**base, "choices": told, "usage": _usage(chorus, prompts, ends)}


async def _stream(
    chorus: RequestGroup,
    base: dict[str, Any],
    tokens: LogprobFormatter,
    fields: CompletionRequest,
    prompts: list[list[int]],
) -> AsyncIterator[tuple[None, Any]]:
    usage = bool(fields.stream_options and fields.stream_options.include_usage)
    running = usage and bool(fields.stream_options and fields.stream_options.continuous_usage_stats)
    said = [0 for _ in chorus.requests]
    told = [LegacyLogprobs(tokens, fields.logprobs is not None) for _ in chorus.requests]
    held: list[list[SampledToken]] = [[] for _ in chorus.requests]
    ends: dict[int, Finished] = {}

    def chunk(number: int, text: str, finish: str | None = None) -> tuple[None, Any]:
        choices, held[number] = held[number], []
        one = {"index": number, "text": text, "logprobs": told[number].of(choices), "finish_reason": finish}
        so_far = streaming.usage_so_far(chorus, number, said[number]) if running else None
        return None, {**base, "choices": [one], **({"usage": so_far} if usage else {})}

    async for number, event in chorus:
        if isinstance(event, TokenEvent):
            said[number] += 1
            held[number].append(event.choice)
            if event.text:
                yield chunk(number, event.text)
        elif isinstance(event, Finished):
            streaming.raise_for_finish(event)
            held[number] += ending(event)
            ends[number] = event
            yield chunk(number, event.text, event.reason)
    if usage:
        yield None, {**base, "choices": [], "usage": _usage(chorus, prompts, ends)}
