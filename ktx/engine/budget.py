"""How many tokens of prompts a step computes: by memory where nobody waits for the next token of an answer, else by time. No tensors here."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from ktx.cache.page_pool import PAGE_TOKENS

log = logging.getLogger("ktx.engine")
# More than 2048 tokens bring little, as experts take no more at once, and whoever comes meanwhile waits for them all. After a long past
# they do bring something: what a step does once for its whole past, such as expanding MLA's latent, is shared by its tokens.
STEP, LONGEST, DEEP = 2048, 8192, 4
SMALLEST = 256  # a step is no smaller for want of memory
SHARE = 0.25  # of the free memory is for a step's activations, where nobody says how large it is to be
ITL = 500  # milliseconds
GROWTH = 2.0  # from one step to the next, at most: a step that was quick for a reason of its own says little about larger ones


def longest_step(context: int) -> int:
    """Tokens of the largest step that a request of `context` tokens takes where memory suffices."""
    return max(STEP, min(LONGEST, context // DEEP))


@dataclass(frozen=True)
class StepTiming:
    """The latest step of a kind: its tokens of prompts, and seconds of its forward."""

    tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


class StepBudget:
    """Tokens of prompts in a step: `step`, after a long past up to `longest`; beside answers as many as take `seconds`, at least `least`.

    How many those are is learnt from steps beside answers. A step's seconds grow less than its tokens, as weights are read once, so as many as
    the latest step's rate makes of `seconds` are never too many; what they bring nearer to `seconds` is found by a few steps.
    """

    def __init__(self, step: int = STEP, longest: int = LONGEST, seconds: float = ITL / 1000, least: int = PAGE_TOKENS):
        self.step, self.longest, self.seconds, self.least = step, longest, seconds, least
        self.fitting = float(least)
        self.latest: dict[bool, StepTiming] = {}  # by whether answers went on beside
        self.warned = False

    def tokens(self, past: int = 0, answers: bool = False) -> int:
        """Of a step whose oldest prompt has `past` tokens behind it, with answers in it or not."""
        whole = max(self.step, min(self.longest, past // DEEP))
        return min(whole, max(self.least, int(self.fitting) // PAGE_TOKENS * PAGE_TOKENS)) if answers else whole

    def took(self, tokens: int, answers: bool, seconds: float) -> None:
        """A step with `tokens` of prompts took so long."""
        if not tokens or seconds <= 0:
            return
        self.latest[answers] = StepTiming(tokens, seconds)
        if not answers:
            return
        fitting = tokens * self.seconds / seconds
        if seconds > self.seconds or 2 * tokens >= self.tokens(
            self.longest * DEEP, True
        ):  # the quick end of a prompt says little
            self.fitting = max(float(self.least), min(fitting, GROWTH * max(self.fitting, tokens), float(self.longest)))
        if seconds > self.seconds and self.least <= tokens < 2 * self.least and not self.warned:
            self.warned = True
            log.warning(
                "%d tokens of a prompt beside answers take %.1f s, more than the %.1f s of --max-itl-ms: that many are computed at once all the same, raise it for faster prompts",
                tokens,
                seconds,
                self.seconds,
            )
