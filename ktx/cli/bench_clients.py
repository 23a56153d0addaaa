"""The clients of `ktx bench serve`: they ask /v1/completions for streams, so many at a time, and note when each piece came."""

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

FITTED = (64, 192)  # words of the two prompts that tell how many tokens a word has
WORDS = (
    "the of and to in is that it was for on are as with his they at be this from have or by one had not but what all "
    "were when we there can an your which their said if do will each about how up out them then she many some so these"
).split()


@dataclass
class Timing:
    """One request, in seconds of one clock. `pieces`: when tokens came, and how many. `error` is empty when all went well."""

    start: float
    end: float = 0.0
    pieces: list[tuple[float, int]] = field(default_factory=list)
    prompt: int = 0
    cached: int = 0
    answer: int = 0
    finished: bool = False
    error: str = ""

    def read(self, line: str, now: float) -> None:
        """A line of the stream."""
        if not line.startswith("data: ") or line == "data: [DONE]":
            return
        value = json.loads(line[6:])
        if "error" in value:
            self.error = message_of(value)
            return
        usage, choices = value.get("usage") or {}, value.get("choices") or ()
        told = usage.get("completion_tokens", self.answer + any(choice.get("text") for choice in choices))
        if choices and told > self.answer:
            self.pieces.append((now, told - self.answer))
        self.answer = max(told, self.answer)
        self.finished |= any(choice.get("finish_reason") for choice in choices)
        self.prompt = usage.get("prompt_tokens", self.prompt)
        self.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", self.cached)

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.pieces[0][0] - self.start

    @property
    def gaps(self) -> list[float]:
        """Seconds from token to token; those of a piece with several share the time since the piece before."""
        pairs = zip(self.pieces, self.pieces[1:], strict=False)
        return [(now - before) / count for (before, _), (now, count) in pairs for _ in range(count)]


def message_of(value: Any) -> str:
    """What an error's JSON says."""
    error = value.get("error", value) if isinstance(value, dict) else value
    return str(error.get("message", error) if isinstance(error, dict) else error)


@dataclass
class Load:
    """What every request asks for. `same`: all ask for one prompt with one seed."""

    model: str
    prompt_tokens: int
    answer_tokens: int
    shared_prefix: int = 0
    same: bool = False
    temperature: float = 0.0

    def body(self, prompt: Any, seed: int) -> dict[str, Any]:
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
    """Prompts of a set length: ids where the server tells the size of its vocabulary, else words, as many as have that many tokens there."""

    def __init__(self, vocabulary: int | None, seed: int, tokens_a_word: float = 1.0, before: float = 0.0):
        self.vocabulary, self.seed = vocabulary, seed
        self.tokens_a_word, self.before = tokens_a_word, before

    def make(self, load: Load, count: int, level: int) -> list[Any]:
        """`count` prompts that no other level has, so that none is in the server's cache."""
        source = random.Random(f"{self.seed} {level}")
        shared = self._units(source, load.shared_prefix, first=True)
        rest = load.prompt_tokens - load.shared_prefix
        made = [shared + self._units(source, rest, not shared) for _ in range(count)]
        if load.same:
            made = made[:1] * count
        return made if self.vocabulary else [" ".join(words) for words in made]

    def _units(self, source: random.Random, tokens: int, first: bool) -> list[Any]:
        if self.vocabulary:
            return [source.randrange(3, self.vocabulary) for _ in range(tokens)]
        count = round((tokens - (self.before if first else 0)) / self.tokens_a_word)
        return source.choices(WORDS, k=max(1, count) if tokens else 0)


async def prompts_for(http: httpx.AsyncClient, load: Load, seed: int) -> Prompts:
    """Asks the server how its tokens are to be counted. KtxError when it does not say."""
    told = await http.get("/tokenizer_info")
    if told.status_code == 200 and isinstance(size := told.json().get("vocab_size"), int):
        return Prompts(size, seed)
    counted = []
    for words in FITTED:
        text = " ".join(random.Random(words).choices(WORDS, k=words))
        answer = await http.post("/v1/completions", json={"model": load.model, "prompt": text, "max_tokens": 1})
        if answer.status_code != 200:
            raise KtxError(f"{http.base_url}: {answer.status_code} {text_of(answer)}")
        usage = answer.json().get("usage") or {}
        if "prompt_tokens" not in usage:
            raise KtxError(f"{http.base_url}: tells no usage.prompt_tokens, so that prompts cannot be made of a length")
        counted.append(usage["prompt_tokens"])
    slope = (counted[1] - counted[0]) / (FITTED[1] - FITTED[0])
    if slope <= 0:
        raise KtxError(f"{http.base_url}: says that {FITTED} words have {tuple(counted)} tokens")
    return Prompts(None, seed, slope, counted[0] - FITTED[0] * slope)


def text_of(answer: httpx.Response) -> str:
    """What an answer that is no success says."""
    try:
        return message_of(answer.json())[:300]
    except ValueError:
        return answer.text[:300]


async def ask(http: httpx.AsyncClient, body: dict[str, Any]) -> Timing:
    """One request from its first byte to its last. What goes wrong is in the timing's `error`."""
    timing = Timing(time.perf_counter())
    try:
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                timing.error = f"{answer.status_code} {text_of(answer)}"
            else:
                async for line in answer.aiter_lines():
                    timing.read(line, time.perf_counter())
    except (httpx.HTTPError, ValueError) as error:
        timing.error = f"{type(error).__name__}: {error}".removesuffix(": ")
    timing.end = time.perf_counter()
    if not timing.error and not (timing.finished and timing.pieces):
        timing.error = "the stream ended without an answer"
    return timing


async def run_level(http: httpx.AsyncClient, load: Load, prompts: Sequence[Any], concurrency: int) -> list[Timing]:
    """Asks for all prompts, `concurrency` at a time."""
    left, timings = enumerate(prompts), list[Timing]()

    async def client() -> None:
        for number, prompt in left:
            timings.append(await ask(http, load.body(prompt, number)))

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return timings
