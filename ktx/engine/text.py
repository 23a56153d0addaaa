"""A session: one conversation's tokens and cache, and the loop that turns a prompt into text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ktx.engine.sampling import Sampling
from ktx.engine.stream import Detokeniser, Router, Text
from ktx.errors import UsageError

FALLBACK_CONTEXT = 1 << 15
PIECE, LONGEST_PIECE = 512, 2048  # tokens of a prompt computed at once


def piece_of(past: int, chunk_size: int | None = None) -> int:
    """How many tokens of a prompt to compute at once after `past` others.

    What a piece does once for its whole past, such as expanding MLA's latent, is shared by its tokens: after a long past
    pieces are longer, up to where their activations would need much memory.
    """
    return chunk_size or min(LONGEST_PIECE, max(PIECE, past // 4))


@dataclass
class Stats:
    """Counts and seconds of one answer."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    prompt_seconds: float = 0.0
    answer_tokens: int = 0
    answer_seconds: float = 0.0
    first_token_seconds: float = 0.0
    context: int = 0
    used: int = 0
    end: str = ""  # "stop", "length", "context" or "cancelled"

    @property
    def prompt_speed(self) -> float:
        """Tokens a second of the part of the prompt that was computed."""
        return (self.prompt_tokens - self.cached_tokens) / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def answer_speed(self) -> float:
        return (self.answer_tokens - 1) / self.answer_seconds if self.answer_tokens > 1 and self.answer_seconds else 0.0


@dataclass(frozen=True)
class Done:
    """The last event of an answer: its token ids (without the stop token) and what it cost."""

    ids: list[int]
    stats: Stats


@dataclass
class Session:
    """A model, a tokenizer and a cache that outlives answers: a prompt that begins like the last one costs only its new part."""

    model: Any
    tokenizer: Any
    max_context: int | None = None
    chunk_size: int | None = None  # None: see piece_of
    cache: Any = None
    ids: list[int] = field(default_factory=list)  # what the cache holds
    cancelled: bool = False

    def __post_init__(self) -> None:
        limit = getattr(self.model.config, "max_position_embeddings", None) or FALLBACK_CONTEXT
        if self.max_context is not None and self.max_context < 8:
            raise UsageError(f"max_context is {self.max_context}, it must be at least 8")
        self.context = min(self.max_context or limit, limit)
        if self.chunk_size is not None and self.chunk_size < 1:
            raise UsageError(f"chunk_size is {self.chunk_size}, it must be at least 1")

    def cancel(self) -> None:
        """Ends the running answer after its present token or chunk."""
        self.cancelled = True

    def stop_ids(self) -> set[int]:
        found: set[int] = set()
        for owner in (getattr(self.model, "generation_config", None), self.model.config, self.tokenizer):
            ids = getattr(owner, "eos_token_id", None)
            found |= set(ids) if isinstance(ids, (list, tuple)) else {ids} if ids is not None else set()
        return found

    def prompt(self, messages: Sequence[dict[str, str]], force_think: bool = False) -> list[int]:
        """Token ids of a conversation that ends where the assistant speaks."""
        if getattr(self.tokenizer, "chat_template", None):
            text = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
            text += "<think>\n" if force_think and not text.rstrip().endswith("<think>") else ""
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        text = "\n".join(message["content"] for message in messages) + ("<think>\n" if force_think else "")
        return list(self.tokenizer(text)["input_ids"])

    def answer(self, ids: Sequence[int], sampling: Sampling, thinking: bool = False) -> Iterator[Text | Done]:
        """Text as it comes, then Done. `thinking` says that the prompt has opened a <think> tag."""
        self.cancelled = False
        stats = Stats(prompt_tokens=len(ids), context=self.context)
        if not ids:
            raise UsageError("the prompt is empty")
        if len(ids) >= self.context:
            raise UsageError(
                f"the prompt has {len(ids)} tokens, the context holds {self.context}: /clear the chat, shorten it, or raise --max_context"
            )
        start = time.perf_counter()
        logits = self._prefill(list(ids), stats)
        stats.prompt_seconds = time.perf_counter() - start
        router, words, source = Router(sampling.stop, thinking), Detokeniser(self.tokenizer), sampling.generator()
        given: list[int] = []
        stops = self.stop_ids()
        while logits is not None and not self.cancelled:
            token = sampling.choose(logits, given, source)
            if not given:
                stats.first_token_seconds, begin = time.perf_counter() - start, time.perf_counter()
            if token in stops:
                stats.end = "stop"
                break
            given.append(token)
            yield from router.feed(words.feed(token))
            stats.answer_seconds = time.perf_counter() - begin
            stats.end = "stop" if router.stopped else "length" if len(given) >= sampling.max_new_tokens else ""
            stats.end = stats.end or ("context" if len(self.ids) + 1 >= self.context else "")
            if stats.end:
                break
            logits = self._forward([token])
        stats.end = stats.end or "cancelled"
        yield from router.feed(words.rest())
        yield from router.finish()
        stats.answer_tokens, stats.used = len(given), len(self.ids)
        yield Done(given, stats)

    def _prefill(self, ids: list[int], stats: Stats) -> torch.Tensor | None:
        """Logits after the prompt; None when cancelled. Only what the cache does not hold yet is computed."""
        stats.cached_tokens = self._reuse(ids)
        logits = None
        at = stats.cached_tokens
        while at < len(ids):
            if self.cancelled:
                return None
            piece = piece_of(at, self.chunk_size)
            logits = self._forward(ids[at : at + piece])
            at += piece
        return logits

    def _reuse(self, ids: list[int]) -> int:
        """Cuts the cache back to the longest common beginning, leaving at least one token to compute."""
        same = next(
            (i for i, (a, b) in enumerate(zip(self.ids, ids, strict=False)) if a != b), min(len(self.ids), len(ids))
        )
        same = min(same, len(ids) - 1)
        if self.cache is not None and same < len(self.ids):
            if getattr(self.cache, "can_crop", False):
                self.cache.truncate(same)
            else:
                self.cache = None
        if self.cache is None:
            same, self.cache = 0, self._new_cache()
        self.ids = self.ids[:same]
        return same

    def _new_cache(self) -> Any:
        from ktx.cache.kv import KVCache

        handle = getattr(self.model, "ktx", None)  # a plain transformers model wants its own type
        return KVCache(self.model.config, None if handle is None else handle.kv_dtype)

    @torch.inference_mode()
    def _forward(self, ids: list[int]) -> torch.Tensor:
        before = len(self.ids)
        positions = torch.arange(before, before + len(ids))[None]
        out = self.model(
            input_ids=torch.tensor([ids]),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.ids += ids
        return out.logits[0, -1].float()

    def forget(self) -> None:
        """Drops the conversation's cache."""
        self.cache, self.ids = None, []
