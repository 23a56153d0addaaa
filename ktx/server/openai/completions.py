"""/v1/completions: continues one or several prompts; with echo and logprobs it scores the prompt."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

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
from ktx.server.state import LoadedModel
from ktx.server.worker_threads import RENDER_THREADS, RENDER_TIMEOUT_S, run_with_timeout

PATH = "/v1/completions"
DEFAULT_MAX_TOKENS = 16  # OpenAI's default


async def answer(model: LoadedModel, fields: CompletionRequest) -> Response:
    """Answers a completion request, as one body or as a stream.

    Raises:
        APIError: the request is invalid, or the engine refused it.
    """
    tokenizer = model.engine.tokenizer
    limit = fields.max_tokens if fields.max_tokens is not None else DEFAULT_MAX_TOKENS
    sampling = build_sampling_params(
        model, fields, limit, logprobs=fields.logprobs, echo=bool(fields.echo and fields.logprobs is not None)
    )
    prompts = await run_with_timeout(
        RENDER_TIMEOUT_S, RENDER_THREADS, "the prompt", _tokenize_prompts, tokenizer, fields
    )
    if fields.truncate_prompt_tokens is not None:
        prompts = [last_tokens(model, ids, fields.truncate_prompt_tokens, sampling) for ids in prompts]
    grammar = await build_grammar(structured_output(fields))
    for ids in prompts:
        check_context_length(model, ids, limit)
    engine_inputs = [
        EngineInput(
            RenderedPrompt("", ids, thinking=False), sampling, grammar, salt=cache_salt(fields), count=fields.n or 1
        )
        for ids in prompts
    ]
    group = await submit(model, engine_inputs, fields.model, fields.lora)
    base = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": fields.model,
        "system_fingerprint": model.fingerprint,
    }
    formatter = LogprobFormatter(tokenizer, bool(fields.return_tokens_as_token_ids))
    if not fields.stream:
        return await streaming.json_response(group, _complete(group, base, formatter, fields, prompts))
    return streaming.sse_response(
        _stream(group, base, formatter, fields, prompts), group, PATH, model.settings.keepalive_s, "[DONE]"
    )


def _tokenize_prompts(tokenizer: Any, fields: CompletionRequest) -> list[list[int]]:
    """Returns the token ids of each prompt. The request has one text, several texts, one list of ids or several."""
    prompt: Any = fields.prompt
    prompts = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) or not prompt else prompt
    special = fields.add_special_tokens is not False
    return [
        list(tokenizer(item, add_special_tokens=special)["input_ids"]) if isinstance(item, str) else list(item)
        for item in prompts
    ]


class LegacyLogprobs:
    """Formats the `logprobs` of a completion: four parallel lists. `offset` is where the next token's text starts.

    Args:
        formatter: formats the tokens.
        enabled: whether the request has log probabilities.
    """

    def __init__(self, formatter: LogprobFormatter, enabled: bool):
        self.formatter, self.enabled, self.offset = formatter, enabled, 0

    def logprobs_of(self, tokens: list[SampledToken]) -> dict[str, Any] | None:
        """Returns the lists of the next tokens and advances `offset`; None if the request has no logprobs."""
        if not self.enabled:
            return None
        lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for sampled in tokens:
            text = self.formatter.text(sampled.token)
            is_first = sampled.logprob is None  # the first token of a prompt has no probability
            top: dict[str, float] = {}  # tokens with the same text share an entry: the most probable one's
            for token, logprob in sampled.top:
                top.setdefault(self.formatter.name(token), clamp_logprob(logprob))
            for name, value in zip(
                lists,
                (
                    self.formatter.name(sampled.token),
                    None if is_first else clamp_logprob(sampled.logprob),
                    None if is_first else top,
                    self.offset,
                ),
                strict=True,
            ):
                lists[name].append(value)
            self.offset += len(text)
        return lists


def finish_token(event: Finished) -> list[SampledToken]:
    """Returns the token that ended the output, as a list; empty if no token did.

    It is reported in `logprobs`, because a client that requests one token, such as lm-eval, expects one entry.
    """
    return [event.end_token] if event.end_token is not None else []


def _usage(group: RequestGroup, prompts: list[list[int]], finished: dict[int, Finished]) -> dict[str, Any]:
    """Returns the `usage` of all prompts and choices. Each choice counts the cached tokens of its prompt, so their sum
    is limited to the prompts' tokens.
    """
    num_prompt_tokens, num_output_tokens = (
        sum(map(len, prompts)),
        sum(event.usage.answer for event in finished.values()),
    )
    num_cached = sum(event.usage.cached for event in finished.values())
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": min(num_cached, num_prompt_tokens)},
    }


async def _complete(
    group: RequestGroup,
    base: dict[str, Any],
    formatter: LogprobFormatter,
    fields: CompletionRequest,
    prompts: list[list[int]],
) -> dict[str, Any]:
    """Collects the output of all choices and returns the whole response."""
    num_choices = len(group.requests)
    texts, tokens, finished = (
        [""] * num_choices,
        [list[SampledToken]() for _ in range(num_choices)],
        dict[int, Finished](),
    )
    async for index, event in group:
        if isinstance(event, PromptLogprobs):
            tokens[index] = list(event.tokens)
        elif isinstance(event, TokenEvent):
            texts[index] += event.text
            tokens[index].append(event.token)
        else:
            streaming.raise_for_finish(event)
            texts[index] += event.text
            tokens[index] += finish_token(event)
            finished[index] = event
    choices_per_prompt = fields.n or 1
    if fields.echo:
        decode = formatter.tokenizer.decode
        prompt_texts = [decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) for ids in prompts]
        texts = [prompt_texts[i // choices_per_prompt] + text for i, text in enumerate(texts)]
    wants_logprobs = fields.logprobs is not None
    choice_dicts = [
        {
            "index": i,
            "text": texts[i],
            "logprobs": LegacyLogprobs(formatter, wants_logprobs).logprobs_of(tokens[i]),
            "finish_reason": finished[i].reason,
        }
        for i in range(num_choices)
    ]
    return {**base, "choices": choice_dicts, "usage": _usage(group, prompts, finished)}


async def _stream(
    group: RequestGroup,
    base: dict[str, Any],
    formatter: LogprobFormatter,
    fields: CompletionRequest,
    prompts: list[list[int]],
) -> AsyncIterator[tuple[None, dict[str, Any]]]:
    """Yields the chunks of a streamed response; one with the usage comes last if the request has `include_usage`."""
    include_usage = bool(fields.stream_options and fields.stream_options.include_usage)
    continuous_usage = include_usage and bool(fields.stream_options and fields.stream_options.continuous_usage_stats)
    num_tokens = [0 for _ in group.requests]
    logprob_formatters = [LegacyLogprobs(formatter, fields.logprobs is not None) for _ in group.requests]
    pending: list[list[SampledToken]] = [[] for _ in group.requests]
    finished: dict[int, Finished] = {}

    def chunk(index: int, text: str, finish: str | None = None) -> tuple[None, dict[str, Any]]:
        """Returns an event without a name: a chunk with one choice's new text and the log probabilities of its pending
        tokens.
        """
        tokens, pending[index] = pending[index], []
        choice = {
            "index": index,
            "text": text,
            "logprobs": logprob_formatters[index].logprobs_of(tokens),
            "finish_reason": finish,
        }
        usage_dict = streaming.usage_so_far(group, index, num_tokens[index]) if continuous_usage else None
        return None, {**base, "choices": [choice], **({"usage": usage_dict} if include_usage else {})}

    async for index, event in group:
        if isinstance(event, TokenEvent):
            num_tokens[index] += 1
            pending[index].append(event.token)
            if event.text:
                yield chunk(index, event.text)
        elif isinstance(event, Finished):
            streaming.raise_for_finish(event)
            pending[index] += finish_token(event)
            finished[index] = event
            yield chunk(index, event.text, event.reason)
    if include_usage:
        yield None, {**base, "choices": [], "usage": _usage(group, prompts, finished)}
