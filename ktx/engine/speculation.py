"""Speculative decoding: a drafter proposes tokens, and one forward verifies them together (Leviathan et al. 2022, arXiv
2211.17192).

A draft token is accepted only if it equals the token that would have been sampled anyway, so outputs do not change,
with sampling neither. On a CPU each further token costs time in a forward, mostly because it needs other experts.
Therefore the cost of a forward is learnt at run time, and only as many tokens are drafted as pay off.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np

from ktx.engine.request import Request
from ktx.engine.scheduler import ScheduledChunk

DRAFTERS = ("mtp", "prompt_lookup")
MAX_DRAFT_TOKENS = 8  # default number of draft tokens of a request in one step
DECAY = 0.98  # weight of a measurement relative to that of one forward later
DEFAULT_MARGINAL_COST = 0.3  # cost of one more token, as a share of a forward, before it is measured
ACCEPTANCE_PRIOR = (1.2, 2.0)  # accepted and verified draft tokens that a request begins with
NGRAM_SIZES = (4, 3, 2)  # tokens that must match, longest first
ID_BYTES = 4  # bytes of a token id


class Drafter(Protocol):
    """Proposes draft tokens."""

    def draft(
        self, results: Sequence[tuple[ScheduledChunk, int]], max_drafts: Mapping[Request, int]
    ) -> dict[Request, list[int]]:
        """Proposes draft tokens.

        Args:
            results: the chunks that were just computed, each with the number of its tokens that stay in the cache.
            max_drafts: the maximum number of draft tokens of each request.
        """

    def close(self) -> None:
        """Detaches from the model."""


class ForwardCostModel:
    """Predicts the seconds of a decode forward: a line fitted to the latest forwards."""

    def __init__(self) -> None:
        # sums over forwards, each with a weight that decays: 1, tokens, tokens squared, seconds, tokens x seconds
        self.weight = self.tokens = self.squares = self.seconds = self.products = 0.0

    def record(self, tokens: int, seconds: float) -> None:
        """Records that a forward with `tokens` tokens took `seconds`."""
        new = (1.0, tokens, tokens * tokens, seconds, tokens * seconds)
        old = (self.weight, self.tokens, self.squares, self.seconds, self.products)
        self.weight, self.tokens, self.squares, self.seconds, self.products = (
            DECAY * previous + value for previous, value in zip(old, new, strict=True)
        )

    def cost(self, tokens: int) -> float:
        """Returns the predicted seconds of a forward with `tokens` tokens, from the mean forward and the cost of a
        further token.
        """
        if not self.weight:  # nothing was measured; only ratios matter
            return 1.0 + DEFAULT_MARGINAL_COST * tokens
        mean_seconds, mean_tokens = self.seconds / self.weight, self.tokens / self.weight
        variance = self.squares / self.weight - mean_tokens * mean_tokens
        # the default's share of the mean forward, until forwards of different sizes give the slope of the line
        seconds_per_token = DEFAULT_MARGINAL_COST * mean_seconds / (1 + DEFAULT_MARGINAL_COST * (mean_tokens - 1))
        if variance > 1e-3:
            seconds_per_token = min(
                mean_seconds / mean_tokens,
                max(0.0, (self.products / self.weight - mean_seconds * mean_tokens) / variance),
            )
        return mean_seconds + seconds_per_token * (tokens - mean_tokens)


def choose_draft_lengths(
    cost_model: ForwardCostModel, acceptance_rates: Sequence[float], max_drafts: Sequence[int]
) -> list[int]:
    """Returns how many tokens to draft for each request, so that the expected tokens per second are maximal.

    Greedy: the draft token with the highest probability of acceptance is added, until one more no longer pays off. The
    n-th draft token of a request is accepted with the probability acceptance rate ** n, because all before it must be.

    Args:
        cost_model: predicts the seconds of a forward.
        acceptance_rates: each request's acceptance rate.
        max_drafts: each request's maximum number of draft tokens.
    """
    counts, expected_tokens, num_tokens = (
        [0] * len(acceptance_rates),
        float(len(acceptance_rates)),
        len(acceptance_rates),
    )
    while True:
        candidates = [i for i in range(len(acceptance_rates)) if counts[i] < max_drafts[i]]
        if not candidates:
            return counts
        best = max(candidates, key=lambda i: acceptance_rates[i] ** (counts[i] + 1))
        new_expected = expected_tokens + acceptance_rates[best] ** (counts[best] + 1)
        # compares the expected tokens per second with and without one more draft token, multiplied by both costs
        if new_expected * cost_model.cost(num_tokens) <= expected_tokens * cost_model.cost(num_tokens + 1):
            return counts
        counts[best], expected_tokens, num_tokens = counts[best] + 1, new_expected, num_tokens + 1


class SpeculativeDecoder:
    """Decides after each forward how many tokens each request drafts, and has the drafter propose them."""

    def __init__(self, drafter: Drafter, max_tokens: int = MAX_DRAFT_TOKENS):
        self.drafter, self.max_tokens, self.cost_model, self.draft_seconds = (
            drafter,
            max_tokens,
            ForwardCostModel(),
            0.0,
        )
        # request -> decayed numbers of accepted and of verified draft tokens
        self.acceptance: WeakKeyDictionary[Request, tuple[float, float]] = WeakKeyDictionary()

    def record_verified(self, request: Request, num_drafted: int, num_accepted: int) -> None:
        """Records that a forward verified `num_drafted` draft tokens, of which the first `num_accepted` were accepted.
        Tokens after the first rejected one are no evidence.
        """
        previous = self.acceptance.get(request, ACCEPTANCE_PRIOR)
        # Old evidence decays towards the prior, so that drafting is tried again after a bad start.
        prior = (ACCEPTANCE_PRIOR[0] * (1 - DECAY), ACCEPTANCE_PRIOR[1] * (1 - DECAY))
        self.acceptance[request] = (
            DECAY * previous[0] + prior[0] + num_accepted,
            DECAY * previous[1] + prior[1] + min(num_drafted, num_accepted + 1),
        )

    def prepare(
        self, results: Sequence[tuple[ScheduledChunk, int]], max_drafts: Mapping[Request, int], seconds: float
    ) -> None:
        """Sets the draft tokens of requests for the next forward.

        Args:
            results: the chunks that were just computed, each with the number of its tokens that stay in the cache.
            max_drafts: the requests that may draft, with the maximum number of draft tokens that each can use.
            seconds: duration of the forward that computed `results`.
        """
        if not any(chunk.num_prompt_tokens for chunk, _ in results):  # the cost is that of decode forwards
            self.cost_model.record(sum(chunk.count for chunk, _ in results), seconds + self.draft_seconds)
        start = time.perf_counter()
        acceptance_rates = [
            accepted / verified
            for accepted, verified in (self.acceptance.get(request, ACCEPTANCE_PRIOR) for request in max_drafts)
        ]
        counts = choose_draft_lengths(
            self.cost_model, acceptance_rates, [min(self.max_tokens, limit) for limit in max_drafts.values()]
        )
        drafts = self.drafter.draft(results, dict(zip(max_drafts, counts, strict=True)))
        for request, draft in drafts.items():
            request.draft = draft
        self.draft_seconds = time.perf_counter() - start


class PromptLookup:
    """Drafts the tokens that followed an earlier occurrence of the last tokens (Saxena 2023, prompt lookup
    decoding).
    """

    def __init__(self) -> None:
        self._texts: WeakKeyDictionary[Request, bytearray] = WeakKeyDictionary()

    def draft(
        self, results: Sequence[tuple[ScheduledChunk, int]], max_drafts: Mapping[Request, int]
    ) -> dict[Request, list[int]]:
        """Returns up to `max_drafts[request]` draft tokens for each request."""
        return {request: self.lookup(request, count) for request, count in max_drafts.items() if count}

    def close(self) -> None:
        """Drops the requests' texts."""
        self._texts.clear()

    def lookup(self, request: Request, max_tokens: int) -> list[int]:
        """Returns the tokens after the latest earlier occurrence of the sequence's last tokens: of as many of them, in
        NGRAM_SIZES, as occur. Searches ids as bytes, because bytearray.rfind is fast.
        """
        text = self._texts.setdefault(request, bytearray())
        text += np.asarray(request.ids[len(text) // ID_BYTES :], dtype="<i4").tobytes()
        for size in NGRAM_SIZES:
            tail = bytes(text[-size * ID_BYTES :])
            offset = text.rfind(tail, 0, len(text) - ID_BYTES) if len(text) > size * ID_BYTES else -1
            while offset % ID_BYTES and offset >= 0:  # the match spans parts of two ids
                offset = text.rfind(tail, 0, offset + len(tail) - 1)
            if offset >= 0:
                first = offset // ID_BYTES + size
                return request.ids[first : first + max_tokens]
        return []
