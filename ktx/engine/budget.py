"""Limits the prompt tokens of a step: as many as memory allows while no request decodes, otherwise as many as fit into
the inter-token latency target. No tensors here.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from ktx.cache.page_pool import PAGE_TOKENS

log = logging.getLogger("ktx.engine")
# More than 2048 tokens gain little, because experts compute at most that many at once, and a request that arrives
# meanwhile waits for the whole step. With a long past they do gain, because work that a step does once for its whole
# past, such as expanding MLA's latent, is shared by its tokens.
STEP_TOKENS, MAX_STEP_TOKENS = 2048, 8192
# A step may have a quarter as many prompt tokens as its request has computed tokens, where that is more than
# STEP_TOKENS: from a past of 8192 tokens on.
PAST_DIVISOR = 4
MIN_STEP_TOKENS = 256  # lack of memory makes a step no smaller than this
# share of the free memory that a step's activations may take, where no step size is configured
ACTIVATION_MEMORY_SHARE = 0.25
MAX_ITL_MS = 500  # default target of the inter-token latency
# largest factor between the estimates of two steps, because a step that was quick for a reason of its own says little
# about larger ones
MAX_GROWTH = 2.0


def max_step_tokens(context: int) -> int:
    """Returns the number of tokens in the largest step of a request with `context` tokens, where memory suffices."""
    return max(STEP_TOKENS, min(MAX_STEP_TOKENS, context // PAST_DIVISOR))


@dataclass(frozen=True)
class StepTiming:
    """The latest step of one kind: its number of prompt tokens and the seconds of its forward."""

    tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        """Prompt tokens per second."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


class StepBudget:
    """Limits the prompt tokens of a step: `base_tokens`, after a long past up to `max_tokens`; while requests decode,
    as many as fit into `target_s`, at least `min_tokens`.

    The number that fits is learnt from steps that also decode. A step's time grows more slowly than its number of
    tokens, because weights are read once. Therefore the number that the latest step's rate yields for `target_s` is
    never too large, and the duration of the steps approaches `target_s` within a few steps.

    Args:
        base_tokens: prompt tokens of a step without decode tokens.
        max_tokens: upper bound of a step after a long past.
        target_s: target duration in seconds of a step that also decodes.
        min_tokens: lower bound of a step that also decodes.
    """

    def __init__(
        self,
        base_tokens: int = STEP_TOKENS,
        max_tokens: int = MAX_STEP_TOKENS,
        target_s: float = MAX_ITL_MS / 1000,
        min_tokens: int = PAGE_TOKENS,
    ):
        self.base_tokens, self.max_tokens, self.target_s, self.min_tokens = (
            base_tokens,  # of a step without decode tokens after a short past
            max_tokens,  # of one after a long past
            target_s,  # duration of a step that also decodes
            min_tokens,  # lower bound of a step that also decodes
        )
        self.fitting_tokens = float(min_tokens)  # estimate of the prompt tokens that take `target_s`
        self.latest: dict[bool, StepTiming] = {}  # by whether the step also decoded
        self.warned = False  # whether the log has the warning about steps that are too slow

    def max_prompt_tokens(self, past: int = 0, decoding: bool = False) -> int:
        """Returns the maximum number of prompt tokens for the next step: more after a long past, because all tokens of
        a step share its work on the past; while requests decode, no more than fit into the latency target.

        Args:
            past: computed tokens of the oldest prompt in the step.
            decoding: whether the step also has decode tokens, so that the latency target applies.
        """
        limit = max(self.base_tokens, min(self.max_tokens, past // PAST_DIVISOR))
        return (
            min(limit, max(self.min_tokens, int(self.fitting_tokens) // PAGE_TOKENS * PAGE_TOKENS))
            if decoding
            else limit
        )

    def record(self, prompt_tokens: int, decoding: bool, seconds: float) -> None:
        """Updates the estimate of how many prompt tokens fit into `target_s` after a step.

        Args:
            prompt_tokens: prompt tokens of the step.
            decoding: whether the step also had decode tokens; only such steps change the estimate.
            seconds: duration of the step's forward.
        """
        if not prompt_tokens or seconds <= 0:
            return
        self.latest[decoding] = StepTiming(prompt_tokens, seconds)
        if not decoding:
            return
        fitting_tokens = prompt_tokens * self.target_s / seconds
        # A quick step with less than half of the allowed tokens, such as the end of a prompt, is no evidence that more
        # tokens fit. The past that is passed is one for which only the latency target limits the step.
        if seconds > self.target_s or 2 * prompt_tokens >= self.max_prompt_tokens(
            past=self.max_tokens * PAST_DIVISOR, decoding=True
        ):
            self.fitting_tokens = max(
                float(self.min_tokens),
                min(fitting_tokens, MAX_GROWTH * max(self.fitting_tokens, prompt_tokens), float(self.max_tokens)),
            )
        # Even a step of about the minimum size is too slow: only a higher target helps.
        if seconds > self.target_s and self.min_tokens <= prompt_tokens < 2 * self.min_tokens and not self.warned:
            self.warned = True
            log.warning(
                "a step with %d prompt tokens and decode tokens takes %.1f s, more than the %.1f s of --max-itl-ms; "
                "steps get no smaller, so it is computed all the same: raise --max-itl-ms for faster prompts",
                prompt_tokens,
                seconds,
                self.target_s,
            )
