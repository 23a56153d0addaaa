"""A request and its events. No tensors here."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from ktx.engine.sampler import SampledToken, SamplingParams
from ktx.utils.deprecation import deprecated_members, deprecated_names
from ktx.weights.lora import AdapterUses

if TYPE_CHECKING:
    import torch

Reason = Literal["stop", "length", "cancelled", "error"]


@deprecated_members(choice="token")
@dataclass(frozen=True)
class TokenEvent:
    """An output token and the text that it completes: empty while a character or possible stop string is incomplete."""

    text: str
    token: SampledToken


@deprecated_members(choices="tokens")
@dataclass(frozen=True)
class PromptLogprobs:
    """With `SamplingParams.echo`, before the output: the prompt's tokens, of which the first has no log-probability."""

    tokens: list[SampledToken]


@deprecated_members(prompt_speed="prompt_tokens_per_s", answer_speed="output_tokens_per_s")
@dataclass(frozen=True)
class Usage:
    """Tokens and seconds of one request. `cached` prompt tokens came from the prefix cache."""

    prompt: int
    answer: int
    cached: int
    queued_seconds: float
    first_token_seconds: float
    seconds: float
    preempted: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def prompt_tokens_per_s(self) -> float:
        """Computed prompt tokens per second."""
        seconds = self.first_token_seconds - self.queued_seconds
        return (self.prompt - self.cached) / seconds if seconds > 0 else 0.0

    @property
    def output_tokens_per_s(self) -> float:
        """Output tokens per second after the first."""
        seconds = self.seconds - self.first_token_seconds
        return (self.answer - 1) / seconds if self.answer > 1 and seconds > 0 else 0.0


@deprecated_members(choice="end_token", refused="client_error")
@dataclass(frozen=True)
class Finished:
    """The last event of a request.

    Args:
        reason: why the output ended.
        text: the end of the text, which was held back because it was part of an incomplete character or of a
            possible stop string.
        ids: the output tokens.
        usage: tokens and seconds of the request.
        stop: the stop string or token id that ended the output.
        error: the error message for the reason "error".
        end_token: the token that ended the output, which is not in `ids`.
        client_error: the request's own parameters caused the error.
    """

    reason: Reason
    text: str
    ids: list[int]
    usage: Usage
    stop: str | int | None = None
    error: str = ""
    end_token: SampledToken | None = None
    client_error: bool = False


Event = PromptLogprobs | TokenEvent | Finished


class Constraint(Protocol):
    """The state of a grammar that an output follows, see ktx.engine.grammar.GrammarMatcher."""

    ended: bool

    def mask(self) -> torch.Tensor | None:
        """Returns a mask bool [vocabulary] of the tokens that may follow; None: all tokens."""

    def accept(self, token: int) -> None:
        """Advances by a token of the output."""


@deprecated_members(number="id", computed="num_computed", left="num_uncomputed", answered="num_output")
@dataclass(eq=False)
class Request:
    """One prompt and its state in the engine. `on_event` is called on the engine's thread for each event and must not
    block.

    `ids` are the prompt and the output; the first `num_computed` of them are in the KV cache, on `pages`. `page_hashes`
    are the hashes of its full pages; `draft` holds draft tokens that the next forward verifies.
    """

    prompt: list[int]
    sampling: SamplingParams
    on_event: Callable[[Event], None]
    salt: bytes = b""
    constraint: Constraint | None = None
    lora: AdapterUses = ()  # the LoRA adapters to apply
    id: int = 0  # in the order of arrival
    cancelled: bool = False
    ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    page_hashes: list[bytes] = field(default_factory=list)
    draft: list[int] = field(default_factory=list)
    cached: int | None = None  # prompt tokens from the prefix cache; None before admission
    isolated: bool = False  # a forward with it failed, so it is computed alone
    preempted: int = 0
    drafted: int = 0
    accepted: int = 0
    arrived: float = field(default_factory=time.perf_counter)
    started: float | None = None
    first_token: float | None = None
    # The submitter's context: the engine's thread logs about the request within it.
    context: Context = field(default_factory=copy_context)

    def __post_init__(self) -> None:
        self.ids = list(self.prompt)

    @property
    def num_uncomputed(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return len(self.ids) - self.num_computed

    @property
    def num_output(self) -> int:
        """Output tokens."""
        return len(self.ids) - len(self.prompt)

    def usage(self) -> Usage:
        """Returns the usage up to now; a time that has not come yet counts as now."""
        now = time.perf_counter()
        started, first = self.started or now, self.first_token or now
        return Usage(
            prompt=len(self.prompt),
            answer=self.num_output,
            cached=self.cached or 0,
            queued_seconds=started - self.arrived,
            first_token_seconds=first - self.arrived,
            seconds=now - self.arrived,
            preempted=self.preempted,
            drafted=self.drafted,
            accepted=self.accepted,
        )


__getattr__ = deprecated_names(__name__, Piece="TokenEvent", Prompt="PromptLogprobs")
