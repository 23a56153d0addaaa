"""Speculative decoding: tokens are guessed, and one forward checks them together (Leviathan et al. 2022, arXiv 2211.17192).

A guess counts only where it is the token that would have been chosen anyway, so answers do not change, drawn ones neither. On a CPU
each token more in a forward costs time, of other experts above all. So a forward's cost is learnt while it runs, and as
many tokens are guessed as pay.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np

from ktx.engine.request import Request
from ktx.engine.scheduler import ScheduledChunk

KINDS = ("mtp", "prompt_lookup")
MAX_DRAFT_TOKENS = 8  # tokens guessed at once
DECAY = 0.98  # weight of what was learnt a forward ago
DEFAULT_MARGINAL_COST = 0.3  # share of a forward that a token more costs, until it is known
ACCEPTANCE_PRIOR = (1.2, 2.0)  # hits and tries that an answer begins with
NGRAM_SIZES = (4, 3, 2)  # tokens that have to be the same, longest first
WORD = 4  # bytes of an id


class Drafter(Protocol):
    def draft(
        self, done: Sequence[tuple[ScheduledChunk, int]], most: Mapping[Request, int]
    ) -> dict[Request, list[int]]:
        """Guesses, `most` tokens at most. `done`: what was just computed, and how many of its tokens stay."""

    def close(self) -> None:
        """Lets go of the model."""


class ForwardCostModel:
    """Seconds of a forward of answers' tokens, a line fitted to the latest ones."""

    def __init__(self) -> None:
        self.weight = self.tokens = self.squares = self.seconds = self.products = 0.0

    def took(self, tokens: int, seconds: float) -> None:
        new = (1.0, tokens, tokens * tokens, seconds, tokens * seconds)
        old = (self.weight, self.tokens, self.squares, self.seconds, self.products)
        self.weight, self.tokens, self.squares, self.seconds, self.products = (
            DECAY * before + now for before, now in zip(old, new, strict=True)
        )

    def cost(self, tokens: int) -> float:
        """Seconds of a forward, by what one of as many tokens as usual takes."""
        if not self.weight:
            return 1.0 + DEFAULT_MARGINAL_COST * tokens
        mean, middle = self.seconds / self.weight, self.tokens / self.weight
        spread = self.squares / self.weight - middle * middle
        each = DEFAULT_MARGINAL_COST * mean / (1 + DEFAULT_MARGINAL_COST * (middle - 1))
        if spread > 1e-3:
            each = min(mean / middle, max(0.0, (self.products / self.weight - mean * middle) / spread))
        return mean + each * (tokens - middle)


def choose_draft_lengths(pace: ForwardCostModel, rates: Sequence[float], most: Sequence[int]) -> list[int]:
    """How many tokens to guess for each answer, so that the tokens a second are the most; `rates`: how often a guess is right."""
    counts, gain, tokens = [0] * len(rates), float(len(rates)), len(rates)
    while True:
        open_ones = [i for i in range(len(rates)) if counts[i] < most[i]]
        if not open_ones:
            return counts
        best = max(open_ones, key=lambda i: rates[i] ** (counts[i] + 1))
        more = gain + rates[best] ** (counts[best] + 1)
        if more * pace.cost(tokens) <= gain * pace.cost(tokens + 1):
            return counts
        counts[best], gain, tokens = counts[best] + 1, more, tokens + 1


class SpeculativeDecoder:
    """After each forward: guesses for the next one."""

    def __init__(self, drafter: Drafter, most: int = MAX_DRAFT_TOKENS):
        self.drafter, self.most, self.pace, self.spent = drafter, most, ForwardCostModel(), 0.0
        self.record: WeakKeyDictionary[Request, tuple[float, float]] = WeakKeyDictionary()

    def checked(self, request: Request, tried: int, hits: int) -> None:
        """A forward has looked at `tried` guesses, of which the first `hits` were right; those behind the first wrong one say nothing."""
        before = self.record.get(request, ACCEPTANCE_PRIOR)
        own = (
            ACCEPTANCE_PRIOR[0] * (1 - DECAY),
            ACCEPTANCE_PRIOR[1] * (1 - DECAY),
        )  # what is long ago is forgotten, so that a bad start is tried again
        self.record[request] = (DECAY * before[0] + own[0] + hits, DECAY * before[1] + own[1] + min(tried, hits + 1))

    def prepare(self, done: Sequence[tuple[ScheduledChunk, int]], room: Mapping[Request, int], seconds: float) -> None:
        """Sets the drafts of those in `room`, who can use as many tokens as it says. `seconds` is what computing all of `done` took."""
        if not any(part.prompt for part, _ in done):
            self.pace.took(sum(part.count for part, _ in done), seconds + self.spent)
        start = time.perf_counter()
        rates = [hits / tried for hits, tried in (self.record.get(request, ACCEPTANCE_PRIOR) for request in room)]
        counts = choose_draft_lengths(self.pace, rates, [min(self.most, most) for most in room.values()])
        drafts = self.drafter.draft(done, dict(zip(room, counts, strict=True)))
        for request, draft in drafts.items():
            request.draft = draft
        self.spent = time.perf_counter() - start


class PromptLookup:
    """What followed the last tokens where they stood before (Saxena 2023, prompt lookup decoding)."""

    def __init__(self) -> None:
        self.texts: WeakKeyDictionary[Request, bytearray] = WeakKeyDictionary()

    def draft(
        self, done: Sequence[tuple[ScheduledChunk, int]], most: Mapping[Request, int]
    ) -> dict[Request, list[int]]:
        return {request: self.found(request, count) for request, count in most.items() if count}

    def close(self) -> None:
        self.texts.clear()

    def found(self, request: Request, most: int) -> list[int]:
        """The latest place counts, of the longest run of tokens that has one."""
        text = self.texts.setdefault(request, bytearray())
        text += np.asarray(request.ids[len(text) // WORD :], dtype="<i4").tobytes()
        for size in NGRAM_SIZES:
            tail = bytes(text[-size * WORD :])
            at = text.rfind(tail, 0, len(text) - WORD) if len(text) > size * WORD else -1
            while at % WORD and at >= 0:  # bytes of two ids
                at = text.rfind(tail, 0, at + len(tail) - 1)
            if at >= 0:
                first = at // WORD + size
                return request.ids[first : first + most]
        return []
