"""The clients of `ktx bench serve`: concurrent streams from /v1/completions, with the arrival times of tokens."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from ktx.errors import KtxError

CALIBRATION_WORDS = (64, 192)  # words of the two prompts from which the number of tokens per word is estimated
WORDS = (
    "the of and to in is that it was for on are as with his they at be this from have or by one had not but what all "
    "were when we there can an your which their said if do will each about how up out them then she many some so these"
).split()


@dataclass
class Timing:
    """Times of one request, in seconds of one clock.

    `chunks` are the arrival times of stream events that have tokens, with their number. `error` is empty when the
    request succeeded.
    """

    start: float
    end: float = 0.0
    chunks: list[tuple[float, int]] = field(default_factory=list)
    prompt: int = 0
    cached: int = 0
    answer: int = 0
    finished: bool = False
    error: str = ""

    def read(self, line: str, now: float) -> None:
        """Reads a line of the server-sent events, which arrived at time `now`: tokens, usage, the end or an error."""
        if not line.startswith("data: ") or line == "data: [DONE]":
            return
        event = json.loads(line[6:])  # after "data: "
        if "error" in event:
            self.error = _error_message(event)
            return
        usage, choices = event.get("usage") or {}, event.get("choices") or ()
        # Without usage, an event with text counts as one token.
        num_tokens = usage.get("completion_tokens", self.answer + any(choice.get("text") for choice in choices))
        if choices and num_tokens > self.answer:
            self.chunks.append((now, num_tokens - self.answer))
        self.answer = max(num_tokens, self.answer)
        self.finished |= any(choice.get("finish_reason") for choice in choices)
        self.prompt = usage.get("prompt_tokens", self.prompt)
        self.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", self.cached)

    @property
    def ttft_s(self) -> float:
        """Seconds from the request to its first token (TTFT)."""
        return self.chunks[0][0] - self.start

    @property
    def inter_token_s(self) -> list[float]:
        """Inter-token latencies in seconds; the tokens of one event share the time since the event before it."""
        pairs = zip(self.chunks, self.chunks[1:], strict=False)
        return [(now - previous) / count for (previous, _), (now, count) in pairs for _ in range(count)]


def _error_message(value: Any) -> str:
    """Returns the message of an error's JSON."""
    error = value.get("error", value) if isinstance(value, dict) else value
    return str(error.get("message", error) if isinstance(error, dict) else error)


@dataclass
class Load:
    """Parameters of all requests. With `same` they all have one prompt and one seed."""

    model: str
    prompt_tokens: int
    answer_tokens: int
    shared_prefix: int = 0
    same: bool = False
    temperature: float = 0.0

    def body(self, prompt: Any, seed: int) -> dict[str, Any]:
        """Returns the JSON body of a streaming request that generates exactly `answer_tokens`.

        `ignore_eos` fixes the length; usage in every event shows how many tokens an event has.
        """
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": self.answer_tokens,
            "temperature": self.temperature,
            "seed": 0 if self.same else seed,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }


class Prompts:
    """Random prompts of a given number of tokens.

    They are token ids if the server reports its vocabulary size, else English words, whose number is computed from
    the tokens per word that the server's tokenizer was measured to produce.

    Args:
        vocabulary: size of the vocabulary, or None.
        tokens_per_word: tokens per word.
        extra_tokens: tokens that the server adds to each prompt, such as BOS.
    """

    def __init__(self, vocabulary: int | None, seed: int, tokens_per_word: float = 1.0, extra_tokens: float = 0.0):
        self.vocabulary, self.seed = vocabulary, seed
        self.tokens_per_word, self.extra_tokens = tokens_per_word, extra_tokens

    def make(self, load: Load, count: int, level: int) -> list[Any]:
        """Returns `count` prompts that differ from those of other levels, so that the server has none cached."""
        rng = random.Random(f"{self.seed} {level}")
        shared = self._units(rng, load.shared_prefix, first=True)
        num_rest = load.prompt_tokens - load.shared_prefix
        prompts = [shared + self._units(rng, num_rest, not shared) for _ in range(count)]
        if load.same:
            prompts = prompts[:1] * count
        return prompts if self.vocabulary else [" ".join(words) for words in prompts]

    def _units(self, rng: random.Random, tokens: int, first: bool) -> list[Any]:
        """Returns random token ids, or words that have about `tokens` tokens with the server's BOS if `first`."""
        if self.vocabulary:
            return [rng.randrange(3, self.vocabulary) for _ in range(tokens)]
        count = round((tokens - (self.extra_tokens if first else 0)) / self.tokens_per_word)
        return rng.choices(WORDS, k=max(1, count) if tokens else 0)


async def prompts_for(http: httpx.AsyncClient, load: Load, seed: int) -> Prompts:
    """Returns a source of prompts that have a given number of the server's tokens.

    They are token ids if the server reports its vocabulary size, as ktx does; else words, after two texts of different
    length have shown the tokens per word, and those that the server adds to each prompt.

    Raises:
        KtxError: the server refuses, or does not report the number of prompt tokens.
    """
    info = await http.get("/tokenizer_info")
    if info.status_code == 200 and isinstance(size := info.json().get("vocab_size"), int):
        return Prompts(size, seed)
    token_counts = []
    for num_words in CALIBRATION_WORDS:
        text = " ".join(random.Random(num_words).choices(WORDS, k=num_words))
        response = await http.post("/v1/completions", json={"model": load.model, "prompt": text, "max_tokens": 1})
        if response.status_code != 200:
            raise KtxError(f"{http.base_url}: {response.status_code} {error_text(response)}")
        usage = response.json().get("usage") or {}
        if "prompt_tokens" not in usage:
            raise KtxError(
                f"{http.base_url}: reports no usage.prompt_tokens, so prompts of a given length cannot be generated"
            )
        token_counts.append(usage["prompt_tokens"])
    tokens_per_word = (token_counts[1] - token_counts[0]) / (CALIBRATION_WORDS[1] - CALIBRATION_WORDS[0])
    if tokens_per_word <= 0:
        raise KtxError(f"{http.base_url}: reports that {CALIBRATION_WORDS} words have {tuple(token_counts)} tokens")
    return Prompts(None, seed, tokens_per_word, token_counts[0] - CALIBRATION_WORDS[0] * tokens_per_word)


def error_text(response: httpx.Response) -> str:
    """Returns the error message of an unsuccessful response."""
    try:
        return _error_message(response.json())[:300]
    except ValueError:
        return response.text[:300]


async def send_request(http: httpx.AsyncClient, body: dict[str, Any]) -> Timing:
    """Sends one request and reads its stream to the end. A failure is recorded in the timing's `error`."""
    timing = Timing(time.perf_counter())
    try:
        async with http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                timing.error = f"{response.status_code} {error_text(response)}"
            else:
                async for line in response.aiter_lines():
                    timing.read(line, time.perf_counter())
    except (httpx.HTTPError, ValueError) as error:
        timing.error = f"{type(error).__name__}: {error}".removesuffix(": ")
    timing.end = time.perf_counter()
    if not timing.error and not (timing.finished and timing.chunks):
        timing.error = "the stream ended before the answer was complete"
    return timing


async def run_level(http: httpx.AsyncClient, load: Load, prompts: Sequence[Any], concurrency: int) -> list[Timing]:
    """Measures one number of clients: sends a request for each prompt, `concurrency` at a time. Returns all timings."""
    queue, timings = enumerate(prompts), list[Timing]()  # all clients take their next prompt from the queue

    async def client() -> None:
        for index, prompt in queue:
            timings.append(await send_request(http, load.body(prompt, index)))

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return timings
