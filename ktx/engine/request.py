"""A request, and what its sender hears of it. No tensors here."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Any, Literal

from ktx.engine.sampler import SampledToken, SamplingParams
from ktx.ops.lora import Uses

Reason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class TokenEvent:
    """A token of the answer and the text it completes: empty while a character or a possible stop string is unfinished."""

    text: str
    choice: SampledToken


@dataclass(frozen=True)
class PromptLogprobs:
    """With `Sampling.echo`, before the answer: the prompt's tokens, of which the first has no log-probability."""

    choices: list[SampledToken]


@dataclass(frozen=True)
class Usage:
    """Tokens and seconds of one answer. `cached` tokens of the prompt did not have to be computed."""

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
    def prompt_speed(self) -> float:
        """Tokens a second of the part of the prompt that was computed."""
        seconds = self.first_token_seconds - self.queued_seconds
        return (self.prompt - self.cached) / seconds if seconds > 0 else 0.0

    @property
    def answer_speed(self) -> float:
        seconds = self.seconds - self.first_token_seconds
        return (self.answer - 1) / seconds if self.answer > 1 and seconds > 0 else 0.0


@dataclass(frozen=True)
class Finished:
    """The last event. `text` is what was held back, `stop` the stop string or token id that ended the answer, `choice` that token,
    which is no part of it. `refused`: the error is what the request asked for.
    """

    reason: Reason
    text: str
    ids: list[int]
    usage: Usage
    stop: str | int | None = None
    error: str = ""
    choice: SampledToken | None = None
    client_error: bool = False


Event = PromptLogprobs | TokenEvent | Finished


@dataclass(eq=False)
class Request:
    """One prompt on its way. `sink` is called on the engine's thread for each event and must not block.

    `ids` are the prompt and what was answered, `computed` of them are in the cache, on `pages`; `keys` are those of its full pages.
    """

    prompt: list[int]
    sampling: SamplingParams
    on_event: Callable[[Event], None]
    salt: bytes = b""
    constraint: Any = None  # a grammar's state, see ktx.engine.grammar
    lora: Uses = ()  # the LoRA adapters that it is computed with
    id: int = 0  # by arrival
    cancelled: bool = False
    ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    page_hashes: list[bytes] = field(default_factory=list)
    draft: list[int] = field(default_factory=list)
    cached: int | None = None  # None until it was first computed
    isolated: bool = False  # a forward with it failed: it is tried without others
    preempted: int = 0
    drafted: int = 0
    accepted: int = 0
    arrived: float = field(default_factory=time.perf_counter)
    started: float | None = None
    first_token: float | None = None
    context: Context = field(
        default_factory=copy_context
    )  # of whoever asked: what the engine's thread says of it is said there

    def __post_init__(self) -> None:
        self.ids = list(self.prompt)

    @property
    def num_uncomputed(self) -> int:
        """Tokens that have to be computed before the next one can be chosen."""
        return len(self.ids) - self.num_computed

    @property
    def num_output(self) -> int:
        return len(self.ids) - len(self.prompt)

    def usage(self) -> Usage:
        now = time.perf_counter()
        started, first = self.started or now, self.first_token or now
        return Usage(
            len(self.prompt),
            self.num_output,
            self.cached or 0,
            started - self.arrived,
            first - self.arrived,
            now - self.arrived,
            self.preempted,
            self.drafted,
            self.accepted,
        )
